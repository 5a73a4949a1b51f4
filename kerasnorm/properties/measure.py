"""`measure`: the properties of a model, at every layer that learns or normalizes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from kerasnorm.common import data as reading
from kerasnorm.common.errors import KerasNormError, taking
from kerasnorm.kernels.reparametrized import Reparametrized
from kerasnorm.method.registry import Source, read
from kerasnorm.properties import definitions as d
from kerasnorm.properties.loss import in_order, summed_loss
from kerasnorm.properties.measurement import Measurement, Site
from kerasnorm.properties.probe import OUTPUT, Pass, Probe, Reading, probes
from kerasnorm.runtime.models import opened
from kerasnorm.runtime.programs import learning_rate
from rewriters import private
from rewriters.arguments import Count, Positive, Seed
from rewriters.tracing import watching


@taking()
def measure(
    model: Any,
    x: Any,
    y: Any = None,
    *,
    batch_size: Count = 64,
    loss: Any = None,
    loss_weights: Any = None,
    learning_rate: Positive | None = None,
    training: bool = True,
    samples: Count = 256,
    memory: Positive = 2e9,
    seed: Seed = 0,
) -> Measurement:
    """The properties that predict how a model trains, layer by layer.

    One forward and one backward pass of each batch, and one more forward pass of the
    first with other samples beside (for the dependence on the batch). Takes the memory
    of one training step at this batch size. The model is left as it was, moving
    statistics included.

    Watched are layers with kernels and normalization layers, wherever they are held. At
    each, what it learns from is measured: the activations that it reads, and the
    gradient that reaches its outputs. See `Site` for the properties, `docs/` for their
    formulas.

    Args:
        model, x, y, batch_size, loss, loss_weights, learning_rate, training, samples,
            memory, seed: as for `Measurer`.

    Returns:
        A `Measurement`: `print` it, `.plot()` it, `.to_json()`, `.to_frame()`.

    Raises:
        KerasNormError: no model, no data, data or labels that do not fit.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> m = kerasnorm.properties.measure(model, np.eye(8, dtype="float32"))
    >>> [site.path for site in m.sites]
    ['dense', 'output']
    """
    measurer = Measurer(
        model,
        x,
        y,
        batch_size=batch_size,
        loss=loss,
        loss_weights=loss_weights,
        learning_rate=learning_rate,
        training=training,
        samples=samples,
        memory=memory,
        seed=seed,
    )
    found = measurer()
    if measurer.broken == found.samples // found.batch_size:
        raise KerasNormError(
            "all outputs of the model are NaN or infinite",
            got=found.notes[-1],
            fix="Look for weights that are not finite there.",
        )
    return found


class Measurer:
    """Measures one model on the same data again and again, compiled once.

    Data and labels are read and checked when it is made, the weights at every call.

    Args:
        model: a built Keras model of any kind, or the path of a saved one.
        x: inputs: arrays, a list or dict of arrays, a `tf.data.Dataset`, a `PyDataset`
            or an iterable of batches.
        y: labels, `(samples, ...)`, or one array for each output, in a list or by its
            name. Without, gradients start in random directions of the outputs instead
            of at a loss.
        batch_size: samples that pass together, which batch statistics are of; fewer
            where `memory` asks for it, and as many as the model takes where it takes
            batches of one size. A rest that fills no batch is left out.
        loss: as `compile` takes it; the compiled one by default, or one that suits the
            labels.
        loss_weights: as `compile` takes them; beside the compiled loss its own.
        learning_rate: of the effective learning rate and the relative step; that of
            the compiled optimizer by default, else 0.01.
        training: as the model is trained; False for inference, with running statistics.
        samples: at most this many are used: of arrays evenly spaced, of a source of
            batches the first.
        memory: bytes that a batch may take, about.
        seed: of the random directions.

    Raises:
        KerasNormError: as `measure`.
    """

    @taking()
    def __init__(
        self,
        model: Any,
        x: Any,
        y: Any = None,
        *,
        batch_size: Count = 64,
        loss: Any = None,
        loss_weights: Any = None,
        learning_rate: Positive | None = None,
        training: bool = True,
        samples: Count = 256,
        memory: Positive = 2e9,
        seed: Seed = 0,
    ):
        model = opened(model, kind=keras.Model)
        inputs, labels = checked(model, x, y, samples)
        self.notes: list[str] = []
        self.model, self.training, self.rate = model, training, learning_rate
        self.inputs, self.labels = inputs, labels
        fixed = reading.whole_batch(model, len(inputs))
        self.batch = fixed or min(batch_size, len(inputs))
        fits = max(1, int(memory // (2 * _bytes(model, inputs))))
        if fits < self.batch and fixed is None:
            self.notes.append(
                f"batches of {fits} instead of {self.batch} to stay below "
                f"{memory / 1e9:.2g} GB"
            )
            self.batch = fits
        self.broken = 0  # batches whose outputs are not finite
        self.watched = probes(model)
        if not self.watched:
            raise KerasNormError(
                "there is nothing to measure",
                got=f"{model.name!r} without a layer that has a kernel or normalizes",
            )
        self._run = Pass(
            model,
            self.watched,
            inputs.pack,
            len(inputs.arrays),
            summed_loss(model, labels, loss, loss_weights, seed),
            training,
        )

    @property
    def traces(self) -> int:
        return self._run.traces

    def _rate_of(self, kernel: Any) -> float:
        if self.rate is not None:
            return float(self.rate)
        optimizer = getattr(self.model, "optimizer", None)
        return 0.01 if optimizer is None else learning_rate(optimizer, kernel)

    def __call__(self) -> Measurement:
        """The properties of the model as it is now."""
        started = time.perf_counter()
        model, inputs, batch = self.model, self.inputs, self.batch
        kernels = [k for probe in self.watched for k in probe.kernels]
        rates = {id(k): self._rate_of(k) for k in kernels}
        rate = self._rate_of(kernels[0] if kernels else None)
        run, watched, notes = self._run, self.watched, list(self.notes)
        flat = [*inputs.arrays, *self.labels]
        batches = [
            [a[k : k + batch] for a in flat]
            for k in range(0, len(inputs) - batch + 1, batch)
        ]
        n = len(inputs.arrays)
        passes = [run.run(part[:n], part[n:]) for part in batches]
        others = _dependence(run, [a[:batch] for a in inputs.arrays], passes[0][0])
        if others is None:
            notes.append("one sample a batch: dependence on the others is not known")
        if len(set(rates.values())) > 1:
            notes.append("learning rates differ; that of the first kernel is told")
        lost = [_broken(p[0], watched) for p in passes]
        self.broken = sum(path is not None for path in lost)
        if self.broken:
            first = next(path for path in lost if path is not None)
            notes.append(
                f"{self.broken} of {len(passes)} batches give outputs that are NaN or"
                f" infinite, from {first!r} on"
            )
        found = [
            _gather(k, [p[0] for p in passes]) for k in (*range(len(watched)), OUTPUT)
        ]
        gradients = {
            key: float(np.sqrt(np.mean([p[1][key] ** 2 for p in passes])))
            for key in passes[0][1]
        }
        sites = []
        for k, probe in enumerate(watched):
            if found[k]:
                known = {**found[k], **_of_weights(probe, gradients, rates)}
                known["dependence"] = (others or {}).get(k)
                if probe.source is not None and "mean" in known:
                    known["statistics_distance"] = _distance(probe, known)
                sites.append(_site(probe, known))
        if found[-1]:
            found[-1]["dependence"] = (others or {}).get(OUTPUT)
            last = max((s.depth for s in sites), default=0) + 1
            sites.append(_site(Probe("output", model, "output", last), found[-1]))
        return Measurement(
            model=getattr(model, "name", ""),
            sites=tuple(sites),
            samples=batch * len(batches),
            batch_size=batch,
            learning_rate=rate,
            labelled=bool(self.labels),
            training=self.training,
            seconds=time.perf_counter() - started,
            notes=tuple(notes),
        )


def checked(
    model: Any, x: Any, y: Any, samples: int | None
) -> tuple[reading.Inputs, list[np.ndarray]]:
    """Inputs and flat labels, as many of them, or an error that says what is wrong.

    Args:
        model, x, y: as for `Measurer`.
        samples: at most this many; None for all.
    """
    streamed = reading.batches_of(x) is not None
    inputs = reading.collect(model, x, samples, every=samples is None)
    if y is None:
        return inputs, []
    n = len(inputs) if streamed else inputs.total
    missing = np.zeros((n, 0), "float32")  # of an output that no loss reads
    labels = [
        missing if v is None else keras.ops.convert_to_numpy(v)
        for v in in_order(model, y)
    ]
    if streamed and (inputs.cut or n == samples):  # there may be more of it
        labels = [v[:n] if v.ndim else v for v in labels]
    if any(not v.ndim or len(v) != n for v in labels):
        raise KerasNormError(
            "there are not as many labels as inputs",
            got=f"labels of shape {[v.shape for v in labels]}",
            expected=f"{n} of them",
        )
    rows = reading.spaced(n, samples)
    return inputs, [v[rows] for v in labels]


def _bytes(model: Any, inputs: reading.Inputs) -> int:
    """Bytes of all that one sample leaves between layers."""
    sizes = [1]

    def note(layer: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        sizes.extend(
            4 * int(np.prod(v.shape))
            for v in tree.flatten(outputs)
            if hasattr(v, "shape")
        )

    # Symbolically, where the model has shapes: a sample may be large.
    graph = private.functional(model, model)
    if getattr(graph, "operations", None) and hasattr(graph, "inputs"):
        for operation in graph.operations:
            for node in private.inbound_nodes(operation, ()):
                for t in node.output_tensors:
                    sizes.append(4 * int(np.prod([s or 1 for s in t.shape[1:]])))
        return sum(sizes)
    leaves = [
        x
        for x in private.flatten_layers(model, include_self=False)
        if not private.held_layers(x)
    ]
    with keras.StatelessScope(), watching(leaves, note, result=True):
        model(inputs.pack([a[:1] for a in inputs.arrays]), training=False)
    return sum(sizes)


def _dependence(
    run: Pass, x: Sequence[np.ndarray], first: dict[int, Reading]
) -> dict[int, float] | None:
    """Dependence by probe: the first half of a batch, with itself for company."""
    n = len(x[0])
    kept = n // 2
    if n < 4:
        return None
    again = [np.concatenate([a[:kept], a[: n - kept]]) for a in x]
    second = run.sketches(again)
    return {
        k: d.batch_dependence(
            np.asarray(r.sketch[:kept], "float64"),
            np.asarray(second[k][:kept], "float64"),
        )
        for k, r in first.items()
        if r.sketch is not None and k in second
    }


def _broken(found: dict[int, Reading], watched: Sequence[Probe]) -> str | None:
    """The first place whose values are not finite, where the outputs are not."""

    def finite(k: int) -> bool:
        mean = found[k].mean if k in found else None
        return mean is None or bool(np.isfinite(mean).all())

    if finite(OUTPUT):
        return None
    return next((w.path for k, w in enumerate(watched) if not finite(k)), "output")


def _gather(k: int, passes: Sequence[dict[int, Reading]]) -> dict[str, Any]:
    """One place's properties over all batches."""
    readings = [p[k] for p in passes if k in p]
    known: dict[str, Any] = {}
    if not readings:
        return known
    if readings[0].mean is not None:
        # A batch is what statistics are of, so variances are within batches; over all
        # of them only what the running statistics see is pooled.
        means = np.array([r.mean for r in readings], "float64")
        variances = np.array([r.variance for r in readings], "float64")
        known["mean"] = means.mean(0)
        known["pooled"] = variances.mean(0) + means.var(0)
        known["variance"] = d.activation_variance(known["pooled"])
        known["dead"] = d.dead_share(np.abs(means).max(0), known["pooled"])
        grams = [r.cosines for r in readings if r.cosines is not None]
        for name, f in (
            ("cosine", d.cosine_similarity),
            ("stable_rank", d.stable_rank),
            ("effective_rank", d.effective_rank),
        ):
            known[name] = float(np.mean([f(g) for g in grams]))
    if readings[0].gradient_norms is not None:
        norms = np.array([r.gradient_norms for r in readings], "float64")
        known["gradient"] = d.gradient_norm(float(np.sum(norms**2)), norms.size)
        known["gradient_cosine"] = float(
            np.mean(
                [
                    d.cosine_similarity(r.gradient_cosines)
                    for r in readings
                    if r.gradient_cosines is not None
                ]
            )
        )
    return known


def _of_weights(
    probe: Probe, gradients: dict[int, float], rates: dict[int, float]
) -> dict[str, float]:
    """Norm, effective learning rate and relative step of a layer's kernels."""
    kernels = probe.kernels
    if not kernels:
        return {}
    square = sum(
        float(np.sum(keras.ops.convert_to_numpy(k).astype("float64") ** 2))
        for k in kernels
    )
    norm, rate = float(np.sqrt(square)), rates[id(kernels[0])]
    gradient = float(np.sqrt(sum(gradients[id(k)] ** 2 for k in kernels)))
    return {
        "weight_norm": norm,
        "weight_gradient": gradient,
        "effective_learning_rate": d.effective_learning_rate(rate, norm),
        "relative_step": d.relative_step(rate, gradient, norm),
    }


def _distance(probe: Probe, known: dict[str, Any]) -> float | None:
    # Read anew: a monitor keeps its probes while running statistics move.
    source = read(probe.layer)
    weights = source.weights if isinstance(source, Source) else {}
    mean, variance = weights.get("mean"), weights.get("variance")
    if variance is None or np.size(variance) != np.size(known["pooled"]):
        return None
    # A method without a mean normalizes the second moment or the variance; what it
    # keeps no running value of cannot drift.
    mean = known["mean"] if mean is None else np.ravel(mean)
    return d.statistics_distance(
        known["mean"], known["pooled"], mean, np.ravel(variance)
    )


def _site(probe: Probe, known: dict[str, Any]) -> Site:
    layer = probe.layer
    if isinstance(layer, Reparametrized) or probe.source is None:
        method = type(layer).__name__ if isinstance(layer, Reparametrized) else None
    else:
        method = probe.source.method
    fields = {k: known.get(k) for k in Site.figures()}
    return Site(
        probe.path,
        type(layer).__name__,
        probe.kind,
        probe.depth,
        method,
        probe.share,
        **fields,  # type: ignore[arg-type]
    )
