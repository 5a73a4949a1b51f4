"""What an evaluation found: numbers, a table, JSON, and figures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from kerasnorm.adversarial.checks import Sign
from kerasnorm.common.errors import KerasNormError
from kerasnorm.common.results import Result, finite


@dataclass(frozen=True)
class AttackResult:
    """One attack at one radius.

    Attributes:
        name, eps: which.
        tried: points it was run on.
        fallen: of these, points for which it found an adversarial example.
        accuracy: share of all points that are classified correctly after it, and after
            those before it (unless each attack was tried alone).
        steps: points judged by the model, in all.
        seconds: wall time, compilation included.
        white_box: it used gradients of the model.
    """

    name: str
    eps: float
    tried: int
    fallen: int
    accuracy: float
    steps: int
    seconds: float
    white_box: bool


@dataclass(frozen=True)
class Evaluation(Result):
    """Accuracy under attack.

    Attributes:
        norm: of the ball.
        eps: its radii, growing.
        clean_accuracy: share classified correctly as they are.
        robust: share that no attack broke, per radius.
        attacks: every attack at every radius, in the order they were run.
        y, predicted: classes and predictions on the clean inputs, `(n,)`.
        distance: of the nearest adversarial example found for each point, `(n,)`: 0
            where the clean point is wrong, inf where none was found.
        warnings: signs that the numbers cannot be trusted.
        seconds: wall time of everything.
        seed: of the random numbers.
        x, adversarial: inputs and nearest adversarial examples, where they were kept;
            the clean input where there is none.
        adversarial_predicted: their predictions.
    """

    norm: str
    eps: tuple[float, ...]
    clean_accuracy: float
    robust: tuple[float, ...]
    attacks: tuple[AttackResult, ...]
    y: np.ndarray = field(repr=False)
    predicted: np.ndarray = field(repr=False)
    distance: np.ndarray = field(repr=False)
    warnings: tuple[Sign, ...] = ()
    seconds: float = 0.0
    seed: int = 0
    x: np.ndarray | None = field(default=None, repr=False)
    adversarial: np.ndarray | None = field(default=None, repr=False)
    adversarial_predicted: np.ndarray | None = field(default=None, repr=False)

    @classmethod
    def joined(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """One evaluation of the points of several, which had the same settings."""
        sizes = [len(p.y) for p in parts]

        def share(shares: Iterable[float]) -> float:
            points = (round(s * n) for s, n in zip(shares, sizes, strict=True))
            return sum(points) / sum(sizes)

        def together(name: str) -> Any:
            values = [getattr(p, name) for p in parts]
            return None if values[0] is None else np.concatenate(values)

        attacks = [
            replace(
                same[0],
                accuracy=share(r.accuracy for r in same),
                **{
                    name: sum(getattr(r, name) for r in same)
                    for name in ("tried", "fallen", "steps", "seconds")
                },
            )
            for same in zip(*(p.attacks for p in parts), strict=True)
        ]
        # Of each kind the first: the numbers in the texts are those of a part.
        signs = {w.code: w for p in reversed(parts) for w in p.warnings}
        arrays = ("y", "predicted", "distance")
        arrays += ("x", "adversarial", "adversarial_predicted")
        return replace(
            parts[0],
            clean_accuracy=share(p.clean_accuracy for p in parts),
            robust=tuple(map(share, zip(*(p.robust for p in parts), strict=True))),
            attacks=tuple(attacks),
            warnings=tuple(signs.values()),
            seconds=sum(p.seconds for p in parts),
            **{name: together(name) for name in arrays},
        )

    @property
    def robust_accuracy(self) -> float:
        """Share that no attack broke, at the largest radius."""
        return self.robust[-1]

    @property
    def median_distance(self) -> float:
        """Median of `distance` over the points that are classified correctly: inf
        where most of them stand, NaN where there are none."""
        found = np.sort(self.distance[self.predicted == self.y])
        # Not the mean of two neighbours, which would be NaN between infinities.
        return float(found[(len(found) - 1) // 2]) if len(found) else float("nan")

    @property
    def per_class(self) -> dict[int, tuple[int, float, float]]:
        """Class: how many points, clean accuracy, robust accuracy at the largest
        radius."""
        stands = self.standing()
        return {
            int(c): (
                int((self.y == c).sum()),
                float((self.predicted == self.y)[self.y == c].mean()),
                float(stands[self.y == c].mean()),
            )
            for c in np.unique(self.y)
        }

    def standing(self, eps: float | None = None) -> np.ndarray:
        """Points with no adversarial example within `eps`, `(n,)` bool.

        Args:
            eps: the largest radius by default; any number of at most that.
        """
        eps = self.eps[-1] if eps is None else eps
        return (self.predicted == self.y) & ~within(self.distance, eps)

    def accuracy(self, name: str, eps: float | None = None) -> float:
        """Accuracy after an attack, at the largest radius by default.

        Raises:
            KerasNormError: no such attack was run at that radius.
        """
        eps = self.eps[-1] if eps is None else eps
        for result in self.attacks:
            if result.name == name and result.eps == eps:
                return result.accuracy
        raise KerasNormError(
            "no such attack was run",
            got=f"{name!r} at eps {eps}",
            expected=", ".join(sorted({r.name for r in self.attacks})),
        )

    # -------------------------------------------------------------- showing

    def rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """See `Result.rows`: a line for every attack and radius."""
        head = ("attack", self.norm, "tried", "fallen", "accuracy", "steps", "s")
        rows = [
            ("none", "0", str(len(self.y)), "", _percent(self.clean_accuracy), "", "")
        ]
        rows += [
            (
                r.name,
                f"{r.eps:.4g}",
                str(r.tried),
                str(r.fallen),
                _percent(r.accuracy),
                str(r.steps),
                f"{r.seconds:.1f}",
            )
            for r in self.attacks
        ]
        return head, rows

    def summary(self) -> str:
        """One sentence, and the warnings."""
        n = len(self.y)
        text = (
            f"{n} points: {_percent(self.clean_accuracy)} correct,"
            f" {_percent(self.robust_accuracy)} after all attacks within"
            f" {self.norm} {self.eps[-1]:.4g}; median distance"
            f" {self.median_distance:.4g}; {self.seconds:.1f} s."
        )
        return "\n".join([text, *map(str, self.warnings)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what is infinite or undefined is None."""
        return finite(
            {
                "norm": self.norm,
                "eps": self.eps,
                "samples": len(self.y),
                "clean_accuracy": self.clean_accuracy,
                "robust_accuracy": self.robust,
                "median_distance": self.median_distance,
                "per_class": {
                    str(c): {"samples": n, "clean": clean, "robust": robust}
                    for c, (n, clean, robust) in self.per_class.items()
                },
                "attacks": [asdict(r) for r in self.attacks],
                "distance": self.distance,
                "warnings": [asdict(w) for w in self.warnings],
                "seconds": self.seconds,
                "seed": self.seed,
            }
        )

    def _forms(self) -> dict[str, Any]:
        return {**super()._forms(), ".npz": self._save_examples}

    def _save_examples(self, path: Any) -> None:
        np.savez_compressed(
            path,
            **self._kept(),
            y=self.y,
            predicted=self.predicted,
            distance=self.distance,
        )

    def _kept(self) -> dict[str, Any]:
        if self.x is None or self.adversarial is None:
            raise KerasNormError(
                "the adversarial examples were not kept", fix="Evaluate with keep=True"
            )
        return {"x": self.x, "adversarial": self.adversarial}

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws accuracy against eps, overall and after each attack.

        Args:
            path: where to save the figure; not saved when None.

        Returns:
            The matplotlib figure.

        Raises:
            KerasNormError: matplotlib is not installed (extra `plots`).
        """
        from kerasnorm.adversarial.plots import curve

        return curve(self, path)

    def grid(self, path: str | os.PathLike[str] | None = None, rows: int = 6) -> Any:
        """Draws clean inputs, their adversarial examples, and the difference.

        Args:
            path: where to save the figure; not saved when None.
            rows: how many points, the fallen ones first.

        Returns:
            The matplotlib figure.

        Raises:
            KerasNormError: the examples were not kept, or are no images; matplotlib is
                not installed (extra `plots`).
        """
        from kerasnorm.adversarial.plots import grid

        self._kept()
        return grid(self, path, rows)


def within(distance: np.ndarray, eps: float, room: float = 0.0) -> np.ndarray:
    """Whether distances found in float32 are at most `eps`, but for rounding, which
    may have added `room`."""
    return np.isfinite(distance) & (distance <= eps * (1 + 1e-5) + 1e-6 + room)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
