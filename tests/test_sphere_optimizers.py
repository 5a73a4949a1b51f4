"""Optimizers on spheres: one step exactly, a thousand without drift, then resumed."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from conftest import mostly_ci
from keras import layers, ops
from zoo import ZOO, images

import kerasnorm
from kerasnorm.common.errors import KerasNormError
from kerasnorm.numerics import backend
from kerasnorm.sphere import (
    SGDP,
    AdamP,
    OnSphere,
    SphereAdam,
    SphereSGD,
    scale_invariant_weights,
)
from kerasnorm.sphere.spheres import first_radius


JAX = keras.backend.backend() == "jax"
O = keras.optimizers  # noqa: E741

WRAPPED = {
    "sgd": lambda: O.SGD(0.1),
    "momentum": lambda: O.SGD(0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda: O.SGD(0.1, momentum=0.9, nesterov=True, clipnorm=1.0),
    "adam": lambda: O.Adam(1e-2),
    "adamw": lambda: O.AdamW(1e-2, weight_decay=0.1, amsgrad=True),
    "adamax": lambda: O.Adamax(1e-2),
    "nadam": lambda: O.Nadam(1e-2),
    "lion": lambda: O.Lion(1e-3),
    "muon": lambda: O.Muon(1e-2),
    "rmsprop": lambda: O.RMSprop(1e-2, momentum=0.9, centered=True),
    "adagrad": lambda: O.Adagrad(0.1),
    "adadelta": lambda: O.Adadelta(0.1),
    "adafactor": lambda: O.Adafactor(1e-2),
    "lamb": lambda: O.Lamb(1e-2),
    "averaged": lambda: O.SGD(0.1, 0.9, use_ema=True, ema_overwrite_frequency=3),
    "accumulated": lambda: O.SGD(0.1, 0.9, gradient_accumulation_steps=2),
}


def network(dtype=None):
    """Units of every granularity, biases, and a head that is not invariant."""
    return keras.Sequential(
        [
            images(),
            layers.Conv2D(8, 3, name="filters", dtype=dtype),
            layers.BatchNormalization(dtype=dtype),
            layers.ReLU(dtype=dtype),
            layers.DepthwiseConv2D(3, use_bias=False, name="depthwise", dtype=dtype),
            layers.GroupNormalization(2, dtype=dtype),
            layers.ReLU(dtype=dtype),
            layers.Flatten(dtype=dtype),
            layers.Dense(6, use_bias=False, name="layer", dtype=dtype),
            layers.LayerNormalization(dtype=dtype),
            layers.Dense(3, name="head", dtype="float32"),
        ]
    )


def data(rng, count=32):
    x = rng.normal(size=(count, 8, 8, 3)).astype("float32")
    return x, np.arange(count) % 3


def loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def off(optimizer):
    """Largest relative distance of a weight from its sphere, in float64."""
    found = [
        np.abs(
            first_radius(optimizer._trainable_variables[i], s)
            / ops.convert_to_numpy(optimizer._radii[i]).astype("float64")
            - 1
        ).max()
        for i, s in optimizer._held.items()
    ]
    assert found
    return max(found)


def jump(optimizer, variables, steps, seed=0):
    """Random gradients, radial parts and all, in one compiled loop."""
    shapes = [tuple(v.shape) for v in variables]
    seeds = keras.random.SeedGenerator(seed)

    def gradients():
        return [keras.random.normal(s, seed=seeds) for s in shapes]

    if JAX:
        import jax

        step = jax.jit(optimizer.stateless_apply)
        rng = np.random.default_rng(seed)
        drawn = [rng.normal(size=(20, *s)).astype("float32") for s in shapes]
        state = [v.value for v in optimizer.variables]
        values = [v.value for v in variables]
        for n in range(steps):
            values, state = step(state, [g[n % 20] for g in drawn], values)
        for v, value in zip(variables, values, strict=True):
            v.assign(value)
        for v, value in zip(optimizer.variables, state, strict=True):
            v.assign(value)
        return
    import tensorflow as tf

    @tf.autograph.experimental.do_not_convert
    def step():
        optimizer.apply(gradients(), variables)

    @tf.function
    def run():
        for _ in tf.range(steps):
            step()

    run()


@pytest.mark.parametrize("name", mostly_ci(WRAPPED, ["sgd", "adam", "muon"]))
def test_no_drift_in_a_thousand_steps(name):
    model = network()
    optimizer = OnSphere(WRAPPED[name](), model)
    optimizer.build(model.trainable_variables)
    before = ops.convert_to_numpy(model.get_layer("filters").kernel)
    head = ops.convert_to_numpy(model.get_layer("head").kernel)
    jump(optimizer, model.trainable_variables, 1000)
    assert off(optimizer) <= 1e-6
    after = ops.convert_to_numpy(model.get_layer("filters").kernel)
    assert np.abs(after - before).max() > 1e-3
    assert np.abs(ops.convert_to_numpy(model.get_layer("head").kernel) - head).max() > 0
    assert np.isfinite(after).all()


@pytest.mark.parametrize(
    "options",
    [
        {"step": "geodesic"},
        {"spheres": "layer", "max_angle": 0.01},
        {"spheres": "spectral"},
        {"effective": True},
        {"spheres": "joint", "step": "geodesic"},
        {"spheres": "joint", "effective": True, "max_angle": 0.1},
    ],
    ids=str,
)
def test_no_drift_in_other_geometries(options):
    model = network()
    optimizer = OnSphere(O.SGD(0.1, 0.9), model, **options)
    variables = model.trainable_variables
    optimizer.build(variables)
    held = [variables[i] for i in optimizer._held]
    start = np.sqrt(sum(np.sum(ops.convert_to_numpy(v) ** 2.0) for v in held))
    jump(optimizer, variables, 1000)
    if options.get("spheres") == "joint":
        end = np.sqrt(sum(np.sum(ops.convert_to_numpy(v) ** 2.0) for v in held))
        assert abs(end / start - 1) <= 1e-6
    else:
        assert off(optimizer) <= 1e-6


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_joint_sphere_is_kept_where_a_weight_gets_no_gradient(rng):
    model = network()
    optimizer = OnSphere(O.SGD(5.0, 0.9), model, spheres="joint")
    variables = model.trainable_variables
    optimizer.build(variables)
    held = sorted(optimizer._held)
    norms = [np.linalg.norm(ops.convert_to_numpy(variables[i])) for i in held]
    for absent in (held[:1], held[1:], held):
        grads = [
            None
            if i in absent
            else ops.convert_to_tensor(rng.normal(size=v.shape).astype("float32"))
            for i, v in enumerate(variables)
        ]
        optimizer.apply(grads, variables)
        now = [np.linalg.norm(ops.convert_to_numpy(variables[i])) for i in held]
        np.testing.assert_allclose(np.linalg.norm(now), np.linalg.norm(norms), 1e-5)
        for i, before, after in zip(held, norms, now, strict=True):
            assert i not in absent or after == before
        norms = now


def oracle(w, gradients, rate, momentum, nesterov, units, step, limit=None):
    """Riemannian momentum SGD on `(fan_in, filters)`, float64, unit by unit."""
    w, m = w.copy(), np.zeros_like(w)
    for g in gradients:
        for unit in sorted(set(units)):
            part = np.flatnonzero(np.equal(units, unit))
            p, v = w[:, part], m[:, part]
            r = np.sqrt((p**2).sum())
            n = p / r

            def along(u, n=n):
                return u - n * (n * u).sum()

            h = along(g[:, part])
            v = momentum * along(v) - rate * h
            u = momentum * v - rate * h if nesterov else v
            size = np.sqrt((u**2).sum())
            if limit is not None:
                most = r * (np.tan(limit) if step == "retract" else limit)
                u, size = u * min(1, most / size), min(size, most)
            if step == "geodesic":
                p = p * np.cos(size / r) + u * (r / size) * np.sin(size / r)
            else:
                p = (p + u) * r / np.sqrt(((p + u) ** 2).sum())
            w[:, part], m[:, part] = p, v
    return w


@pytest.mark.parametrize("step", ["retract", "geodesic"])
@pytest.mark.parametrize(
    "momentum,nesterov", [(0.0, False), (0.875, False), (0.875, True)]
)
@pytest.mark.parametrize("limit", [None, 0.0625])
def test_steps_equal_the_oracle(step, momentum, nesterov, limit, rng):
    with backend.double_precision():
        model = network("float64")
        flows = {f.path: f for f in scale_invariant_weights(model).invariant}
        assert {f.granularity for f in flows.values()} == {"filter", "group", "layer"}
        # Rate, momentum and limit pass through float32, which has these exactly.
        rate = 0.25
        optimizer = OnSphere(
            O.SGD(rate, momentum, nesterov), model, step=step, max_angle=limit
        )
        variables = model.trainable_variables
        optimizer.build(variables)
        drawn = [[rng.normal(size=v.shape) for v in variables] for _ in range(3)]
        order = {id(v): i for i, v in enumerate(variables)}
        expected = {
            path: oracle(
                columns(f.kernel, ops.convert_to_numpy(f.kernel.variable)),
                [columns(f.kernel, g[order[id(f.kernel.variable)]]) for g in drawn],
                rate,
                momentum,
                nesterov,
                f.units,
                step,
                limit,
            )
            for path, f in flows.items()
        }
        for g in drawn:
            optimizer.apply([ops.convert_to_tensor(x) for x in g], variables)
        for path, f in flows.items():
            found = columns(f.kernel, ops.convert_to_numpy(f.kernel.variable))
            np.testing.assert_allclose(found, expected[path], rtol=1e-9, atol=1e-12)


def columns(kernel, value):
    return ops.convert_to_numpy(kernel.columns(ops.convert_to_tensor(value)))


def test_plain_descent_grows_as_the_lemma_says(rng):
    """|w+|**2 - |w|**2 = rate**2 |grad|**2, since the gradient is orthogonal to w."""
    with backend.double_precision():
        x = keras.Input((8, 8, 3), dtype="float64")
        norm = layers.BatchNormalization(epsilon=1e-14, dtype="float64")
        conv = layers.Conv2D(4, 3, use_bias=False, dtype="float64")
        model = keras.Model(x, norm(conv(x)))
        batch = ops.convert_to_tensor(rng.normal(size=(6, 8, 8, 3)))
        upstream = ops.convert_to_tensor(rng.normal(size=(6, 6, 6, 4)))
        w = ops.convert_to_numpy(conv.kernel)

        def run(kernel):
            with keras.StatelessScope(state_mapping=[(conv.kernel, kernel)]):
                return ops.tanh(model(batch, training=True) * upstream)

        _, (gradient,) = backend.vjp(run, [conv.kernel.value])
        g = ops.convert_to_numpy(gradient)
        cosine = np.sum(w * g) / np.linalg.norm(w) / np.linalg.norm(g)
        assert abs(cosine) < 1e-10
        for rate in (1e-3, 1.0, 30.0):
            grown = np.sum((w - rate * g) ** 2, (0, 1, 2)) - np.sum(w**2, (0, 1, 2))
            np.testing.assert_allclose(
                grown, rate**2 * np.sum(g**2, (0, 1, 2)), rtol=1e-7
            )


def test_elsewhere_it_is_the_wrapped_optimizer(rng):
    x, y = data(rng)
    heads = []
    for wrap in (False, True):
        keras.utils.set_random_seed(0)
        model = network()
        model.layers[0].trainable = model.get_layer("depthwise").trainable = False
        model.get_layer("layer").trainable = True
        inner = O.Adam(1e-2, weight_decay=0.1)
        chosen = [f for f in scale_invariant_weights(model) if f.path == "depthwise"]
        model.get_layer("depthwise").trainable = True
        optimizer = OnSphere(inner, chosen) if wrap else inner
        model.get_layer("depthwise").trainable = False
        model.compile(optimizer, loss())
        model.fit(x, y, epochs=2, verbose=0, shuffle=False)
        heads.append(model.get_weights())
    for a, b in zip(*heads, strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_decay_along_the_radius(rng):
    variables = network().trainable_variables
    model = network()
    variables = model.trainable_variables
    optimizer = OnSphere(O.SGD(0.5, weight_decay=0.1), model)
    optimizer.build(variables)
    before = [ops.convert_to_numpy(v) for v in variables]
    optimizer.apply([ops.zeros(v.shape) for v in variables], variables)
    for i, (a, v) in enumerate(zip(before, variables, strict=True)):
        scale = 1.0 if i in optimizer._held else 0.95
        np.testing.assert_allclose(ops.convert_to_numpy(v), scale * a, rtol=1e-6)


def test_effective_rate_does_not_depend_on_the_radius(rng):
    """With `effective`, scaling a filter changes nothing but its length."""
    x, y = data(rng)
    found = []
    for scale in (1.0, 8.0):
        keras.utils.set_random_seed(0)
        model = network()
        for layer in model.layers:
            if hasattr(layer, "epsilon"):
                layer.epsilon = 1e-12
        kernel = model.get_layer("filters").kernel
        kernel.assign(kernel * scale)
        bias = model.get_layer("filters").bias
        bias.assign(bias * scale)
        model.compile(SphereSGD(model, 0.05, effective=True), loss())
        model.fit(x, y, epochs=3, batch_size=16, shuffle=False, verbose=0)
        found.append(ops.convert_to_numpy(kernel) / scale)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [SGDP, AdamP])
def test_projected_steps_have_no_radial_part(make, rng):
    model = network()
    variables = model.trainable_variables
    optimizer = make(model, 0.1, weight_decay=0.1, decay_ratio=0.2)
    optimizer.build(variables)
    before = [ops.convert_to_numpy(v).astype("float64") for v in variables]
    gradients = [rng.normal(size=v.shape).astype("float32") for v in variables]
    optimizer.apply([ops.convert_to_tensor(g) for g in gradients], variables)
    for i, spheres in optimizer._held.items():
        w = before[i] * (1 - 0.1 * 0.1 * 0.2)
        u = ops.convert_to_numpy(variables[i]) - w
        if spheres.groups is None:
            radial = np.sum(w * u, spheres.axes)
            assert np.abs(radial).max() < 1e-5
            assert (np.linalg.norm(u) > 1e-3).all()
    again = type(optimizer).from_config(optimizer.get_config())
    assert again.decay_ratio == 0.2


@pytest.mark.parametrize("jit", mostly_ci([False, True], [False]))
@pytest.mark.parametrize("kind", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_training(kind, jit, rng):
    x, y = data(rng, 64)
    model = network(kind)
    model.compile(SphereAdam(model, 1e-2), loss(), jit_compile=jit)
    history = model.fit(x, y, epochs=8, batch_size=16, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert off(model.optimizer) <= 1e-6


@pytest.mark.parametrize("inner", ["momentum", "adam"])
def test_save_load_and_resume_is_bit_for_bit(inner, rng, tmp_path):
    x, y = data(rng)

    def fit(model):
        model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)

    model = network()
    schedule = O.schedules.ExponentialDecay(0.05, 3, 0.9)
    wrapped = O.SGD(schedule, 0.9) if inner == "momentum" else O.Adam(schedule)
    model.compile(OnSphere(wrapped, model, max_angle=0.2), loss())
    fit(model)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.optimizer.max_angle == 0.2
    for m in (model, again):
        fit(m)
    for a, b in zip(model.variables, again.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))
    pairs = zip(model.optimizer.variables, again.optimizer.variables, strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))
    assert off(again.optimizer) <= 1e-6


def test_within_other_optimizers(rng):
    x, y = data(rng)
    model = network()
    inner = OnSphere(O.SGD(0.1, 0.9), model)
    model.compile(O.LossScaleOptimizer(inner), loss())
    model.fit(x, y, verbose=0)
    assert off(inner) <= 1e-6
    model = network()
    inner = OnSphere(O.SGD(0.1, 0.9), model)
    table = O.OptimizerMap(O.Adam(1e-3), {".*/(filters|depthwise)/.*": inner})
    model.compile(O.MultiOptimizer(table), loss())
    model.fit(x, y, verbose=0, epochs=2)
    assert len(inner._held) == 2
    assert off(inner) <= 1e-6


@pytest.mark.skipif(JAX, reason="tf.distribute")
def test_tf_distribute(rng):
    import tensorflow as tf

    x, y = data(rng)
    strategy = tf.distribute.MirroredStrategy(["cpu:0"])
    with strategy.scope():
        model = network()
        model.compile(OnSphere(O.SGD(0.1, 0.9), model), loss())
    model.fit(x, y, batch_size=16, verbose=0)
    assert off(model.optimizer) <= 1e-6


def test_embeddings_get_sparse_gradients():
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(11, 6),
            layers.LayerNormalization(),
            layers.GlobalAveragePooling1D(),
            layers.Dense(2),
        ]
    )
    model.compile(SphereSGD(model, 0.1, 0.9), "mse")
    model.fit(np.arange(40).reshape(8, 5) % 11, np.ones((8, 2)), epochs=3, verbose=0)
    assert off(model.optimizer) <= 1e-6


def test_what_is_refused():
    model = network()
    plain = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    with pytest.raises(KerasNormError, match="no weight of this model"):
        OnSphere(O.SGD(), plain)
    with pytest.raises(KerasNormError, match="wraps an optimizer"):
        OnSphere(O.LossScaleOptimizer(O.SGD()), model)
    angles = [{"max_angle": angle} for angle in (2.0, "wide")]
    for bad in ({"spheres": "cube"}, {"step": "jump"}, *angles):
        with pytest.raises(KerasNormError, match="bad "):
            OnSphere(O.SGD(), model, **bad)
    if hasattr(O, "ScheduleFreeAdamW"):
        with pytest.raises(KerasNormError, match="no direction"):
            OnSphere(O.ScheduleFreeAdamW(), model).build(model.trainable_variables)
    zero = network()
    kernel = zero.get_layer("filters").kernel
    kernel.assign(0 * kernel)
    with pytest.raises(KerasNormError, match="all zero"):
        OnSphere(O.SGD(), zero).build(zero.trainable_variables)
    saved = OnSphere(O.SGD(), model).get_config()
    with pytest.raises(KerasNormError, match="another model"):
        OnSphere.from_config(saved).build(plain.trainable_variables)


def test_subclassed_models_train(rng):
    model = ZOO["subclassed"]()
    model.compile(kerasnorm.sphere.SphereSGD(model, 0.05, 0.9), "mse")
    model.fit(rng.normal(size=(8, 5)), rng.normal(size=(8, 3)), verbose=0)
    assert off(model.optimizer) <= 1e-6


@pytest.mark.parametrize(
    ("method", "options", "held"),
    [
        ("ln", {}, {"conv/kernel": 1}),
        ("gn", {"groups": 2}, {"conv/kernel": 2}),
        (
            None,
            {"weights": "weight"},
            {"conv/conv/kernel": None, "head/head/kernel": None},
        ),
        ("none", {}, None),
        ("dyt", {}, None),
    ],
)
@pytest.mark.parametrize("outer", [lambda x: x, O.LossScaleOptimizer])
def test_a_rewritten_model_is_held_where_it_is_invariant(
    method, options, held, outer, rng
):
    parts = [
        layers.Conv2D(4, 3, use_bias=False, name="conv"),
        layers.BatchNormalization(),
    ]
    parts += [layers.ReLU(), layers.Flatten(), layers.Dense(3, name="head")]
    model = keras.Sequential([images(), *parts])
    optimizer = OnSphere(O.SGD(0.1), model)
    model.compile(outer(optimizer), loss())
    x, y = data(rng)
    model.fit(x, y, epochs=3, verbose=0)
    if held is None:
        with pytest.warns(UserWarning, match="trains by the SGD that OnSphere wrapped"):
            new = kerasnorm.rewrite(model, method, **options)
    else:
        new = kerasnorm.rewrite(model, method, **options)
    found = new.optimizer
    if outer is O.LossScaleOptimizer:
        assert type(found) is outer
        found = found.inner_optimizer
    assert isinstance(found, OnSphere if held else O.SGD)
    if held:
        groups = {s.path.split("/", 1)[1]: s.groups for s in found._wanted}
        assert groups == held
    # A step at rate 0 goes nowhere, wherever the weights were carried to.
    found.learning_rate = 0.0
    before = [ops.convert_to_numpy(v) for v in new.trainable_variables]
    new.fit(x, y, verbose=0)
    after = [ops.convert_to_numpy(v) for v in new.trainable_variables]
    for value, was in zip(after, before, strict=True):
        np.testing.assert_allclose(value, was, rtol=1e-5, atol=1e-6)


def test_what_was_chosen_to_be_held_is_so_in_a_rewritten_model():
    inputs = x = keras.Input((6,))
    for name in ("one", "two"):
        x = layers.BatchNormalization()(layers.Dense(4, name=name)(x))
    model = keras.Model(inputs, layers.Dense(2, name="head")(x), name="m")
    flows = kerasnorm.sphere.scale_invariant_weights(model)
    (one,) = (f for f in flows.invariant if "one" in f.kernel.variable.path)
    (head,) = (f for f in flows if "head" in f.kernel.variable.path)
    model.compile(OnSphere("sgd", [one, head]), loss())
    new = kerasnorm.rewrite(model, "ln")
    assert {s.path for s in new.optimizer._wanted} == {"one/kernel", "head/kernel"}


@pytest.mark.parametrize("spheres", ["unit", "layer", "joint", "spectral"])
def test_weights_set_from_outside_keep_their_length(spheres, rng):
    model = network()
    model.compile(OnSphere(O.SGD(0.05), model, spheres=spheres), loss())
    x, y = data(rng)
    model.fit(x, y, verbose=0)
    kernels = [s.path for s in model.optimizer._wanted]
    held = [v for v in model.trainable_variables if v.path in kernels]
    for v in held:
        v.assign(5 * v.value)
    values = [ops.convert_to_numpy(v) for v in held]

    def length(arrays):
        if spheres == "spectral":
            return np.linalg.norm(np.reshape(arrays[0], (-1, arrays[0].shape[-1])), 2)
        return np.sqrt(sum(np.sum(np.square(a)) for a in arrays))

    model.fit(x, y, epochs=2, verbose=0)
    now = [ops.convert_to_numpy(v) for v in held]
    assert length(now) == pytest.approx(length(values), rel=1e-5)
    assert any(np.max(np.abs(a - b)) > 1e-4 for a, b in zip(now, values, strict=True))


def test_a_rewritten_model_of_mixed_precision_keeps_what_was_around_it(rng):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        parts = [layers.Dense(4, use_bias=False), layers.BatchNormalization()]
        model = keras.Sequential([keras.Input((6,)), *parts, layers.Dense(3)])
        model.compile(OnSphere(O.SGD(0.1), model), loss())
        x = rng.normal(size=(16, 6)).astype("float32")
        model.fit(x, np.arange(16) % 3, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert type(model.optimizer) is O.LossScaleOptimizer  # by Keras itself
    new = kerasnorm.rewrite(model, weights="weight")
    assert type(new.optimizer) is O.LossScaleOptimizer
    assert type(new.optimizer.inner_optimizer) is OnSphere
    new.fit(x, np.arange(16) % 3, verbose=0)


@pytest.mark.parametrize("spheres", ["unit", "layer", "joint"])
def test_lengths_hold_where_weights_round_coarsely(spheres, rng):
    """Rounding to bfloat16 is no setting of the weights from outside."""
    x, y = data(rng)
    model = network("bfloat16")
    inner = O.SGD(0.05, 0.9)
    optimizer = OnSphere(inner, model, spheres=spheres)
    model.compile(optimizer, loss(), jit_compile=False)
    model.fit(x, y, batch_size=8, epochs=40, verbose=0)
    if spheres == "joint":
        squares = [
            sum(
                float(np.sum(ops.convert_to_numpy(r).astype("float64") ** 2)) for r in v
            )
            for v in (
                optimizer._radii.values(),
                [
                    first_radius(optimizer._trainable_variables[i], s)
                    for i, s in optimizer._held.items()
                ],
            )
        ]
        assert abs(squares[1] / squares[0] - 1) < 2e-2
    else:
        assert off(optimizer) < 1e-2
