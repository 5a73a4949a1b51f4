"""Recurrent layers whose cells get a normalization inside."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.layers.group import default_groups
from kerasnorm.method.registry import Adoption, Edit, Fidelity, Method, Reason, Refusal
from kerasnorm.recurrent import GRU, LSTM, RNN, Normalized, SimpleRNN, follows
from rewriters.errors import reason
from rewriters.graph import Site
from rewriters.transfer import assign, copy_weights, own_variables


# Keras's class -> the normalized one.
TWINS = {getattr(keras.layers, k.__name__): k for k in (LSTM, GRU, SimpleRNN)}
CELLS = {
    getattr(keras.layers, k.cell_class.__name__): k.cell_class for k in TWINS.values()
}


def adopt_cell(
    site: Site,
    norm: Method,
    arguments: Mapping[str, Any],
    options: Mapping[str, Any],
    force: bool = False,
) -> Adoption | Refusal | None:
    """How a layer of Keras's recurrences becomes its normalized twin.

    Kernels, recurrent kernels and biases are carried over; the norms are fresh, so that
    the layer computes something else than before.

    Args:
        site: of the layer.
        norm: the method inside the cell.
        arguments: of the norms, such as `epsilon`.
        options: of the cells that have them, such as `cell_state`.
        force: also where nothing would be left of what a norm sees.

    Returns:
        None where the site holds no recurrent cell, or none without norms.
    """
    cells = cells_of(site.layer) if isinstance(site.layer, keras.layers.RNN) else []
    if not cells or all(isinstance(cell, Normalized) for cell in cells):
        return None
    if any(_elsewhere(site, cell) for cell in cells):
        return Refusal(
            Reason.SHARED, f"a cell of {site.path} is also held outside of it", None
        )
    kind = TWINS.get(type(site.layer))
    made = {"norm": norm, "norm_arguments": arguments}
    try:
        if kind is not None:
            config = site.layer.get_config()
            for word in ("implementation", "use_cudnn", "time_major"):
                config.pop(word, None)
            layer = kind(**_arguments(config, kind.cell_class, options, made))
        else:
            layer = _with_twins(site.layer, options, made)
        twins = [c for c in cells_of(layer) if isinstance(c, Normalized)]
        blind = next((c for c in twins if not force and _is_blind(c)), None)
    except KerasNormError as error:
        return Refusal(Reason.NO_RULE, error.what, error.fix)
    except (TypeError, ValueError) as error:  # functions of one's own in a config
        return Refusal(Reason.NO_RULE, f"it cannot be made again: {reason(error)}")
    if blind is not None:
        return Refusal(
            Reason.DEGENERATE,
            f"{blind.units} units leave {norm.title.lower()} nothing but a constant",
            "force=True, if you mean it",
        )
    stay = [type(c).__name__ for c in cells_of(layer) if not isinstance(c, Normalized)]
    note = "kernels kept, the norms are new"
    note += f"; {', '.join(stay)} without a norm" if stay else ""
    edit = Edit(site.path, keras.saving.serialize_keras_object(layer))
    return Adoption((edit,), Fidelity.FRESH, note)


def _elsewhere(site: Site, cell: Any) -> bool:
    """Whether something beside the layer holds its cell."""
    inner = tuple(f"{path}/" for path in site.paths)
    held = site._map.by_id.get(id(cell))
    return held is not None and not all(p.startswith(inner) for p in held.paths)


def _arguments(
    config: Mapping[str, Any],
    cell: Any,
    options: Mapping[str, Any],
    made: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of a cell, or its layer, like one of this config."""
    norm, arguments = made["norm"], dict(made["norm_arguments"])
    if norm.name == "group" and "groups" not in arguments:
        arguments["groups"] = default_groups(config["units"])
    known = {k: v for k, v in options.items() if k in cell_options(cell)}
    return {**config, **known, "norm": norm, "norm_arguments": arguments}


def _is_blind(cell: Normalized) -> bool:
    """Whether a norm of the cell puts out the same for all inputs.

    Raises:
        KerasNormError: one is not defined on its vectors.
    """
    rng = np.random.default_rng(0)
    again = type(cell).from_config(cell.get_config())
    for name, width in cell.widths().items():
        norm = getattr(again, name)
        norm.build((None, width))
        if follows(norm):
            continue
        y = norm(rng.normal(size=(8, width)).astype("float32"), training=False)
        y = ops.convert_to_numpy(ops.cast(y, "float32"))
        if np.ptp(y, axis=0).max() < 1e-6:
            return True
    return False


def _with_twins(layer: Any, options: Mapping[str, Any], made: Mapping[str, Any]) -> Any:
    """`layer`, an RNN, with twins of the cells that have one."""
    cells = cells_of(layer)
    kinds = [CELLS.get(type(cell)) for cell in cells]
    own = type(layer) not in (keras.layers.RNN, RNN)
    if own or not any(kinds):
        what = layer if own else cells[0]
        raise KerasNormError(
            f"there is no normalized {type(what).__name__}",
            got=f"{type(layer).__name__} {layer.name!r}",
            expected=f"one of {', '.join(k.__name__ for k in CELLS)}",
        )
    twins = [
        kind(**_arguments(cell.get_config(), kind, options, made)) if kind else cell
        for kind, cell in zip(kinds, cells, strict=True)
    ]
    stacked = isinstance(layer.cell, keras.layers.StackedRNNCells)
    if stacked and follows(made["norm"].layer):
        raise KerasNormError(
            f"{made['norm'].title.lower()} does not follow stacked cells",
            got=f"{len(cells)} cells in {layer.name!r}",
            expected="one cell",
            fix="a layer for each of the cells",
        )
    if stacked:
        config = layer.cell.get_config()
        config["cells"] = [keras.saving.serialize_keras_object(cell) for cell in twins]
        cell = keras.layers.StackedRNNCells.from_config(config)
    else:
        (cell,) = twins
    config = layer.get_config()
    config["cell"] = keras.saving.serialize_keras_object(cell)
    return RNN.from_config(config)


def cells_of(layer: Any) -> list[Any]:
    """The cells of a recurrent layer, in order; none of any other."""
    cell = getattr(layer, "cell", None)
    return [] if cell is None else list(getattr(cell, "cells", [cell]))


def cell_options(cell: Any) -> set[str]:
    """Arguments that a cell of this module has beside those of Keras's."""
    own = set(inspect.signature(cell.__init__).parameters)
    return own - {"self", "units", "norm", "norm_arguments", "kwargs"}


def carry_cells(old: Any, new: Any) -> None:
    """Copies the weights of a recurrent layer's cells to those of its twin."""
    for before, after in zip(cells_of(old), cells_of(new), strict=True):
        if type(before) is type(after):
            copy_weights({id(before): (before, after)})
            continue
        twins = {v.name: v for v in own_variables(after)}
        for variable in own_variables(before):
            twin = twins.get(variable.name)
            if twin is not None and twin.shape == variable.shape:
                assign(twin, variable)
                twin.trainable &= variable.trainable
        if not before.trainable:
            _freeze(after)
    if not old.trainable:
        _freeze(new)


def _freeze(layer: Any) -> None:
    """With what it holds: the constructor's flag does not reach that, and setting a
    flag to what it is does nothing on TensorFlow."""
    layer.trainable = True
    layer.trainable = False
