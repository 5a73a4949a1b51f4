"""How near a rewritten model's answers are to the original's, on samples held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from kerasnorm.common import data as reading
from kerasnorm.common.arrays import fed
from kerasnorm.fitting.execution import largest, run
from rewriters.program import Program, fixed_batch, is_graph, maker_of


# Softened probabilities tell more about the wrong classes than hard ones.
TEMPERATURE = 2.0
# Samples that run at once, at most, and how many times the memory of its inputs one
# takes where it is not known.
BATCH, WIDER = 64, 40
# Half the width of an interval that holds 95 % of a normal distribution.
WIDTH = 1.96


@dataclass(frozen=True)
class Agreement:
    """How often one output answers as the original's does, on samples held out.

    Args:
        output: name of the output; empty where there is one.
        samples: number of samples held out.
        rate: share of answers that are the same (the largest of several values, or the
            side of a half that a probability is on), the mean over positions; None
            where the output is no such answer.
        low, high: the interval of 95 % around it (Wilson 1927), as shares.
        kept: share of the variance of the original's output that is kept.
    """

    output: str
    samples: int
    rate: float | None
    low: float | None
    high: float | None
    kept: float

    def __str__(self) -> str:
        of = f"{self.samples} samples held out"
        name = f"{self.output}: " if self.output else ""
        if self.low is None or self.high is None:
            return f"{name}keeps {100 * self.kept:.1f} % of the variance on {of}"
        low, high = math.floor(100 * self.low), math.ceil(100 * self.high)
        return f"{name}answers as the original does on {low} to {high} % of {of}"


def interval(rate: float, n: int) -> tuple[float, float]:
    """The interval of 95 % around a share of n observations (Wilson 1927)."""
    spread = WIDTH**2 / n
    middle = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (rate * (1 - rate) + spread / 4)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


class Judge:
    """Compares models with the original, which runs once.

    Args:
        teacher: the original.
        inputs: samples held out.
        views: see `kerasnorm.fitting.fit.fit`. What is near is then near to the
            original's mean answer.
        memory: bytes that running a model may take.
    """

    def __init__(
        self,
        teacher: Any,
        inputs: reading.Inputs,
        views: Sequence[Callable[..., Any]] = (),
        memory: float = 1e8,
    ):
        self.inputs = inputs
        needs = WIDER * sum(a[:1].nbytes for a in inputs.arrays)
        if is_graph(teacher):
            needs = 6 * largest(Program(teacher))
        fits = max(1, min(BATCH, int(memory / max(1, needs))))
        self.batch = fixed_batch(teacher) or fits
        self.wanted = self._outputs(teacher)
        seen = [self.wanted, *(self._outputs(teacher, view) for view in views)]
        self.targets = [sum(y) / len(seen) for y in zip(*seen, strict=True)]
        self.samples = len(self.wanted[0])
        self.kinds = [
            "linear" if is_linear(teacher, k) else kind(y)
            for k, y in enumerate(self.wanted)
        ]
        self.losses = [
            loss(*pair) for pair in zip(self.kinds, self.wanted, strict=True)
        ]
        names = getattr(teacher, "output_names", None) or ()
        several = len(self.wanted) > 1
        self.names = [
            (names[k] if k < len(names) else str(k)) if several else ""
            for k in range(len(self.wanted))
        ]

    def _outputs(
        self, model: Any, view: Callable[..., Any] = lambda x: x
    ) -> list[np.ndarray]:
        """Flat outputs for all samples; what is left of the last fixed batch, not."""
        n = len(self.inputs)
        if fixed_batch(model) is not None:
            n = n // self.batch * self.batch
        dtypes = [t.dtype for t in getattr(model, "inputs", None) or ()]
        dtypes = dtypes or [None] * len(self.inputs.arrays)
        parts = []
        for start in range(0, n, self.batch):
            rows = slice(start, min(start + self.batch, n))
            given = zip(self.inputs.arrays, dtypes, strict=True)
            x = [ops.convert_to_tensor(fed(a[rows]), dtype) for a, dtype in given]
            seen = view(self.inputs.pack(x))
            if is_graph(model):
                parts.append(run(model, self.inputs.flat(seen)))
            else:
                parts.append(tree.flatten(model(seen, training=False)))
        flat = zip(*parts, strict=True)
        return [np.concatenate([ops.convert_to_numpy(v) for v in p]) for p in flat]

    def gap(self, student: Any) -> float:
        """The mean loss of the outputs, each in its own units; inf where not finite."""
        gaps = [
            float(np.mean(ops.convert_to_numpy(of(y, p))))
            for of, y, p in zip(
                self.losses, self.targets, self._outputs(student), strict=True
            )
        ]
        total = float(np.sum(gaps))
        return total if math.isfinite(total) else math.inf

    def agreement(self, student: Any) -> tuple[Agreement, ...]:
        """One entry for each output."""
        found = []
        given = self._outputs(student)
        for name, which, y, p in zip(
            self.names, self.kinds, self.wanted, given, strict=True
        ):
            rate = low = high = None
            if (which == "linear" and (y.ndim != 2 or y.shape[-1] < 2)) or (
                y.ndim < 1 or not y.size
            ):
                pass
            else:
                same = (
                    (y > 0.5) == (p > 0.5)
                    if which == "sigmoid"
                    else y.argmax(-1) == p.argmax(-1)
                )
                rate = float(np.mean(same))
                low, high = interval(rate, self.samples)
            y, p = y.astype("float64"), p.astype("float64")
            total = np.sum(np.square(y - y.mean(0)))
            kept = 1 - float(np.sum(np.square(y - p)) / total) if total > 0 else 1.0
            found.append(Agreement(name, self.samples, rate, low, high, max(0.0, kept)))
        return tuple(found)


def kind(outputs: np.ndarray) -> str:
    """What outputs are, told by their values: `softmax`, `sigmoid` or `linear`."""
    if outputs.min() < 0 or outputs.max() > 1 + 1e-3:
        return "linear"
    if outputs.shape[-1] > 1 and np.allclose(outputs.sum(-1), 1, atol=1e-2):
        return "softmax"
    return "sigmoid"


def is_linear(model: Any, k: int) -> bool:
    """Whether the layer that makes an output says that it has no activation: its values
    are no probabilities, even where all of them could be."""
    maker = maker_of(model, k)
    return getattr(maker, "activation", None) is keras.activations.linear


def loss(which: str, outputs: np.ndarray) -> Callable[[Any, Any], Any]:
    """`(teacher's, student's) -> loss of each sample` for outputs like these."""
    if which == "softmax":
        return _softened
    if which == "sigmoid":
        return _entropy
    power = float(np.mean(np.var(outputs.astype("float64"), 0))) + 1e-12
    return lambda y, p: per_sample(ops.square(ops.cast(y - p, "float32"))) / power


def _entropy(y: Any, p: Any) -> Any:
    """Binary cross-entropy of each sample."""
    y, p = (ops.reshape(ops.cast(v, "float32"), (ops.shape(v)[0], -1)) for v in (y, p))
    return keras.losses.binary_crossentropy(y, p)


def per_sample(v: Any) -> Any:
    """The mean of each sample."""
    return ops.mean(ops.reshape(v, (ops.shape(v)[0], -1)), -1)


def _softened(y: Any, p: Any) -> Any:
    def log_of(v: Any) -> Any:
        v = ops.log(ops.clip(ops.cast(v, "float32"), 1e-7, 1.0))
        return ops.log_softmax(v / TEMPERATURE)

    log_y, log_p = log_of(y), log_of(p)
    gap = ops.sum(ops.exp(log_y) * (log_y - log_p), -1, keepdims=True)
    return TEMPERATURE**2 * per_sample(gap)
