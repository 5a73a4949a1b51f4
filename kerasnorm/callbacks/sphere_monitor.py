"""How far along its spheres a model moves while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError, taking
from kerasnorm.numerics import backend, replicas
from kerasnorm.runtime.programs import learning_rate
from kerasnorm.sphere import geometry
from kerasnorm.sphere.invariance import scale_invariant_weights
from kerasnorm.sphere.spheres import Spheres
from rewriters import private


FIGURES = ("norm", "effective_rate", "angle", "cosine", "gamma")


class SphereMonitor(keras.callbacks.Callback):
    """Lengths, angles and effective learning rates of the scale-invariant weights.

    Measured within the training step itself, on the gradient that was used, and logged
    at the end of every epoch for its last step; so they stand in `history` and reach
    every logger behind this callback (`TensorBoard`, `CSVLogger`). Means over the units
    (filters, groups, layers) of each weight, and of these over all weights:

        sphere/norm             |w|
        sphere/effective_rate   learning rate / |w|**2
        sphere/angle            between w before and after the step, in radians
        sphere/cosine           of w and the gradient; 0 but for epsilon and decay
        sphere/gamma            mean |gamma| of the normalizations behind

    With `layers=True` also `sphere/norm/<path>` and the like for each weight. It works
    with every optimizer, on spheres or not, and changes nothing of the training. The
    step is compiled anew when training starts and when it ends.

    Args:
        layers: log each weight as well. Default False.
        prefix: of the logged names. Default `"sphere/"`.

    Attributes:
        paths: the weights measured.
        last: `{figure: one number per weight}` of the last step read.

    Raises:
        KerasNormError: when training starts, no trained weight is scale invariant.
    """

    @taking()
    def __init__(self, layers: bool = False, prefix: str = "sphere/"):
        super().__init__()
        self.layers, self.prefix = layers, prefix
        self.paths: list[str] = []
        self.last: dict[str, np.ndarray] = {}
        self._flows: list[Any] = []
        self._tap: Any = None
        self._release: Callable[[], Any] = lambda: None

    def on_train_begin(self, logs: Any = None) -> None:
        self._release()  # of a fit that an error ended
        trained = {id(v): i for i, v in enumerate(self.model.trainable_variables)}
        self._flows = [
            f
            for f in scale_invariant_weights(self.model).invariant
            if id(f.kernel.variable) in trained
        ]
        if not self._flows:
            raise KerasNormError(
                "no trained weight of this model is scale invariant",
                got=self.model.name,
                fix="print(kerasnorm.sphere.scale_invariant_weights(model)) tells why.",
            )
        self.paths = [f.name for f in self._flows]
        spheres = [
            Spheres.of(f, trained[id(f.kernel.variable)], "unit") for f in self._flows
        ]
        self._tap = backend.Tap((len(spheres), 4))
        self._listen(spheres)

    def _listen(self, spheres: list[Spheres]) -> None:
        """Has every step of the optimizer report to the tap."""
        optimizer = self.model.optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            optimizer = optimizer.inner_optimizer
        plain, tap = optimizer.apply, self._tap
        variables = [f.kernel.variable for f in self._flows]

        def apply(grads: Any, trainable_variables: Any = None) -> None:
            grads = list(grads)
            given = trainable_variables
            given = private.trainable_variables(optimizer) if given is None else given
            known = {id(v): g for v, g in zip(given, grads, strict=True)}
            before = [backend.value(v) for v in variables]
            plain(grads, trainable_variables)
            after = [backend.value(v) for v in variables]
            found = [  # zeros where the loss knows nothing of a weight
                ops.zeros_like(w) if known.get(id(v)) is None else known[id(v)]
                for v, w in zip(variables, before, strict=True)
            ]
            found = [backend.value(g) for g in found]
            if replicas.count() > 1:  # the optimizer adds them up as well
                found = replicas.sum_all(*found)
            rows = zip(spheres, before, after, found, strict=True)
            tap.put(ops.stack([_figures(*row) for row in rows]))

        def release() -> None:
            if vars(optimizer).get("apply") is apply:  # not another monitor's around it
                del vars(optimizer)["apply"]

        vars(optimizer)["apply"] = apply
        self._release = release
        self.model.make_train_function(force=True)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        seen = self._tap.get()
        if seen is None:
            return
        seen = seen.astype("float64")
        kernels = [f.kernel.variable for f in self._flows]
        rate = np.array([learning_rate(self.model.optimizer, k) for k in kernels])
        self.last = {
            "norm": seen[:, 0],
            "effective_rate": rate * seen[:, 1],
            "angle": seen[:, 2],
            "cosine": seen[:, 3],
            "gamma": np.array([_gamma(f) for f in self._flows]),
        }
        if logs is None:
            return
        for name in FIGURES:
            values = self.last[name]
            known = values[np.isfinite(values)]
            if name != "gamma" or len(known):
                mean = known.mean() if len(known) else np.nan
                logs[f"{self.prefix}{name}"] = float(mean)
            if self.layers:
                logs |= {
                    f"{self.prefix}{name}/{path}": float(value)
                    for path, value in zip(self.paths, values, strict=True)
                    if np.isfinite(value) or name != "gamma"
                }

    def on_train_end(self, logs: Any = None) -> None:
        self._release()
        self.model.train_function = None


def _figures(spheres: Spheres, w: Any, v: Any, g: Any) -> Any:
    """Norm, its inverse square, angle to `v` and cosine with `g`; means over units."""
    w, v, g = (spheres.split(ops.cast(backend.value(x), "float32")) for x in (w, v, g))
    axes = spheres.axes
    square, ahead = geometry.inner(w, w, axes), geometry.inner(w, v, axes)
    tiny = 1e-30
    aside = geometry.norm(v - w * (ahead / (square + tiny)), axes)
    norm = ops.sqrt(square)
    length = ops.sqrt(square * geometry.inner(g, g, axes))
    figures = (
        norm,
        1.0 / (square + tiny),
        ops.arctan2(aside * norm, ahead),
        geometry.inner(w, g, axes) / (length + tiny),
    )
    return ops.stack([ops.mean(x) for x in figures])


def _gamma(flow: Any) -> float:
    """Mean size of the scales behind a weight, NaN where there are none."""
    found = [
        np.abs(ops.convert_to_numpy(v)).mean()
        for a in flow.absorbers
        for v in [getattr(a.layer, "gamma", None)]
        if v is not None
    ]
    return float(np.mean(found)) if found else float("nan")
