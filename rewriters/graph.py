"""Where the layers of a model are, how they are called, and what is next to them.

`sites` finds every layer wherever it is held: by a graph (Functional, Sequential,
nested to any depth), by an attribute, list or dict of a subclassed model or custom
layer, by a wrapper or a recurrent cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from rewriters.holders import Layer, walk
from rewriters.program import Instruction, Program, is_graph
from rewriters.tracing import Call, call_of, trace


@dataclass(frozen=True, eq=False)
class Site:
    """A layer of a model, and every place it is called.

    Args:
        path: names and attributes from the model to the layer, joined by `/`; unique.
        layer: the layer.
        calls: the recorded calls, empty when none is known.
        inner: held by an attribute of a custom layer, wrapper or subclassed model,
            rather than by a graph.
        paths: every path to the layer, `path` first.
    """

    path: str
    layer: Any
    calls: tuple[Call, ...]
    inner: bool
    paths: tuple[str, ...]
    _map: SiteMap = field(repr=False)

    @property
    def shared(self) -> bool:
        """Whether the layer is called, or held, in more than one place."""
        return len(self.calls) > 1 or len(self.paths) > 1

    def before(self) -> Site | None:
        """The layer whose output is this one's only input, and goes nowhere else."""
        place = self._map.place(self.layer)
        if place is None or len(place[1].inputs) != 1:
            return None
        program, value = place[0], place[1].inputs[0]
        producer = program.producer.get(value)
        if producer is None or value in program.outputs:
            return None
        alone = len(program.consumers[value]) == 1 and len(producer.outputs) == 1
        return self._map.by_id.get(id(producer.operation)) if alone else None

    def after(self) -> Site | None:
        """The only layer that reads this one's output, and reads nothing else."""
        place = self._map.place(self.layer)
        if place is None or len(place[1].outputs) != 1:
            return None
        program, value = place[0], place[1].outputs[0]
        readers = program.consumers.get(value, [])
        if len(readers) != 1 or value in program.outputs:
            return None
        if len(readers[0].inputs) != 1:
            return None
        return self._map.by_id.get(id(readers[0].operation))

    @property
    def placed(self) -> bool:
        """Whether `before` and `after` can tell: a graph calls the layer, once, and
        nothing else does."""
        return self._map.place(self.layer) is not None


class SiteMap:
    """All sites of a model, by path; iterates over them in order of computation.

    Args:
        model: any Keras model or layer.
        tracing: run the insides of custom layers symbolically to learn with which
            shapes, masks and keywords inner layers are called.
    """

    def __init__(self, model: Any, tracing: bool = True):
        self.model = model
        self.program = Program(model) if is_graph(model) else None
        steps = _by_operation(self.program)
        found: dict[int, list[tuple[str, Any, bool]]] = {}
        for path, layer, inner in walk(model):
            found.setdefault(id(layer), []).append((path, layer, inner))
        inside = [p[0] for p in found.values() if p[0][2]]
        layers = [layer for _, layer, _ in inside]
        traced = trace(self.program, model, layers) if tracing else {}
        self._places = {k: [(self.program, i) for i in v] for k, v in steps.items()}
        for (_, layer, inner), *_ in found.values():
            if inner and is_graph(layer):
                self._place_inside(layer, traced)
        self.by_id: dict[int, Site] = {}
        for key, places in found.items():
            path, layer, inner = places[0]
            calls = [call_of(i) for i in steps.get(key, [])]
            calls += _distinct(traced.get(key, []))
            paths = tuple(p for p, _, _ in places)
            self.by_id[key] = Site(path, layer, tuple(calls), inner, paths, self)
        order = {k: n for n, k in enumerate(steps)}
        ranked = sorted(self.by_id.values(), key=lambda s: order.get(id(s.layer), 1e9))
        self.sites = ranked if self.program else list(self.by_id.values())
        self.by_path = {p: s for s in self.sites for p in s.paths}

    def _place_inside(self, graph: Any, traced: Mapping[int, list[Call]]) -> None:
        """Notes the steps of a graph that code calls, and calls as a whole only."""
        times = len(traced.get(id(graph), ()))
        if not times:
            return
        program = Program(graph)
        steps = _by_operation(program)
        if all(
            len(traced.get(id(i.operation), ())) == times * len(steps[id(i.operation)])
            for i in program.instructions
            if isinstance(i.operation, Layer)
        ):
            for key, found in steps.items():
                self._places.setdefault(key, [(program, i) for i in found])

    def place(self, layer: Any) -> tuple[Program, Instruction] | None:
        """The only step at which a graph calls the layer, if there is one."""
        places = self._places.get(id(layer), [])
        return places[0] if len(places) == 1 else None  # type: ignore

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, path: str) -> Site:
        return self.by_path[path]


def sites(
    model: Any,
    where: str | Callable[[Site], bool] | None = None,
    *,
    tracing: bool = True,
) -> list[Site]:
    """Every layer of a model, in order of computation where it is known.

    Args:
        model: any Keras model: Functional, Sequential, subclassed, nested.
        where: a glob on the path (`"block*/bn*"`; `*` crosses `/`), or a callable
            that takes a `Site`.
        tracing: see `SiteMap`.

    Returns:
        A list of `Site`, each layer once, however often it is called.
    """
    return [s for s in SiteMap(model, tracing) if selects(where, s)]


def _by_operation(program: Program | None) -> dict[int, list[Instruction]]:
    steps: dict[int, list[Instruction]] = {}
    for i in program.instructions if program else ():
        steps.setdefault(id(i.operation), []).append(i)
    return steps


def _distinct(calls: list[Call]) -> list[Call]:
    found: list[Call] = []
    for call in calls:
        if call not in found:
            found.append(call)
    return found


def selects(where: str | Callable[[Site], bool] | None, site: Site) -> bool:
    """Whether `where` (see `sites`) picks the site."""
    if where is None:
        return True
    if callable(where):
        return bool(where(site))
    return any(fnmatchcase(path, where) for path in site.paths)
