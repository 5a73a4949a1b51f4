"""Weights on spheres: only the direction is learned where the length cannot matter."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.flow.analysis import Flow, flows
from kerasnorm.flow.ties import runs
from kerasnorm.kernels import wrapping
from kerasnorm.kernels.kernel import Kernel, kernel_of, kernels_of
from kerasnorm.kernels.reparametrized import (
    CASES,
    CLAIMS,
    UNDECIDED,
    Reparametrized,
    oracle_of,
)
from kerasnorm.method import adoption
from kerasnorm.method.moving_statistics import is_running
from kerasnorm.method.registry import (
    Adoption,
    Case,
    Edit,
    Fidelity,
    Options,
    Reason,
    Refusal,
    Source,
    declare,
    read,
)
from kerasnorm.numerics import moments


# Epsilons below this are lost beside the rounding of a variance.
LEAST_EPSILON = 1e-10


@keras.saving.register_keras_serializable("kerasnorm")
class SphereNormalization(Reparametrized):
    r"""Holds the filters of a kernel on spheres.

        w = radius * v / ||v||          per filter, per group of filters, or per layer

    A rewrite (`weights="sphere"`) chooses `per` and `radius` from a proof on the graph:
    where a normalization behind the layer is blind to the length of a unit, the unit
    keeps its own radius, and no function is lost; elsewhere the radius is learned, as
    in weight normalization. `v` starts with length 1, so that under
    `kerasnorm.sphere.OnSphere` learning rates are angles.

    Paper: Sun et al., 2020, https://arxiv.org/abs/2006.09104

    Args:
        layer: the layer to wrap, built or not; it keeps its name and config.
        per: `"filter"` (default), `"layer"`, or a number of groups of filters.
        radius: `"learned"` (default), `"own"`, the length the kernel has when it is
            wrapped, for good; or a positive number. A rewrite takes `"own"` for units
            whose length cannot matter, unless told otherwise. With a number it adapts
            the normalization behind: moving statistics and epsilon, so that inference
            is exact.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        Those of the wrapped layer.

    Raises:
        KerasNormError: the layer has no kernel; another `per` or `radius`.
    """

    def __init__(
        self,
        layer,
        per: str | int = "filter",
        radius: str | float = "learned",
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        number = isinstance(per, int) and not isinstance(per, bool)
        if per not in ("filter", "layer") and not (number and int(per) > 0):
            raise KerasNormError(
                "no such unit of a kernel",
                got=f"per={per!r}",
                expected="'filter', 'layer' or a number of groups",
            )
        _check_radius(radius)
        self.per = per
        self.radius = radius

    def kernel(self, v, length=None):
        given = self.radius if length is None else length
        inverse = moments.inverse_root(self._squares(v), 0.0)
        return v * self._spread(inverse * given, v)

    def initial(self, v):
        return {"length": self.lengths(v)} if self.radius == "learned" else {}

    def state(self, v):
        return {"length": self.lengths(v)} if self.radius == "own" else {}

    def absorb(self, v, w):
        inverse = moments.inverse_root(self._squares(w), 0.0)
        return {"v": w * self._spread(inverse, w), **self.initial(w), **self.state(w)}

    def lengths(self, v: Any) -> Any:
        """Length of each unit of `(fan_in, filters)`."""
        return ops.sqrt(self._squares(v))

    def _units(self, filters: int) -> int:
        count = {"filter": filters, "layer": 1}.get(self.per, self.per)  # type: ignore
        if filters % count:
            raise KerasNormError(
                "the groups do not divide the filters",
                got=f"per={self.per!r} for {filters} filters of {self.layer.name!r}",
            )
        return count

    def _squares(self, v):
        per_filter = ops.sum(ops.square(v), 0)
        return ops.sum(ops.reshape(per_filter, (self._units(v.shape[1]), -1)), 1)

    def _spread(self, per_unit, v):
        return ops.repeat(per_unit, v.shape[1] // self._units(v.shape[1]))


def _check_radius(radius: Any) -> None:
    number = isinstance(radius, (int, float)) and not isinstance(radius, bool)
    if radius not in ("learned", "own") and not (number and radius > 0):
        raise KerasNormError(
            "no such radius",
            got=f"radius={radius!r}",
            expected="'learned', 'own' or a positive number",
        )


# ------------------------------------------------------------------ rewriting


_FLOWS: weakref.WeakKeyDictionary[Any, dict[Any, list[Flow]]] = (
    weakref.WeakKeyDictionary()
)


def flow_at(site: Any, options: Options) -> dict[int, Flow]:
    """What is known of the model's kernels, by `id(variable)`, with the normalization
    layers that are planned already in their places; computed once a plan."""
    key = json.dumps(options.planned, sort_keys=True, default=repr)
    kept = _FLOWS.setdefault(site._map, {})
    if key not in kept:
        layers = {
            path: keras.saving.deserialize_keras_object(dict(layer))
            for path, layer in options.planned.items()
            if layer is not None
        }
        kept[key] = flows(site._map, layers)
    return {id(f.kernel.variable): f for f in kept[key] if f.decided}


def wrap(site, options):
    radius = options.arguments.get("radius", "own")
    _check_radius(radius)
    plain = dict(options.arguments)
    learned = replace(options, arguments={**plain, "radius": "learned"})
    answer = _wrap(site, learned)
    if not isinstance(answer, Adoption):
        return answer
    if answer.fidelity is Fidelity.AT_INFERENCE:
        answer = replace(answer, fidelity=Fidelity.EXACT)  # its state never moves
    if radius == "learned" or "per" in plain:
        return answer
    known = flow_at(site, options)
    kernels: Any = kernels_of(site.layer)
    found: list[Any] = [known.get(id(k.variable)) for k in kernels]
    if not all(f is not None and f.invariant for f in found):
        reasons = [f.reason for f in found if f is not None and not f.invariant]
        why = f"learned radius: {reasons[0]}" if reasons else "learned radius"
        return replace(answer, note="; ".join(filter(None, (answer.note, why))))
    pers = {_per(f) for f in found}
    per = pers.pop() if len(pers) == 1 else "layer"
    through = found[0].reason
    if radius == "own":
        arguments = {**plain, "per": per, "radius": "own"}
        answer = _wrap(site, replace(options, arguments=arguments))
        if isinstance(answer, Refusal):
            return answer
        return Adoption(answer.edits, Fidelity.EXACT, through)
    return _given(site, options, found, per, float(radius))


_wrap = wrapping.wrapper(SphereNormalization)


def _per(flow: Flow) -> str | int:
    groups = runs(flow.units)
    return "filter" if groups is None else "layer" if groups == 1 else groups


def _given(site, options, found, per, radius):
    """A radius given as a number: what is behind has to make up for it."""
    own = 'radius="own"'
    flow, after = found[0], site.after()
    absorber = flow.absorbers[0]
    alone = len(found) == 1 and len(flow.absorbers) == 1
    direct = (
        alone
        and after is not None
        and after.layer is absorber.layer
        and flow.kernel.filters == flow.kernel.channels
        and not site.shared
        and not after.shared
    )
    if after is None or not direct:
        return Refusal(
            Reason.NOT_EXACT,
            f"its length reaches {', '.join(flow.through)} by more than one step",
            own,
        )
    source: Any = read(after.layer)
    plain = {"per": per, "radius": radius}
    wrapped = SphereNormalization(
        wrapping.copy(site.layer),
        **plain,
        name=site.layer.name,
        trainable=site.layer.trainable,
        dtype=site.layer.dtype_policy,
    )
    factor = _factors(wrapped, flow.kernel, site.layer)
    if not np.isfinite(factor).all():
        return Refusal(Reason.NOT_EXACT, f"{site.path} has filters that are zero", own)
    epsilon = _epsilon(source, factor)
    if isinstance(epsilon, Refusal):
        return epsilon
    if not epsilon >= LEAST_EPSILON:
        return Refusal(
            Reason.NOT_EXACT,
            f"{after.path} would need an epsilon of {epsilon:.1e}",
            own,
        )
    norm = wrapping.copy(after.layer, epsilon=epsilon)
    edits = (
        Edit(site.path, keras.saving.serialize_keras_object(wrapped)),
        adoption.edit(after, norm),
    )
    fidelity = Fidelity.AT_INFERENCE if is_running(source) else Fidelity.EXACT
    note = f"{after.path}: epsilon {source.epsilon:g} -> {epsilon:g}"
    return Adoption(edits, fidelity, note)


def _factors(wrapped: Any, kernel: Kernel, layer: Any) -> np.ndarray:
    """By how much each filter is multiplied, float64."""
    v = ops.cast(ops.convert_to_tensor(kernel.variable), "float32")
    v = kernel.columns(v)
    lengths = ops.convert_to_numpy(wrapped._spread(wrapped.lengths(v), v))
    with np.errstate(divide="ignore"):
        return wrapped.radius / lengths.astype("float64")


def _epsilon(source: Source, factor: np.ndarray) -> float | Refusal:
    """The epsilon with which a normalization does the same on scaled inputs."""
    if is_running(source):
        room = factor**2 * (
            source.weights["variance"].astype("float64") + source.epsilon
        )
        return min(source.epsilon, float(room.min()))
    if np.ptp(factor) > 1e-6 * factor.max():
        return Refusal(
            Reason.NOT_EXACT,
            f"radii from {1 / factor.max():.3g} to {1 / factor.min():.3g} times the "
            "new one ask for an epsilon each",
            'radius="own"',
        )
    return float(source.epsilon * factor.mean() ** 2)


def carry(source, layers):
    if source is not None:
        wrapping.carry(source, layers)
        return
    pairs = list(layers.values())
    wrapping.carry(None, {"": pairs[0]})
    if len(pairs) == 1:
        return
    (old, new), (norm, scaled) = pairs
    kernel: Any = kernel_of(old)
    factor = _factors(new, kernel, old)
    if isinstance(getattr(new.layer, "bias", None), keras.Variable):
        bias = ops.convert_to_numpy(old.bias).astype("float64")
        adoption.assign(new.layer.bias, bias * factor)
    scaled.set_weights(norm.get_weights())
    found: Any = read(norm)
    if is_running(found):
        mean, variance = (
            found.weights[k].astype("float64") for k in ("mean", "variance")
        )
        adoption.assign(scaled.moving_mean, mean * factor)
        room = factor**2 * (variance + found.epsilon) - scaled.epsilon
        adoption.assign(scaled.moving_variance, np.maximum(room, 0.0))


def check_units():
    rng = np.random.default_rng(0)
    v = rng.normal(size=(5, 6)).astype("float32")
    for per, units in (("filter", 6), ("layer", 1), (3, 3)):
        for radius in ("learned", "own", 2.0):
            dense = keras.layers.Dense(6)
            layer = SphereNormalization(dense, per=per, radius=radius)
            layer.build((None, 5))
            dense.kernel.assign(v)
            layer.take({k.label: (v, v) for k in layer.kernels})
            w = ops.convert_to_numpy(layer.weight())
            held = ops.convert_to_numpy(
                layer.lengths(ops.convert_to_tensor(dense.kernel))
            )
            np.testing.assert_allclose(held, np.ones(units), rtol=1e-5)
            if radius == 2.0:
                found = ops.convert_to_numpy(layer.lengths(ops.convert_to_tensor(w)))
                np.testing.assert_allclose(found, np.full(units, 2.0), rtol=1e-5)
            else:
                np.testing.assert_allclose(w, v, rtol=1e-5, atol=1e-6)
            learned = len(layer.trainable_weights) - len(dense.trainable_weights)
            np.testing.assert_equal(learned, radius == "learned")


def of_paper(v, p, config, training):
    count = {"filter": v.shape[1], "layer": 1}.get(config.get("per"), config.get("per"))
    count = v.shape[1] if count is None else count
    w = np.empty_like(v)
    for n, part in enumerate(np.split(np.arange(v.shape[1]), count)):
        radius = p["length"][n] if "length" in p else config["radius"]
        w[:, part] = radius * v[:, part] / np.sqrt(np.sum(v[:, part] ** 2))
    return w


declare(
    SphereNormalization,
    name="sphere",
    aliases=("on_sphere",),
    title="Sphere normalization of weights",
    family="weight",
    paper="Sun et al., 2020, arXiv:2006.09104",
    invariance="filter",  # in v, where per is so
    oracle=oracle_of(of_paper),
    **{**wrapping.rules(SphereNormalization), "wrap": wrap, "carry": carry},
    cases=(
        *CASES,
        Case({"layer": keras.layers.Dense(4), "per": 2}, (4, 5)),
        Case({"layer": keras.layers.Dense(3), "per": "layer", "radius": 2.0}, (4, 5)),
    ),
    claims=CLAIMS,
    undecided=UNDECIDED,
    checks=(check_units,),
)
