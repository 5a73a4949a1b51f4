"""What the adoption rules of several methods share.

A rule decides, from a trained layer (`Source`) and the place where it stands (`Site`),
which layer takes over and how faithfully, or why none should. Nothing is computed and
no model is touched here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras.layers import Layer

from kerasnorm.common.errors import KerasNormError, accepting
from kerasnorm.method.registry import (
    Adoption,
    Edit,
    Fidelity,
    Options,
    Reason,
    Refusal,
    Source,
)
from rewriters import private
from rewriters.arguments import allows


if TYPE_CHECKING:
    from rewriters.graph import Site

Shape = tuple[int | None, ...]

# Keras's own words; they mean the same in every layer that takes them.
CARRIED = (
    "center",
    "scale",
    *(
        f"{weight}_{word}"
        for weight in ("beta", "gamma")
        for word in ("initializer", "regularizer", "constraint")
    ),
)


# ---------------------------------------------------------------- reading


def reader(method: str, *also: str, **names: str) -> Callable[[Layer], Source]:
    """A function that describes a layer with the usual attributes as a `Source`.

    Args:
        method: the method the layer implements.
        also: further arguments to keep in `Source.config`.
        names: canonical weight name -> attribute, where they differ.
    """

    def read(layer: Layer) -> Source:
        return describe(layer, method, *also, **names)

    return read


def describe(layer: Any, method: str, *also: str, **names: str) -> Source:
    """See `reader`."""
    names = {"gamma": "gamma", "beta": "beta"} | names
    weights = {
        name: keras.ops.convert_to_numpy(value)
        for name, attribute in names.items()
        if isinstance(value := getattr(layer, attribute, None), keras.Variable)
    }
    config = {k: getattr(layer, k) for k in (*CARRIED, *also) if hasattr(layer, k)}
    if getattr(layer, "synchronized", False):
        config["synchronized"] = True
    axis = layer.axis
    if not isinstance(axis, int):
        axis = axis[0] if len(axis) == 1 else tuple(axis)
    return Source(method, layer, axis, layer.epsilon, weights, config)


# ----------------------------------------------------------------- places


def shapes(site: Site) -> list[Shape]:
    """Input shapes of the site; what it was built with where no call is known."""
    found: list[Shape] = [tuple(call.shape) for call in site.calls]
    if not found:
        built = (private.build_shapes_dict(site.layer, None) or {}).get("input_shape")
        if built is not None:
            found = [(None, *built[1:])]
    return found


def size(shape: Iterable[int | None]) -> int | None:
    """Product of the sizes; None where one is unknown."""
    sizes = list(shape)
    return None if None in sizes else math.prod(s for s in sizes if s is not None)


def channel_axis(source: Source, rank: int) -> int:
    """The axis of the channels, counted from the front."""
    axes = [source.axis] if isinstance(source.axis, int) else list(source.axis)
    return axes[-1] % rank


def last_axis(source: Source) -> int:
    """`axis` as one integer, for methods that have one."""
    return source.axis if isinstance(source.axis, int) else max(source.axis)


def channels(source: Source, site: Site) -> int | None:
    """Number of channels, from the shapes or else from gamma and beta."""
    for shape in shapes(site):
        return shape[channel_axis(source, len(shape))]
    for value in source.weights.values():
        return value.shape[-1]
    return None


def positions(source: Source, shape: Shape) -> int | None:
    """Number of positions: all but the batch and the channels."""
    axis = channel_axis(source, len(shape))
    return size(s for a, s in enumerate(shape) if a not in (0, axis))


# --------------------------------------------------------------- refusing


def already(what: str) -> Refusal:
    """The layer computes the method already."""
    return Refusal(Reason.ALREADY, f"this is {what} already")


def forced_training(source: Source, site: Site) -> Refusal | None:
    """Refuses a batch normalization that is called with `training=True`: it uses the
    statistics of the batch even at inference, and no trained ones."""
    if source.method == "batch":
        if any(call.kwargs.get("training") is True for call in site.calls):
            return Refusal(
                Reason.TRAINING,
                f"{site.path} is called with training=True: it uses the statistics of "
                "the batch, at inference too",
                "call it without `training`, then rewrite",
            )
    return None


def one_element(
    site: Site, options: Options, count: Callable[[Shape], int | None], instead: str
) -> Refusal | None:
    """Refuses statistics over a single element: they leave nothing but beta.

    Args:
        count: number of elements behind one statistic, for an input shape; None where
            it is not known.
        instead: the nearest sound choice.
    """
    if options.force:
        return None
    for shape in shapes(site):
        if count(shape) == 1:
            return Refusal(
                Reason.DEGENERATE,
                f"one element per statistic on input shape {shape}: the output would "
                "be beta whatever the input",
                instead,
            )
    return None


# -------------------------------------------------------------- replacing


def make(
    cls: type[Layer],
    source: Source,
    site: Site,
    options: Options,
    **arguments: Any,
) -> Layer:
    """The unbuilt layer that takes the place of the site's.

    It keeps name, trainable flag and dtype policy, and the arguments that both layers
    know. The user's arguments come last.

    Raises:
        KerasNormError: an argument that the layer does not take, or a bad value.
    """
    layer = site.layer
    given = {k: v for k, v in options.arguments.items() if k not in arguments}
    if "axis" in arguments and "axis" in options.arguments:
        _same_axis(arguments["axis"], options.arguments["axis"], site)
    arguments = {"axis": source.axis, "epsilon": source.epsilon, **arguments, **given}
    carried = {k: v for k, v in source.config.items() if k in CARRIED}
    accepted = _accepted(cls)
    # Keras's own layer refuses to be synchronized on JAX, where it is without a word.
    if keras.backend.backend() == "tensorflow" or not cls.__module__.startswith(
        "keras."
    ):
        carried |= {k: v for k, v in source.config.items() if k == "synchronized"}
    unknown = sorted(k for k in options.arguments if k not in accepted)
    if unknown:
        raise KerasNormError(
            f"{cls.__name__} does not take {', '.join(map(repr, unknown))}",
            got=dict(options.arguments),
            expected=f"arguments among {', '.join(sorted(accepted))}",
        )
    carried = {k: v for k, v in carried.items() if k in accepted}
    return in_place_of(layer, cls, **{**carried, **arguments})


def _same_axis(axis: Any, given: Any, site: Site) -> None:
    """Refuses an axis that is not the one the replaced layer asks for."""
    rank = next((len(shape) for shape in shapes(site)), 1)
    wanted, got = {a % rank for a in np.ravel(axis).tolist()}, None
    if allows(int | Sequence[int], given):
        axes = np.ravel(given).tolist()
        got = {a % rank for a in axes} if all(-rank <= a < rank for a in axes) else None
    if wanted != got:
        raise KerasNormError(
            f"the axis follows from the layer that is replaced, {site.path!r}",
            got=f"axis={given!r}",
            expected=f"axis={axis!r}",
            fix="Leave it away.",
        )


def in_place_of(layer: Layer, cls: type[Layer], *args: Any, **arguments: Any) -> Layer:
    """`cls(*args, **arguments)` with the name, the dtype policy and `trainable` of the
    layer that it replaces.

    Raises:
        KerasNormError: the class refuses its arguments.
    """
    with accepting(cls.__name__, arguments):
        return cls(
            *args,
            **arguments,
            name=layer.name,
            trainable=layer.trainable,
            dtype=layer.dtype_policy,
        )


def _accepted(cls: type) -> set[str]:
    names: set[str] = set()
    for base in cls.__mro__:
        if base is Layer:
            break
        if "__init__" in vars(base):
            names |= set(inspect.signature(base.__init__).parameters)
    return names - {"self", "args", "kwargs"}


def pick(
    stock: type[Layer],
    own: type[Layer],
    site: Site,
    options: Options,
    because: str | None = None,
    mask_matters: bool = True,
) -> type[Layer] | Refusal:
    """Keras's own layer where it computes the method correctly here, else ours.

    Args:
        because: a further reason why Keras's layer would be wrong here.
        mask_matters: whether masked positions enter the statistics.
    """
    if options.layers == "kerasnorm":
        return own
    takes = set(inspect.signature(stock.call).parameters)
    ranks = [(len(call.shape), call.masked) for call in site.calls]
    masked = mask_matters and any(masked for _, masked in ranks)
    reason = Reason.NOT_EXACT
    if because is None and masked and "mask" not in takes:
        reason = Reason.MASK
        because = f"a mask reaches it, which keras.layers.{stock.__name__} ignores"
    if because is None and masked and any(rank != 3 for rank, m in ranks if m):
        reason = Reason.MASK
        because = f"keras.layers.{stock.__name__} reads masks on (B, T, F) alone"
    if because is None:
        words = {k for call in site.calls for k in call.kwargs}
        missing = sorted(words - takes)
        if missing:
            reason = Reason.CALL
            because = (
                f"it is called with {', '.join(missing)}, which "
                f"keras.layers.{stock.__name__} does not take"
            )
        elif site.inner and not {"training", "mask"} <= takes:
            reason = Reason.CALL
            because = (
                "its owner may call it with training= or mask=, which "
                f"keras.layers.{stock.__name__} does not take"
            )
    if because is None:
        return stock
    if options.layers == "keras":
        return Refusal(reason, because, 'layers="auto"')
    return own


def adopt(site: Site, layer: Layer, fidelity: Fidelity, note: str = "") -> Adoption:
    """The adoption that puts `layer` at the site."""
    return Adoption((edit(site, layer),), fidelity, note)


def edit(site: Site, layer: Layer | None) -> Edit:
    """The edit that puts `layer` at the site, or removes what is there (None)."""
    if layer is None:
        return Edit(site.path, None)
    # `pick` took a layer that reads no mask only where the mask does not matter.
    masked = any(call.masked for call in site.calls)
    blind = masked and "mask" not in inspect.signature(layer.call).parameters
    drops = ("mask",) if blind else ()
    return Edit(site.path, keras.saving.serialize_keras_object(layer), drops)


def adopt_fresh(
    cls: type[Layer],
    source: Source,
    site: Site,
    options: Options,
    *,
    fidelity: Fidelity = Fidelity.FRESH,
    note: str = "",
    **arguments: Any,
) -> Adoption | Refusal:
    """Puts a layer that Keras has no counterpart of at the site.

    `arguments` are those of the new layer, where the user does not say otherwise.
    """
    refusal = forced_training(source, site)
    if refusal is not None:
        return refusal
    if options.layers == "keras":
        return Refusal(Reason.NO_RULE, "Keras has no layer for it", 'layers="auto"')
    arguments = {"axis": last_axis(source), **arguments}
    arguments = {k: v for k, v in arguments.items() if k not in options.arguments}
    return adopt(site, make(cls, source, site, options, **arguments), fidelity, note)


def is_relu(layer: Layer) -> bool:
    """Whether the layer is `max(x, 0)` and nothing else."""
    if isinstance(layer, keras.layers.ReLU):
        plain = {"max_value": None, "negative_slope": 0.0, "threshold": 0.0}
        return all((getattr(layer, k) or 0) == (v or 0) for k, v in plain.items())
    return (
        isinstance(layer, keras.layers.Activation)
        and layer.activation is keras.activations.relu
    )


def on_images(site: Site) -> bool:
    """Whether the input has positions beyond a sequence: an image or a volume."""
    return any(len(shape) > 3 for shape in shapes(site))


# --------------------------------------------------------------- carrying


def carry_affine(source: Source, layers: Mapping[str, tuple[Any, Any]]) -> None:
    """Copies gamma and beta into the new layers, spread over their axes."""
    for _, new in layers.values():
        if new is None:
            continue
        for name in ("gamma", "beta"):
            value = source.weights.get(name)
            variable = getattr(new, name, None)
            if variable is None and name == "gamma":
                variable = getattr(new, "scale", None)  # Keras's RMSNormalization
            if value is not None and isinstance(variable, keras.Variable):
                assign(variable, spread(value, source.axis, new))


def spread(value: np.ndarray, axis: int | Sequence[int], new: Any) -> np.ndarray:
    """A weight that lives on `axis`, for a layer whose weights live on other axes.

    Repeats along axes it did not have; averages over axes that are gone.
    """
    built = (private.build_shapes_dict(new, None) or {}).get("input_shape")
    old = [axis] if isinstance(axis, int) else list(axis)
    to = [new.axis] if isinstance(new.axis, int) else list(new.axis)
    if built is None or value.ndim != len(old):
        return value
    rank = len(built)
    old, to = sorted(a % rank for a in old), sorted(a % rank for a in to)
    value = value.mean(tuple(i for i, a in enumerate(old) if a not in to))
    shape = [built[a] if a in old else 1 for a in to]
    return np.broadcast_to(value.reshape(shape), [built[a] for a in to])


def assign(variable: Any, value: np.ndarray) -> None:
    """Sets a variable, in its own dtype."""
    variable.assign(np.asarray(value).astype(np.dtype("float64")))
