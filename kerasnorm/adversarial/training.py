"""Training on adversarial examples, as a `train_step` that `fit` uses as any other."""

from __future__ import annotations

from typing import Any, Literal

import keras
from keras import ops

from kerasnorm.adversarial.attack import log_odds
from kerasnorm.adversarial.ball import Ball, canonical, flat, per_row
from kerasnorm.adversarial.reading import read_pair, read_radii
from kerasnorm.adversarial.victim import Outputs, Victim
from kerasnorm.common.errors import KerasNormError, taking
from kerasnorm.runtime import programs
from kerasnorm.runtime.models import opened
from rewriters.arguments import Count, Positive, Seed


@taking()
def adversarial_training(
    model: Any,
    norm: Any = "linf",
    eps: Any = 8 / 255,
    *,
    method: Literal["pgd", "free"] = "pgd",
    steps: Count = 7,
    length: Positive = 0.25,
    replays: Count = 4,
    bounds: Any = (0.0, 1.0),
    outputs: Outputs = "auto",
    seed: Seed | None = None,
    name: str | None = None,
) -> AdversarialTraining:
    """A model that trains `model` on adversarial examples of each batch.

    It shares the weights of `model`, which is what is used afterwards.

    ```python
    trainer = adversarial_training(model, norm="linf", eps=8 / 255, steps=7)
    trainer.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    trainer.fit(x, y, epochs=20)
    model.predict(x)
    ```

    Args:
        model: a built Keras model of one input, `(rows, ...) -> (rows, classes)`.
        norm: `"linf"`, `"l2"` or `"l1"`.
        eps: radius of the ball, in the units of the input.
        method, steps, length, replays, bounds, outputs, seed: as for
            `AdversarialTraining`.
        name: of the model that trains.

    Raises:
        KerasNormError: a setting that makes no sense; a model of several inputs, or
            whose outputs are not classes.
    """
    named = {} if name is None else {"name": name}
    return AdversarialTraining(
        opened(model, kind=keras.Model),
        norm=norm,
        eps=eps,
        method=method,
        steps=steps,
        length=length,
        replays=replays,
        bounds=bounds,
        outputs=outputs,
        seed=seed,
        **named,
    )


@keras.saving.register_keras_serializable("kerasnorm")
class AdversarialTraining(keras.Model):
    """Trains the model inside it on adversarial examples; calls it otherwise.

    Args:
        model: as for `adversarial_training`.
        norm, eps: of the ball.
        method: `"pgd"`, a few steps of projected gradient descent per batch, on the
            model in inference mode (Madry et al. 2018,
            https://arxiv.org/abs/1706.06083), each as dear as a training step; or
            `"free"`, every batch used several times in a row, where each pass serves
            the weights and the perturbation at once (Shafahi et al. 2019,
            https://arxiv.org/abs/1904.12843). Its perturbations start anew from each
            batch.
        steps: of `"pgd"`.
        length: of its steps, as a share of eps.
        replays: of `"free"`; train for fewer epochs by this factor.
        bounds: lowest and highest value of an input; one beyond them is moved towards
            them or not at all.
        outputs: of the model: `"logits"`, `"probabilities"` or `"auto"`.
        seed: of the random starts.
    """

    @taking()
    def __init__(
        self,
        model: Any,
        *,
        norm: Any = "linf",
        eps: Any = 8 / 255,
        method: Literal["pgd", "free"] = "pgd",
        steps: Count = 7,
        length: Positive = 0.25,
        replays: Count = 4,
        bounds: Any = (0.0, 1.0),
        outputs: Outputs = "auto",
        seed: Seed | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        radius, *more = read_radii(eps)
        if more or radius == float("inf"):
            raise KerasNormError(
                "eps is no radius",
                got=repr(eps),
                expected="one finite number of at least 0",
            )
        read_pair(bounds, (1,))
        self.model, self.method, self.outputs_are = model, method, outputs
        self.norm, self.eps = canonical(norm), radius
        self.bounds = (float(bounds[0]), float(bounds[1]))
        self.steps, self.replays = int(steps), int(replays)
        self.length, self.seed = float(length), seed
        self.generator = keras.random.SeedGenerator(seed)
        self.victim = Victim(model, outputs=outputs)
        self.victim.assume()
        self.built = True

    def call(self, x: Any, training: bool | None = None) -> Any:
        return self.model(x, training=training)

    def get_build_config(self) -> dict[str, Any] | None:
        shape = getattr(self.model, "input_shape", None)
        return {"input_shape": shape} if shape else self.model.get_build_config()

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Nothing is left to do: the model inside is there, and built."""

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.model.compute_output_shape(input_shape)

    def train_step(self, *args: Any) -> Any:
        """One batch; the arguments are those of the backend, the data last."""
        *state, data = args
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        if y is None:
            raise KerasNormError("adversarial training needs labels", got="x alone")
        if isinstance(x, (list, tuple, dict)):
            raise KerasNormError(
                "adversarial training moves one input", got=f"a {type(x).__name__}"
            )
        x = ops.convert_to_tensor(x, "float32")
        if self.method == "pgd":
            moved, state = programs.in_training(self, state, lambda: self.perturb(x, y))
            return super().train_step(*state, (moved, y, weight))
        ball, bounds = Ball(self.norm, self.eps), self._around(x)
        length = ops.full((ops.shape(x)[0],), self.eps)
        moved, state = programs.in_training(
            self, state, lambda: ball.start(x, bounds, self.generator)
        )
        logs: Any = {}
        for _ in range(self.replays):
            logs, state, g = programs.train_step(self, state, moved, y, weight)
            further = moved + ball.steepest(moved, g, length, bounds)
            further = ops.stop_gradient(ball.project(x, further, bounds))
            # Gradients of a scaled loss overflow now and then.
            finite = ops.all(ops.isfinite(flat(g)), axis=1)
            moved = ops.where(per_row(finite, x), further, moved)
        return (logs, *state) if state else logs

    def perturb(self, x: Any, y: Any) -> Any:
        """Adversarial examples of a batch, from a random start.

        Args:
            x: `(rows, ...)`.
            y: classes, integers or one-hot.
        """
        classes = self.victim.classes
        (y,) = keras.tree.flatten(y)  # as of a model whose output stands in a dict
        y = ops.convert_to_tensor(y)
        if len(y.shape) == 2 and y.shape[-1] == classes:
            y = ops.argmax(y, axis=-1)
        y = ops.cast(ops.reshape(y, (-1,)), "int32")
        ball, bounds = Ball(self.norm, self.eps), self._around(x)
        length = ops.full((ops.shape(x)[0],), self.length * self.eps)
        moved = ball.start(x, bounds, self.generator)

        def losses(x):
            z = self.victim.logits(x, ())
            return log_odds(z, y), z

        for _ in range(self.steps):
            _, _, g = programs.value_and_gradient(losses, moved)
            moved = moved + ball.steepest(moved, g, length, bounds)
            moved = ops.stop_gradient(ball.project(x, moved, bounds))
        return moved

    def _around(self, x: Any) -> tuple[Any, Any]:
        """Bounds that hold `x` too: clipped, it could move further than eps."""
        low, high = self.bounds
        return ops.minimum(x, low), ops.maximum(x, high)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "model": keras.saving.serialize_keras_object(self.model),
            "norm": self.norm,
            "eps": self.eps,
            "method": self.method,
            "steps": self.steps,
            "length": self.length,
            "replays": self.replays,
            "bounds": list(self.bounds),
            "outputs": self.outputs_are,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        model = keras.saving.deserialize_keras_object(
            config["model"], custom_objects=custom_objects
        )
        return cls(**{**config, "model": model})
