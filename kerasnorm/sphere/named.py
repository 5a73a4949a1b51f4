"""Optimizers by their usual names: on spheres, or with steps along them."""

from __future__ import annotations

from typing import Any

import keras

from kerasnorm.sphere.optimizers import OnSphere


@keras.saving.register_keras_serializable("kerasnorm")
class SphereSGD(OnSphere):
    """`OnSphere(keras.optimizers.SGD(...), model)`.

    Args:
        model: the built model to train.
        learning_rate: a number, schedule or callable. Default 0.01.
        momentum, nesterov: of SGD. Default 0 and False.
        spheres, step, max_angle, effective, name: see `OnSphere`.
        **kwargs: of `keras.optimizers.SGD`: `weight_decay`, `clipnorm`, ...
    """

    def __init__(
        self,
        model: Any,
        learning_rate: Any = 0.01,
        momentum: float = 0.0,
        nesterov: bool = False,
        *,
        spheres: str = "unit",
        step: str = "retract",
        max_angle: float | None = None,
        effective: bool = False,
        name: str | None = None,
        **kwargs: Any,
    ):
        inner = keras.optimizers.SGD(learning_rate, momentum, nesterov, **kwargs)
        options = {"step": step, "max_angle": max_angle, "effective": effective}
        super().__init__(inner, model, spheres=spheres, name=name, **options)


@keras.saving.register_keras_serializable("kerasnorm")
class SphereAdam(OnSphere):
    """`OnSphere(keras.optimizers.Adam(...), model)`.

    Args:
        model: the built model to train.
        learning_rate: a number, schedule or callable. Default 0.001.
        beta_1, beta_2: of Adam. Default 0.9 and 0.999.
        spheres, step, max_angle, effective, name: see `OnSphere`.
        **kwargs: of `keras.optimizers.Adam`: `epsilon`, `amsgrad`, `weight_decay`, ...
    """

    def __init__(
        self,
        model: Any,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        *,
        spheres: str = "unit",
        step: str = "retract",
        max_angle: float | None = None,
        effective: bool = False,
        name: str | None = None,
        **kwargs: Any,
    ):
        inner = keras.optimizers.Adam(learning_rate, beta_1, beta_2, **kwargs)
        options = {"step": step, "max_angle": max_angle, "effective": effective}
        super().__init__(inner, model, spheres=spheres, name=name, **options)


class _Projected(OnSphere):
    """Takes the part along the weight out of each step, and lets the length be."""

    returns = False

    def __init__(self, inner: Any, model: Any, decay_ratio: float, **options: Any):
        super().__init__(inner, model, **options)
        self.decay_ratio = decay_ratio

    def get_config(self) -> dict[str, Any]:
        """See `OnSphere`."""
        return {**super().get_config(), "decay_ratio": self.decay_ratio}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """See `OnSphere`."""
        config = dict(config)
        ratio = config.pop("decay_ratio")
        made = super().from_config(config, custom_objects)
        made.decay_ratio = ratio
        return made


@keras.saving.register_keras_serializable("kerasnorm")
class SGDP(_Projected):
    """SGD whose steps on scale-invariant weights have no part along the weight.

        u <- u - w <w, u> / |w|**2,     w <- w + u

    Momentum then makes the length grow no faster than the steps' own squares. Which
    weights are scale invariant, and per what, is proved on the model's graph; the paper
    guesses it at every step from the cosine of weight and gradient.

    Paper: Heo et al., 2021, https://arxiv.org/abs/2006.08217

    Args:
        model: the built model to train.
        learning_rate: default 0.1.
        momentum, nesterov: default 0.9 and False.
        weight_decay: of all variables; a `decay_ratio` of it, on the weights whose
            steps are projected. Divide by 1 - momentum to match the paper's code.
        decay_ratio: default 0.1.
        max_angle: see `OnSphere`.
        name: name of the optimizer.
        **kwargs: of `keras.optimizers.SGD`.
    """

    def __init__(
        self,
        model: Any,
        learning_rate: Any = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float | None = None,
        decay_ratio: float = 0.1,
        *,
        max_angle: float | None = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        inner = keras.optimizers.SGD(
            learning_rate, momentum, nesterov, weight_decay, **kwargs
        )
        super().__init__(inner, model, decay_ratio, max_angle=max_angle, name=name)


@keras.saving.register_keras_serializable("kerasnorm")
class AdamP(_Projected):
    """Adam whose steps on scale-invariant weights have no part along the weight.

    See `SGDP`.

    Paper: Heo et al., 2021, https://arxiv.org/abs/2006.08217

    Args:
        model: the built model to train.
        learning_rate: default 0.001.
        beta_1, beta_2: default 0.9 and 0.999.
        weight_decay, decay_ratio, max_angle, name: see `SGDP`.
        **kwargs: of `keras.optimizers.Adam`.
    """

    def __init__(
        self,
        model: Any,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        weight_decay: float | None = None,
        decay_ratio: float = 0.1,
        *,
        max_angle: float | None = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        inner = keras.optimizers.Adam(
            learning_rate, beta_1, beta_2, weight_decay=weight_decay, **kwargs
        )
        super().__init__(inner, model, decay_ratio, max_angle=max_angle, name=name)
