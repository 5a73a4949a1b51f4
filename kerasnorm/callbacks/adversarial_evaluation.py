"""Robust accuracy while a model trains."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from kerasnorm.adversarial.attack import setting_of
from kerasnorm.adversarial.checks import NotFinite
from kerasnorm.adversarial.evaluate import Evaluator
from kerasnorm.adversarial.evaluation import Evaluation
from kerasnorm.adversarial.reading import check_source, pieces, read_settings
from kerasnorm.adversarial.victim import Outputs
from kerasnorm.callbacks._steps import Steps
from kerasnorm.common.data import spaced
from kerasnorm.common.errors import KerasNormError, taking
from kerasnorm.numerics import replicas
from rewriters import private
from rewriters.arguments import Count
from rewriters.transfer import innermost


class AdversarialEvaluation(keras.callbacks.Callback):
    """Attacks the model on fixed inputs, and logs what it still gets right.

    Logged are `val_<attack>_accuracy` for every attack, `val_robust_accuracy` after all
    of them and `val_clean_accuracy` on the same inputs; with several radii the names
    end in `_eps<radius>`, and those without are of the largest. Put it in front of the
    callbacks that shall see them: `callbacks=[AdversarialEvaluation(...),
    EarlyStopping("val_pgd_accuracy", mode="max"), ModelCheckpoint(...)]`.

    Nothing of the training is changed, to the last bit: no weight, no moving statistic,
    no state of a random generator. Each attack is compiled once, in the first epoch,
    and again only where another model or other averages are attacked.

    ```python
    robust = AdversarialEvaluation(x_val, y_val, ["pgd", "apgd-ce"], eps=8 / 255)
    model.fit(x, y, validation_data=(x_val, y_val), callbacks=[robust])
    robust.plot("robustness.png")
    ```

    Args:
        x, y: inputs and classes, as for `kerasnorm.adversarial.evaluate`; a source of
            batches is read once, when training starts.
        attacks, norm, eps: as there; PGD with 20 steps by default.
        samples: at most this many of the inputs, of arrays evenly spaced ones, of a
            source of batches the first; None for all.
        every: epochs between two evaluations, counted from epoch 0. The first epoch of
            every `fit` is evaluated in any case, unless `file` has one before it. In
            the epochs between, the last values are logged again, so that every epoch
            has them.
        every_steps: also evaluate after this many training steps, counted from the
            start of `fit`; these go to `history` alone. Where Keras runs several at a
            time (`steps_per_execution`), after those in which the number is reached.
        ema: attack the exponential moving average of the weights that the optimizer
            keeps (`use_ema=True`).
        weight_norms: log `weight_norm` beside, the l2 norm of all kernels together.
        prefix: of the logged names.
        file: a `.jsonl` file that every evaluation is appended to, in a folder that is
            made if need be; a training that was interrupted goes on with the values in
            it.
        model: attack this one instead, for example an average kept by other means.
        verbose: 1 shows a progress bar and a line of results, 0 nothing.
        bounds, outputs, preprocessing, attacked, batch_size, seed, alone, keep, jit: as
            for `kerasnorm.adversarial.Evaluator`.

    Attributes:
        history: one dict per evaluation: `epoch`, `step`, `seconds`, what was logged.
        evaluation: the last `Evaluation`.
        seconds: all time spent in evaluations, and `share` of the time of training.

    Raises:
        KerasNormError: at the start of training, as `evaluate`; a setting that makes no
            sense; `ema` and an optimizer that keeps no average; a `file` of another
            kind.
    """

    @taking(hint=setting_of)
    def __init__(
        self,
        x: Any,
        y: Any = None,
        attacks: Any = None,
        norm: Any = "linf",
        eps: Any = 8 / 255,
        *,
        samples: Count | None = 500,
        every: Count = 1,
        every_steps: Count | None = None,
        ema: bool = False,
        weight_norms: bool = False,
        prefix: str = "val_",
        file: str | os.PathLike[str] | None = None,
        model: Any = None,
        verbose: bool | int = 0,
        bounds: Any = (0.0, 1.0),
        outputs: Outputs = "auto",
        preprocessing: Callable[..., Any] | None = None,
        attacked: int | str | None = None,
        batch_size: Count = 128,
        seed: int = 0,
        alone: bool = False,
        keep: bool = False,
        jit: bool | None = None,
    ):
        super().__init__()
        if attacks is None:
            from kerasnorm.adversarial.gradient import pgd

            attacks = pgd(steps=20)
        if ema and model is not None:
            raise KerasNormError(
                "either the average that the optimizer keeps, or another model",
                got="ema=True and a model",
            )
        self.x, self.y = x, y
        self.settings = {
            "attacks": attacks,
            "norm": norm,
            "eps": eps,
            "verbose": verbose,
            "bounds": bounds,
            "outputs": outputs,
            "preprocessing": preprocessing,
            "attacked": attacked,
            "batch_size": batch_size,
            "seed": seed,
            "alone": alone,
            "keep": keep,
            "jit": jit,
        }
        self.samples, self.every, self.every_steps = samples, every, every_steps
        self.ema, self.weight_norms, self.prefix = ema, weight_norms, prefix
        self.file = None if file is None else Path(file)
        self.other, self.verbose = model, verbose
        self.history: list[dict[str, float]] = []
        self.evaluation: Evaluation | None = None
        self.seconds = 0.0
        self._evaluator: Evaluator | None = None
        self._attacked: list[Any] = []
        self._last: dict[str, float] | None = None
        self._epoch, self._began, self._spent = 0, 0.0, 0.0
        self._steps = Steps(every_steps)
        read_settings(attacks, norm, eps)
        check_source(x, y)

    @property
    def share(self) -> float:
        """Share of the time of the last `fit` spent in evaluations."""
        total = time.perf_counter() - self._began
        return self._spent / total if total > 0 else 0.0

    def _make(self, model: Any, replaced: Any = ()) -> Evaluator:
        return Evaluator(model, replaced=replaced, **self.settings)

    def on_train_begin(self, logs: Any = None) -> None:
        self._began, self._spent = time.perf_counter(), 0.0
        self._last, self._steps = None, Steps(self.every_steps)
        self.x, self.y = _few(self.x, self.y, self.samples)
        self._begin()
        if self.file is not None and replicas.writes(self.model):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.file is not None and self.file.exists():
            self.history = _read(self.file)

    def _victim(self) -> Any:
        trained = self.model  # on JAX, asking for it brings it up to date
        return trained if self.other is None else self.other

    def _begin(self) -> None:
        """Mistakes show now, not after the first epoch."""
        model = self._victim()
        if self.ema and not getattr(innermost(model.optimizer), "use_ema", False):
            raise KerasNormError(
                "the optimizer keeps no average of the weights",
                got=type(innermost(model.optimizer)).__name__,
                fix="Give it use_ema=True",
            )
        if model.built:
            self._make(model).prepare(self.x, self.y)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._steps.passed(batch, (self.params or {}).get("steps")):
            self._evaluate(step=self._steps.count)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if epoch % self.every == 0 or self._known(epoch) is None:
            self._last = self._evaluate(step=None)
        else:
            self._last = self._known(epoch)
        if logs is not None:
            logs.update(self._last or {})

    def _known(self, epoch: int) -> dict[str, float] | None:
        """What was logged in an earlier epoch of this run, or of one before it that was
        interrupted."""
        if self._last is not None or self.file is None:
            return self._last
        before = [h for h in self.history if h["epoch"] < epoch and h["step"] is None]
        if not before:
            return None
        marks = ("epoch", "step", "seconds")
        return {k: v for k, v in before[-1].items() if k not in marks}

    def _evaluate(self, step: int | None) -> dict[str, float]:
        started = time.perf_counter()
        model, averages = self._victim(), self._averages()
        attacked = [model, *chain(*averages)]
        same = [*map(id, attacked)] == [*map(id, self._attacked)]
        if self._evaluator is None or not same:
            self._evaluator = self._make(model, averages)
            self._attacked = attacked
        try:
            found = self.evaluation = self._evaluator(self.x, self.y)
            values = self._values(found)
        except NotFinite as error:  # of a training that diverged: `fit` says so too
            private.print_msg(f"\n{type(self).__name__}: {error}")
            values = self._undefined()
        if self.weight_norms:
            values["weight_norm"] = weight_norm(model)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self._spent += seconds
        entry: dict[str, Any] = {"epoch": self._epoch, "step": step, "seconds": seconds}
        entry.update(values)
        self.history.append(entry)
        if self.file is not None and replicas.writes(self.model):
            _append(self.file, entry)
        if self.verbose and replicas.writes(self.model):
            private.print_msg(
                "\n"
                + ", ".join(f"{k}: {v:.4f}" for k, v in values.items())
                + f" ({seconds:.1f} s, {100 * self.share:.0f} % of the time so far)"
            )
        return values

    def _values(self, found: Evaluation) -> dict[str, float]:
        values = {"clean_accuracy": found.clean_accuracy}
        for result in found.attacks:
            name = f"{result.name}_accuracy"
            if len(found.eps) > 1:
                values[f"{name}_eps{result.eps:.4g}"] = result.accuracy
            values[name] = result.accuracy  # the largest radius comes last
        values["robust_accuracy"] = found.robust_accuracy
        return {self.prefix + name: float(value) for name, value in values.items()}

    def _undefined(self) -> dict[str, float]:
        """NaN for all that is logged."""
        evaluator = self._evaluator
        names = ["clean_accuracy", "robust_accuracy"]
        for attack in evaluator.attacks if evaluator is not None else ():
            names.append(f"{attack.name}_accuracy")
            if evaluator is not None and len(evaluator.radii) > 1:
                names += [f"{names[-1]}_eps{eps:.4g}" for eps in evaluator.radii]
        return {self.prefix + name: math.nan for name in names}

    def _averages(self) -> list[tuple[Any, Any]]:
        if not self.ema:
            return []
        optimizer = innermost(self.model.optimizer)
        averages = private.moving_averages(optimizer)
        return list(zip(private.trainable_variables(optimizer), averages, strict=True))

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws the accuracies over the epochs, and the weight norm if it was logged.

        Args:
            path: where to save the figure; not saved when None.

        Returns:
            The matplotlib figure.

        Raises:
            KerasNormError: nothing was evaluated yet; matplotlib is not installed.
        """
        from kerasnorm.adversarial.plots import training

        entries = [h for h in self.history if h["step"] is None]
        if not entries:
            raise KerasNormError("there is nothing to draw", got="no evaluation yet")
        names = [k for k in chain(*entries) if k.endswith("accuracy")]
        return training(entries, list(dict.fromkeys(names)), path)


def weight_norm(model: Any) -> float:
    """The l2 norm of all kernels of a model together: trainable, two axes or more."""
    squares = [
        float(np.sum(np.square(ops.convert_to_numpy(v.value), dtype="float64")))
        for v in model.trainable_variables
        if len(v.shape) > 1
    ]
    return math.sqrt(sum(squares))


def _few(x: Any, y: Any, samples: int | None) -> tuple[Any, np.ndarray]:
    """At most so many inputs and their classes, in the same places.

    Raises:
        KerasNormError: different numbers of them; a source of batches without classes.
    """
    if y is None:
        x, y = next(pieces(x, samples or sys.maxsize, whole=samples is None))
        rows: Any = slice(samples)
    else:
        x, y = _arrays(x), np.atleast_1d(np.asarray(y))
        rows = spaced(y.shape[0], samples)
    arrays = [*tree.flatten(x), y]
    if len({a.shape[:1] for a in arrays}) > 1:
        raise KerasNormError(
            "the inputs and classes have different numbers of samples",
            got=[a.shape for a in arrays],
        )
    return tree.map_structure(lambda a: a[rows], x), y[rows]


def _arrays(data: Any) -> Any:
    """An array, or lists and dicts of arrays."""
    if isinstance(data, Mapping):
        return {k: _arrays(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)) and data and getattr(data[0], "shape", ()):
        return type(data)(map(_arrays, data))
    return np.asarray(ops.convert_to_numpy(data) if hasattr(data, "dtype") else data)


# What every line of a file begins with.
HEAD = '{"epoch": '


def _append(file: Path, entry: dict[str, Any]) -> None:
    cut = file.exists() and file.read_bytes()[-1:] not in (b"", b"\n")
    with file.open("a", encoding="utf-8") as out:
        out.write("\n" * cut + json.dumps(entry) + "\n")


def _read(file: Path) -> list[dict[str, float]]:
    """The evaluations in a file, but for lines that an interruption cut off.

    Raises:
        KerasNormError: it holds something else.
    """
    found = []
    for line in file.read_text("utf-8", errors="replace").splitlines():
        if not line.startswith(HEAD[: len(line)]):
            raise KerasNormError(
                "the file holds no evaluations",
                got=f"{str(file)!r} with {line[:40]!r}",
                expected=f"lines that begin with {HEAD!r}",
                fix="Give another file",
            )
        with contextlib.suppress(json.JSONDecodeError):
            found += [json.loads(line)] if line else []
    return found
