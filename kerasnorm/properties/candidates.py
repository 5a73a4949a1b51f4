"""The same model under another method: freshly initialized, or with its weights."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.kernels.reparametrized import Reparametrized
from kerasnorm.method.registry import Method, Reason, get, methods, read
from kerasnorm.rewriting.apply import apply
from kerasnorm.rewriting.plan import Plan, plan
from rewriters import private
from rewriters.edit import edit
from rewriters.graph import SiteMap


# What Lubana et al. study, in their order, and the same network without.
STUDIED = (
    "batch",
    "layer",
    "instance",
    "group",
    "filter_response",
    "variance",
    "evonorm_b0",
    "evonorm_s0",
    "weight",
    "scaled_weight_standardization",
    "none",
)


def chosen(names: Any) -> list[Method]:
    """The methods to compare, each once.

    Args:
        names: names or methods, one or several; `"all"`; None for those of `STUDIED`.

    Raises:
        KerasNormError: an unknown method, or none.
    """
    if isinstance(names, str) and names == "all":
        return list(methods().values())
    names = STUDIED if names is None else names
    names = [names] if isinstance(names, (str, Method)) else names
    found = {get(name).name: get(name) for name in names}
    if not found:
        raise KerasNormError("no method to compare", got="methods=[]")
    return list(found.values())


def fresh(model: Any, seed: int = 0) -> Any:
    """A copy of a model with newly drawn weights; the model is untouched.

    Every layer is made anew from its config, so that its own initializers speak. Two
    layers with the same path get the same weights from the same seed, whatever else is
    in the model. A layer that cannot be made anew keeps the weights it has.

    Args:
        model: a built Keras model.
        seed: of the initializers that have none of their own.
    """
    with _drawing(f"{seed}/"):
        new = edit(model, {}).model
    for site in SiteMap(new, tracing=False):
        with _drawing(f"{seed}/{site.path}"):
            _draw(site.layer)
    with _drawing(f"{seed}/"):
        _draw(new)
    return new


def _draw(layer: Any) -> None:
    """Gives a layer's own variables, not those of layers within, initial values."""
    own = private.own_variables(layer)
    if not own:
        return
    with contextlib.suppress(Exception):  # a class that its config does not describe
        made = type(layer).from_config(layer.get_config())
        made.build_from_config(layer.get_build_config())
        values = private.own_variables(made)
        if [tuple(v.shape) for v in values] == [tuple(v.shape) for v in own]:
            for variable, value in zip(own, values, strict=True):
                variable.assign(value)


@contextlib.contextmanager
def _drawing(seed: str) -> Iterator[None]:
    """Context in which initializers without a seed draw theirs from this one: Keras
    takes it from Python's own generator."""
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)


def put_under(
    model: Any, method: str | Method, x: Sequence[Any] | None, seed: int = 0
) -> tuple[Any, Plan]:
    """A copy of a model under a method, and the plan it was made by.

    Args:
        model: the model; with fresh weights where `x` is given.
        method: the method; a model that has it already is copied.
        x: a batch of inputs, flat: the model then starts as the method's paper says.
            None keeps what the weights know, as far as `rewrite` does without data.
        seed: of what the method draws itself.

    Returns:
        The new model, or None where the method applies nowhere.
    """
    method = get(method)
    site_map = SiteMap(model)
    norms = [s for s in site_map if read(s.layer) is not None]
    kernels = method.wrap is not None and not norms
    words = {"weights": method} if kernels else {"method": method}
    made = plan(model, site_map=site_map, **words)  # type: ignore[arg-type]
    if not made.steps or x is not None:
        # With fresh weights nothing is lost where a rule is not exact.
        forced = plan(model, site_map=site_map, force=True, **words)  # type: ignore
        degenerate = tuple(r for r in made.refused if r.reason is Reason.DEGENERATE)
        made = Plan(
            forced.method,
            forced.model,
            forced.steps,
            (*degenerate, *forced.refused),
            forced.groups,
            forced.weights,
        )
    already = [r for r in made.refused if r.reason is Reason.ALREADY]
    without = method.family == "none" and not norms
    if not made.steps and not already and not without:
        return None, made
    with _drawing(f"{seed}/{method.name}"):
        edited = apply(model, made, site_map=site_map)
    if x is not None:
        layers = [edited.new(site_map[s.path].layer) for s in made.steps]
        new = _of_method(edited.model, method, [v for v in layers if v is not None])
        for layer in new:
            if isinstance(layer, Reparametrized):
                _start(layer)
        if method.start is not None:
            method.start(edited.model, new, list(x))
    return edited.model, made


def _of_method(model: Any, method: Method, layers: Sequence[Any]) -> list[Any]:
    """The layers of a method in a model; folded ones stand elsewhere than the steps."""
    cls = method.layer
    if cls is None or not issubclass(cls, Reparametrized):
        return list(layers)
    return [
        v
        for v in private.flatten_layers(model, include_self=False)
        if isinstance(v, cls)
    ]


def _start(layer: Reparametrized) -> None:
    """The method's own parameters as training starts with them, rather than such that
    an old kernel is kept."""
    for kernel in layer.kernels:
        v = kernel.columns(ops.cast(ops.convert_to_tensor(kernel.variable), "float32"))
        values = {**layer.initial(v), **layer.state(v)}
        for name, variable in layer.parameters(kernel).items():
            if name in values:
                variable.assign(values[name])


def why_not(made: Plan) -> str:
    """Why a method applies nowhere, from the refusals of its plan."""
    if not made.refused:
        return "there is no layer for it"
    reasons = Counter(r.reason for r in made.refused)
    reason = reasons.most_common(1)[0][0]
    first = next(r for r in made.refused if r.reason is reason)
    return f"{reason}: {first.detail}"


def size(model: Any) -> int:
    """Number of trainable parameters."""
    return int(sum(np.prod(v.shape) for v in model.trainable_weights))


def as_inputs(arrays: Sequence[np.ndarray], batch: int) -> list[Any]:
    """The first samples as tensors."""
    return [keras.ops.convert_to_tensor(a[:batch]) for a in arrays]
