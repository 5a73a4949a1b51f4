"""Recurrent cells with a normalization inside, and the layers that run them.

    keras.Sequential([keras.Input((None, 8)), kerasnorm.recurrent.LSTM(32, norm="ln")])

A cell takes any per-sample method by name, and the two methods of `kerasnorm.layers`
that follow a sequence: `"streaming"` and `"time_specific"`. A per-sample cell also runs
in `keras.layers.RNN`; the other two change state at every step and need `RNN` of this
module, as do their layers `LSTM`, `GRU` and `SimpleRNN`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

from kerasnorm.common.errors import KerasNormError, accepting
from kerasnorm.method.registry import Method, get
from rewriters import private


Tensor = Any


@dataclasses.dataclass
class _Stream:
    """One step of the sequence for the norms that follow it."""

    norms: list[Any]
    carries: list[list[Tensor]]
    mask: Tensor | None
    time: Tensor

    def __call__(self, norm: Any, x: Tensor, training: Any) -> Tensor:
        k = next(k for k, n in enumerate(self.norms) if n is norm)
        x = ops.cast(x, norm.statistics_dtype)[:, None]
        mask = None if self.mask is None else self.mask[:, None]
        y, self.carries[k] = norm.step(x, self.carries[k], mask, training, self.time)
        return ops.cast(y[:, 0], norm.compute_dtype)


def follows(norm: Any) -> bool:
    """Whether a norm is a stream along the sequence rather than a plain layer."""
    return hasattr(norm, "begin")


class Normalized(keras.layers.Layer):
    """What the cells share; mixed in before Keras's own cell."""

    units: int
    get_dropout_mask: Callable[..., Any]
    get_recurrent_dropout_mask: Callable[..., Any]
    dropout: float
    recurrent_dropout: float

    def __init__(
        self,
        units: int,
        norm: str | Method = "layer",
        norm_arguments: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(units, **kwargs)
        method = get(norm)
        self.norm = method.name
        self.norm_arguments = dict(norm_arguments or {})
        layer = method.layer
        if layer is None or not (method.family == "sample" or follows(layer)):
            raise KerasNormError(
                f"no recurrent cell can hold {method.title.lower()}",
                got=f"norm={norm!r}",
                expected="a per-sample method, 'streaming' or 'time_specific'",
            )
        for name in self.widths():
            with accepting(method.title, f"norm_arguments={self.norm_arguments}"):
                made = layer(**self.norm_arguments, dtype=self.dtype_policy, name=name)
            setattr(self, name, made)

    def widths(self) -> dict[str, int]:
        """Width of what each norm of the cell normalizes, by attribute."""
        raise NotImplementedError

    def build(self, input_shape):
        super().build(input_shape)
        for name, width in self.widths().items():
            getattr(self, name).build((None, width))

    def normalized(self, name: str, x: Tensor, training: Any, stream: Any) -> Tensor:
        norm = getattr(self, name)
        if not follows(norm):
            return norm(x)
        if stream is None:
            raise KerasNormError(
                f"{self.norm} statistics cannot follow this sequence",
                got=f"{type(self).__name__} {self.name!r} in another layer",
                expected="a layer of kerasnorm.recurrent around the cell",
                fix="Use `kerasnorm.recurrent.RNN(cell)`.",
            )
        return stream(norm, x, training)

    def masks(self, inputs: Tensor, h: Tensor, training: Any) -> tuple[Any, Any]:
        """Dropout masks of input and state: None, a tensor, or one per gate."""
        x = self.get_dropout_mask(inputs) if 0 < self.dropout < 1 else None
        u = self.recurrent_dropout
        u = self.get_recurrent_dropout_mask(h) if 0 < u < 1 else None
        return (x, u) if training else (None, None)

    def project(self, x: Tensor, kernel: Tensor, masks: Any, gates: range) -> Tensor:
        """`x` times the kernel's columns of some gates, dropout included."""
        units = self.units
        if isinstance(masks, list):
            parts = [
                ops.matmul(x * masks[g], kernel[:, g * units : (g + 1) * units])
                for g in gates
            ]
            return ops.concatenate(parts, axis=-1)
        x = x if masks is None else x * masks
        return ops.matmul(x, kernel[:, gates.start * units : gates.stop * units])

    def get_config(self):
        arguments = {
            k: keras.saving.serialize_keras_object(v) if hasattr(v, "get_config") else v
            for k, v in self.norm_arguments.items()
        }
        config = super().get_config()
        return {**config, "norm": self.norm, "norm_arguments": arguments}


@keras.saving.register_keras_serializable("kerasnorm")
class LSTMCell(Normalized, keras.layers.LSTMCell):
    """LSTM cell with normalized projections and state.

        i, f, g, o = norm(x W) + norm(h U) + b
        c = sigmoid(f) c + sigmoid(i) tanh(g)
        h = sigmoid(o) tanh(norm(c))

    Paper: Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450. With
    `cell_state="carry"` the normalized c is also what the next step gets, the form of
    tensorflow-addons. `norm="time_specific"` is that of Cooijmans et al., 2017,
    https://arxiv.org/abs/1603.09025 (with gamma started at 0.1), and
    `norm="streaming"` that of Liao et al., 2016, https://arxiv.org/abs/1610.06160.

    Args:
        units: width of the state.
        norm: name of the method, default `"layer"`.
        norm_arguments: arguments of the norms, such as `epsilon`.
        cell_state: `"output"` normalizes c for the output, `"carry"` for output and
            next step, None not at all. Default `"output"`.
        **kwargs: arguments of `keras.layers.LSTMCell`.

    Raises:
        KerasNormError: unknown method, or one that no cell can hold; arguments that it
            does not take.
    """

    def __init__(
        self,
        units: int,
        norm: str | Method = "layer",
        norm_arguments: Mapping[str, Any] | None = None,
        cell_state: str | None = "output",
        **kwargs: Any,
    ):
        if cell_state not in ("output", "carry", None):
            raise KerasNormError(
                "unknown place for the norm of the cell state",
                got=f"cell_state={cell_state!r}",
                expected="'output', 'carry' or None",
            )
        self._cell_state = cell_state
        super().__init__(units, norm, norm_arguments, **kwargs)
        self.cell_state = cell_state

    def widths(self):
        widths = {"kernel_norm": 4 * self.units, "recurrent_norm": 4 * self.units}
        return widths | ({"state_norm": self.units} if self._cell_state else {})

    def call(self, inputs, states, training=False, stream=None):
        h, c = states
        x_masks, h_masks = self.masks(inputs, h, training)
        x = self.project(inputs, self.kernel, x_masks, range(4))
        z = self.project(h, self.recurrent_kernel, h_masks, range(4))
        x = self.normalized("kernel_norm", x, training, stream)
        z = x + self.normalized("recurrent_norm", z, training, stream)
        if self.use_bias:
            z = z + self.bias
        i, f, g, o = ops.split(z, 4, axis=-1)
        c = self.recurrent_activation(f) * c
        c = c + self.recurrent_activation(i) * self.activation(g)
        shown = c
        if self.cell_state is not None:
            shown = self.normalized("state_norm", c, training, stream)
        h = self.recurrent_activation(o) * self.activation(shown)
        return h, [h, shown if self.cell_state == "carry" else c]

    def get_config(self):
        return {**super().get_config(), "cell_state": self.cell_state}


@keras.saving.register_keras_serializable("kerasnorm")
class GRUCell(Normalized, keras.layers.GRUCell):
    """GRU cell with normalized projections; gates and candidate apart.

        z, r = sigmoid(norm(x W) + norm(h U) + b)
        g = tanh(norm(x Wg) + bg + r * (norm(h Ug) + b'g))
        h = z h + (1 - z) g

    With `reset_after=False`, `norm((r * h) Ug)` stands in the second line.

    Paper: Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450

    Args:
        units: width of the state.
        norm: name of the method, default `"layer"`.
        norm_arguments: arguments of the norms, such as `epsilon`.
        **kwargs: arguments of `keras.layers.GRUCell`.

    Raises:
        KerasNormError: unknown method, or one that no cell can hold.
    """

    def widths(self):
        units = self.units
        return {
            "kernel_norm": 2 * units,
            "recurrent_norm": 2 * units,
            "candidate_kernel_norm": units,
            "candidate_recurrent_norm": units,
        }

    def call(self, inputs, states, training=False, stream=None):
        h = states[0] if isinstance(states, (list, tuple)) else states
        units, gates, candidate = self.units, range(2), range(2, 3)
        x_masks, h_masks = self.masks(inputs, h, training)

        def part(name, v, kernel, masks, which):
            v = self.project(v, kernel, masks, which)
            return self.normalized(name, v, training, stream)

        x = part("kernel_norm", inputs, self.kernel, x_masks, gates)
        xg = part("candidate_kernel_norm", inputs, self.kernel, x_masks, candidate)
        u = part("recurrent_norm", h, self.recurrent_kernel, h_masks, gates)
        bias = recurrent_bias = ops.zeros((3 * units,), self.compute_dtype)
        if self.use_bias:
            bias = self.bias
            if self.reset_after:
                bias, recurrent_bias = bias[0], bias[1]
        split = 2 * units
        z = self.recurrent_activation(x + u + (bias + recurrent_bias)[:split])
        z, r = ops.split(z, 2, axis=-1)
        inner = h if self.reset_after else r * h
        name = "candidate_recurrent_norm"
        u = part(name, inner, self.recurrent_kernel, h_masks, candidate)
        u = r * (u + recurrent_bias[split:]) if self.reset_after else u
        g = self.activation(xg + bias[split:] + u)
        h = z * h + (1 - z) * g
        return h, [h] if isinstance(states, (list, tuple)) else h


@keras.saving.register_keras_serializable("kerasnorm")
class SimpleRNNCell(Normalized, keras.layers.SimpleRNNCell):
    """Simple recurrent cell with the sum of both projections normalized.

        h = tanh(norm(x W + h U) + b)

    Paper: Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450; with
    `norm_arguments={"center": False}` the form of tensorflow-addons.

    Args:
        units: width of the state.
        norm: name of the method, default `"layer"`.
        norm_arguments: arguments of the norm, such as `epsilon`.
        **kwargs: arguments of `keras.layers.SimpleRNNCell`.

    Raises:
        KerasNormError: unknown method, or one that no cell can hold.
    """

    def widths(self):
        return {"state_norm": self.units}

    def call(self, sequence, states, training=False, stream=None):
        h = states[0] if isinstance(states, (list, tuple)) else states
        x_masks, h_masks = self.masks(sequence, h, training)
        z = self.project(sequence, self.kernel, x_masks, range(1))
        z = z + self.project(h, self.recurrent_kernel, h_masks, range(1))
        z = self.normalized("state_norm", z, training, stream)
        if self.bias is not None:
            z = z + self.bias
        h = z if self.activation is None else self.activation(z)
        return h, [h] if isinstance(states, (list, tuple)) else h


# -------------------------------------------------------------------- layers


@keras.saving.register_keras_serializable("kerasnorm")
class RNN(keras.layers.RNN):
    """`keras.layers.RNN` that also runs cells whose norms follow the sequence.

    Their state enters the loop as tensors and leaves it as one update, so that JAX, and
    gradients through the loop, see no variable change. Masked steps of a sample do not
    count in its statistics.

    Args:
        cell: a cell of `kerasnorm.recurrent`, or any that `keras.layers.RNN` takes.
        **kwargs: arguments of `keras.layers.RNN`.
    """

    def inner_loop(self, sequences, initial_state, mask, training=False):
        norms = []
        if isinstance(self.cell, Normalized):
            held = [getattr(self.cell, name) for name in self.cell.widths()]
            norms = [norm for norm in held if follows(norm)]
        if not norms:
            return super().inner_loop(sequences, initial_state, mask, training)
        states = keras.tree.flatten(initial_state)
        n = len(states)
        # What a masked step puts out again.
        shown = ops.zeros_like(states[0])
        begun = [norm.begin(training) for norm in norms]
        flat = [v for carry in begun for v in carry]
        inputs = sequences
        if mask is not None:
            # As one more feature: of several inputs TensorFlow's loop cannot tell a
            # length that varies.
            told = ops.cast(mask, sequences.dtype)[..., None]
            inputs = ops.concatenate([sequences, told], -1)

        def split(values):
            values = iter(values)
            return [[next(values) for _ in carry] for carry in begun]

        def step(inputs, states):
            x, valid = inputs, None
            if mask is not None:
                x, valid = inputs[..., :-1], inputs[..., -1:] > 0.5
            before, time = list(states[:n]), states[-1]
            shown, *carried = states[n:-1]
            stream = _Stream(norms, split(carried), valid, time)
            y, after = self.cell(x, before, training=training, stream=stream)
            after = list(after)
            if valid is not None:
                kept = 0 * y if self.zero_output_for_mask else shown
                y = ops.where(valid, y, kept)
                pairs = zip(after, before, strict=True)
                after = [ops.where(valid, new, old) for new, old in pairs]
            carried = [v for carry in stream.carries for v in carry]
            return y, [*after, y, *carried, time + 1]

        last, outputs, states = private.rnn(
            step,
            inputs,
            [*states, shown, *flat, ops.zeros((), "int32")],
            go_backwards=self.go_backwards,
            unroll=self.unroll,
            input_length=sequences.shape[1],
            return_all_outputs=self.return_sequences,
        )
        for norm, carry in zip(norms, split(states[n + 1 : -1]), strict=True):
            norm.end(carry, training)
        return last, outputs, list(states[:n])


class _CellLayer(RNN):
    """A recurrent layer made of its cell's arguments and those of `RNN`."""

    cell_class: type[Any]

    def __init__(
        self,
        units: int,
        norm: str | Method = "layer",
        norm_arguments: Mapping[str, Any] | None = None,
        *,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        unroll: bool = False,
        zero_output_for_mask: bool = False,
        activity_regularizer: Any = None,
        name: str | None = None,
        trainable: bool = True,
        dtype: Any = None,
        **kwargs: Any,
    ):
        cell = self.cell_class(
            units,
            norm,
            norm_arguments,
            dtype=dtype,
            trainable=trainable,
            name=f"{_snake(self.cell_class)}",
            **kwargs,
        )
        super().__init__(
            cell,
            return_sequences=return_sequences,
            return_state=return_state,
            go_backwards=go_backwards,
            stateful=stateful,
            unroll=unroll,
            zero_output_for_mask=zero_output_for_mask,
            activity_regularizer=activity_regularizer,
            name=name,
            trainable=trainable,
            dtype=dtype,
        )

    def get_config(self):
        config = super().get_config()
        config.pop("cell")
        regularizer = keras.regularizers.serialize(self.activity_regularizer)
        cell = self.cell.get_config()
        return {**cell, **config, "activity_regularizer": regularizer}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(**config)


def _snake(cls: type) -> str:
    return {"LSTMCell": "lstm_cell", "GRUCell": "gru_cell"}.get(
        cls.__name__, "simple_rnn_cell"
    )


def _document(cell: type[Any]) -> Callable[[type[Any]], type[Any]]:
    def decorate(cls):
        cls.cell_class = cell
        cls.__doc__ = f"""{cls.__name__} layer with a normalization inside.

    The equations are those of `{cell.__name__}`. All else, masks, states, dropout and
    dtype policies, is as in `keras.layers.{cls.__name__}`, without a fused GPU kernel.

    Args:
        units: width of the state.
        norm: name of the method, default `"layer"`.
        norm_arguments: arguments of the norms, such as `epsilon`.
        return_sequences, return_state, go_backwards, stateful, unroll,
            zero_output_for_mask: see `keras.layers.RNN`.
        **kwargs: arguments of `{cell.__name__}`.
    """
        return keras.saving.register_keras_serializable("kerasnorm")(cls)

    return decorate


@_document(LSTMCell)
class LSTM(_CellLayer):
    """Long short-term memory of normalized cells; see `LSTMCell`."""


@_document(GRUCell)
class GRU(_CellLayer):
    """Gated recurrent units that are normalized; see `GRUCell`."""


@_document(SimpleRNNCell)
class SimpleRNN(_CellLayer):
    """Simple recurrence, normalized; see `SimpleRNNCell`."""
