"""The properties of a model while it trains."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from kerasnorm.callbacks._steps import Steps
from kerasnorm.common.errors import KerasNormError, taking
from kerasnorm.numerics import replicas
from kerasnorm.properties.measure import Measurer, checked
from kerasnorm.properties.measurement import Measurement, Site
from rewriters import private
from rewriters.arguments import Count, Positive, Seed


class PropertyMonitor(keras.callbacks.Callback):
    """Measures the model on a fixed batch at chosen steps, layer by layer.

    Logged at the end of every epoch, so that they stand in `history` and in every
    logger behind this callback: `variance_growth` and `gradient_growth` (factors a
    layer), `cosine`, `stable_rank`, `effective_rank` (at the last layer), `dead` (the
    largest share behind the first layer), `gradient_norm`, `weight_norm` (of all
    kernels together), `effective_learning_rate`, `relative_step` (the median and the
    largest over layers), `statistics_distance` (the largest) and `dependence`. With
    `layers`, also `gradient/<path>` and the like for each layer. See
    `kerasnorm.properties.measure` for what they are.

    Nothing of the training is changed: no weight, no moving statistic, no state of a
    random generator.

    Cost: a measurement takes about three forward-and-backward passes of its batch run
    step by step, or six as `fit` compiles them: every hundred steps of the same batch
    size, some percent of the time of training. `seconds` and `share` have what it took,
    and `verbose=1` says so at the end.

    ```python
    monitor = PropertyMonitor(x[:64], y[:64], every_steps=100, log_dir="logs")
    model.fit(x, y, callbacks=[monitor])
    monitor.history[-1][1].plot("properties.png")
    ```

    Args:
        x, y: inputs and labels, see `kerasnorm.properties.measure`; at most `samples`
            are used.
        every: epochs between two measurements; in the others the last values are
            logged again. None for none at the end of epochs.
        every_steps: also measure after this many training steps, counted over all
            epochs; where several run at a time (`steps_per_execution`), after those in
            which the number is reached.
        layers: properties to log for each layer as well, `("gradient",)`; TensorBoard
            gets all of them anyway.
        log_dir: where to write TensorBoard's summaries, by step; none are written
            where it is None. Needs TensorFlow.
        samples: at most this many, evenly spaced; the first of a source of batches,
            which is read once.
        prefix: of the logged names.
        verbose: 1 prints the cost when training ends.
        batch_size, loss, loss_weights, learning_rate, training, memory, seed: as for
            `measure`.

    Attributes:
        history: `(step, Measurement)` pairs, in order.
        seconds: all time spent on measurements; `share` of the time of training.

    Raises:
        KerasNormError: a setting that makes no sense; when training starts, data that
            does not fit the model.
    """

    @taking()
    def __init__(
        self,
        x: Any,
        y: Any = None,
        *,
        every: Count | None = 1,
        every_steps: Count | None = None,
        layers: Sequence[str] = (),
        log_dir: str | os.PathLike[str] | None = None,
        samples: Count = 64,
        prefix: str = "",
        verbose: bool | int = 0,
        batch_size: Count = 64,
        loss: Any = None,
        loss_weights: Any = None,
        learning_rate: Positive | None = None,
        training: bool = True,
        memory: Positive = 2e9,
        seed: Seed = 0,
    ):
        super().__init__()
        unknown = [name for name in layers if name not in Site.figures()]
        if unknown:
            raise KerasNormError(
                "unknown properties",
                got=", ".join(map(repr, unknown)),
                expected=f"some of {', '.join(Site.figures())}",
            )
        if log_dir is not None:
            _tensorflow()  # a missing TensorFlow shows here
        self.x, self.y = x, y
        self.every, self.every_steps = every, every_steps
        self._steps = Steps(every_steps)
        self.layers, self.log_dir = tuple(layers), log_dir
        self.prefix, self.verbose = prefix, verbose
        self.settings = {
            "batch_size": batch_size,
            "loss": loss,
            "loss_weights": loss_weights,
            "learning_rate": learning_rate,
            "training": training,
            "samples": samples,
            "memory": memory,
            "seed": seed,
        }
        self.history: list[tuple[int, Measurement]] = []
        self.seconds = 0.0
        self._began = 0.0
        self._last: dict[str, float] = {}
        self._writer: Any = None
        self._measurer: Measurer | None = None

    @property
    def share(self) -> float:
        """Share of the time since training began spent on measurements."""
        total = time.perf_counter() - self._began
        return self.seconds / total if self._began else 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        self._began, self.seconds = time.perf_counter(), 0.0
        self._measurer = None  # loss and learning rate may be others now
        if self.model.built:  # a mistake shows before the first epoch, not after it
            self._read()

    def _read(self) -> None:
        """Keeps what is measured on: a generator gives it once."""
        inputs, labels = checked(self.model, self.x, self.y, self.settings["samples"])
        self.x, self.y = inputs.pack(inputs.arrays), labels or None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._steps.passed(batch, (self.params or {}).get("steps")):
            self._measure()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        done = bool(self.history) and self.history[-1][0] == self._steps.count
        if self.every and (epoch % self.every == 0 or not self._last) and not done:
            self._measure()
        if logs is not None:
            logs.update(self._last)

    def on_train_end(self, logs: Any = None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self.verbose:
            private.print_msg(
                f"\nPropertyMonitor: {len(self.history)} measurements took"
                f" {self.seconds:.1f} s, {self.share:.1%} of the time of training"
            )

    def _measure(self) -> None:
        started = time.perf_counter()
        model = self.model  # on JAX, asking for it brings it up to date
        if self._measurer is None:
            self._read()
            self._measurer = Measurer(model, self.x, self.y, **self.settings)
        found = self._measurer()
        self.history.append((self._steps.count, found))
        values = figures(found)
        each = {
            f"{name}/{site.path}": float(getattr(site, name))
            for name in Site.figures()
            for site in found.sites
            if getattr(site, name) is not None
        }
        chosen = {k: v for k, v in each.items() if k.split("/")[0] in self.layers}
        self._last = {self.prefix + k: v for k, v in {**values, **chosen}.items()}
        if self.log_dir is not None and replicas.writes(self.model):
            self._write({**values, **each})
        self.seconds += time.perf_counter() - started

    def _write(self, values: dict[str, float]) -> None:
        tf = _tensorflow()
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(os.fspath(self.log_dir or ""))
        # What `tf.summary.scalar` writes, which asks for TensorBoard to be installed.
        plugin = tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars")
        about = tf.compat.v1.SummaryMetadata(plugin_data=plugin)
        with self._writer.as_default(step=self._steps.count):
            for name, value in values.items():
                tag = f"properties/{self.prefix}{name}"
                tf.summary.write(tag, tf.constant(value, "float32"), metadata=about)
        self._writer.flush()


def figures(m: Measurement) -> dict[str, float]:
    """A measurement in a few numbers, by name."""

    def all_of(name: str) -> np.ndarray:
        found = [getattr(s, name) for s in m.sites if s.kind != "output"]
        return np.array([v for v in found if v is not None], "float64")

    values = {
        "variance_growth": m.forward.factor,
        "gradient_growth": m.backward.factor,
    }
    for name in ("cosine", "stable_rank", "effective_rank"):
        if len(m.hidden(name)):
            values[name] = float(m.hidden(name)[-1])
    totals = {"gradient_norm": "weight_gradient", "weight_norm": "weight_norm"}
    for name, source in totals.items():
        values[name] = float(np.sqrt(np.sum(all_of(source) ** 2)))
    for name in ("effective_learning_rate", "relative_step"):
        if len(all_of(name)):
            values[name] = float(np.median(all_of(name)))
            values[f"{name}_max"] = float(all_of(name).max())
    if (worst := m.most_dead) is not None:
        values["dead"] = float(worst.dead or 0.0)
    if len(all_of("statistics_distance")):
        values["statistics_distance"] = float(all_of("statistics_distance").max())
    last = [s.dependence for s in m.sites if s.kind == "output"]
    if last and last[0] is not None:
        values["dependence"] = float(last[0])
    return values


def _tensorflow() -> Any:
    try:
        import tensorflow
    except ImportError as error:
        raise KerasNormError(
            "TensorBoard's summaries are written by TensorFlow",
            got="no such package",
            fix="pip install tensorflow, or leave `log_dir` away.",
        ) from error
    return tensorflow
