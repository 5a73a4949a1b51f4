"""What `measure` found: a table, JSON, a data frame, figures over depth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from kerasnorm.common.errors import KerasNormError
from kerasnorm.common.results import Result, drawn
from kerasnorm.properties.definitions import Growth, growth


@dataclass(frozen=True)
class Site:
    """The properties of one layer; None where one has no meaning there.

    Args:
        path: where the layer is; `"output"` for the model's outputs.
        layer: its class.
        kind: `"linear"` (it has kernels), `"norm"` or `"output"`.
        depth: how many layers with kernels lead through it, itself included.
        method: name of the normalization, or class of the weight method.
        share: of the paths from inputs to outputs, how many lead through the layer; a
            residual branch is taken by half of them.
        variance: of the activations that it reads, within a channel.
        cosine: mean cosine between the activations of two samples, in [-1, 1].
        stable_rank: of the samples' activations, in [1, batch size].
        effective_rank: the same, by entropy.
        dead: share of units that are always 0, in [0, 1].
        gradient: norm of the gradient at its output, root mean square over samples.
        gradient_cosine: mean cosine between the gradients of two samples.
        weight_norm: of its kernels.
        weight_gradient: norm of the gradient of the mean loss in them.
        effective_learning_rate: learning rate over the square of the weight norm.
        relative_step: by what share of itself one step moves the kernels.
        statistics_distance: of the data's statistics from the running ones, in running
            standard deviations.
        dependence: of a sample's activations on the other samples of its batch; 0 is
            none, 1 as much as samples differ.
    """

    path: str
    layer: str
    kind: str
    depth: int
    method: str | None = None
    share: float = 1.0
    variance: float | None = None
    cosine: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    dead: float | None = None
    gradient: float | None = None
    gradient_cosine: float | None = None
    weight_norm: float | None = None
    weight_gradient: float | None = None
    effective_learning_rate: float | None = None
    relative_step: float | None = None
    statistics_distance: float | None = None
    dependence: float | None = None

    @classmethod
    def figures(cls) -> tuple[str, ...]:
        """Names of the properties."""
        return tuple(f.name for f in fields(cls))[6:]


# Where a property is an average over depth by its logarithm.
LOGARITHMIC = (
    "variance",
    "gradient",
    "weight_norm",
    "weight_gradient",
    "effective_learning_rate",
    "relative_step",
)


@dataclass(frozen=True)
class Measurement(Result):
    """The properties of a model at every layer, as `measure` found them.

    Attributes:
        model: its name.
        sites: one `Site` for each layer that learns or normalizes, in order of
            computation, and one for the outputs.
        samples: how many were used.
        batch_size: how many at once.
        learning_rate: behind the effective learning rate and the relative step.
        labelled: whether gradients start at a loss of labels.
        training: whether the model ran as it is trained.
        seconds: wall time.
        notes: what the user should know.
    """

    model: str
    sites: tuple[Site, ...]
    samples: int
    batch_size: int
    learning_rate: float
    labelled: bool = False
    training: bool = True
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def profile(self, name: str, kind: str = "linear") -> tuple[np.ndarray, np.ndarray]:
        """A property against depth: `(depths, values)`.

        Layers of the same depth count as one, by their mean (of logarithms where the
        property is a size).

        Args:
            name: of the property, an attribute of `Site`.
            kind: `"linear"` or `"norm"`.

        Raises:
            KerasNormError: there is no such property.
        """
        if name not in Site.figures():
            raise KerasNormError(
                "unknown property",
                got=repr(name),
                expected=f"one of {', '.join(Site.figures())}",
            )
        values: dict[int, list[float]] = {}
        for site in self.sites:
            value = getattr(site, name)
            if site.kind == kind and value is not None:
                values.setdefault(site.depth, []).append(value)
        depths = sorted(values)
        if name in LOGARITHMIC:
            with np.errstate(divide="ignore"):
                means = [float(np.exp(np.mean(np.log(values[k])))) for k in depths]
        else:
            means = [float(np.mean(values[k])) for k in depths]
        return np.array(depths), np.array(means)

    def hidden(self, name: str) -> np.ndarray:
        """`profile` over the hidden layers: without the one that reads the inputs,
        which are the data's and not the model's."""
        values = self.profile(name)[1]
        return values[1:] if len(values) > 2 else values

    @property
    def most_dead(self) -> Site | None:
        """The linear layer that reads most dead units, but for the first, which reads
        the data; None where none is known."""
        behind = [s for s in self.sites if s.kind == "linear" and s.depth > 1]
        known = [s for s in behind if s.dead is not None]
        return max(known, key=lambda s: s.dead or 0.0, default=None)

    @property
    def forward(self) -> Growth:
        """How the activation variance goes with depth."""
        return growth(self.hidden("variance"))

    @property
    def backward(self) -> Growth:
        """How the gradient's norm goes on its way back, from the last layer on."""
        return growth(self.profile("gradient")[1][::-1])

    def at(self, path: str) -> Site:
        """The properties of the layer at a path.

        Raises:
            KerasNormError: no layer that is measured is there.
        """
        for site in self.sites:
            if site.path == path:
                return site
        raise KerasNormError(
            "no layer that is measured has this path",
            got=repr(path),
            expected=f"one of {', '.join(s.path for s in self.sites)}",
        )

    def summary(self) -> str:
        """A few sentences: the three properties, and what else stands out."""
        forward, backward = self.forward, self.backward
        cosines, ranks = self.hidden("cosine"), self.hidden("stable_rank")
        lines = [
            f"Forward: activation variance times {forward.factor:.3g} a layer"
            f" ({forward.kind}), {forward.total:.3g} in all",
        ]
        if len(cosines):
            lines.append(
                f"Informative: cosine similarity {cosines[0]:.2f} to"
                f" {cosines[-1]:.2f}, stable rank {ranks[0]:.3g} to {ranks[-1]:.3g}"
                f" of {self.batch_size}",
            )
        lines.append(
            f"Backward: gradient norm times {backward.factor:.3g} a layer on its way"
            f" back ({backward.kind}), {backward.total:.3g} in all"
        )
        worst = self.most_dead
        if worst is not None and worst.dead:
            lines.append(f"Dead units: up to {worst.dead:.0%}, before {worst.path}")
        output = next((s for s in self.sites if s.kind == "output"), None)
        if output is not None and output.dependence is not None:
            lines.append(
                f"Dependence of the output on the batch: {output.dependence:.3g}"
            )
        return ".\n".join([*lines, *self.notes]) + "."

    def table(self) -> str:
        """The properties as a table for the terminal, and the summary."""
        return aligned(*self.rows()) + "\n\n" + self.summary()

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table, as text."""
        columns = [
            n for n in _COLUMNS if any(getattr(s, n) is not None for s in self.sites)
        ]
        head = ["depth", "layer", *(_COLUMNS[n] for n in columns)]
        rows = [
            [str(s.depth), s.path, *(number(getattr(s, n)) for n in columns)]
            for s in self.sites
        ]
        return head, rows

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the sites, the two growths, the summary."""
        return {
            **asdict(self),
            "forward": asdict(self.forward),
            "backward": asdict(self.backward),
            "summary": self.summary(),
        }

    def to_frame(self) -> Any:
        """The sites as a pandas data frame, one row each.

        Raises:
            KerasNormError: pandas is not installed.
        """
        try:
            import pandas  # type: ignore[reportMissingImports]
        except ImportError as error:
            raise KerasNormError(
                "data frames need pandas",
                got="no such package",
                fix="pip install pandas",
            ) from error
        return pandas.DataFrame([asdict(s) for s in self.sites])

    def to_html(self) -> str:
        """The report as one HTML page that holds its figures."""
        from kerasnorm.properties.html import measurement_page

        return measurement_page(self)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws the properties against depth.

        Args:
            path: where to save the figure (`.png`, `.svg`, `.pdf`); not saved if None.

        Returns:
            The matplotlib figure.

        Raises:
            KerasNormError: matplotlib is not installed (extra `plots`).
        """
        from kerasnorm.properties.plots import depth_figure

        return drawn(depth_figure({self.model: self}), path)


_COLUMNS = {
    "variance": "variance",
    "cosine": "cosine",
    "stable_rank": "stable rank",
    "effective_rank": "eff. rank",
    "dead": "dead",
    "gradient": "gradient",
    "weight_norm": "||w||",
    "relative_step": "step",
    "statistics_distance": "drift",
    "dependence": "dependence",
}


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text that cuts nothing off, the second column to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for line in (head, ["-" * w for w in widths], *rows):
        cells = [
            c.ljust(w) if k == 1 else c.rjust(w)
            for k, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Three digits; empty for what is not known."""
    return "" if value is None else f"{value:.3g}"
