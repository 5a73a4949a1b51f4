"""`rewrite`: load -> sites -> plan -> apply -> fit -> report -> save."""

from __future__ import annotations

import inspect
import os
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import keras
import numpy as np

from kerasnorm.common.errors import KerasNormError, taking
from kerasnorm.kernels.reparametrized import Reparametrized
from kerasnorm.method.registry import Edit, Method, get, read
from kerasnorm.recurrent import RNN
from kerasnorm.rewriting.cells import carry_cells
from kerasnorm.rewriting.plan import Plan, known_arguments, plan
from kerasnorm.rewriting.report import Report
from kerasnorm.rewriting.verify import verify
from kerasnorm.runtime.models import is_path, opened
from rewriters import private
from rewriters.edit import Edited, custom_objects_of, edit
from rewriters.errors import reason
from rewriters.exchange import deserialize
from rewriters.graph import Site, SiteMap
from rewriters.saving import check_target, save
from rewriters.transfer import own_variables, paired_layers


@overload
def rewrite(
    model: Any,
    method: str | Method | Plan | None = None,
    *,
    weights: str | Method | None = None,
    data: Any = None,
    fit: Literal["affine", "refit", "distill"] | None = None,
    where: str | Callable[[Site], bool] | None = None,
    groups: int | Literal["auto", "paper"] | None = None,
    cells: bool | Mapping[str, Any] = False,
    layers: Literal["auto", "keras", "kerasnorm"] = "auto",
    force: bool = False,
    strict: bool = False,
    out: str | os.PathLike[str] | None = None,
    return_report: Literal[False] = False,
    custom_objects: Mapping[str, Any] | None = None,
    fit_options: Mapping[str, Any] | None = None,
    verbose: bool | int = True,
    **arguments: Any,
) -> keras.Model: ...


@overload
def rewrite(
    model: Any,
    method: str | Method | Plan | None = None,
    *,
    weights: str | Method | None = None,
    data: Any = None,
    fit: Literal["affine", "refit", "distill"] | None = None,
    where: str | Callable[[Site], bool] | None = None,
    groups: int | Literal["auto", "paper"] | None = None,
    cells: bool | Mapping[str, Any] = False,
    layers: Literal["auto", "keras", "kerasnorm"] = "auto",
    force: bool = False,
    strict: bool = False,
    out: str | os.PathLike[str] | None = None,
    return_report: Literal[True],
    custom_objects: Mapping[str, Any] | None = None,
    fit_options: Mapping[str, Any] | None = None,
    verbose: bool | int = True,
    **arguments: Any,
) -> tuple[keras.Model, Report]: ...


@taking()
def rewrite(
    model: Any,
    method: str | Method | Plan | None = None,
    *,
    weights: str | Method | None = None,
    data: Any = None,
    fit: Literal["affine", "refit", "distill"] | None = None,
    where: str | Callable[[Site], bool] | None = None,
    groups: int | Literal["auto", "paper"] | None = None,
    cells: bool | Mapping[str, Any] = False,
    layers: Literal["auto", "keras", "kerasnorm"] = "auto",
    force: bool = False,
    strict: bool = False,
    out: str | os.PathLike[str] | None = None,
    return_report: bool = False,
    custom_objects: Mapping[str, Any] | None = None,
    fit_options: Mapping[str, Any] | None = None,
    verbose: bool | int = True,
    **arguments: Any,
) -> Any:
    """A new model with its normalization layers swapped.

    The original is untouched. Names, `trainable` flags, dtype policies, shared and
    nested layers, the compiled state and optimizer slots are kept. Where all steps are
    exact, the outputs of both models are compared on random inputs.

    Args:
        model: a Keras model of any kind, or the path of a saved one.
        method: name or alias of the target method, or a `Plan`; None where `weights`
            says all.
        weights: name or alias of a weight method for all kernels, such as `"wn"`; the
            normalization layers stay, or follow `method`.
        data: unlabelled inputs for the fit: arrays, a list or dict of arrays, a
            `tf.data.Dataset`, a `PyDataset` or a generator; labels are ignored.
        fit: `"affine"` (seconds; a few hundred samples), `"refit"` (also the linear
            layers), `"distill"` (also trains on the original's outputs), or None to
            carry gamma and beta over only. Without `data`, None; with it, `"affine"`
            by default.
        where, groups, cells, layers, force, **arguments: see `plan`.
        strict: layers that stay are an error, not one warning that says how many and
            why.
        out: where to save the new model; never over the input.
        return_report: also return the `Report`.
        custom_objects: passed on to `load`.
        fit_options: further arguments of the fit, such as `samples`, `epochs`,
            `batch_size`, `memory`, `seed`.
        verbose: False for no progress bar.

    Returns:
        The new `keras.Model`, or `(model, report)`.

    Raises:
        KerasNormError: bad arguments or data, a `where` that selects nothing, or, with
            `strict`, a layer that stays: before any work; an exact step that turned
            out not to be.
        RewriteError: a file that cannot be read, a model that cannot be rebuilt.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4),
    ...                           keras.layers.BatchNormalization()])
    >>> kerasnorm.rewrite(model, "none").layers[-1].name
    'dense'
    """
    started = time.perf_counter()
    source = model if is_path(model) else None
    wanted = {
        "weights": weights,
        "where": where,
        "groups": groups,
        "cells": cells,
        "layers": layers,
        "force": force,
        **arguments,
    }
    _check(method, wanted, data, fit, fit_options, out, source)
    model = opened(model, custom_objects)
    site_map = SiteMap(model)
    if not isinstance(method, Plan):
        method = plan(model, method, site_map=site_map, **wanted)
    if strict and method.staying:
        raise KerasNormError(
            "not all layers can be swapped",
            got=method.staying,
            fix="print(kerasnorm.plan(...)) shows the details; without strict=True"
            " the others are swapped",
        )
    if (
        fit is None
        and data is not None
        and ("auto" in (method.groups, method.epsilon) or not method.exact)
    ):
        fit = "affine"
    if data is not None:
        data = _read(model, data, fit, fit_options)
    edited = apply(model, method, site_map=site_map)
    compared, fitted = None, None
    if method.exact:
        compared = verify(
            model,
            edited.model,
            f"the rewrite to {method.method!r}",
            fix="Leave out steps with `where`, and report this model.",
        )
    if fit is not None and method.steps:
        fitted = _fit(model, edited, method, site_map, data, fit, fit_options, verbose)
        edited.renew_averages()
        _warn_of(fitted, fit)
    report = Report(
        plan=method,
        fit=fitted,
        comparison=None if isinstance(compared, str) else compared,
        unverified=compared if isinstance(compared, str) else None,
        seconds=time.perf_counter() - started,
        parameters=(model.count_params(), edited.model.count_params())
        if model.built
        else None,
    )
    if out is not None:
        save(edited.model, out, inputs=(source,))
    if method.staying:
        warnings.warn(f"{method.staying}.", stacklevel=3)  # past `taking`
    return (edited.model, report) if return_report else edited.model


def apply(model: Any, plan: Plan, *, site_map: SiteMap | None = None) -> Edited:
    """Carries a plan out on a model: the new model, with weights carried over.

    Args:
        model: the model the plan was made for, or one of the same architecture.
        plan: from `plan`, or `Plan.from_json`.

    Raises:
        KerasNormError: a layer of the plan is not in this model, or cannot be made.
    """
    site_map = site_map or SiteMap(model)
    paths = [e.path for s in plan.steps for e in s.edits]
    missing = [p for p in paths if p not in site_map.by_path]
    if missing:
        raise KerasNormError(
            f"the plan is for another model ({plan.model!r})",
            got=f"no layer at {', '.join(map(repr, missing[:5]))}",
            expected=f"a layer at each of its {len(paths)} paths",
        )
    for step in plan.steps:
        layer = site_map[step.path].layer
        kinds = type(layer).__name__, getattr(read(layer), "method", None)
        if step.source not in kinds:
            raise KerasNormError(
                f"the plan is for another model ({plan.model!r})",
                got=f"{step.path!r} is a {kinds[0]}",
                expected=step.source,
            )
    with keras.saving.custom_object_scope(custom_objects_of(site_map)):
        layers = {
            e.path: _made(e, site_map[e.path].layer)
            for s in plan.steps
            for e in s.edits
        }
    drops = {e.path: e.drops for s in plan.steps for e in s.edits}

    def carry_all(edited: Edited) -> None:
        for step in plan.steps:
            held = {
                e.path: (old, edited.new(old))
                for e in step.edits
                for old in [site_map[e.path].layer]
            }
            old, new = held.get(step.path, (None, None))
            if isinstance(new, RNN):
                carry_cells(old, new)
                continue
            carry(get(step.method), read(site_map[step.path].layer), held)
            for old, new in held.values():
                keep_frozen(old, new)

    edited = edit(model, layers, drops=drops, site_map=site_map, carry=carry_all)
    edited.renew_averages()
    return edited


def _made(edit: Edit, old: Any) -> Any:
    """The layer of an edit in place of the old one, None where there is none."""
    try:
        return edit.layer and deserialize(edit.layer, old)
    except (TypeError, ValueError) as error:
        raise KerasNormError(
            f"the layer at {edit.path!r} cannot be made",
            got=reason(error),
            fix="Register its own classes and functions with "
            "`keras.saving.register_keras_serializable`.",
        ) from error


def carry(method: Method, source: Any, layers: Mapping[str, tuple[Any, Any]]) -> None:
    """Sets the weights of new layers from what the old normalization had learnt."""
    if method.carry is not None:
        method.carry(source, layers)
        return
    for _, new in layers.values():
        for variable in new.variables if new is not None else ():
            value = source.weights.get(_canonical(variable))
            if value is not None and np.size(value) == np.prod(variable.shape):
                variable.assign(np.reshape(value, variable.shape))


_CANONICAL = {
    "scale": "gamma",
    "moving_mean": "mean",
    "moving_variance": "variance",
}


def _canonical(variable: Any) -> str:
    return _CANONICAL.get(variable.name) or variable.name


def keep_frozen(old: Any, new: Any) -> None:
    """Freezes what stands for variables of a trainable layer frozen by themselves."""
    if new is None:
        return
    before, after = (
        x.layer if isinstance(x, Reparametrized) else x for x in (old, new)
    )
    for a, b in paired_layers({id(before): (before, after)}):
        known = private.trainable_variables(a) if a.trainable else ()
        frozen = {_canonical(v) for v in known if not v.trainable}
        for w in own_variables(b):
            w.trainable &= _canonical(w) not in frozen
    for kernel in new.kernels if isinstance(new, Reparametrized) else ():
        for parameter in new.parameters(kernel).values():
            parameter.trainable &= kernel.variable.trainable


def _read(
    model: Any, data: Any, fit: str | None, options: Mapping[str, Any] | None
) -> Any:
    """The data as a fit sees it, checked also where no fit will be."""
    from kerasnorm.fitting.fit import prepare

    of_reading = {
        k: v for k, v in (options or {}).items() if k in ("samples", "memory")
    }
    return prepare(model, data, fit or "affine", **of_reading)


def _fit(
    model: Any,
    edited: Edited,
    plan: Plan,
    site_map: SiteMap,
    data: Any,
    method: str,
    options: Mapping[str, Any] | None,
    verbose: bool | int,
) -> Any:
    from kerasnorm.fitting.fit import fit

    pairs = [
        (step.path, old, new)
        for step in plan.steps
        for old in [site_map[step.path].layer]
        if read(old) is not None and (new := edited.new(old)) is not None
    ]
    return fit(
        model,
        edited.model,
        pairs,
        data,
        method,
        choose=[
            name
            for name in ("groups", "epsilon")
            if name in known_arguments(get(plan.method))
            and getattr(plan, name) in (None, "auto")
        ],
        verbose=verbose,
        **(options or {}),
    )


# Below this agreement with the original a user is warned.
LOW = 0.9


def _warn_of(fitted: Any, fit: str) -> None:
    """Warns where answers are no longer the original's, and says what to try."""
    low = [a for a in fitted.agreement if a.rate is not None and a.rate < LOW]
    if low:
        nearer = {
            "affine": 'fit="refit", which solves the other layers as well',
            "refit": 'fit="distill", which trains on the original\'s outputs',
        }.get(fit, 'more epochs (fit_options={"epochs": 10})')
        told = "; ".join(map(str, low))
        warnings.warn(
            f"The new model {told}. Try {nearer}, more data, or another method.",
            stacklevel=4,
        )


def _check(
    method: Any,
    wanted: Mapping[str, Any],
    data: Any,
    fit: Any,
    options: Any,
    out: Any,
    source: Any,
) -> None:
    """Everything that can be known to be wrong before any work."""
    if isinstance(method, Plan):
        defaults = inspect.signature(plan).parameters
        for name, value in wanted.items():
            if name not in defaults or value != defaults[name].default:
                raise KerasNormError(
                    "a plan says already what is done",
                    got=f"{name}={value!r} beside a plan",
                    fix="Give it to `kerasnorm.plan`.",
                )
    for name in (method, wanted["weights"]):
        if name is not None and not isinstance(name, Plan):
            get(name)
    for name in ("groups", "epsilon"):
        given = getattr(method, name) if isinstance(method, Plan) else wanted.get(name)
        if given == "auto" and data is None:
            raise KerasNormError(
                f"a fit chooses {name}, and needs data",
                got=f"{name}={given!r}, data=None",
                fix="Pass some of the model's inputs, unlabelled, as `data`.",
            )
    if options is not None:
        from kerasnorm.fitting.fit import check_options

        check_options(options)
    if fit is not None and data is None:
        raise KerasNormError(
            f"fit={fit!r} needs data",
            got="data=None",
            fix="Pass some of the model's inputs, unlabelled, as `data`.",
        )
    if options and data is None:
        raise KerasNormError(
            "there are options of a fit and no fit",
            got=f"fit_options={dict(options)!r}, data=None",
            fix="Pass `data`, or leave them away.",
        )
    if out is not None:
        check_target(out, inputs=(source,))
