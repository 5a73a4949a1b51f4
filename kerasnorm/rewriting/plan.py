"""What a rewrite would do, as data: every matched site once, as a step or a refusal."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import keras

from kerasnorm.common.errors import KerasNormError, taking
from kerasnorm.method.registry import (
    Adoption,
    Edit,
    Fidelity,
    Method,
    Options,
    Reason,
    Refusal,
    Source,
    get,
    read,
)
from kerasnorm.rewriting.cells import CELLS, adopt_cell, cell_options
from kerasnorm.runtime.models import opened
from rewriters.arguments import shown
from rewriters.edit import custom_objects_of
from rewriters.graph import Site, SiteMap, selects


# So many paths are named for one reason, at most.
FEW = 3


@dataclass(frozen=True)
class Step:
    """One normalization layer that will be swapped, or layer that will be wrapped.

    Args:
        path: where it is.
        source: the method it computes now, or the class of a layer with kernels.
        method: the method it will compute.
        fidelity: how much of the trained function is kept without data.
        edits: the layers replaced or removed for it.
        note: what else the reader should know.
    """

    path: str
    source: str
    method: str
    fidelity: Fidelity
    edits: tuple[Edit, ...]
    note: str = ""

    @property
    def layer(self) -> str:
        """Class that takes the place, or what happens instead."""
        for edit in self.edits:
            if edit.path == self.path and edit.layer is not None:
                name = edit.layer.get("registered_name") or ""
                return name if ">" in name else edit.layer["class_name"]
        others = [e.path for e in self.edits if e.layer is not None]
        return f"into {', '.join(others)}" if others else "removed"


@dataclass(frozen=True)
class Refused:
    """One normalization layer that stays: why, with values, and what would do."""

    path: str
    source: str
    reason: Reason
    detail: str
    instead: str | None = None


@dataclass(frozen=True)
class Plan:
    """What `rewrite` would do with a model.

    Args:
        method: name of the target method.
        model: name of the model planned for.
        steps: the swaps, in order of computation.
        refused: the normalization layers that stay, each with its reason.
        groups, epsilon: as they were given; where they are None a fit chooses them, and
            where they are `"auto"` there has to be one.
        weights: name of the weight method around kernels, beside `method`.

    `print(plan)` gives a table; `to_json` and `from_json` are inverse to each other.
    """

    method: str
    model: str
    steps: tuple[Step, ...] = ()
    refused: tuple[Refused, ...] = ()
    groups: int | str | None = field(default=None)
    epsilon: float | str | None = field(default=None)
    weights: str | None = None

    @property
    def fidelity(self) -> Fidelity | None:
        """The least faithful of the steps; None for an empty plan."""
        order = list(Fidelity)
        return max((s.fidelity for s in self.steps), key=order.index, default=None)

    @property
    def exact(self) -> bool:
        """Whether the new model must compute at inference what the old one did."""
        return self.fidelity in (None, Fidelity.EXACT, Fidelity.AT_INFERENCE)

    @property
    def staying(self) -> str | None:
        """How many layers stay that should be swapped, and why; None where none do.
        Layers that are of the method already are as wanted."""
        if not self.steps and not self.refused:
            return f"{self.model!r} has no layer to swap"
        reasons: dict[Reason, list[str]] = {}
        for r in self.refused:
            if r.reason is not Reason.ALREADY:
                reasons.setdefault(r.reason, []).append(r.path)
        if not reasons:
            return None
        stay = sum(map(len, reasons.values()))
        why = "; ".join(
            f"{reason} ({', '.join(paths[:FEW])}{', ...' * (len(paths) > FEW)})"
            for reason, paths in reasons.items()
        )
        return f"{stay} of {len(self.steps) + stay} layers stay as they are: {why}"

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            KerasNormError: the text is not one.
        """
        try:
            data = json.loads(text)
            steps = tuple(
                Step(
                    **{
                        **s,
                        "fidelity": Fidelity(s["fidelity"]),
                        "edits": tuple(
                            Edit(**{**e, "drops": tuple(e["drops"])})
                            for e in s["edits"]
                        ),
                    }
                )
                for s in data["steps"]
            )
            refused = tuple(
                Refused(**{**r, "reason": Reason(r["reason"])}) for r in data["refused"]
            )
            return cls(**{**data, "steps": steps, "refused": refused})
        except (TypeError, ValueError, KeyError) as error:
            raise KerasNormError(
                "not a plan", got=str(error), expected="text from `Plan.to_json`"
            ) from error

    def __str__(self) -> str:
        from kerasnorm.rewriting.report import plan_table

        return plan_table(self)


@taking()
def plan(
    model: Any,
    method: str | Method | None = None,
    *,
    weights: str | Method | None = None,
    where: str | Callable[[Site], bool] | None = None,
    groups: int | Literal["auto", "paper"] | None = None,
    cells: bool | Mapping[str, Any] = False,
    layers: Literal["auto", "keras", "kerasnorm"] = "auto",
    force: bool = False,
    site_map: SiteMap | None = None,
    **arguments: Any,
) -> Plan:
    """What `rewrite(model, method)` would do; nothing is done.

    Args:
        model: a Keras model, or the path of a saved one.
        method: name or alias of the target method, `"gn"`, `"group"`, ...; None leaves
            the normalization layers alone.
        weights: name or alias of a weight method, `"ws"`, `"sn"`, ..., that takes over
            the kernels of all layers that have some, whatever normalizes their
            outputs.
        where: a glob on the path of the layers to swap (`"block*/bn*"`; `*` crosses
            `/`), or a callable that takes a `Site`; all normalization layers when None.
        groups: number of groups for methods that have them, -1 for one per channel.
            `"paper"`: 32, or as many as leave 16 channels to a group. `"auto"`: what
            keeps most variance on the data of the fit, which is the default where
            there is one; else the default is `"paper"`.
        cells: also put the method inside the cells of LSTM, GRU and SimpleRNN layers;
            a dict gives further arguments of the cells, such as `cell_state`.
        layers: `"auto"` takes Keras's own layers where they compute the method
            correctly, `"keras"` only these, `"kerasnorm"` never.
        force: swap also where the statistics would be degenerate.
        **arguments: further arguments of the target layer, such as `epsilon`; of the
            weight method's where there is no other. `epsilon="auto"`, the default where
            there is a fit, lets it add up to the mean variance: see `choose` of
            `kerasnorm.fitting.fit.fit`.

    Returns:
        A `Plan`: every matched normalization layer (with `weights`, layer with kernels)
        is a step or a refusal.

    Raises:
        KerasNormError: unknown method, argument or value; `where` selects nothing.
    """
    site_map = site_map or SiteMap(opened(model))
    target, around = _targets(method, weights)
    first = target or around
    if first is None:
        raise KerasNormError(
            "nothing to rewrite to",
            got="method=None, weights=None",
            expected="a normalization method, a weight method, or both",
        )
    options = _options(first, groups, layers, force, arguments)
    with keras.saving.custom_object_scope(custom_objects_of(site_map)):
        builder = _built(site_map, target, around, where, cells, options)
    if where is not None and not builder.steps and not builder.refused:
        everywhere = _built(site_map, target, around, None, cells, options)
        found = [x.path for x in (*everywhere.steps, *everywhere.refused)]
        raise KerasNormError(
            "no layer that could be swapped is selected",
            got=f"where={shown(where)}",
            expected=f"some of {', '.join(found[:5])}{', ...' * (len(found) > 5)}"
            if found
            else f"a model that has one, which {site_map.model.name!r} has not",
        )
    return Plan(
        first.name,
        getattr(site_map.model, "name", ""),
        tuple(builder.steps),
        tuple(builder.refused),
        groups,
        arguments.get("epsilon"),
        around.name if around is not None and target is not None else None,
    )


def _built(
    site_map: SiteMap,
    target: Method | None,
    around: Method | None,
    where: str | Callable[[Site], bool] | None,
    cells: bool | Mapping[str, Any],
    options: Options,
) -> _Builder:
    """The answers of the methods at all sites."""
    builder = _Builder()
    whole: list[str] = []  # within what is replaced with all that it holds
    if target is not None:
        for site in site_map:
            source = read(site.layer)
            if source is not None and selects(where, site):
                name = getattr(source, "method", type(site.layer).__name__)
                within = next((w for w in whole if site.path.startswith(w)), None)
                if within is None:
                    answer = _adopt(target, source, site, options)
                else:
                    answer = Refusal(
                        Reason.SHARED,
                        f"{within[:-1]!r} is replaced as a whole",
                        "rewrite the result once more",
                    )
                builder.add(site, name, target, answer)
            elif cells is not False and selects(where, site):
                answer = adopt_cell(
                    site,
                    target,
                    options.arguments,
                    _cell_options(cells),
                    options.force,
                )
                if isinstance(answer, Adoption):
                    whole += [f"{path}/" for path in site.paths]
                if answer is not None:
                    builder.add(site, type(site.layer).__name__, target, answer)
        planned = {e.path: e.layer for s in builder.steps for e in s.edits}
        options = Options(options.layers, options.force, planned=planned)
    if around is not None and around.wrap is not None:
        held: list[str] = []
        for site in site_map:
            within = any(path.startswith(tuple(held)) for path in site.paths)
            if within or not selects(where, site):
                continue
            answer = around.wrap(site, options)
            if answer is not None:
                held += [f"{path}/" for path in site.paths]
                builder.add(site, type(site.layer).__name__, around, answer)
    return builder


class _Builder:
    """Collects answers; no layer is changed for two of them."""

    def __init__(self):
        self.steps: list[Step] = []
        self.refused: list[Refused] = []
        self.taken: dict[str, str] = {}

    def add(self, site: Site, source: str, target: Method, answer: Any) -> None:
        if not isinstance(answer, Refusal):
            paths = [e.path for e in answer.edits]
            clash = next((p for p in paths if p in self.taken), None)
            if clash is not None:
                answer = Refusal(
                    Reason.SHARED,
                    f"{clash!r} is changed already for {self.taken[clash]!r}",
                    "rewrite the result once more",
                )
        if isinstance(answer, Refusal):
            why = (answer.reason, answer.detail, answer.instead)
            self.refused.append(Refused(site.path, source, *why))
            return
        self.taken |= {e.path: site.path for e in answer.edits}
        how = (answer.fidelity, answer.edits, answer.note)
        self.steps.append(Step(site.path, source, target.name, *how))


def _targets(method: Any, weights: Any) -> tuple[Method | None, Method | None]:
    target = None if method is None else get(method)
    around = None if weights is None else get(weights)
    if around is not None and around.wrap is None:
        raise KerasNormError(
            "this is no method for kernels",
            got=f"weights={around.name!r}",
            expected="a weight method such as 'wn', 'ws' or 'sn'",
            fix=f"Pass it as the method: rewrite(model, {around.name!r}).",
        )
    return target, around


def _cell_options(cells: bool | Mapping[str, Any]) -> Mapping[str, Any]:
    options = cells if isinstance(cells, Mapping) else {}
    known = set().union(*map(cell_options, CELLS.values()))
    for name in options:
        if name not in known:
            raise KerasNormError(
                "no recurrent cell takes this argument",
                got=f"{name}={options[name]!r}",
                expected=f"one of {', '.join(sorted(known))}",
            )
    return options


def _adopt(
    target: Method, source: Source | Refusal, site: Site, options: Options
) -> Any:
    if isinstance(source, Refusal):
        return source
    if not site.calls and not getattr(site.layer, "built", True):
        return Refusal(
            Reason.NO_GRAPH,
            "the model is not built, so that no shape is known",
            "call it once, then rewrite",
        )
    if source.method == target.name and not options.arguments:
        return Refusal(Reason.ALREADY, f"it is a {target.title.lower()} layer")
    if target.adopt is None:
        return Refusal(Reason.NO_RULE, f"{target.name!r} takes over no other layer")
    return target.adopt(source, site, options)


def _options(
    target: Method,
    groups: int | str | None,
    layers: str,
    force: bool,
    arguments: Mapping[str, Any],
) -> Options:
    known = known_arguments(target)
    arguments = dict(arguments)
    if groups is not None:
        if isinstance(groups, numbers.Integral) and not isinstance(groups, bool):
            groups = int(groups)
        if groups not in ("auto", "paper") and not (
            type(groups) is int and (groups > 0 or groups == -1)
        ):
            raise KerasNormError(
                "this is no number of groups",
                got=repr(groups),
                expected="a positive integer, -1 for one per channel, 'auto', 'paper'",
            )
        if "groups" not in known:
            raise KerasNormError(
                f"{target.title.lower()} has no groups",
                got=f"groups={groups!r}",
                fix="Leave `groups` away, or choose 'group'.",
            )
        if groups not in ("auto", "paper"):
            arguments["groups"] = groups
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise KerasNormError(
                f"{target.title.lower()} does not take this argument",
                got=f"{name}={arguments[name]!r}",
                expected=f"one of {', '.join(sorted(known)) or 'none'}",
                fix=f"Did you mean {near[0]!r}?" if near else None,
            )
    epsilon = arguments.get("epsilon", 0)
    if epsilon == "auto" and "epsilon" in known:
        del arguments["epsilon"]
    elif not (isinstance(epsilon, numbers.Real) and 0 <= float(epsilon) < math.inf):
        raise KerasNormError(
            "this is no epsilon",
            got=f"epsilon={epsilon!r}",
            expected="a finite number of at least 0, or 'auto'",
        )
    return Options(layers, force, arguments)


def known_arguments(target: Method) -> set[str]:
    """Arguments of the target's layer that a user may set for all sites."""
    if target.layer is None:
        return set()
    names: set[str] = set()
    for cls in target.layer.__mro__:
        if "__init__" in vars(cls) and cls.__module__.startswith("keras."):
            break
        if "__init__" in vars(cls):
            names |= set(inspect.signature(cls.__init__).parameters)
    return names - {"self", "kwargs", "args", "name", "dtype", "trainable", "layer"}
