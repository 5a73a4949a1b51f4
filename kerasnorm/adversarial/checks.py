"""Signs that a robust accuracy cannot be trusted, each with a code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kerasnorm.common.errors import KerasNormError


DOCS = "docs/adversarial.md"

CODES = {
    "zero-gradients": "the gradient is exactly 0, so that no white-box attack can move",
    "gradient-masking": "many steps do less than one, or than none",
    "black-box-stronger": "attacks without gradients break what those with them do not",
    "rising": "points that fall in a small ball stand in a larger one",
    "randomized": "the same input gives different outputs",
    "range": "the data, the bounds and eps do not fit each other",
    "not-finite": "outputs are NaN or infinite, which count as wrong answers",
    "unconfirmed": "adversarial examples failed the check afterwards, and do not count",
    "hidden-logits": "probabilities are attacked, as the logits are out of reach",
}

# Shares of the points tried from which a sign counts.
FLAT, ODD = 0.1, 0.02


class NotFinite(KerasNormError):
    """All outputs of a model are NaN or infinite."""


@dataclass(frozen=True)
class Sign:
    """One sign.

    Attributes:
        code: a key of `CODES`, and a section of the docs page.
        text: what was seen, with numbers.
    """

    code: str
    text: str

    def __str__(self) -> str:
        return f"[{self.code}] {self.text} ({DOCS}#{self.code})"


@dataclass
class Evidence:
    """What an evaluation saw beside its results.

    Args:
        x: the clean inputs.
        bounds, radii, norm: of the evaluation.
        hidden: probabilities without a way to the logits.
        random: two passes over the same inputs differed.
    """

    x: np.ndarray
    bounds: tuple[Any, Any]
    radii: Sequence[float]
    norm: str
    hidden: bool
    random: bool
    curve: list[float] = field(default_factory=list)
    again: list[tuple[float, int, int]] = field(default_factory=list)
    flat: list[tuple[str, int, int]] = field(default_factory=list)
    apart: dict[str, int] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)

    def saw(
        self,
        attack: Any,
        eps: float,
        found: Any,
        rows: np.ndarray,
        fell: np.ndarray,
        apart: int,
    ) -> None:
        """Notes how an attack went."""
        if attack.white_box:
            self.flat.append((attack.name, int(found.flat.sum()), len(rows)))
        if apart:
            self.apart[attack.name] = self.apart.get(attack.name, 0) + apart


def warnings(seen: Evidence, results: Sequence[Any], clean: np.ndarray) -> list[Sign]:
    """All signs, in the order of `CODES`."""
    correct = max(int(clean.sum()), 1)
    found = [
        Sign("zero-gradients", f"{name}: {flat} of {tried} points have no gradient")
        for name, flat, tried in seen.flat
        if tried and flat >= max(FLAT * tried, 2)
    ]
    found += _masking(results, correct)
    found += _black_box(results, correct)
    for eps, tried, fell in seen.again:
        if tried - fell >= max(ODD * tried, 2):
            found.append(
                Sign(
                    "rising",
                    f"{tried - fell} of {tried} points that fell in a smaller ball"
                    f" stand at eps {eps:.4g}",
                )
            )
    if seen.random:
        found.append(
            Sign(
                "randomized",
                "two passes over the same inputs differ; gradients of one draw say"
                " little about the next",
            )
        )
    found += _range(seen)
    found += [
        Sign("not-finite", f"{where}: the outputs of {n} are NaN or infinite")
        for where, n in seen.broken.items()
        if n
    ]
    found += [
        Sign("unconfirmed", f"{name}: {n} examples") for name, n in seen.apart.items()
    ]
    if seen.hidden:
        found.append(
            Sign("hidden-logits", "the last activation was not found; use logits")
        )
    unique = {(w.code, w.text): w for w in found}
    order = list(CODES)
    return sorted(unique.values(), key=lambda w: order.index(w.code))


def _masking(results: Sequence[Any], correct: int) -> list[Sign]:
    """One step that does more than many; noise that does more than gradients. Seen
    where an attack that should be weaker comes later and still finds some."""
    found = []
    for later, result in enumerate(results):
        before = [r for r in results[:later] if r.eps == result.eps and r.white_box]
        if not before or result.tried == correct:
            continue
        weak = result.name.startswith(("fgsm", "noise"))
        if weak and result.fallen >= max(ODD * correct, 2):
            found.append(
                Sign(
                    "gradient-masking",
                    f"{result.name} broke {result.fallen} points that"
                    f" {before[-1].name} had left standing",
                )
            )
    # Where each was tried on all points, the accuracies can be compared.
    for eps in {r.eps for r in results}:
        level = [r for r in results if r.eps == eps and r.tried == correct]
        weak = [r for r in level if r.name.startswith(("fgsm", "noise"))]
        many = [r for r in level if r.white_box and r not in weak]
        if weak and many:
            least, most = max(weak, key=_fallen), max(many, key=_fallen)
            if least.fallen - most.fallen >= max(ODD * correct, 2):
                found.append(
                    Sign(
                        "gradient-masking",
                        f"{least.name} broke {least.fallen} points, {most.name} only"
                        f" {most.fallen}",
                    )
                )
    return found


def _fallen(result: Any) -> int:
    return result.fallen


def _black_box(results: Sequence[Any], correct: int) -> list[Sign]:
    found = []
    for at, result in enumerate(results):
        white = [r for r in results[:at] if r.eps == result.eps and r.white_box]
        alone = result.tried == correct and white and white[0].tried == correct
        extra = result.fallen - (max(map(_fallen, white)) if alone and white else 0)
        if not result.white_box and white and extra >= max(ODD * correct, 2):
            found.append(
                Sign(
                    "black-box-stronger",
                    f"{result.name} broke {extra} points at eps {result.eps:.4g} that"
                    " no gradient had led to",
                )
            )
    return found


def _range(seen: Evidence) -> list[Sign]:
    low, high = (np.asarray(b, "float64") for b in seen.bounds)
    width = float(np.max(high - low))
    data = float(seen.x.max() - seen.x.min())
    found = []
    if data < 0.05 * width:
        found.append(
            Sign(
                "range",
                f"the data fills {data:.4g} of bounds {width:.4g} wide",
            )
        )
    top = max((r for r in seen.radii if np.isfinite(r)), default=0.0)
    diameter = width if seen.norm == "linf" else width * seen.x[0].size ** 0.5
    diameter = width * seen.x[0].size if seen.norm == "l1" else diameter
    if top >= 0.5 * diameter:
        found.append(
            Sign(
                "range",
                f"eps {top:.4g} turns any input into any other halfway: the widest"
                f" difference is {diameter:.4g}",
            )
        )
    return found
