"""`compass`: one model under every method, measured, judged and ranked."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from kerasnorm.common.errors import KerasNormError, taking
from kerasnorm.common.results import Result, drawn
from kerasnorm.method import registry
from kerasnorm.properties import candidates as making
from kerasnorm.properties import rules
from kerasnorm.properties.confirm import Training, train
from kerasnorm.properties.loss import objective
from kerasnorm.properties.measure import Measurer, checked
from kerasnorm.properties.measurement import Measurement, aligned, number
from kerasnorm.runtime.models import opened
from kerasnorm.runtime.programs import one_of
from rewriters.arguments import Count, Positive, Seed, Whole


@dataclass(frozen=True)
class Candidate:
    """One method at one batch size and learning rate.

    Attributes:
        name: how the tables call it.
        method: name of the method.
        batch_size, learning_rate: what it was measured for.
        measurement: None where the method does not apply to the model.
        ruled_out: why, the gravest first; empty where it is not.
        score: the ranking among what is not ruled out; larger is better.
        parameters: how many are trained.
        training: what training it gave, with `confirm`.
    """

    name: str
    method: str
    batch_size: int
    learning_rate: float
    measurement: Measurement | None = None
    ruled_out: tuple[rules.Finding, ...] = ()
    score: float = float("-inf")
    parameters: int = 0
    training: Training | None = None

    @property
    def sentence(self) -> str:
        """Why it stands where it stands."""
        if self.ruled_out:
            return "; ".join(f.text for f in self.ruled_out)
        return rules.sentence(self.measurement) if self.measurement else ""


@dataclass(frozen=True)
class Compass(Result):
    """What `compass` found.

    Attributes:
        model: name of the model.
        candidates: best first, then what is ruled out, then what does not apply.
        weights: `"fresh"` or `"given"`.
        samples: how many inputs were used.
        seconds: wall time.

    `print` it; `.plot()`, `.heat_map()`, `.to_json()`; `.save("report.html")`.
    """

    model: str
    candidates: tuple[Candidate, ...] = field(default=())
    weights: str = "fresh"
    samples: int = 0
    seconds: float = 0.0

    @property
    def best(self) -> Candidate | None:
        """The candidate that ranks first; None where all are ruled out."""
        return next((c for c in self.candidates if not c.ruled_out), None)

    def measurements(self) -> dict[str, Measurement]:
        """Measurements by the candidate's name, in order."""
        found = {c.name: c.measurement for c in self.candidates}
        return {k: v for k, v in found.items() if v is not None}

    def curves(self) -> dict[str, tuple[float, ...]]:
        """Losses by step of what was trained."""
        return {c.name: c.training.losses for c in self.candidates if c.training}

    def columns(self) -> list[tuple[str, Callable[[Candidate], tuple[str, float]]]]:
        """The properties that decide: `(title, candidate -> (text, goodness))`, the
        goodness in [0, 1]."""

        def total(law: Any) -> float:
            return law.total if np.isfinite(law.total) and law.total > 0 else 1e38

        def stable(name: str) -> Callable[[Candidate], tuple[str, float]]:
            def cell(c: Candidate) -> tuple[str, float]:
                value = total(getattr(c.measurement, name))
                far = abs(np.log(value)) / np.log(rules.RANGE)
                return number(value), 1 - min(1.0, far)

            return cell

        def cosine(c: Candidate) -> tuple[str, float]:
            value = rules.last(c.measurement, "cosine")  # type: ignore[arg-type]
            return f"{value:.3f}", _goodness(1 - value, 1e-3, 1.0)

        def rank(c: Candidate) -> tuple[str, float]:
            value = rules.last(c.measurement, "effective_rank")  # type: ignore
            return number(value), _goodness(value, 1.0, c.batch_size)

        def dependence(c: Candidate) -> tuple[str, float]:
            value = rules.output(c.measurement, "dependence")  # type: ignore[arg-type]
            value = value or 0.0
            return number(value), 1 - min(1.0, value / rules.DEPENDENCE)

        def step(c: Candidate) -> tuple[str, float]:
            values = c.measurement.profile("relative_step")[1]  # type: ignore
            return number(float(values.max())), _goodness(
                values.max(), rules.STEP, 1e-3
            )

        return [
            ("variance, last/first", stable("forward")),
            ("cosine, last", cosine),
            ("eff. rank, last", rank),
            ("gradient, first/last", stable("backward")),
            ("dependence", dependence),
            ("largest step", step),
        ]

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table, as text."""
        columns = self.columns()
        trained = any(c.training for c in self.candidates)
        head = ["", "method", *(title for title, _ in columns)]
        head += ["loss after"] if trained else []
        rows, place = [], 0
        for c in self.candidates:
            place += not c.ruled_out
            mark = str(place) if not c.ruled_out else "-"
            cells = [f(c)[0] if c.measurement else "" for _, f in columns]
            after = [number(c.training.final) if c.training else ""] if trained else []
            rows.append([mark, c.name, *cells, *after, c.sentence])
        return [*head, "why"], rows

    def summary(self) -> str:
        """One sentence: how many, which is best, which are ruled out."""
        out = [c.name for c in self.candidates if c.ruled_out]
        best = self.best
        text = f"{len(self.candidates)} candidates for {self.model!r}"
        text += f", {self.weights} weights, {self.samples} samples: "
        text += f"{best.name} ranks first" if best else "all are ruled out"
        if best and out:
            text += f"; ruled out: {', '.join(out)}"
        trained = [c for c in self.candidates if c.training]
        if trained:
            won = min(trained, key=lambda c: c.training.final)  # type: ignore
            text += f"; lowest loss after {len(won.training.losses)} steps: {won.name}"  # type: ignore
        return text + "."

    def table(self) -> str:
        """The ranking as a table for the terminal, then a sentence each."""
        head, rows = self.rows()
        lines = [f"{row[0]:>3} {row[1]}: {row[-1]}" for row in rows]
        short = aligned(head[:-1], [row[:-1] for row in rows])
        return "\n".join([short, "", *lines, "", self.summary()])

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **{k: v for k, v in asdict(self).items() if k != "candidates"},
            "summary": self.summary(),
            "candidates": [
                {
                    **asdict(c),
                    "sentence": c.sentence,
                    "measurement": c.measurement and c.measurement.to_dict(),
                }
                for c in self.candidates
            ],
        }

    def to_html(self) -> str:
        """The report as one HTML page that holds its figures."""
        from kerasnorm.properties.html import compass_page

        return compass_page(self)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws the properties against depth, one line a candidate.

        Args:
            path: where to save the figure; not saved if None.

        Returns:
            The matplotlib figure.

        Raises:
            KerasNormError: matplotlib is not installed (extra `plots`).
        """
        from kerasnorm.properties.plots import depth_figure

        faint = [c.name for c in self.candidates if c.ruled_out]
        return drawn(depth_figure(self.measurements(), faint), path)

    def heat_map(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws methods by properties; see `plot`."""
        from kerasnorm.properties.plots import heat_figure

        return drawn(heat_figure(self), path)


@taking()
def compass(
    model: Any,
    x: Any,
    y: Any = None,
    *,
    methods: str | Sequence[Any] | None = None,
    batch_sizes: Count | Sequence[Count] = 64,
    learning_rates: Positive | Sequence[Positive] | None = None,
    momentum: float | None = None,
    weights: Literal["fresh", "given"] = "fresh",
    confirm: Whole = 0,
    loss: Any = None,
    samples: Count = 256,
    memory: Positive = 2e9,
    seed: Seed = 0,
    report: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Compass:
    """Which normalization for this model, and why: nothing needs to be trained.

    The model is put under each method, measured (see `measure`), and judged: a method
    is ruled out where one property alone stops training, and the rest are ranked. See
    `docs/choosing.md` for the rules, and for how well they predict.

    Args:
        model: a built Keras model of any kind, or the path of a saved one; untouched.
        x, y: inputs and labels, see `measure`.
        methods: names; `"all"` for every method that applies; by default those of
            Lubana et al. (2021): ten, and none.
        batch_sizes: one, fewer where there are not as many samples, or several.
        learning_rates: one or several, of the step that a method has to stand; that of
            the compiled optimizer by default, else 0.01.
        momentum: of that step, in [0, 1); that of the compiled optimizer by default,
            else 0.9.
        weights: `"fresh"`: every candidate starts from the same newly drawn weights,
            and as its method's paper says; `"given"`: from what `rewrite` makes of the
            model's own.
        confirm: train each candidate that is not ruled out for so many steps; needs
            `y`.
        loss: see `measure`.
        samples: at most this many are measured, and no fewer than the largest of
            several batches holds.
        memory: bytes that a batch may take, about.
        seed: of the weights and of the order in which samples are trained on.
        report: where to write the report, see `Compass.save`.
        progress: called with the name of each candidate before it is measured.

    Returns:
        A `Compass`: `print` it, `.plot()` it, `.save("report.html")`.

    Raises:
        KerasNormError: unknown method or argument, data that does not fit; before any
            work.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8),
    ...     keras.layers.BatchNormalization(), keras.layers.ReLU(),
    ...     keras.layers.Dense(4)])
    >>> x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    >>> found = kerasnorm.compass(model, x, methods=["bn", "ln"])
    >>> sorted(c.method for c in found.candidates)
    ['batch', 'layer']
    """
    started = time.perf_counter()
    model = opened(model, kind=keras.Model)
    chosen = making.chosen(methods)
    sizes = np.ravel(batch_sizes).tolist()
    rates: list[Any] = np.ravel(learning_rates).tolist()  # type: ignore[arg-type]
    if momentum is None:
        optimizer = one_of(getattr(model, "optimizer", None))
        momentum = float(getattr(optimizer, "momentum", 0.9))
    _check(sizes, rates, momentum, confirm, y, report)
    if confirm:  # training takes all of the data
        inputs, labels = checked(model, x, y, None)
        x, y = inputs.pack(inputs.arrays), labels
    samples = max(samples, *sizes) if len(sizes) > 1 else samples
    inputs, labels = checked(model, x, y, samples)
    if len(sizes) == 1:
        sizes = [min(*sizes, len(inputs))]
    elif max(sizes) > len(inputs):
        raise KerasNormError(
            "a batch holds more samples than there are",
            got=f"batch_sizes={sizes}, {len(inputs)} samples",
            fix="Give more data or smaller batches.",
        )
    parts = objective(model, labels, loss) if labels else (None, None)
    base, start = model, None
    if weights == "fresh":
        base = making.fresh(model, seed)
        start = making.as_inputs(inputs.arrays, max(sizes))

    def under(method: registry.Method) -> Iterator[Candidate]:
        new, made = making.put_under(base, method, start, seed)
        if new is None:
            yield excluded(method, "shape", f"does not apply: {making.why_not(made)}")
            return
        degenerate = [
            rules.Finding("shape", f"{r.path}: {r.detail}")
            for r in made.refused
            if r.reason is registry.Reason.DEGENERATE
        ]
        for size in sizes:
            measured = Measurer(
                new,
                inputs.pack(inputs.arrays),
                labels or None,
                batch_size=size,
                loss=parts[0],
                loss_weights=parts[1],
                learning_rate=rates[0],
                samples=samples,
                memory=memory,
                seed=seed,
            )()
            for rate in rates:
                m = _at(measured, rate)
                out = (*degenerate[:1], *rules.findings(m, method, momentum))
                name = [method.name]
                name += [f"batch {size}"] if len(sizes) > 1 else []
                name += [f"lr {rate:g}"] if len(rates) > 1 else []
                training = None
                if confirm and not out:
                    step = (size, m.learning_rate)
                    training = train(new, x, y, confirm, *step, *parts, model, seed)
                yield Candidate(
                    ", ".join(name),
                    method.name,
                    size,
                    m.learning_rate,
                    m,
                    out,
                    rules.score(m, method, momentum),
                    making.size(new),
                    training,
                )

    def excluded(method: registry.Method, kind: str, why: str) -> Candidate:
        rate = 0.01 if rates[0] is None else float(rates[0])
        out = (rules.Finding(kind, why),)
        return Candidate(method.name, method.name, sizes[0], rate, ruled_out=out)

    found: list[Candidate] = []
    for method in chosen:
        if progress is not None:
            progress(method.name)
        try:
            found += list(under(method))
        except Exception as error:  # of a method; the others are worth knowing still
            first = str(error).strip().partition("\n")[0]
            why = f"cannot be measured here: {type(error).__name__}: {first}"
            found.append(excluded(method, "error", why))
    if all(c.ruled_out and c.ruled_out[0].property == "error" for c in found):
        raise KerasNormError(
            "no method could be measured", got=f"{found[0].name}: {found[0].sentence}"
        )
    found.sort(key=lambda c: (c.measurement is None, bool(c.ruled_out), -c.score))
    result = Compass(
        getattr(model, "name", ""),
        tuple(found),
        weights,
        min(samples, len(inputs)),
        time.perf_counter() - started,
    )
    if report is not None:
        result.save(report)
    return result


def _check(
    sizes: Any,
    rates: Any,
    momentum: float,
    confirm: Any,
    y: Any,
    report: Any,
) -> None:
    if not 0 <= momentum < 1:
        raise KerasNormError(
            "this is no momentum", got=repr(momentum), expected="a number in [0, 1)"
        )
    if not sizes:
        raise KerasNormError("there is no batch size", got="batch_sizes=[]")
    if not rates:
        raise KerasNormError("there is no learning rate", got="learning_rates=[]")
    if confirm and y is None:
        raise KerasNormError(
            "training needs labels", got=f"confirm={confirm}, y=None", fix="Pass y."
        )
    forms = Compass("")._forms()
    path = Path("report.html" if report is None else report).absolute()
    if path.suffix.lower() not in forms or not path.parent.is_dir():
        raise KerasNormError(
            "the report cannot be written",
            got=str(report),
            expected=f"a folder that exists, a name that ends in {', '.join(forms)}",
        )


def _at(m: Measurement, rate: float | None) -> Measurement:
    """A measurement as it would be at another learning rate."""
    if rate is None or rate == m.learning_rate:
        return m
    factor = rate / m.learning_rate
    scaled: Mapping[str, Any]
    sites = []
    for site in m.sites:
        scaled = {
            n: None if (v := getattr(site, n)) is None else v * factor
            for n in ("effective_learning_rate", "relative_step")
        }
        sites.append(replace(site, **scaled))
    return replace(m, sites=tuple(sites), learning_rate=float(rate))


def _goodness(value: float, worst: float, best: float) -> float:
    """Where a size lies between two others by its logarithm, in [0, 1]."""
    if not value > 0 or not np.isfinite(value):
        return 0.0
    share = np.log(value / worst) / np.log(best / worst)
    return float(np.clip(share, 0, 1))
