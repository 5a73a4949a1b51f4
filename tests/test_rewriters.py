"""Sites, edits and transfer on every kind of model (`zoo.py`)."""

from __future__ import annotations

import collections

import keras
import numpy as np
import pytest
import zoo
from keras import layers

import kerasnorm
import rewriters
from kerasnorm.method.registry import get
from rewriters.compare import outputs


CUSTOM = {
    c.__name__: c
    for c in (zoo.Block, zoo.LazyBlock, zoo.Subclassed, zoo.FunctionalSubclass)
}


@pytest.fixture(scope="module", params=sorted(zoo.ZOO))
def animal(request):
    return zoo.ZOO[request.param]()


def norms(model):
    return [
        s
        for s in rewriters.sites(model)
        if isinstance(s.layer, layers.BatchNormalization)
    ]


def twin(old):
    return layers.BatchNormalization.from_config(old.get_config())


def reload(model, path):
    model.save(path)
    return keras.saving.load_model(path, custom_objects=CUSTOM)


def test_every_norm_is_found_with_its_calls(animal):
    found = norms(animal)
    expected = [
        x for x in animal._flatten_layers() if isinstance(x, layers.BatchNormalization)
    ]
    assert {id(s.layer) for s in found} == {id(x) for x in expected}
    assert all(s.calls for s in found)
    assert len({s.path for s in found}) == len(found)


def test_empty_edit_is_bit_equal(animal):
    before = [np.array(w) for w in animal.get_weights()]
    result = rewriters.edit(animal, {})
    x = rewriters.random_inputs(animal)
    for a, b in zip(outputs(animal, x), outputs(result.model, x), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(before, animal.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert type(result.model) is type(animal)

    def kept(model):
        found = list(model._flatten_layers())[1:]
        found = [x for x in found if not isinstance(x, layers.InputLayer)]
        return [(x.name, x.trainable, x.dtype_policy.name) for x in found]

    assert kept(animal) == kept(result.model)


def test_replaced_norms_survive_saving(animal, request, tmp_path):
    sites = norms(animal)
    result = rewriters.edit(animal, {s.path: twin for s in sites})
    for site in sites:
        new = result.new(site.layer)
        assert new is not site.layer
        for v, w in zip(site.layer.variables, new.variables, strict=True):
            w.assign(v)
    x = rewriters.random_inputs(animal)
    assert rewriters.compare(animal, result.model, x).max_abs == 0
    assert len(result.model.variables) == len(animal.variables)
    if request.node.callspec.params["animal"] not in zoo.UNSAVEABLE:
        again = reload(result.model, tmp_path / "model.keras")
        assert rewriters.compare(animal, again, x).max_abs == 0


def test_another_class_takes_the_place(animal, request, tmp_path):
    sites = [s for s in norms(animal) if not any(c.masked for c in s.calls)]

    def other(old):
        return layers.LayerNormalization(name=old.name, dtype=old.dtype_policy)

    result = rewriters.edit(animal, {s.path: other for s in sites})
    assert all(
        isinstance(result.new(s.layer), layers.LayerNormalization) for s in sites
    )
    if request.node.callspec.params["animal"] not in zoo.UNSAVEABLE:
        again = reload(result.model, tmp_path / "model.keras")
        x = rewriters.random_inputs(animal)
        assert rewriters.compare(result.model, again, x).max_abs == 0


def test_removed_layers_pass_their_input_on(animal):
    sites = norms(animal)
    result = rewriters.edit(animal, {s.path: None for s in sites})
    for site in sites:
        assert result.new(site.layer) is None
    kept = [
        x
        for x in result.model._flatten_layers()
        if isinstance(x, layers.BatchNormalization)
    ]
    assert not kept
    x = rewriters.random_inputs(animal)
    assert all(np.isfinite(y).all() for y in outputs(result.model, x))


def test_program_computes_what_the_model_computes(animal):
    if not rewriters.program.is_graph(animal):
        with pytest.raises(rewriters.RewriteError, match="no graph"):
            rewriters.Program(animal)
        return
    program = rewriters.Program(animal)
    x = rewriters.random_inputs(animal)
    flat = [keras.ops.convert_to_tensor(v) for v in keras.tree.flatten(x)]
    for a, b in zip(program.run(flat), outputs(animal, x), strict=True):
        np.testing.assert_array_equal(np.asarray(a, "float32"), b)


def test_unknown_path_names_the_path():
    with pytest.raises(rewriters.RewriteError, match="'nowhere'"):
        rewriters.edit(zoo.ZOO["sequential"](), {"nowhere": None})


def test_adapted_layers_stay_adapted():
    norm, numbers = layers.Normalization(), layers.IntegerLookup()
    text = layers.TextVectorization(output_mode="tf_idf", max_tokens=9)
    norm.adapt(np.random.default_rng(0).normal(3, 2, (50, 4)))
    numbers.adapt(np.array([4, 4, 7]))
    text.adapt(np.array(["a b", "b c b"]))
    a, b, c = keras.Input((4,)), keras.Input((1,)), keras.Input((1,), dtype="string")
    model = keras.Model([a, b, c], [norm(a), numbers(b), text(c)])
    result = rewriters.edit(model, {})
    x = np.ones((2, 4), "float32")
    np.testing.assert_array_equal(np.array(result.new(norm)(x)), np.array(norm(x)))
    for old in (numbers, text):
        assert result.new(old).get_vocabulary() == old.get_vocabulary()
    weights = [t._lookup_layer.idf_weights_const for t in (text, result.new(text))]
    np.testing.assert_array_equal(*map(np.array, weights))


def test_a_lost_mask_is_refused():
    model = zoo.ZOO["masked"]()
    with pytest.raises(rewriters.RewriteError, match="'mask'"):
        rewriters.edit(model, {"bn": layers.GroupNormalization(groups=2)})


def test_neighbours():
    model = zoo.ZOO["residual"]()
    where = rewriters.SiteMap(model)
    assert where["bn_in"].before() is None  # the stem also feeds the sum
    assert where["bn_out"].before().path == "conv"
    assert where["bn_out"].after() is None  # the sum reads something else too
    assert where["conv"].after().path == "bn_out"


def test_shared_and_nested_sites():
    where = rewriters.SiteMap(zoo.ZOO["nested_called_twice"]())
    assert where["trunk/bn"].shared and len(where["trunk/bn"].calls) == 2
    where = rewriters.SiteMap(zoo.ZOO["nested_sequential_frozen"]())
    assert where["base/b"].calls[0].kwargs == {"training": False}
    where = rewriters.SiteMap(zoo.ZOO["masked"]())
    assert where["bn"].calls[0].masked


def test_optimizer_slots_follow_their_variables():
    model = zoo.ZOO["compiled_adam"]()
    result = rewriters.edit(
        model, {"bn": layers.GroupNormalization(groups=2, name="bn")}
    )
    old, new = model.optimizer, result.model.optimizer
    assert type(new) is type(old) and new is not old
    assert int(new.iterations) == int(old.iterations) > 0
    assert float(new.learning_rate) == float(old.learning_rate)
    slots = {
        (v.path, name): getattr(old, name)[k]
        for name in ("_momentums", "_velocities")
        for k, v in enumerate(old._trainable_variables)
    }
    moved = 0
    for name in ("_momentums", "_velocities"):
        for k, v in enumerate(new._trainable_variables):
            if v.path.startswith("bn/"):
                assert not np.any(getattr(new, name)[k])
            else:
                np.testing.assert_array_equal(
                    getattr(new, name)[k], slots[v.path, name]
                )
                moved += 1
    assert moved == 8
    x = np.zeros((8, 6), "float32")
    result.model.fit(x, x[:, :3], verbose=0)


def test_resuming_after_an_empty_edit_is_the_same_training():
    model = zoo.ZOO["compiled_adam"]()
    copy = rewriters.edit(model, {}).model
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(16, 6)), rng.normal(size=(16, 3))
    for m in (model, copy):
        m.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), copy.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_rewritten_model_can_be_rewritten_again(tmp_path):
    model = zoo.ZOO["subclassed"]()
    once = rewriters.edit(
        model, {"norms/0": layers.LayerNormalization(name="norm")}
    ).model
    twice = rewriters.edit(
        once, {"parts/block/norm": layers.LayerNormalization(name="inner")}
    ).model
    assert isinstance(twice, zoo.Subclassed)
    assert isinstance(twice.norms[0], layers.LayerNormalization)
    assert isinstance(twice.parts["block"].norm, layers.LayerNormalization)
    again = reload(twice, tmp_path / "twice.keras")
    assert rewriters.compare(twice, again).max_abs == 0


def test_where_selects_by_glob_and_by_function():
    model = zoo.ZOO["nested_twice"]()
    assert [s.path for s in rewriters.sites(model, "*/bn")] == ["middle/inner/bn"]
    assert len(rewriters.sites(model, lambda s: s.path.startswith("middle"))) > 2


def test_compare_reports_differences():
    model = zoo.ZOO["plain_functional"]()
    other = rewriters.edit(model, {}).model
    other.get_layer("head").bias.assign_add([1, 0, 0, 0, 0])
    result = rewriters.compare(model, other)
    assert result.max_abs == pytest.approx(1, abs=1e-6)
    with pytest.raises(rewriters.RewriteError, match="other shapes"):
        rewriters.compare(
            model, zoo.ZOO["plain_functional"]().layers[-2], np.ones((2, 8, 8, 3))
        )


def test_compare_needs_samples():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    for x in ({"samples": 0}, {"x": np.zeros((0, 3))}):
        with pytest.raises(rewriters.RewriteError, match="0 samples"):
            rewriters.compare(model, model, **x)


def trained(**options):
    """A model that knows a little, what it was trained on, and what as."""
    keras.utils.set_random_seed(0)
    parts = [layers.Dense(8), layers.BatchNormalization(name="bn"), layers.Dense(2)]
    model = keras.Sequential([keras.Input((6,)), *parts])
    x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
    y = (x[:, 0] > 0).astype("int32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(options.pop("optimizer", "adam"), loss, **options)
    model.fit(x, y, epochs=3, verbose=0)
    return model, x, y


@pytest.mark.parametrize("scale", [True, False])
def test_a_model_of_mixed_precision_is_rewritten_under_another_policy(scale):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, x, y = trained(auto_scale_loss=scale)
    finally:
        keras.config.set_dtype_policy("float32")
    new = kerasnorm.rewrite(model, "ln")
    assert type(new.optimizer) is type(model.optimizer)
    inner = new.optimizer.inner_optimizer if scale else new.optimizer
    assert int(new.optimizer.iterations) == 6 and np.any(inner._momentums[0])
    assert new.dtype_policy.name == "mixed_float16"
    new.fit(x, y, verbose=0)
    kerasnorm.export(new)


@pytest.mark.parametrize("method, fit", [("none", None), ("ln", "affine")])
def test_averages_of_weights_begin_at_what_was_set(method, fit):
    model, x, y = trained(optimizer=keras.optimizers.Adam(0.01, use_ema=True))
    data = None if fit is None else x
    new = kerasnorm.rewrite(model, method, data=data, fit=fit, verbose=False)
    new.optimizer.learning_rate = 0.0
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in new.trainable_variables]
    new.fit(x, y, verbose=0)  # which puts the averages in the weights' place
    old = {v.path: keras.ops.convert_to_numpy(v) for v in model.trainable_variables}
    for v, was in zip(new.trainable_variables, before, strict=True):
        untouched = np.array_equal(old.get(v.path), was)
        now = keras.ops.convert_to_numpy(v)
        if not untouched:
            np.testing.assert_allclose(now, was, rtol=1e-5, err_msg=v.path)


def test_a_state_that_the_gradient_overwrites_has_no_average():
    model, x, _ = trained(optimizer=keras.optimizers.Adam(0.01, use_ema=True))
    new = kerasnorm.rewrite(model, "streaming", force=True)
    averages = new.optimizer._model_variables_moving_average
    assert any(average is None for average in averages)
    assert outputs(new, x)[0].shape == outputs(model, x)[0].shape


class TwoOptimizers(keras.Model):
    """Compiles as Keras's own GAN example does."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense, self.bn = layers.Dense(4), layers.BatchNormalization()

    def call(self, x, training=False):
        return self.bn(self.dense(x), training=training)

    def compile(self, d_optimizer, g_optimizer):
        super().compile()
        self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer


class Rates(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule without a config."""

    def __call__(self, step):
        return 0.01


def test_what_cannot_be_compiled_again_is_told():
    model = TwoOptimizers()
    x = np.ones((4, 3), "float32")
    model(x)
    model.compile("adam", "sgd")
    with pytest.warns(UserWarning, match=r"not compiled: TwoOptimizers.compile takes"):
        new = kerasnorm.rewrite(model, "none")
    np.testing.assert_allclose(outputs(new, x)[0], outputs(model, x)[0], atol=1e-5)
    model, *_ = trained(optimizer=keras.optimizers.SGD(Rates()))
    with pytest.warns(UserWarning, match=r"not compiled: .* has no config"):
        assert not kerasnorm.rewrite(model, "none").compiled


class Pairs(layers.Layer):
    """Layers in tuples, inside of what `kind` says."""

    def __init__(self, kind, **kwargs):
        super().__init__(**kwargs)
        self.kind = kind
        pairs = [(layers.Dense(4), layers.BatchNormalization()) for _ in range(2)]
        kinds = {"list": list, "tuple": tuple, "dict": lambda x: {"a": x[0], "b": x[1]}}
        self.pairs = kinds[kind](pairs)

    def build(self, shape):
        for dense, norm in self.each():
            dense.build(shape)
            norm.build((*shape[:-1], 4))
            shape = (*shape[:-1], 4)
        self.built = True

    def each(self):
        return self.pairs.values() if isinstance(self.pairs, dict) else self.pairs

    def call(self, x):
        for dense, norm in self.each():
            x = norm(dense(x))
        return x

    def get_config(self):
        return {**super().get_config(), "kind": self.kind}


@pytest.mark.parametrize("kind", ["list", "tuple", "dict"])
def test_layers_in_tuples_within_others(kind, tmp_path):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, Pairs(kind)(inputs))
    new = kerasnorm.rewrite(model, "ln")
    norms = [n for _, n in new.layers[-1].each()]
    assert {type(n).__name__ for n in norms} == {"LayerNormalization"}
    assert len(new.weights) == len(model.weights) - 4  # no moving statistics
    new.save(tmp_path / "m.keras")
    again = keras.saving.load_model(
        tmp_path / "m.keras", custom_objects={"Pairs": Pairs}
    )
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    np.testing.assert_array_equal(outputs(again, x)[0], outputs(new, x)[0])


# JAX gives the buffers of what it trains away.
DONATES = set(kerasnorm.methods()) if keras.backend.backend() == "jax" else {"weight"}


@pytest.mark.parametrize("method", sorted(DONATES - {"adaptive_instance"}))
def test_training_the_copy_leaves_the_original_its_memory(method):
    norm = layers.BatchNormalization()
    parts = [layers.Dense(4, name="body"), norm, layers.Dense(2, name="head")]
    model = keras.Sequential([keras.Input((3,)), *parts])
    new = (
        kerasnorm.rewrite(model, weights=method)
        if get(method).wrap
        else kerasnorm.rewrite(model, method, force=True)
    )
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    new.compile("sgd", "mse")
    new.fit(x, x[:, :2], verbose=0)
    assert model.predict(x, verbose=0).shape == (8, 2)
    plain = kerasnorm.export(new)
    plain.compile("sgd", "mse")
    plain.fit(x, x[:, :2], verbose=0)
    assert new.predict(x, verbose=0).shape == (8, 2)


@pytest.mark.parametrize("kind", ["functional", "sequential"])
def test_attributes_of_a_plain_model_stay(kind):
    inputs = keras.Input((4,))
    body = keras.Sequential([layers.Dense(3), layers.BatchNormalization()], name="body")
    if kind == "functional":
        model = keras.Model(inputs, body(inputs))
    else:
        model = keras.Sequential([inputs, body])
    model.class_names, model.threshold, model.body = ["a", "b"], 0.3, body
    x = np.ones((8, 4), "float32")
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(x, x[:, :3], verbose=0)
    new = kerasnorm.rewrite(model, "ln")
    assert list(new.class_names) == ["a", "b"] and new.threshold == 0.3
    assert new.body is new.get_layer("body") and model.body is body
    assert not hasattr(new, "history")
    new.fit(x, x[:, :3], verbose=0)


class Threshold(keras.metrics.Metric):
    """Without a config."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold

    def update_state(self, *args):
        pass

    def result(self):
        return 0.0


def test_attributes_that_hold_what_the_layers_hold():
    Pair = collections.namedtuple("Pair", "name layer")
    inputs = keras.Input((4,))
    dense = layers.Dense(3, name="dense")
    model = keras.Model(inputs, layers.BatchNormalization()(dense(inputs)))
    model.kernel, model.special = dense.kernel, {dense}
    model.pair, model.counts = Pair("first", dense), collections.OrderedDict(a=1)
    model.metric = Threshold(0.3)
    new = kerasnorm.rewrite(model, "ln")
    there = new.get_layer("dense")
    assert new.kernel is there.kernel and set(new.special) == {there}
    assert new.pair.name == "first" and new.pair.layer is there
    assert dict(new.counts) == {"a": 1} and new.metric.threshold == 0.3
    assert len(new.trainable_variables) == len(model.trainable_variables) == 4
    theirs = {id(v) for v in model.variables}
    assert not any(id(v) in theirs for v in new.variables)


class Halving(keras.optimizers.schedules.LearningRateSchedule):
    """Known to nobody but the model."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate * 0.5**step

    def get_config(self):
        return {"rate": self.rate}


def small_mlp():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, name="first"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dense(5, name="second"),
            layers.BatchNormalization(),
            layers.Dense(3, name="head"),
        ]
    )


@pytest.mark.parametrize("kind", ["schedule", "function"])
def test_an_optimizer_belongs_to_one_model(kind):
    x = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
    model = small_mlp()
    rate = Halving(0.1) if kind == "schedule" else lambda: 0.1
    model.compile(keras.optimizers.Adam(rate), "mse", jit_compile=False)
    if kind == "schedule":
        new = kerasnorm.rewrite(model, "ln")
        assert new.optimizer is not model.optimizer
        new.fit(x, x[:, :3], verbose=0)
    else:
        with pytest.warns(UserWarning, match="not compiled|lambda"):
            new = kerasnorm.rewrite(model, "ln")
        assert not new.compiled
    model.fit(x, x[:, :3], verbose=0)


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_excluded_from_weight_decay_stays_so(wrapped):
    model = small_mlp()
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    first = model.get_layer("first").kernel
    optimizer.exclude_from_weight_decay([first], ["bias", "gamma", "beta"])
    if wrapped:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer, "mse", jit_compile=False)
    new = kerasnorm.rewrite(model, "ln")
    used = new.optimizer.inner_optimizer if wrapped else new.optimizer
    decayed = {v.path for v in new.trainable_variables if used._use_weight_decay(v)}
    assert decayed == {new.get_layer(n).kernel.path for n in ("second", "head")}
    assert optimizer is model.optimizer


def test_a_variable_frozen_by_itself_stays_frozen():
    x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
    model = small_mlp()
    model.get_layer("second").kernel.trainable = False
    kept = np.array(model.get_layer("second").kernel)
    new = kerasnorm.rewrite(model, "ln", data=x, fit="refit")
    np.testing.assert_array_equal(np.array(new.get_layer("second").kernel), kept)
    new.compile("sgd", "mse", jit_compile=False)
    new.fit(x, x[:, :3], verbose=0)
    np.testing.assert_array_equal(np.array(new.get_layer("second").kernel), kept)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_stands_for_a_frozen_variable_is_frozen(compiled):
    x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
    model = small_mlp()
    model.get_layer("second").kernel.trainable = False
    norm = model.layers[1]
    norm.gamma.trainable = False
    if compiled:
        model.compile("adam", "mse", jit_compile=False)
        model.fit(x, x[:, :3], verbose=0)
    new = kerasnorm.rewrite(model, "gn", groups=1, weights="wn")
    second, first = new.get_layer("second"), new.get_layer(norm.name)
    if not compiled:
        new.compile("adam", "mse", jit_compile=False)
    held = [second.layer.kernel, second.g, first.gamma]
    free = [second.layer.bias, first.beta, new.get_layer("first").g]
    before = [np.array(v) for v in held + free]
    new.fit(x, x[:, :3], verbose=0)
    for k, v in enumerate(held + free):
        assert np.array_equal(np.array(v), before[k]) == (k < len(held)), v.path
    plain = kerasnorm.export(new).get_layer("second")
    assert [v.trainable for v in plain.variables] == [False, True]


@pytest.mark.parametrize("how", ["int8", "lora", "int8, then lora"])
def test_layers_that_an_owner_makes_may_be_quantized_or_have_lora(how):
    x = keras.Input((6, 8))
    y = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    y = layers.BatchNormalization(name="norm")(y)
    model = keras.Model(x, layers.Dense(3)(y))
    zoo.randomize(model)
    for layer in model.get_layer("attention")._flatten_layers():
        if isinstance(layer, layers.EinsumDense):
            if "int8" in how:
                layer.quantize("int8")
            if "lora" in how:
                layer.enable_lora(2, lora_alpha=3)
                layer.lora_kernel_b.assign(layer.lora_kernel_b + 0.1)
    new = rewriters.edit(model, {}).model
    x = np.random.default_rng(0).normal(size=(3, 6, 8)).astype("float32")
    np.testing.assert_allclose(
        new.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6
    )
    query, twin = (m.get_layer("attention").query_dense for m in (model, new))
    assert twin.lora_enabled == query.lora_enabled
    assert twin.quantization_mode == query.quantization_mode
    assert [v.trainable for v in twin.variables] == [
        v.trainable for v in query.variables
    ]


@pytest.mark.parametrize("how", ["int8", "lora"])
def test_a_refit_leaves_kernels_alone_that_are_quantized_or_have_lora(how):
    x = np.random.default_rng(0).normal(size=(128, 6)).astype("float32")
    model = small_mlp()
    zoo.randomize(model)
    second = model.get_layer("second")
    second.enable_lora(2) if how == "lora" else second.quantize("int8")
    new, report = kerasnorm.rewrite(
        model, "ln", data=x, fit="refit", return_report=True
    )
    notes = " ".join(report.fit.notes)
    assert "quantized or has LoRA: second" in notes
    np.testing.assert_array_equal(
        np.array(new.get_layer("second")._kernel), np.array(second._kernel)
    )
