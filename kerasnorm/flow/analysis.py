"""How the scale of a kernel flows through a model, by abstract interpretation.

Each filter of a kernel is given a factor of its own, s > 0, and every value that
depends on it is described as

    x = s[owner] ** degree * z + c

with z free of s, `owner` telling which filter's factor an element carries, and c a
constant that neither s nor the input changes. Operations map descriptions to
descriptions (`flow_rules`). Some *tie* factors: a group normalization is blind to the
scale of a whole group only, a dense layer mixes all its inputs. A factor that is tied
to 1, because it meets what does not scale, or reaches the output, ends the flow: the
kernel is not scale invariant. If every path ends in a normalization that absorbs the
factor, it is, independently for each class of tied filters.

Layers that are not Keras's own are run on symbolic tensors, and what they call is
followed; so are subclassed models. What cannot be followed is said to be undecided.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import tree

from kerasnorm.flow.rules import apply, is_known, probe
from kerasnorm.flow.ties import Absorber, Owners, Scaled, Stop, Ties
from kerasnorm.kernels import kernel as kernels
from kerasnorm.kernels.reparametrized import Reparametrized
from kerasnorm.method.registry import Refusal
from rewriters import private
from rewriters.graph import SiteMap
from rewriters.program import Instruction, Value
from rewriters.tracing import spec_from_build


@dataclass(frozen=True)
class Flow:
    """Whether the scale of one kernel can matter, and why.

    Args:
        path: of the layer that holds the kernel.
        kernel: where its filters lie.
        invariant: the output in training mode does not depend on the scale of a unit,
            but for the epsilons of the normalizations behind it.
        decided: False where the answer is that nobody can tell.
        reason: the proof, or what stands against it, in one line.
        units: for each filter (flattened as `Kernel.columns` does) the unit it belongs
            to; filters of one unit are scaled together. Empty where not invariant.
        joint: the bias has to be scaled along with its filter.
        absorbers: the normalizations that the scale does not pass.
    """

    path: str
    kernel: kernels.Kernel
    invariant: bool
    decided: bool
    reason: str
    units: tuple[int, ...] = ()
    joint: bool = False
    absorbers: tuple[Absorber, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """Path of the layer and name of the kernel."""
        return f"{self.path}/{self.kernel.name}"

    @property
    def granularity(self) -> str | None:
        """`"filter"`, `"group"` or `"layer"`: what can be scaled by itself."""
        if not self.invariant:
            return None
        count = max(self.units) + 1
        if count == len(self.units):
            return "filter"
        return "layer" if count == 1 else "group"

    @property
    def through(self) -> tuple[str, ...]:
        """Paths of the normalizations that the scale does not pass."""
        return tuple(dict.fromkeys(a.path for a in self.absorbers))


def flows(model: Any, replaced: dict[str, Any] | None = None) -> list[Flow]:
    """Follows the scale of every kernel of a model, in training mode.

    Args:
        model: any built Keras model, or its `SiteMap`.
        replaced: path of a layer -> the layer to think in its place.
    """
    site_map = model if isinstance(model, SiteMap) else SiteMap(model, tracing=False)
    swapped = {
        id(site_map[path].layer): layer for path, layer in (replaced or {}).items()
    }
    graph = Graph(site_map, swapped)
    found, seen = [], set()
    held = {
        id(k.variable): site.layer
        for site in site_map
        if isinstance(site.layer, Reparametrized) and site.layer.built
        for k in site.layer.kernels
    }
    for site in site_map:
        own = own_kernels(site.layer)
        if isinstance(own, Refusal):
            kernel = kernels.Kernel(site.layer, "kernel", (-1,), (-1,))
            found.append(Flow(site.path, kernel, False, False, own.detail))
            continue
        for kernel in own:
            if id(kernel.variable) in seen:
                continue
            seen.add(id(kernel.variable))
            wrapper = held.get(id(kernel.variable))
            if wrapper is not None:
                found.append(_wrapped(site.path, kernel, wrapper))
            else:
                found.append(_flow(site.path, kernel, graph))
    return found


def own_kernels(layer: Any) -> list[kernels.Kernel] | Refusal:
    """The kernels that are variables of the layer itself."""
    own = kernels.kernel_of(layer)
    if isinstance(own, Refusal) and getattr(layer, "built", False):
        return own
    if isinstance(own, kernels.Kernel) or isinstance(
        getattr(layer, "recurrent_kernel", None), keras.Variable
    ):
        return kernels.kernels_of(layer)
    return []


def _wrapped(path: str, kernel: kernels.Kernel, wrapper: Reparametrized) -> Flow:
    """A reparametrized kernel is as invariant as the method makes it: the kernel in use
    is computed with filters of other lengths, and compared."""
    what = type(wrapper).__name__
    units = probe(wrapper, kernel)
    if units is None:
        return Flow(path, kernel, False, False, f"{what} keeps its scale")
    return Flow(path, kernel, True, True, f"normalized by {what}", units)


def _flow(path: str, kernel: kernels.Kernel, graph: Graph) -> Flow:
    stop = Stop("", False)
    for joint in (False, True) if has_bias(kernel.layer) else (False,):
        ties = Ties(kernel, joint)
        try:
            absorbers = graph.follow(ties)
        except Stop as error:
            stop = error
            continue
        units = ties.units()
        through = ", ".join(dict.fromkeys(a.path for a, _ in absorbers))
        return Flow(
            path,
            kernel,
            True,
            True,
            f"absorbed by {through}",
            units,
            joint,
            tuple(_absorber(a, o, ties) for a, o in absorbers),
        )
    return Flow(path, kernel, False, stop.decided, stop.reason)


def has_bias(layer: Any) -> bool:
    """Whether the layer adds a bias of its own."""
    return isinstance(getattr(layer, "bias", None), keras.Variable)


def _absorber(found: Absorber, owners: Owners, ties: Ties) -> Absorber:
    units = np.append(ties.units(), -1)
    axis = getattr(found.layer, "axis", -1)
    channel = (axis if isinstance(axis, int) else max(axis)) % owners.ndim
    if any(n > 1 for a, n in enumerate(owners.shape) if a != channel):
        return found
    per_channel = tuple(int(u) for u in units[owners.ravel()])
    return Absorber(found.path, found.layer, per_channel, found.degree, found.shifted)


class Graph:
    """The instructions of a model, custom layers followed inside."""

    def __init__(self, site_map: SiteMap, swapped: dict[int, Any]):
        self.swapped = swapped
        if site_map.program is not None:
            steps, self.outputs = (
                site_map.program.instructions,
                site_map.program.outputs,
            )
        else:
            steps, self.outputs = _of_subclass(site_map.model)
        self.read_apart: set[int] = set()
        self.steps = [s for i in steps for s in _expand(i, self.read_apart)]
        self.users: dict[int, list[int]] = {}
        self.readers: dict[Value, list[int]] = {}
        for n, step in enumerate(self.steps):
            for layer in _held(step.operation):
                self.users.setdefault(id(layer), []).append(n)
            for value in dict.fromkeys(step.inputs):
                self.readers.setdefault(value, []).append(n)

    def follow(self, ties: Ties) -> list[tuple[Absorber, Owners]]:
        """Where the kernel's scale ends.

        Raises:
            Stop: it can reach the output, or nobody knows.
        """
        if id(ties.kernel.variable) in self.read_apart:
            raise Stop("it is also read outside its layer", False)
        starts = self.users.get(id(ties.kernel.layer), [])
        if not starts:
            raise Stop("no call of it is known", False)
        known: dict[Value, Scaled] = {}
        absorbers: list[tuple[Absorber, Owners]] = []
        pending = set(starts)
        while pending:
            n = min(pending)  # in order of computation
            pending.remove(n)
            step = self.steps[n]
            layer = self.swapped.get(id(step.operation), step.operation)
            results, absorber = apply(step, layer, known, ties, n in starts)
            if absorber is not None:
                absorbers.append(absorber)
            for value, result in zip(step.outputs, results, strict=True):
                if result is None:
                    continue
                if value in self.outputs:
                    raise Stop(f"{step.path} is an output of the model", True)
                known[value] = result
                pending.update(self.readers.get(value, []))
        if not absorbers:
            raise Stop("nothing reads it", False)
        return absorbers


def _held(operation: Any) -> Iterator[Any]:
    """The layer that is called, and what a wrapper around it holds."""
    yield operation
    if isinstance(operation, keras.layers.TimeDistributed):
        yield from _held(operation.layer)
    elif isinstance(operation, (keras.layers.RNN, keras.layers.Bidirectional)):
        yield from private.flatten_layers(operation, include_self=False)


# ------------------------------------------------------- following custom layers


class _Reads(keras.StatelessScope):
    """Notes which variables the code of a layer reads itself: in the calls of inner
    layers, which run in scopes of their own, it hears nothing."""

    def __init__(self, seen: set[int]):
        super().__init__()
        self.seen = seen

    def get_current_value(self, variable):
        self.seen.add(id(variable))
        return super().get_current_value(variable)


def _expand(step: Instruction, read: set[int]) -> Iterator[Instruction]:
    """The calls within one call; `read` is added what is read apart from these."""
    leaves = tree.flatten((step.args, step.kwargs))
    read |= {id(v) for v in leaves if isinstance(v, keras.Variable)}
    if is_known(step.operation):
        yield step
        return
    try:
        steps = _traced(step, read)
    except Exception:  # tensors of a kind of its own, data-dependent Python, ...
        yield step
        return
    for inner in steps:
        yield from _expand(inner, read)


def _of_subclass(model: Any) -> tuple[list[Instruction], tuple[Value, ...]]:
    """The model as one instruction, from the shapes it was built with."""
    spec = spec_from_build(model)
    if spec is None:
        return [], ()
    inputs = tree.map_structure(_value, spec)
    made = keras.Operation.compute_output_spec(model, spec)
    outputs = tuple(_value(t) for t in tree.flatten(made))
    step = Instruction(model.name, model, (inputs,), {}, outputs)
    return [step], outputs


def _traced(step: Instruction, read: set[int]) -> list[Instruction]:
    """The calls within one call of a layer, on the same values.

    The layer runs on symbolic tensors, in training mode unless that is fixed; the nodes
    this leaves on its inner layers are removed again.
    """
    layer = step.operation
    known: dict[int, Value] = {}
    kept: list[Any] = []

    def symbol(leaf: Any) -> Any:
        if not isinstance(leaf, Value):
            return leaf
        t = keras.KerasTensor(leaf.shape, leaf.dtype)
        known[id(t)] = leaf
        kept.append(t)
        return t

    args, kwargs = tree.map_structure(symbol, (tuple(step.args), dict(step.kwargs)))
    if private.call_has_training_arg(layer, False):
        fixed = kwargs.get("training")
        fixed = step.training if fixed is None else fixed
        kwargs["training"] = True if fixed is None else fixed
    layers = private.flatten_layers(layer)
    before = [
        (x, len(private.inbound_nodes(x)), len(private.outbound_nodes(x)))
        for x in layers
    ]
    try:
        with _Reads(read):
            made = tree.flatten(layer.call(*args, **kwargs))
        nodes = _nodes(made, known)
    finally:
        for inner, inbound, outbound in before:
            del (
                private.inbound_nodes(inner)[inbound:],
                private.outbound_nodes(inner)[outbound:],
            )
    wanted = {id(t): v for t, v in zip(made, step.outputs, strict=True)}
    if len(wanted) < len(made) or any(id(t) in known for t in made):
        raise ValueError("an input is passed through")
    known |= wanted
    steps = []
    for node in nodes:

        def value(leaf: Any) -> Any:
            return known.get(id(leaf), leaf) if _symbolic(leaf) else leaf

        inner_args, inner_kwargs = tree.map_structure(
            value, (tuple(node.arguments.args), dict(node.arguments.kwargs))
        )
        outputs = tuple(known.setdefault(id(t), _value(t)) for t in node.outputs)
        path = f"{step.path}/{node.operation.name}"
        training = kwargs.get("training")
        training = False if training is False else step.training
        steps.append(
            Instruction(
                path, node.operation, inner_args, inner_kwargs, outputs, training
            )
        )
    return steps


def _nodes(made: Sequence[Any], known: dict[int, Value]) -> list[Any]:
    """The nodes behind symbolic tensors, each after all it depends on."""
    order: list[Any] = []
    done: set[int] = set()

    def visit(t: Any) -> None:
        stack = [(t, False)]
        while stack:
            t, ready = stack.pop()
            operation, index = private.keras_history(t)[:2]
            node = private.inbound_nodes(operation)[index]
            if ready:
                if id(node) not in done:
                    done.add(id(node))
                    order.append(node)
            elif id(node) not in done:
                stack.append((t, True))
                stack += [(x, False) for x in node.input_tensors if id(x) not in known]

    for t in made:
        visit(t)
    return order


def _value(t: Any) -> Value:
    masked = private.get_keras_mask(t) is not None
    return Value(tuple(t.shape), keras.backend.standardize_dtype(t.dtype), masked)


_symbolic = functools.partial(lambda cls, x: isinstance(x, cls), keras.KerasTensor)
