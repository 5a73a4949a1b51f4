"""The tests that follow from a method's declaration.

In a test suite of one's own, one line checks a method of one's own:

    def test_my_method():
        kerasnorm.method.testing.check_method("my_method")
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from kerasnorm.method.claims import claims, judge, measure
from kerasnorm.method.normalization import Normalization
from kerasnorm.method.registry import Case, Method, get
from kerasnorm.numerics import backend
from rewriters import private


# Largest difference accepted from the float64 oracle, relative to the outputs (or 1 if
# those are smaller). float64: sums of a few hundred numbers. float32: the same, and
# the XLA and matrix-product reductions, whose order of summation differs. The halves:
# rounding of the input and of the output, 2**-11 and 2**-8, with gamma up to 1.5.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}

# Means 1000 times the deviation: rounding the input alone to float32 costs 3e-5 of a
# deviation; mean, product and sum round once more each.
OFFSET, OFFSET_TOLERANCE = 1e3, 5e-4

# Of the difference quotients that gradients are compared with, in float64.
STEP = 1e-6


@dataclass(frozen=True)
class Check:
    """One generated test: a name and a function without arguments that raises
    `AssertionError` where the method breaks it."""

    name: str
    run: Callable[[], None]


def check_method(method: str | Method) -> None:
    """Runs every generated test of a method.

    Args:
        method: name or declaration.

    Raises:
        AssertionError: lists all that failed, not the first alone.
    """
    failures = []
    for check in checks(method):
        try:
            check.run()
        except Exception as error:
            failures.append(f"{check.name}: {type(error).__name__}: {error}")
    if failures:
        raise AssertionError(
            f"{len(failures)} checks of {get(method).name!r} failed\n"
            + "\n".join(failures)
        )


def checks(method: str | Method) -> Iterator[Check]:
    """The generated tests of a method, named `<case>-<check>`, `claim-<name>`, ..."""
    method = get(method)
    for number, case in enumerate(method.cases):
        subject = Subject(method, case)
        for name, f in _CASE_CHECKS.items():
            if f is not masked or case.masked:
                yield Check(
                    f"case{number}-{name}", functools.partial(_with, f, subject)
                )
    judged = [c for c in method.cases if c.claims] or [Case({}, (4, 5, 3))]
    subjects = [Subject(method, case) for case in judged]
    for name in claims():
        run = functools.partial(_check_claim, method, name, subjects)
        yield Check(f"claim-{name}", run)
    for f in method.checks:
        yield Check(f.__name__.removeprefix("check_"), f)


def _with(f: Callable[[Subject], None], subject: Subject) -> None:
    """Runs a check; what the subject before this one has compiled is let go."""
    global _last
    if _last is not None and _last is not subject:
        _last.release()
    _last = subject
    f(subject)


_last: Subject | None = None


class Subject:
    """A method on one case: layers built once per dtype policy, and inputs."""

    def __init__(self, method: Method, case: Case):
        self.method, self.case = method, case
        rng = np.random.default_rng(0)
        self.x = rng.normal(0.7, 2.0, case.shape)
        self.mask = None
        if case.masked:
            self.mask = rng.random(case.shape[:2]) > 0.4
            self.mask[:, 0] = True
        # Modes to look at where looking is dear; both where they differ.
        same = method.claims.get("train_equals_inference") is True
        self.modes = (True,) if same else (False, True)
        self.release()

    def release(self) -> None:
        """Forgets the layers and compiled functions made so far."""
        self.layer = functools.cache(self._layer)
        self._function = functools.cache(self._traced)

    def unbuilt(self, policy: str = "float32", **more: Any) -> Any:
        """The case's layer, not built yet."""
        if self.method.layer is None:
            return keras.layers.Identity(dtype=policy)
        config = dict(self.case.config)
        for key, value in config.items():
            if isinstance(value, keras.layers.Layer):
                inner = {**value.get_config(), "dtype": policy}
                config[key] = type(value).from_config(inner)
        return self.method.layer(**{**config, **more}, dtype=policy)

    def _layer(self, policy: str = "float32", **more: Any) -> Any:
        """The layer, built, with random weights that are the same in every dtype."""
        layer = self.unbuilt(policy, **more)
        layer.build(self.case.shape)
        rng = np.random.default_rng(1)
        for variable in layer.variables:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        return layer

    def inputs(self, dtype: str) -> Any:
        return ops.convert_to_tensor(self.x.astype("float32"), dtype)

    def call(self, layer: Any, training: bool, mask: bool = True) -> Callable:
        """The layer as a function of its input and its trainable weights.

        Without weights it takes its own; moving statistics are not kept.
        """
        kwargs: dict[str, Any] = {}
        # Some layers (wrappers of plain ones) take neither keyword.
        if private.call_has_training_arg(layer):
            kwargs["training"] = training
        if mask and self.mask is not None:
            kwargs["mask"] = self.mask

        def f(x, *weights):
            trainable = list(weights) or [v.value for v in layer.trainable_variables]
            others = [v.value for v in layer.non_trainable_variables]
            return layer.stateless_call(trainable, others, x, **kwargs)[0]

        return f

    def run(self, policy: str, x: Any, training: bool) -> Any:
        """The layer's output, eagerly where that is not slow."""
        return self._function(policy, training)(ops.convert_to_tensor(x))

    def _traced(self, policy: str, training: bool) -> Callable:
        return backend.traced(self.call(self.layer(policy), training))

    def oracle(self, x: np.ndarray, layer: Any, training: bool) -> np.ndarray:
        weights = {
            v.name: ops.convert_to_numpy(v).astype("float64") for v in layer.variables
        }
        if self.method.oracle is None:
            return x
        mask = self.mask
        return self.method.oracle(x, weights, self.case.config, training, mask)

    def expected(self, layer: Any, dtype: str, training: bool) -> np.ndarray:
        """The oracle on the inputs as the dtype holds them."""
        x = _numpy(self.inputs(dtype))
        return self.oracle(x, layer, training)


def _numpy(x: Any) -> np.ndarray:
    return ops.convert_to_numpy(
        ops.cast(x, "float64" if _wide(x) else "float32")
    ).astype("float64")


def _wide(x: Any) -> bool:
    return keras.backend.standardize_dtype(x.dtype) == "float64"


def _close(got: Any, expected: np.ndarray, tolerance: float, what: str) -> None:
    got = _numpy(got) if not isinstance(got, np.ndarray) else got
    if got.shape != expected.shape:
        raise AssertionError(f"{what}: shape {got.shape}, expected {expected.shape}")
    error = np.abs(got - expected).max() / max(1.0, np.abs(expected).max())
    if not error <= tolerance:
        raise AssertionError(f"{what}: relative error {error:.2e} > {tolerance:g}")


# ----------------------------------------------------------- checks of a case


def oracle_float64(subject: Subject) -> None:
    """Both modes agree with the paper's formula in float64."""
    with backend.double_precision():
        layer = subject.layer("float64")
        for training in (False, True):
            y = subject.run("float64", subject.inputs("float64"), training)
            expected = subject.expected(layer, "float64", training)
            _close(y, expected, TOLERANCE["float64"], f"training={training}")


def oracle_float32(subject: Subject) -> None:
    """In float32 too, also where the mean is 1000 times the deviation."""
    layer = subject.layer()
    for training in (False, True):
        y = subject.run("float32", subject.inputs("float32"), training)
        expected = subject.expected(layer, "float32", training)
        _close(y, expected, TOLERANCE["float32"], f"training={training}")
        x = (subject.x + OFFSET * 2.0).astype("float32")
        y = subject.run("float32", x, training)
        expected = subject.oracle(x.astype("float64"), layer, training)
        _close(y, expected, OFFSET_TOLERANCE, f"large mean, training={training}")


def gradients(subject: Subject) -> None:
    """Of inputs and weights, against central differences in float64."""
    with backend.double_precision():
        layer = subject.layer("float64")
        start = [subject.x, *(_numpy(v) for v in layer.trainable_variables)]
        for training in (False,) if _surrogate(layer) else (False, True):
            shape = subject.run("float64", subject.x, training).shape
            f = subject.call(layer, training)
            _differentiate(f, start, shape, f"training={training}")


def _surrogate(layer: Any) -> bool:
    """Whether the method defines a gradient in training that is not the derivative of
    its output; then a check of its own compares it with the paper's."""
    return getattr(layer, "surrogate_gradient", False)


def second_derivatives(subject: Subject) -> None:
    """Of the squared gradient with respect to the input, likewise."""
    with backend.double_precision():
        layer = subject.layer("float64")
        if _surrogate(layer):
            return
        f = subject.call(layer, training=True)
        # A fixed random direction, of the shape of the output.
        rng = np.random.default_rng(3)
        shape = subject.run("float64", subject.x, True).shape
        upstream = ops.convert_to_tensor(rng.normal(size=tuple(shape)))

        def penalty(x):
            _, (dx,) = backend.vjp(f, [x], upstream)
            return ops.square(dx)

        _differentiate(penalty, [subject.x], subject.x.shape, "second derivative")


def _differentiate(f: Callable, start: list[np.ndarray], shape: Any, what: str) -> None:
    rng = np.random.default_rng(2)
    inputs = [ops.convert_to_tensor(v) for v in start]
    upstream = ops.convert_to_tensor(rng.normal(size=tuple(shape)))
    both = backend.traced(lambda *v: backend.vjp(f, v, upstream))
    for k, found in enumerate(both(*inputs)[1]):
        direction = rng.normal(size=start[k].shape)
        ends = []
        for step in (STEP, -STEP):
            moved = ops.convert_to_tensor(start[k] + step * direction)
            y, _ = both(*inputs[:k], moved, *inputs[k + 1 :])
            ends.append(float(np.vdot(_numpy(y), _numpy(upstream))))
        numeric = (ends[0] - ends[1]) / (2 * STEP)
        analytic = float(np.vdot(_numpy(found), direction))
        # Rounding leaves 1e-16 / STEP of the function, truncation STEP**2 of its third
        # derivative, which is large where a variance is small.
        scale = 1 + abs(numeric) + abs(ends[0])
        if abs(numeric - analytic) > 1e-6 * scale:
            raise AssertionError(
                f"{what}, input {k}: {analytic}, but the quotient is {numeric}"
            )


def half_precision(subject: Subject) -> None:
    """float16 and bfloat16 stay close to the oracle, and finite."""
    for dtype in ("float16", "bfloat16"):
        layer = subject.layer(f"mixed_{dtype}")
        for training in subject.modes:
            y = subject.run(f"mixed_{dtype}", subject.inputs(dtype), training)
            if keras.backend.standardize_dtype(y.dtype) != dtype:
                raise AssertionError(f"output is {y.dtype} in mixed_{dtype}")
            expected = subject.expected(layer, dtype, training)
            _close(y, expected, TOLERANCE[dtype], f"{dtype}, training={training}")
    if isinstance(subject.unbuilt(), Normalization):
        _stays_finite(subject)


def _stays_finite(subject: Subject) -> None:
    """Batch statistics of inputs near the largest float16, and of constant ones."""
    rng = np.random.default_rng(4)
    large = rng.choice([-6e4, 6e4], subject.case.shape)
    layer = subject.layer("mixed_float16")
    inputs = {"large": large, "constant": np.full_like(large, 6e4), "zero": 0 * large}
    f = subject.call(layer, training=True, mask=False)
    both = backend.traced(lambda v: backend.vjp(f, [v]))
    for name, x in inputs.items():
        x = ops.convert_to_tensor(x.astype("float16"))
        y, (dx,) = both(x)
        if not (np.isfinite(_numpy(y)).all() and np.isfinite(_numpy(dx)).all()):
            raise AssertionError(f"not finite on {name} input")


def masked(subject: Subject) -> None:
    """What stands at masked positions, NaN included, reaches no other position."""
    mask: Any = subject.mask
    x = subject.x.astype("float32")
    dirty = x.copy()
    dirty[~mask] = np.nan
    for training in (False, True):
        y, z = (_numpy(subject.run("float32", v, training)) for v in (x, dirty))
        _close(z[mask], y[mask], TOLERANCE["float32"], f"training={training}")


def compiles(subject: Subject) -> None:
    """The plain graph and XLA give what eager mode gives, with static shapes, a dynamic
    batch, and every dynamic axis that the layer allows."""
    layer = subject.layer()
    shape = subject.case.shape
    x = subject.inputs("float32")
    modes = [subject.call(layer, training) for training in subject.modes]
    # JAX has static shapes alone, and the other checks compile its gradients.
    static_alone = keras.backend.backend() != "tensorflow"
    variants: list[tuple[bool, Any]] = [(True, shape)]
    if not static_alone:
        variants += [(False, (None, *shape[1:])), (True, _free_axes(layer, shape))]

    def f(x):
        outputs = [g(x) for g in modes]
        if static_alone:
            return outputs
        return outputs + [backend.vjp(g, [x])[1][0] for g in modes]

    expected = [_numpy(v) for v in f(x)]
    for jit, traced in variants:
        for got, want in zip(
            backend.compiled(f, jit, traced)(x), expected, strict=True
        ):
            _close(got, want, 2 * TOLERANCE["float32"], f"jit={jit}, shape {traced}")


def _free_axes(layer: Any, shape: tuple[int, ...]) -> tuple[int | None, ...]:
    """The shape with every axis dynamic that may be."""
    axis = getattr(layer, "axis", -1)
    kept = {a % len(shape) for a in ([axis] if isinstance(axis, int) else axis)}
    if not isinstance(layer, Normalization):
        kept = set(range(1, len(shape)))
    return tuple(n if a in kept else None for a, n in enumerate(shape))


def batch_of_one(subject: Subject) -> None:
    """A single sample gives finite outputs of the right shape in both modes."""
    layer = subject.layer()
    x = ops.convert_to_tensor(subject.x[:1].astype("float32"))
    for training in subject.modes:
        y = backend.traced(subject.call(layer, training, mask=False))(x)
        if tuple(y.shape) != tuple(layer.compute_output_shape(x.shape)):
            raise AssertionError(f"shape {y.shape}")
        if not np.isfinite(_numpy(y)).all():
            raise AssertionError(f"not finite, training={training}")


def config_is_frozen(subject: Subject) -> None:
    """`build` changes no argument, and the config survives JSON."""
    layer = subject.unbuilt()
    before = _arguments(layer)
    layer.build(subject.case.shape)
    if (after := _arguments(layer)) != before:
        raise AssertionError(f"the config was {before}, and after build is {after}")
    again = _arguments(type(layer).from_config(json.loads(before)))
    if again != before:
        raise AssertionError(f"config {before} came back as {again}")


def _arguments(layer: Any) -> str:
    """The config as JSON; what it says about shapes is no argument."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k != "build_config"}
        return value

    config = strip(keras.saving.serialize_keras_object(layer)["config"])
    return json.dumps(config, sort_keys=True)


def saves(subject: Subject) -> None:
    """In a model, behind `x * 2.0`, through a `.keras` file."""
    inputs = keras.Input(subject.case.shape[1:])
    layer = subject.unbuilt()
    model = keras.Model(inputs, layer(inputs * 2.0))
    rng = np.random.default_rng(5)
    for variable in model.variables:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    x = subject.x.astype("float32")
    y = ops.convert_to_numpy(model(x))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        loaded = keras.models.load_model(path)
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded(x)), y)
    # Keras itself shortens the paths within wrappers; the names stay.
    if [v.name for v in loaded.variables] != [v.name for v in model.variables]:
        raise AssertionError("variables came back under other names")


_CASE_CHECKS: dict[str, Callable[[Subject], None]] = {
    f.__name__: f
    for f in (
        oracle_float64,
        oracle_float32,
        gradients,
        second_derivatives,
        half_precision,
        masked,
        compiles,
        batch_of_one,
        config_is_frozen,
        saves,
    )
}


# ---------------------------------------------------------------------- claims


def _check_claim(method: Method, name: str, subjects: list[Subject]) -> None:
    claimed = method.claims[name]
    if claimed is None:
        return
    worst = max(violation(subject, name) for subject in subjects)
    found = judge(worst)
    if found is not claimed:
        verdict = {True: "holds", False: "is violated", None: "is ambiguous"}[found]
        raise AssertionError(
            f"{method.name!r} declares {name}={claimed}, and it {verdict}: worst "
            f"violation {worst:.2e}"
        )


def violation(subject: Subject, name: str) -> float:
    """The measured violation of a claim on one case, in float64 and with an epsilon
    too small to matter."""
    with backend.double_precision():
        tiny = {"epsilon": 1e-14} if hasattr(subject.unbuilt(), "epsilon") else {}
        layer = subject.layer("float64", **tiny)
        return measure(name, layer, subject.x, np.random.default_rng(6))
