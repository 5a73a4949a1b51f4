"""The registry: a method is one file that calls `declare`.

From that one call follow the name users type, the layer they get, what `rewrite`
may turn into it and how faithfully, the generated tests, the docs page, and a row of
`methods()`. The first pass over an unknown name imports every file of
`kerasnorm.layers` and `kerasnorm.weights` and every installed entry point of the group
`kerasnorm.methods`, so dropping a file in is the whole change.
"""

from __future__ import annotations

import difflib
import enum
import importlib
import importlib.metadata
import json
import pkgutil
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kerasnorm.common.errors import KerasNormError
from kerasnorm.method.claims import claims as laws


if TYPE_CHECKING:
    from rewriters.graph import Site


class Fidelity(enum.StrEnum):
    """How much of the trained function a step keeps."""

    EXACT = "exact"  # in training and inference
    AT_INFERENCE = "exact at inference"
    FITTED = "fitted"  # solved on data; the share of variance kept says how well
    FRESH = "fresh"  # parameters copied, statistics of another kind


class Reason(enum.StrEnum):
    """Why a site is left alone; a closed set, so that callers may branch on it."""

    ALREADY = "already this method"
    NO_RULE = "no rule from this layer"
    OVERRIDDEN = "subclass overrides call"
    DEGENERATE = "degenerate statistics"
    UNDEFINED = "not defined on this shape"
    GROUPS = "groups do not divide channels"
    NO_LINEAR = "no linear layer to fold into"
    SHARED = "shared layer"
    NOT_EXACT = "not exact here"
    TRAINING = "forced training mode"
    MASK = "mask not supported"
    CALL = "call arguments not kept"
    NO_GRAPH = "graph unknown"


@dataclass(frozen=True)
class Refusal:
    """A site that stays as it is: the reason, the detail with values, and the
    nearest sound choice where there is one."""

    reason: Reason
    detail: str
    instead: str | None = None


@dataclass(frozen=True)
class Source:
    """What a trained normalization layer computes, in words common to all methods.

    Args:
        method: name of the method the layer implements, `"batch"`, `"group"`, ...
        layer: the layer itself.
        axis: axes that `gamma` and `beta` live on, as given to the layer.
        epsilon: added under the root (or as the method has it).
        weights: current values by canonical name: `gamma`, `beta`, `mean`,
            `variance`, ...; absent ones are missing keys.
        config: Keras arguments that carry over between methods by the same name:
            `center`, `scale`, `gamma_initializer`, `beta_regularizer`, ...
    """

    method: str
    layer: keras.layers.Layer
    axis: int | Sequence[int]
    epsilon: float
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What the user asked for, beyond the method's name.

    Args:
        layers: `"auto"` takes Keras's own layer where it computes the method
            correctly at that site; `"keras"` insists on it, `"kerasnorm"` never does.
        force: override refusals that guard against degenerate statistics.
        arguments: arguments of the target layer, such as `groups` or `epsilon`.
        planned: path -> serialized layer of what the same plan replaces already.
    """

    layers: str = "auto"
    force: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    planned: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Edit:
    """One layer replaced, or removed where `layer` is None; pure data.

    `layer` is what `keras.saving.serialize_keras_object` gives for the unbuilt
    replacement. `drops` names recorded call keywords that the replacement does not
    take and does not need, such as a mask that does not matter to it.
    """

    path: str
    layer: Mapping[str, Any] | None = None
    drops: tuple[str, ...] = ()

    def __post_init__(self):
        # What is written and read again must compare equal: JSON knows no tuples.
        plain = None if self.layer is None else json.loads(json.dumps(self.layer))
        object.__setattr__(self, "layer", plain)


@dataclass(frozen=True)
class Adoption:
    """How a method takes a site over: the edits, the fidelity, and what to say."""

    edits: tuple[Edit, ...]
    fidelity: Fidelity
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One configuration on one input shape for the generated tests.

    Args:
        config: arguments of the layer.
        shape: input shape with the batch, e.g. `(4, 6, 5, 8)`.
        masked: the layer honours a mask on this shape.
        claims: judge the method's claims on this case; False where an argument takes
            the method away from them.
    """

    config: Mapping[str, Any]
    shape: tuple[int, ...]
    masked: bool = False
    claims: bool = True


@dataclass(frozen=True)
class Method:
    """One normalization method, as declared by its file. See `declare`."""

    name: str
    title: str
    family: str
    paper: str
    aliases: tuple[str, ...]
    layer: type[keras.layers.Layer] | None
    invariance: str
    oracle: Callable[..., np.ndarray] | None
    reads: Mapping[type, Callable[[Any], Source | Refusal]]
    adopt: Callable[[Source, Site, Options], Adoption | Refusal] | None
    carry: Callable[[Source, Mapping[str, tuple[Any, Any]]], None] | None
    wrap: Callable[[Site, Options], Adoption | Refusal | None] | None
    start: Callable[[Any, Sequence[Any], Any], None] | None
    claims: Mapping[str, bool | None]
    cases: tuple[Case, ...]
    checks: tuple[Callable[..., None], ...]
    module: str

    def __repr__(self) -> str:
        return f"<{self.title}: {', '.join((self.name, *self.aliases))}>"

    @property
    def summary(self) -> str:
        """First line of the layer's (or the module's) docstring."""
        doc = self.layer.__doc__ if self.layer else None
        doc = doc or importlib.import_module(self.module).__doc__ or self.title
        return doc.strip().splitlines()[0]


FAMILIES = ("batch", "sample", "weight", "none")
INVARIANCES = ("filter", "group", "layer", "none")

_METHODS: dict[str, Method] = {}
_READERS: dict[type, Callable[[Any], Source | Refusal]] = {}
_discovered = False


def declare(
    layer: type[keras.layers.Layer] | None = None,
    *,
    name: str,
    family: str,
    paper: str,
    title: str | None = None,
    aliases: Sequence[str] = (),
    invariance: str = "none",
    oracle: Callable[..., np.ndarray] | None = None,
    reads: Mapping[type, Callable[[Any], Source | Refusal]] | None = None,
    adopt: Callable[[Source, Site, Options], Adoption | Refusal] | None = None,
    carry: Callable[[Source, Mapping[str, tuple[Any, Any]]], None] | None = None,
    wrap: Callable[[Site, Options], Adoption | Refusal | None] | None = None,
    start: Callable[[Any, Sequence[Any], Any], None] | None = None,
    claims: Collection[str] = (),
    undecided: Collection[str] = (),
    cases: Sequence[Case] = (),
    checks: Sequence[Callable[..., None]] = (),
) -> Method:
    """Declares a normalization method; call it once, at the end of the method's file.

    Args:
        layer: the Keras layer, registered for saving as `kerasnorm>ClassName`.
        name: what users type, `"group"`; `"group_normalization"` follows from it.
        family: `"batch"`, `"sample"`, `"weight"` or `"none"`.
        paper: citation with its arXiv id or DOI.
        aliases: short names, `("gn",)`.
        invariance: what may be scaled by c > 0 without changing the output, in the
            weights that feed the layer: `"filter" | "group" | "layer" | "none"`.
        oracle: float64 NumPy from the paper, `oracle(x, weights, config, training,
            mask) -> y`; shares no code with the layer.
        reads: which layer classes compute this method, and how to describe one of
            them as a `Source`. Looked up along the class hierarchy; a subclass that
            overrides `call` is refused.
        adopt: pure planning rule `(source, site, options) -> Adoption | Refusal`.
        carry: sets the new layers' weights, `(source, {path: (old, new)})`, after the
            new model is built; without it, weights of the same canonical name are
            copied. The source is None for what `wrap` adopted.
        wrap: of weight methods: pure planning rule `(site, options) -> Adoption |
            Refusal | None` for a layer with kernels, whatever normalizes its outputs;
            None where the layer is no such layer.
        start: of methods that the paper starts from more than a layer's own
            initializers: `(model, its layers of the method, a batch of inputs)`, for a
            model whose weights are fresh.
        claims: names of the laws in `kerasnorm.method.claims` that hold; for each of
            the others the tests must find a counterexample.
        undecided: names of laws that are judged neither way.
        cases: configurations and shapes for the generated tests.
        checks: further tests of this method alone, functions without arguments.

    Returns:
        The registered `Method`.

    Raises:
        KerasNormError: two files declare one name, or `family`, `invariance` or a claim
            is unknown.
    """
    if family not in FAMILIES or invariance not in INVARIANCES:
        raise KerasNormError(
            f"cannot declare {name!r}",
            got=f"family={family!r}, invariance={invariance!r}",
            expected=f"family in {FAMILIES} and invariance in {INVARIANCES}",
        )
    unknown = sorted({*claims, *undecided} - set(laws()))
    if unknown or set(claims) & set(undecided):
        raise KerasNormError(
            f"cannot declare {name!r}",
            got=f"claims={sorted(claims)}, undecided={sorted(undecided)}",
            expected=f"each at most once, among {', '.join(laws())}",
        )
    module = sys._getframe(1).f_globals["__name__"]  # the file that declares
    method = Method(
        name=name,
        title=title or name.replace("_", " ").capitalize() + " normalization",
        family=family,
        paper=paper,
        aliases=tuple(aliases),
        layer=layer,
        invariance=invariance,
        oracle=oracle,
        reads=dict(reads or {}),
        adopt=adopt,
        carry=carry,
        wrap=wrap,
        start=start,
        claims={law: None if law in undecided else law in claims for law in laws()},
        cases=tuple(cases),
        checks=tuple(checks),
        module=module,
    )
    for word in _words(method):
        other = _METHODS.get(word)
        if other is not None and other.module != method.module:
            raise KerasNormError(
                f"two files declare the method name {word!r}",
                got=f"{other.module} and {method.module}",
                fix="Rename one of them.",
            )
        _METHODS[word] = method
    _READERS.update(method.reads)
    return method


def methods() -> dict[str, Method]:
    """Every known method by its name, sorted; aliases are attributes of each.

    >>> "group" in methods()
    True
    """
    _discover()
    return {m.name: m for m in sorted(set_of(_METHODS), key=lambda m: m.name)}


def get(name: str | Method) -> Method:
    """The method for a name, alias or full name, e.g. `"gn"`, `"group"`,
    `"group_normalization"`.

    Raises:
        KerasNormError: unknown name; the message has the nearest ones.
    """
    if isinstance(name, Method):
        return name
    word = _word(name)
    if word not in _METHODS:
        _discover()
    if word not in _METHODS:
        near = difflib.get_close_matches(word, _METHODS, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        known = ", ".join(
            f"{m.name} ({', '.join(m.aliases)})" for m in methods().values()
        )
        raise KerasNormError(
            "unknown normalization method",
            got=repr(name),
            fix=f"{hint}Known: {known}",
        )
    return _METHODS[word]


def read(layer: keras.layers.Layer) -> Source | Refusal | None:
    """Describes a normalization layer; None when the layer is not one.

    A subclass of a known class is read as that class unless it overrides `call`,
    in which case nobody knows what it computes, and the answer is a `Refusal`.
    """
    _discover()
    for cls in type(layer).__mro__:
        if cls in _READERS:
            if type(layer).call is not cls.call:
                return Refusal(
                    Reason.OVERRIDDEN,
                    f"{type(layer).__name__} is a {cls.__name__} with its own `call`",
                    "replace it by hand, or declare a method that reads it",
                )
            return _READERS[cls](layer)
    return None


def set_of(registry: Mapping[str, Method]) -> list[Method]:
    """The distinct methods behind the words of a registry."""
    return list({id(m): m for m in registry.values()}.values())


def _words(method: Method) -> list[str]:
    names = [method.name, *method.aliases]
    if method.layer is not None:
        names.append(method.layer.__name__)
    if not method.name.endswith("normalization"):
        names.append(f"{method.name}_normalization")
    return [_word(n) for n in names]


def _word(name: str) -> str:
    return str(name).lower().replace("_", "").replace("-", "").replace(" ", "")


def _discover() -> None:
    """Imports every file that declares a method: ours, and those of other packages.
    One of these that cannot be imported is a warning, and the rest are there."""
    global _discovered
    if _discovered:
        return
    _discovered = True
    for name in ("kerasnorm.layers", "kerasnorm.weights"):
        package = importlib.import_module(name)
        for entry in pkgutil.iter_modules(package.__path__, f"{name}."):
            importlib.import_module(entry.name)
    for entry in importlib.metadata.entry_points(group="kerasnorm.methods"):
        try:
            entry.load()
        except Exception as error:
            warnings.warn(
                f"The methods of {entry.name!r} ({entry.value}) are missing, since "
                f"importing them failed: {type(error).__name__}: {error}. Mend or "
                "uninstall that package.",
                stacklevel=2,
            )
