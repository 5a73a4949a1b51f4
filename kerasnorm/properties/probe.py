"""The pass that is measured: one forward, one backward, read off while they run.

Layers with kernels and normalization layers are watched. Of what such a layer reads, a
few sums are kept; its output goes through an identity whose gradient writes sums of the
gradient that comes back. So no activation or gradient lives longer than in training.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from kerasnorm.kernels.kernel import LINEAR, kernels_of
from kerasnorm.kernels.reparametrized import Reparametrized
from kerasnorm.method.registry import Source, read
from kerasnorm.numerics import backend
from kerasnorm.properties.definitions import gram, moments
from kerasnorm.runtime.compilation import compiles
from kerasnorm.runtime.programs import Compiled, watched_gradients
from rewriters import private
from rewriters.graph import SiteMap
from rewriters.tracing import watching


Array = np.ndarray
Tensor = Any

# Entries of a sample's activations that stand for all where two runs are compared.
SKETCH = 256

# Layers that call what they hold in loops of their own, where no value can be read.
LOOPS = (keras.layers.RNN, keras.layers.TimeDistributed)


@dataclass(frozen=True, eq=False)
class Probe:
    """A layer that is watched.

    Args:
        path: where it is.
        layer: the layer.
        kind: `"linear"` or `"norm"`.
        depth: layers with kernels on the longest way from the input through it, for a
            normalization up to it; its place in the order of calls where there is no
            graph.
        source: what a normalization computes, None if unknown.
        share: of the paths from the inputs to the outputs, how many lead through it;
            every branch of a merge counts as one. 1 where there is no graph.
    """

    path: str
    layer: Any
    kind: str
    depth: int
    source: Source | None = None
    share: float = 1.0

    @property
    def axis(self) -> int:
        """The channel axis of what it reads."""
        if self.source is not None and isinstance(self.source.axis, int):
            return self.source.axis
        layer = getattr(self.layer, "layer", self.layer)
        return 1 if getattr(layer, "data_format", "") == "channels_first" else -1

    @property
    def kernels(self) -> list[Any]:
        """The variables of its kernels; of a weight method, what is trained."""
        if self.kind == "norm":
            return []
        inner = getattr(self.layer, "layer", self.layer)
        found = kernels_of(inner)
        return [k.variable for k in found] if isinstance(found, list) else []


def probes(model: Any) -> list[Probe]:
    """The layers of a model that are watched, in order of computation."""
    site_map = SiteMap(model, tracing=False)
    found: list[tuple[str, Any, str, Source | None]] = []
    held: list[str] = []
    for site in site_map:
        if any(path.startswith(tuple(held)) for path in site.paths):
            continue
        source = read(site.layer)
        whole = isinstance(site.layer, (Reparametrized, *LINEAR, *LOOPS))
        if source is not None:
            known = source if isinstance(source, Source) else None
            found.append((site.path, site.layer, "norm", known))
        elif whole:
            found.append((site.path, site.layer, "linear", None))
        if source is not None or whole:
            held += [f"{path}/" for path in site.paths]
    depths = _depths(site_map.program, {id(f[1]): f[2] for f in found})
    shares = {} if depths is None else _shares(site_map.program)
    order = 0
    result = []
    for path, layer, kind, source in found:
        order += kind == "linear"
        depth = order if depths is None else depths[id(layer)]
        share = shares.get(id(layer), 1.0)
        result.append(Probe(path, layer, kind, depth, source, share))
    return result


def _depths(program: Any, kinds: dict[int, str]) -> dict[int, int] | None:
    """Depth of every probed layer; None where a graph does not hold them all."""
    if program is None:
        return None
    values: dict[Any, int] = {}
    found: dict[int, int] = {}
    for i in program.instructions:
        key = id(i.operation)
        depth = max((values.get(v, 0) for v in i.inputs), default=0)
        depth += kinds.get(key) == "linear"
        values |= dict.fromkeys(i.outputs, depth)
        if key in kinds:
            found.setdefault(key, depth)
    return found if len(found) == len(kinds) else None


def _shares(program: Any) -> dict[int, float]:
    """Share of the paths that lead through each operation: back from the outputs, a
    path chooses among the inputs of a merge, all alike."""
    values = dict.fromkeys(program.outputs, 1.0 / max(1, len(program.outputs)))
    found: dict[int, float] = {}
    for i in reversed(program.instructions):
        share = sum(values.get(v, 0.0) for v in i.outputs)
        key = id(i.operation)
        found[key] = min(1.0, found.get(key, 0.0) + share)
        for v in i.inputs:
            values[v] = values.get(v, 0.0) + share / len(i.inputs)
    return found


@dataclass
class Reading:
    """What one batch says about one place, as arrays.

    Args:
        mean, variance: `(channels,)` of the activations read.
        cosines, norms: `gram` of the activations.
        sketch: `(samples, entries)`, some of the activations.
        gradient_cosines, gradient_norms: `gram` of the gradients at the output, over
            all calls of a shared layer: the norm is the root mean square.
    """

    mean: Array | None = None
    variance: Array | None = None
    cosines: Array | None = None
    norms: Array | None = None
    sketch: Array | None = None
    gradient_cosines: Array | None = None
    gradient_norms: Array | None = None


OUTPUT = -1  # the key of the model's outputs beside the probes' numbers


class Pass:
    """A model made ready to be measured on batches of one size.

    Args:
        model: the model.
        watched: its probes.
        structure: `structure(flat) -> inputs` as the model's call takes them.
        count: how many inputs there are.
        loss: `loss(outputs, y) -> scalar`, the sum over samples.
        training: the training argument of the model's call.
    """

    def __init__(
        self,
        model: Any,
        watched: Sequence[Probe],
        structure: Callable[[Sequence[Any]], Any],
        count: int,
        loss: Callable[[Any, Sequence[Any]], Any],
        training: bool,
    ):
        self.model, self.watched = model, list(watched)
        self.structure, self.count = structure, count
        self.loss, self.training = loss, training
        self.traces = 0  # how often the model's code ran
        self._calls: Counter[int] = Counter()  # in one run, by the probe's number
        kernels = {id(k): k for p in self.watched for k in p.kernels}
        self.variables = list(kernels.values())
        self._both = watched_gradients(self._forward, model, self.variables)
        self._alone: Callable = self._sketches
        if compiles(model):
            variables = [(v, v) for v in model.variables]
            self._alone = Compiled(self._sketches, variables, [model], True)

    def run(
        self, x: Sequence[Array], y: Sequence[Array]
    ) -> tuple[dict[int, Reading], dict[int, float]]:
        """One forward and one backward pass of a batch.

        Returns:
            Readings by the probe's number, `OUTPUT` for the model's outputs; and by
            `id(variable)` the norms of the gradients of the kernels, of the mean loss.
        """
        samples = len(x[0])
        more, slots, gradients = self._both(self._slots(samples), [*x, *y])
        found = {k: Reading(**_numpy(r)) for k, r in more.items()}
        for k, reading in found.items():
            if k != OUTPUT:
                reading.gradient_cosines, reading.gradient_norms = _over_calls(
                    _numpy(slots[3 * k : 3 * k + 3]), self._calls[k]
                )
        norms = {
            id(v): float(np.linalg.norm(_numpy(g).astype("float64"))) / samples
            for v, g in zip(self.variables, gradients, strict=True)
        }
        return found, norms

    def sketches(self, x: Sequence[Array]) -> dict[int, Array]:
        """One forward pass: some of the activations at every probe."""
        return _numpy(self._alone([ops.convert_to_tensor(v) for v in x]))

    def _slots(self, samples: int) -> list[Array]:
        square = (samples, samples)
        shapes = (square, (samples,), square) * len(self.watched)
        return [np.zeros(shape, "float32") for shape in shapes]

    def _forward(self, slots: Sequence[Any], given: Sequence[Any]) -> tuple[Any, Any]:
        inputs, labels = given[: self.count], given[self.count :]
        samples = inputs[0].shape[0]
        found: dict[int, dict[str, Any]] = {}
        self.traces += 1
        self._calls.clear()

        def note(layer: Any, args: Any, kwargs: Any, outputs: Any) -> Any:
            k = self._number[id(layer)]
            x, flat = _first((args, kwargs)), tree.flatten(outputs)
            if not (backend.is_readable(x) and backend.is_readable(flat[0])):
                return None
            if k not in found:  # a shared layer: its first call
                found[k] = self._read(x, self.watched[k].axis, samples)
            if not _countable(flat[0], samples):
                return None
            self._calls[k] += 1
            flat[0] = _marked(flat[0], samples, slots[3 * k : 3 * k + 3])
            return tree.pack_sequence_as(outputs, flat)

        with (
            backend.readable(),
            watching([p.layer for p in self.watched], note, result=True),
        ):
            outputs = self.model(self.structure(inputs), training=self.training)
        found[OUTPUT] = self._read(_first(outputs), -1, samples)
        return self.loss(outputs, labels), found

    def _sketches(self, x: Sequence[Any]) -> dict[int, Any]:
        samples = x[0].shape[0]
        found: dict[int, Any] = {}

        def note(layer: Any, args: Any, kwargs: Any) -> None:
            k, value = self._number[id(layer)], _first((args, kwargs))
            if k not in found and backend.is_readable(value):
                if _countable(value, samples):
                    found[k] = _sketch(value, samples)

        with (
            backend.readable(),
            _scope(),
            watching([p.layer for p in self.watched], note),
        ):
            outputs = self.model(self.structure(x), training=self.training)
        found[OUTPUT] = _sketch(_first(outputs), samples)
        return found

    @functools.cached_property
    def _number(self) -> dict[int, int]:
        return {id(p.layer): k for k, p in enumerate(self.watched)}

    def _read(self, x: Any, axis: int, samples: int) -> dict[str, Any]:
        if not _countable(x, samples):
            return {}
        x = ops.stop_gradient(x)
        mean, variance = moments(x, axis)
        cosines, norms = gram(x, samples)
        return {
            "mean": mean,
            "variance": variance,
            "cosines": cosines,
            "norms": norms,
            "sketch": _sketch(x, samples),
        }


def _scope() -> Any:
    """Where assignments are forgotten; a new one would hide what the outer one maps."""
    inside = private.in_stateless_scope()
    return contextlib.nullcontext() if inside else keras.StatelessScope()


def _marked(y: Tensor, samples: int, slots: Sequence[Tensor]) -> Tensor:
    """`y`, whose gradient's `gram` and inner products become that of the slots."""

    def identity(y, *slots):
        def backward(upstream):
            cosines, norms = gram(upstream, samples)
            products = cosines * norms * norms[:, None]
            return upstream, cosines, norms, products

        return ops.copy(y), backward

    return backend.custom_gradient(identity)(y, *slots)


def _over_calls(sums: Sequence[Array], calls: int) -> tuple[Array, Array]:
    """`gram` of the gradients at all calls of a layer, from the sums over them.

    What adds up is inner products; of one call the rest keeps all of float32's range.
    """
    cosines, norms, products = sums
    if calls <= 1:
        return cosines, norms
    norms = np.sqrt(np.diagonal(products))
    safe = np.where(norms > 0, norms, 1.0)
    return products / safe / safe[:, None], norms / np.sqrt(calls)


def _sketch(x: Tensor, samples: int) -> Tensor:
    flat = ops.reshape(x, (samples, -1))
    units = flat.shape[1]
    where = np.unique(np.linspace(0, units - 1, min(units, SKETCH)).astype("int32"))
    return ops.cast(ops.take(flat, where, axis=1), "float32")


def _countable(x: Any, samples: int) -> bool:
    """Whether a tensor holds numbers for each sample."""
    floating = "float" in keras.backend.standardize_dtype(x.dtype)
    return floating and len(x.shape) > 1 and x.shape[0] % samples == 0


def _first(values: Any) -> Any:
    return next(v for v in tree.flatten(values) if hasattr(v, "shape"))


def _numpy(values: Any) -> Any:
    return tree.map_structure(ops.convert_to_numpy, values)
