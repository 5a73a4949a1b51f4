"""What a rewrite did: a table, JSON, markdown, and plots."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kerasnorm.common.results import Result, render
from kerasnorm.method.registry import Fidelity
from kerasnorm.rewriting.plan import Plan, Step
from rewriters.compare import Comparison


@dataclass(frozen=True)
class Report(Result):
    """What `rewrite` did.

    Attributes:
        plan: the steps and refusals.
        fit: the `FitResult`, None where nothing was fitted.
        comparison: outputs of old and new model compared, for exact rewrites.
        unverified: why the outputs of an exact rewrite were not compared; None where
            they were, or where it is not exact.
        seconds: wall time of the whole rewrite.
        parameters: number of parameters before and after; None if not built.
    """

    plan: Plan
    fit: Any = None
    comparison: Comparison | None = None
    unverified: str | None = None
    seconds: float = 0.0
    parameters: tuple[int, int] | None = None

    @property
    def rho_squared(self) -> dict[str, float]:
        """Share of the old layer's variance kept, by path, for fitted steps."""
        sites = self.fit.sites if self.fit is not None else ()
        return {s.path: s.after for s in sites if not s.note}

    def fidelity(self, step: Step) -> str:
        """The step's fidelity; where it was fitted, with the share of variance kept and
        the number of groups that was chosen, or with why it was not."""
        sites = {} if self.fit is None else {s.path: s for s in self.fit.sites}
        site = sites.get(step.path)
        if site is None or step.fidelity not in (Fidelity.FRESH, Fidelity.FITTED):
            return str(step.fidelity)
        if site.note:
            return f"{step.fidelity}; {site.note}"
        chosen = [
            f"groups={site.groups}" if site.groups else "",
            f"epsilon={site.epsilon:.3g}" if site.epsilon is not None else "",
        ]
        chosen = " with " + ", ".join(filter(None, chosen)) if any(chosen) else ""
        return f"{Fidelity.FITTED}, {site.after:.3f} of variance kept{chosen}"

    def summary(self) -> str:
        """One paragraph: how many layers, how faithful, what stayed."""
        plan = self.plan
        text = f"{len(plan.steps)} of {len(plan.steps) + len(plan.refused)}"
        lines = [f"{text} layers of {plan.model!r} -> {plan.method}"]
        if self.comparison is not None:
            lines.append(
                f"largest relative difference of the outputs on random inputs:"
                f" {self.comparison.relative:.1e}"
            )
        if self.unverified is not None:
            lines.append(f"not verified: {self.unverified}")
        if self.fit is not None:
            kept = list(self.rho_squared.values())
            lines.append(
                f"fit {self.fit.method!r} on {self.fit.samples} samples in"
                f" {self.fit.seconds:.1f} s"
                + (
                    f", variance kept {min(kept):.3f} to {max(kept):.3f}"
                    if kept
                    else ""
                )
            )
            lines += map(str, self.fit.agreement)
            shares = [s.normalizes for s in self.fit.sites if s.normalizes is not None]
            if shares:
                lines.append(
                    f"epsilon was raised in {len(shares)} layers, where a sample's own"
                    f" variance is now {100 * min(shares):.0f} to"
                    f" {100 * max(shares):.0f} % of what it is divided by"
                )
            lines += self.fit.notes
        if self.parameters is not None:
            lines.append("parameters {:,} -> {:,}".format(*self.parameters))
        return "; ".join(lines) + "."

    def table(self) -> str:
        """The report as a table for the terminal."""
        if not self.plan.steps and not self.plan.refused:
            return plan_table(self.plan)
        return super().table()

    def rows(self) -> tuple[Sequence[str], list[Sequence[str]]]:
        """See `Result.rows`: a line for every layer that was found."""
        return plan_rows(self.plan, self.fidelity)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the plan, the fit, the comparison, the summary."""
        return {
            "plan": asdict(self.plan),
            "fit": None if self.fit is None else asdict(self.fit),
            "comparison": self.comparison and self.comparison.to_dict(),
            "unverified": self.unverified,
            "seconds": self.seconds,
            "parameters": self.parameters,
            "summary": self.summary(),
        }

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        accuracy: dict[str, float] | None = None,
    ) -> Any:
        """Draws the share of variance kept at each site, and accuracy kept.

        Args:
            path: where to save the figure; not saved when None.
            accuracy: accuracies by name, `{"original": 0.9, "affine": 0.85}`, drawn
                beside.

        Returns:
            The matplotlib figure.

        Raises:
            KerasNormError: matplotlib is not installed (extra `plots`).
        """
        from kerasnorm.rewriting.plots import draw

        return draw(self, path, accuracy)


def plan_rows(
    plan: Plan, fidelity: Any = None
) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Header and rows of a plan's table."""
    head = ("layer", "from", "to", "fidelity", "note")
    rows: list[Sequence[str]] = [
        (
            s.path,
            s.source,
            s.layer,
            fidelity(s) if fidelity else str(s.fidelity),
            s.note,
        )
        for s in plan.steps
    ]
    rows += [
        (
            r.path,
            r.source,
            "stays",
            str(r.reason),
            r.detail + (f"; {r.instead}" if r.instead else ""),
        )
        for r in plan.refused
    ]
    return head, rows


def plan_table(plan: Plan) -> str:
    """A plan as text."""
    if not plan.steps and not plan.refused:
        return f"No normalization layer of {plan.model!r} matches; nothing to do."
    total = len(plan.steps) + len(plan.refused)
    end = f"{len(plan.steps)} of {total} layers -> {plan.method}"
    return render(*plan_rows(plan)) + f"\n{end} ({plan.fidelity or 'nothing to do'})."
