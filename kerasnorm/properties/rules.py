"""From properties to a verdict: what is ruled out and why, and how the rest ranks.

No constant here was fitted to a network. Each threshold is an order of magnitude
beyond which the property alone stops training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kerasnorm.method.registry import Method
from kerasnorm.properties.measurement import Measurement, number


# Stable forward and backward: factor over all the depth, either way.
RANGE = 1e4
# Informative forward: share of the inputs' dissimilarity, 1 - cosine, that the most
# similar hidden layer keeps. Averages over an image are alike in any network.
KEPT = 1e-3
# Share of dead units in a layer.
DEAD = 0.9
# Dependence on the rest of the batch, behind one normalization: more noise than signal.
DEPENDENCE = 1.0
# Share of itself by which one step may move a weight whose scale matters.
STEP = 1.0


@dataclass(frozen=True)
class Finding:
    """Why a candidate is ruled out.

    Args:
        property: `"numbers"`, `"forward"`, `"informative"`, `"backward"`, `"dead"`,
            `"batch"`, `"step"`, `"shape"`, or `"error"` for what could not be measured.
        text: the sentence, with values.
    """

    property: str
    text: str


def findings(m: Measurement, method: Method, momentum: float) -> tuple[Finding, ...]:
    """What rules a candidate out, the gravest first.

    Args:
        m: its measurement.
        method: its method.
        momentum: of the optimizer, in [0, 1).
    """
    broken = [
        s.path
        for s in m.sites
        if any(v is not None and not np.isfinite(v) for v in (s.variance, s.gradient))
    ]
    if broken:
        text = f"activations or gradients are not finite from {broken[0]} on"
        return (Finding("numbers", text),)
    found = [
        _range("forward", "activation variance", m, m.hidden("variance")),
        _range("backward", "gradient norm on the way back", m, _backward(m)),
        _similar(m),
        _dead(m),
        _companions(m),
        None if normalizes(method) else _step(m, momentum),
    ]
    return tuple(f for f in found if f is not None)


def _range(kind: str, what: str, m: Measurement, values: np.ndarray) -> Finding | None:
    law = m.forward if kind == "forward" else m.backward
    if len(values) < 3 or not np.isfinite(law.total):
        zero = len(values) and not np.all(values > 0)
        return Finding(kind, f"{what}: 0 at some depth") if zero else None
    if 1 / RANGE < law.total < RANGE:
        return None
    how = "grows" if law.total > 1 else "shrinks"
    return Finding(
        kind,
        f"{what} {how} {law.total:.1e}-fold over {len(values)} layers,"
        f" {law.factor:.2g} times a layer",
    )


def _backward(m: Measurement) -> np.ndarray:
    return m.profile("gradient")[1][::-1]


def _similar(m: Measurement) -> Finding | None:
    depth, cosine = m.profile("cosine")
    if len(cosine) < 3 or not np.isfinite(cosine).all():
        return None
    kept = (1 - cosine[1:]) / max(1 - cosine[0], 1e-6)
    worst = int(np.argmin(kept))
    if kept[worst] >= KEPT:
        return None
    return Finding(
        "informative",
        f"cosine similarity {cosine[1 + worst]:.4f} at depth {depth[1 + worst]},"
        " inputs no longer told apart",
    )


def _dead(m: Measurement) -> Finding | None:
    depth, dead = m.profile("dead")
    if len(dead) < 2 or not dead[1:].max() > DEAD:
        return None
    worst = 1 + int(np.argmax(dead[1:]))
    return Finding(
        "dead", f"{dead[worst]:.0%} of the units dead at depth {depth[worst]}"
    )


def _companions(m: Measurement) -> Finding | None:
    """Judged where it enters: deep networks with batch statistics amplify any change
    at initialization, at any batch size, and train all the same."""
    depth, dependence = m.profile("dependence")
    entered = np.flatnonzero(dependence > 0)
    if not len(entered) or not dependence[entered[0]] > DEPENDENCE:
        return None
    first = entered[0]
    return Finding(
        "batch",
        f"the other {m.batch_size - 1} samples of a batch change what the layer at"
        f" depth {depth[first]} reads {dependence[first]:.2g} times as much as another"
        " input does",
    )


def _step(m: Measurement, momentum: float) -> Finding | None:
    """Weights that a normalization follows are turned, not grown, by a large step,
    which makes the next one smaller; others run away."""
    found = [(s.relative_step, s.path) for s in m.sites if s.relative_step is not None]
    value, path = max(found, default=(0.0, ""))
    value /= 1 - momentum
    if value <= STEP:
        return None
    return Finding(
        "step",
        f"a step with learning rate {m.learning_rate:g} and momentum {momentum:g}"
        f" changes {path} by {value:.0%} of itself, and nothing holds it",
    )


def normalizes(method: Method) -> bool:
    """Whether a method restores the scale of activations at every step, rather than
    setting it once."""
    return method.family in ("batch", "sample")


def output(m: Measurement, name: str) -> float | None:
    """A property of the model's outputs."""
    for site in m.sites:
        if site.kind == "output":
            return getattr(site, name)
    return None


def score(m: Measurement, method: Method, momentum: float) -> float:
    """The compass's ranking; larger is better.

        log r_L + mean_l log(1 - c_l) - sum_l q_l log(1 + s_l / (1 - momentum))

    `r_L` is the effective rank of what the last layer reads: what it cannot tell apart
    it cannot learn to. `c_l` are the cosine similarities on the way there. The last
    sum is left out for methods that normalize activations. It bounds by what share of
    itself one step changes the network's function (Bernstein et al., 2020, "On the
    distance between two neural networks and the stability of learning",
    https://arxiv.org/abs/2002.03432): `s_l` is the relative step and `q_l` the share of
    the paths through the layer, since those through fewer layers carry the signal
    (Veit, Wilber and Belongie, 2016, https://arxiv.org/abs/1605.06431).
    """
    rank, cosine = m.hidden("effective_rank"), m.hidden("cosine")
    if not len(rank) or not (np.isfinite(rank).all() and np.isfinite(cosine).all()):
        return float("-inf")
    told_apart = np.log(np.maximum(1 - cosine[:-1], 1e-9))
    value = np.log(rank[-1]) + (told_apart.mean() if len(told_apart) else 0.0)
    return float(value) - (0.0 if normalizes(method) else change(m, momentum))


def change(m: Measurement, momentum: float) -> float:
    """Logarithm of the bound on the relative change of the function by one step."""
    found = [(s.relative_step, s.share) for s in m.sites if s.relative_step is not None]
    return float(sum(q * np.log1p(s / (1 - momentum)) for s, q in found))


def last(m: Measurement, name: str) -> float:
    """A property at the last hidden layer; NaN where none has it."""
    values = m.hidden(name)
    return float(values[-1]) if len(values) else float("nan")


def sentence(m: Measurement) -> str:
    """The measurement in one sentence, for a candidate that is not ruled out."""
    parts = [
        f"cosine similarity {last(m, 'cosine'):.2f} and effective rank"
        f" {number(last(m, 'effective_rank'))} of {m.batch_size} at the last layer",
        f"variance times {m.forward.factor:.2g} and gradients times"
        f" {m.backward.factor:.2g} a layer",
    ]
    dependence = output(m, "dependence")
    if dependence:
        parts.append(f"outputs depend on the batch ({dependence:.2g})")
    return "; ".join(parts)
