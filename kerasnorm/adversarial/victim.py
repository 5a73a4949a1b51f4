"""A model as attacks see it: logits of classes as a function of one of its inputs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras import ops, tree

from kerasnorm.common.arrays import as_array
from kerasnorm.common.data import fits, keys_of
from kerasnorm.common.errors import KerasNormError, taking
from kerasnorm.kernels.reparametrized import Reparametrized
from kerasnorm.runtime.models import opened
from rewriters import private
from rewriters.arguments import shown
from rewriters.errors import reason
from rewriters.program import fixed_batch, is_graph


Tensor = Any
Outputs = Literal["auto", "logits", "probabilities"]
# Wrappers that exchange the kernel of a layer, and change nothing behind it.
SAME = (Reparametrized, keras.layers.SpectralNormalization)


class Victim:
    """A classifier under attack.

    Args:
        model: a built Keras model, or the path of a saved one, with one output,
            `(rows, classes)`; one unit means two classes.
        outputs: what the model gives: `"logits"`, `"probabilities"`, or `"auto"`, found
            from its last activation. Probabilities made by a last softmax or sigmoid
            are attacked in front of it, as behind it gradients vanish; others by their
            logarithms.
        preprocessing: function of a tensor between the attacked input and the model,
            differentiable.
        attacked: which input, by place, name or key, where there are several.
        replaced: pairs `(variable, read instead)`, for averaged weights.

    Raises:
        KerasNormError: not one output of classes; an attacked input of integers.
    """

    @taking()
    def __init__(
        self,
        model: Any,
        *,
        outputs: Outputs = "auto",
        preprocessing: Callable | None = None,
        attacked: int | str | None = None,
        replaced: Sequence[tuple[Any, Any]] = (),
    ):
        self.model = opened(model, kind=keras.Model)
        self.preprocessing = preprocessing
        self.attacked, self.kind = attacked, outputs
        self.replaced = {id(v): source for v, source in replaced}
        self.structure: Any = 0
        self.place, self.units = 0, 0
        self.ending: Any = None

    @property
    def classes(self) -> int:
        """How many classes it tells apart."""
        return max(self.units, 2)

    @property
    def fixed_batch(self) -> int | None:
        """How many samples the model always takes at once; None where any will do."""
        return fixed_batch(self.model)

    def variables(self) -> list[tuple[Any, Any]]:
        """All variables it may read, each with the one that is read in its place."""
        return [(v, self.replaced.get(id(v), v)) for v in self.model.variables]

    # --------------------------------------------------------------- reading

    def open(self, x: Any) -> tuple[np.ndarray, list[np.ndarray]]:
        """Learns how the model is called, and by whom its outputs are made.

        Args:
            x: inputs, as the model's `predict` takes them.

        Returns:
            The attacked input, and the others.
        """
        leaves = [as_array(a) for a in tree.flatten(x)]
        if leaves and not any(a.ndim for a in leaves):
            raise KerasNormError(
                "the inputs are numbers in lists",
                got=f"{type(x).__name__} {shown(x)}",
                expected="an array, or a list or dict of arrays",
                fix="Pass np.asarray(x).",
            )
        self.structure = tree.pack_sequence_as(x, list(range(len(leaves))))
        self.place = self._place(x, len(leaves))
        if any(a.ndim == 0 for a in leaves) or len({len(a) for a in leaves}) != 1:
            raise KerasNormError(
                "the inputs have different numbers of samples",
                got=[a.shape for a in leaves],
            )
        if not len(leaves[0]):
            raise KerasNormError(
                "there is nothing to attack",
                got="an empty set",
                expected="at least one input",
            )
        attacked = leaves.pop(self.place)
        if attacked.dtype.kind not in "fiub" and attacked.dtype.name != "bfloat16":
            raise KerasNormError(
                "the attacked input holds no numbers", got=f"dtype {attacked.dtype}"
            )
        self._check_input(x, attacked)
        attacked = np.ascontiguousarray(attacked, "float32")
        if not self.units:
            self._read_outputs(attacked, leaves)
        return attacked, leaves

    def _place(self, x: Any, count: int) -> int:
        if isinstance(self.attacked, str):
            names = keys_of(x) or list(self._inputs(x))
            if self.attacked not in names:
                raise KerasNormError(
                    "no such input", got=repr(self.attacked), expected=", ".join(names)
                )
            return names.index(self.attacked)
        if self.attacked is None and count > 1:
            raise KerasNormError(
                "which of the inputs is attacked is not known",
                got=f"{count} inputs",
                fix="Say so: attacked=0, or attacked='name'",
            )
        if not 0 <= (self.attacked or 0) < count:
            raise KerasNormError(
                "no such input", got=self.attacked, expected=f"0 to {count - 1}"
            )
        keys, names = keys_of(x), list(self._inputs(x))
        if set(names) <= set(keys) and names[self.attacked or 0 :]:
            # Places are those of the model, whose order a dict need not have.
            return keys.index(names[self.attacked or 0])
        return self.attacked or 0

    def _inputs(self, x: Any) -> dict[str, Any]:
        """The model's inputs by the names that `x` has for them, in the order of the
        model; none where it has no graph."""
        inputs = getattr(self.model, "inputs", None) or ()
        wanted = private.inputs_struct(self.model, None)
        names = keys_of(wanted) if isinstance(x, dict) else []
        if len(names) != len(inputs):
            names = [t.name for t in inputs]
        return dict(zip(names, inputs, strict=True))

    def _check_input(self, x: Any, attacked: np.ndarray) -> None:
        inputs = self._inputs(x)
        names = keys_of(x) or list(inputs)
        wanted = inputs.get(names[self.place]) if self.place < len(names) else None
        if self.preprocessing is not None or wanted is None:
            return
        shape = tuple(wanted.shape)
        if not fits(shape, attacked.shape):
            raise KerasNormError(
                "the data does not fit the attacked input",
                got=f"shape {attacked.shape}",
                expected=f"shape {shape}",
            )
        _check_floating(wanted)

    def _read_outputs(self, x: np.ndarray, others: Sequence[np.ndarray]) -> None:
        size = np.arange(self.fixed_batch or min(2, len(x))) % len(x)
        rows = [ops.convert_to_tensor(a[size]) for a in (x, *others)]
        built = self.model.built
        if self.preprocessing is not None:
            _check_preprocessing(self.preprocessing, rows[0])
        try:
            with keras.StatelessScope() if built else contextlib.nullcontext():
                y = self.plain(rows[0], rows[1:])
        except Exception as error:  # each backend raises its own
            raise KerasNormError(
                "the model cannot be called with the data",
                got=f"{type(error).__name__} for {[a.shape for a in (x, *others)]}",
                expected="inputs of the shapes that it was built for",
            ) from error
        flat = tree.flatten(y)
        if len(flat) != 1 or len(flat[0].shape) != 2 or flat[0].shape[-1] is None:
            raise KerasNormError(
                "the outputs are not classes",
                got=f"shape {[tuple(t.shape) for t in flat]}",
                expected="one output, (rows, classes)",
                fix="Attack a model of the output that holds the classes",
            )
        self.units = int(flat[0].shape[-1])
        values = ops.convert_to_numpy(ops.cast(flat[0], "float32"))
        self.ending = None if self.kind == "logits" else _ending(self.model)
        if self.ending is not None and not self._ends(rows, values):
            self.ending = None
        if self.kind == "auto":
            sums = (
                np.abs(values.sum(1) - 1) if self.units > 1 else np.zeros(len(values))
            )
            shares = bool(((values >= 0) & (values <= 1)).all() and (sums < 1e-2).all())
            known = self.ending is not None or (shares and self.units > 1)
            self.kind = "probabilities" if known else "logits"

    def _ends(self, rows: Sequence[Tensor], values: np.ndarray) -> bool:
        """Whether the activation that was found makes the outputs of the logits; a
        graph says so itself."""
        with keras.StatelessScope(), _without(self.ending):
            z = ops.cast(self.plain(rows[0], rows[1:]), "float32")
        p = ops.sigmoid(z) if self.units == 1 else ops.softmax(z, axis=-1)
        gap = np.abs(ops.convert_to_numpy(p) - values).max()
        return bool(gap < 2e-2 or is_graph(self.model))

    def assume(self) -> None:
        """As `open`, where there are no data yet: one input, and outputs that are
        logits unless an activation or the user says otherwise."""
        inputs = getattr(self.model, "inputs", None)
        if inputs is not None and len(inputs) != 1:
            raise KerasNormError(
                "adversarial training moves one input", got=f"{len(inputs)} inputs"
            )
        if inputs is not None:
            _check_floating(inputs[0])
        outputs = tree.flatten(getattr(self.model, "outputs", None) or [])
        if len(outputs) == 1 and len(outputs[0].shape) == 2:
            self.units = outputs[0].shape[-1]
        elif inputs is None and self.model.built:
            shape = (self.model.get_build_config() or {}).get("input_shape")
            shape = shape and self.model.compute_output_shape(tuple(shape))
            self.units = shape[-1] if shape and len(shape) == 2 else 0
        if not self.units:
            raise KerasNormError(
                "the outputs are not classes, or not known",
                got=f"{[tuple(t.shape) for t in outputs]}",
                expected="a built model of one output, (rows, classes)",
            )
        graph = inputs is not None and self.kind != "logits"
        self.ending = _ending(self.model) if graph else None
        if self.kind == "auto":
            self.kind = "probabilities" if self.ending is not None else "logits"

    @property
    def hidden(self) -> bool:
        """Whether there are probabilities and no way to the logits behind them."""
        return self.kind == "probabilities" and self.ending is None

    # --------------------------------------------------------------- calling

    def plain(self, x: Tensor, others: Sequence[Tensor] = ()) -> Tensor:
        """The model's own outputs, in inference mode; a single one as it is."""
        if self.preprocessing is not None:
            x = self.preprocessing(x)
        leaves = list(others)
        leaves.insert(self.place, x)
        inputs = tree.map_structure(lambda k: leaves[k], self.structure)
        y = self.model(inputs, training=False)
        leaves = tree.flatten(y)
        return leaves[0] if len(leaves) == 1 else y

    def logits(self, x: Tensor, others: Sequence[Tensor], seed: Any = None) -> Tensor:
        """`(rows, classes)` in float32.

        Args:
            x: the attacked input.
            others: the further inputs.
            seed: a `Stream`; gives the random layers of a model that are active even
                in inference another draw at every call, as they have in use.
        """
        with self.redrawn(seed), _without(self.ending):
            z = ops.cast(self.plain(x, others), "float32")
        if self.hidden:
            z = ops.clip(z, 1e-30, 1.0)
            odds = ops.log(ops.clip(1 - z, 1e-30, 1.0)) if self.units == 1 else 0.0
            z = ops.log(z) - odds
        if self.units == 1:
            # By halves: against a constant 0 the gradient vanishes in rounding sooner.
            z = ops.concatenate([-z / 2, z / 2], axis=-1)
        return z

    def redrawn(self, seed: Any) -> Any:
        """Context in which every random generator of the model is in another state."""
        return _redrawn(self.model, seed)

    def decide(self, outputs: np.ndarray) -> np.ndarray:
        """Classes from the model's own outputs; -1 where these are not finite."""
        if self.units == 1:
            classes = outputs[:, 0] > (0.5 if self.kind == "probabilities" else 0.0)
        else:
            classes = outputs.argmax(-1)
        return np.where(np.isfinite(outputs).all(-1), classes, -1).astype("int32")

    def pack(self, x: Any, others: Sequence[Any]) -> Any:
        """The inputs as `predict` takes them."""
        if self.preprocessing is not None:
            x = ops.convert_to_numpy(self.preprocessing(ops.convert_to_tensor(x)))
        leaves = list(others)
        leaves.insert(self.place, x)
        return tree.map_structure(lambda k: leaves[k], self.structure)


def _check_floating(wanted: Any) -> None:
    dtype = keras.backend.standardize_dtype(wanted.dtype)
    if "float" not in dtype:
        raise KerasNormError(
            "an input of integers has no gradient to follow",
            got=f"input {wanted.name!r} of dtype {dtype}",
            expected="a floating input",
        )


# --------------------------------------------------------- the last activation


def _ending(model: Any) -> Any:
    """The operation that makes probabilities of logits at the end of a model, None
    where there is none, or where it is also used elsewhere."""
    layer: Any = model
    calls, recorded = 0, True
    while isinstance(layer, (keras.Model, *SAME)):
        if isinstance(layer, SAME):
            calls += len(private.inbound_nodes(layer))
            layer = layer.layer
        elif is_graph(layer):
            outputs = layer.outputs
            layer = (
                private.keras_history(outputs[0]).operation
                if len(outputs) == 1
                else None
            )
        elif isinstance(layer, keras.Sequential) and layer.layers:
            layer = layer.layers[-1]
        else:  # without a recorded graph, the layer made last is called last
            inner = list(
                private.flatten_layers(layer, include_self=False, recursive=False)
            )
            layer, recorded = inner[-1] if inner else None, False
    calls += len(private.inbound_nodes(layer, ()))
    return layer if _kind(layer) and (calls <= 1 or not recorded) else None


def _check_preprocessing(function: Any, x: Tensor) -> None:
    """Refuses what cannot be compiled, and so not be differentiated either."""
    try:
        y = function(x)
        known = not isinstance(y, (np.ndarray, np.generic)) and hasattr(y, "shape")
        why = f"it returns {type(y).__name__}"
        if known and not isinstance(function, keras.layers.Layer):
            # NumPy takes a tensor that has values, but not one that has a shape alone.
            spec = keras.KerasTensor(tuple(x.shape), "float32")
            keras.layers.Lambda(function).compute_output_spec(spec)
    except Exception as error:  # of anybody's code
        known, why = False, f"{type(error).__name__}: {reason(error)}"
    if not known:
        raise KerasNormError(
            "preprocessing is no differentiable function of a tensor",
            got=why,
            expected="a function made of keras.ops, or a layer",
            fix="NumPy has no gradients: use keras.ops in its place.",
        )


def _kind(operation: Any) -> str | None:
    """The attribute by which it can be taken off: its activation, or its call."""
    squash = (keras.activations.softmax, keras.activations.sigmoid)
    activation = getattr(operation, "activation", None)
    if isinstance(activation, _Aside) or activation in squash:
        return "activation"
    whole = type(operation).__name__ in ("Softmax", "Sigmoid")
    plain = getattr(operation, "axis", -1) in (-1, 1)
    return "call" if whole and plain else None


class _Aside:
    """Stands for an activation, and for a call, that some threads see taken off.

    The user may call the model at the same time: other threads see it as it is.
    """

    def __init__(self, function: Any):
        self.function = function
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.seen_off = threading.local()
        self.users = 0

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.seen_off, "depth", 0):
            return x
        return self.function(x, *args, **kwargs)


_LOCK = threading.Lock()


@contextlib.contextmanager
def _without(operation: Any) -> Iterator[None]:
    """Takes the activation off while a model is traced, for this thread alone."""
    if operation is None:
        yield
        return
    name: Any = _kind(operation)
    with _LOCK:
        aside = vars(operation).get(name)
        if not isinstance(aside, _Aside):
            aside = _Aside(getattr(operation, name))
            object.__setattr__(operation, name, aside)
        aside.users += 1
    seen = aside.seen_off
    seen.depth = getattr(seen, "depth", 0) + 1
    try:
        yield
    finally:
        seen.depth -= 1
        with _LOCK:
            aside.users -= 1
            if not aside.users and name == "activation":
                object.__setattr__(operation, name, aside.function)
            elif not aside.users:
                object.__delattr__(operation, name)


def random_states(model: Any) -> list[Any]:
    """Variables that hold the states of a model's random generators."""
    return [v for v in model.variables if v.name == "seed_generator_state"]


@contextlib.contextmanager
def _redrawn(model: Any, seed: Any) -> Iterator[None]:
    """Another random state for every generator of the model."""
    states = random_states(model)
    if seed is None or not states:
        yield
        return
    outer = private.get_stateless_scope()
    mapping = [(v, ops.cast(seed.next(), v.dtype)) for v in states]
    if outer is not None:
        # A scope hides the one around it, and what that maps.
        inside = [(v, outer.get_current_value(v)) for v in model.variables]
        drawn = {id(v) for v in states}
        mapping += [(v, x) for v, x in inside if x is not None and id(v) not in drawn]
    with keras.StatelessScope(state_mapping=mapping):
        yield
