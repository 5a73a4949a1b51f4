"""Attacks on models whose answers are known, and what an evaluation says about them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import adversarial_models as zoo
import keras
import numpy as np
import pytest
from conftest import mostly_ci
from keras import ops

from kerasnorm import adversarial, weights
from kerasnorm.adversarial import victim
from kerasnorm.adversarial.attack import Attack, names, read
from kerasnorm.adversarial.checks import CODES
from kerasnorm.adversarial.driver import Runner
from kerasnorm.common.errors import KerasNormError


STRONG = ["apgd-t", "fab-t"]
# Square needs thousands of queries to come near; its floor here is a few hundred.
WEAK = {"square", "noise"}


def attacks_by(norm):
    """Every attack that a name makes, once."""
    found = {a.name: a for n in names() for a in read(n)}
    return [a for a in found.values() if norm in a.norms]


@pytest.fixture(scope="module")
def line():
    model, w, b = zoo.linear()
    x = zoo.images()
    return model, w, b, x, zoo.labels(w, b, x)


@pytest.fixture(scope="module")
def trained():
    return zoo.network()


# ------------------------------------------------- against the exact answer


@pytest.mark.parametrize("norm", zoo.NORMS)
def test_linear_model_gives_the_exact_answer(norm, line):
    model, w, b, x, y = line
    eps = zoo.radius(norm, w, b, x, y)
    exact = zoo.stands(norm, w, b, x, y, eps)
    assert 0.3 < exact.mean() < 0.7
    attacks = [adversarial.apgd("dlr-t", steps=60), adversarial.fab(steps=40)]
    found = adversarial.evaluate(model, x, y, attacks, norm, eps)
    # Points within rounding of the radius may fall on either side.
    near = zoo.stands(norm, w, b, x, y, eps * 1.005) != zoo.stands(
        norm, w, b, x, y, eps * 0.995
    )
    assert near.mean() < 0.1
    assert (found.standing() == exact)[~near].all()
    assert not found.warnings


@pytest.mark.parametrize("norm", mostly_ci(zoo.NORMS, ["linf"]))
def test_two_classes_are_solved_by_every_gradient_attack(norm):
    """With two classes the loss grows with the margin: there is one direction."""
    model, w, b = zoo.linear(classes=2)
    x = zoo.images(25)
    y = zoo.labels(w, b, x)
    eps = zoo.radius(norm, w, b, x, y)
    exact = zoo.stands(norm, w, b, x, y, eps).mean()
    floor = zoo.stands(norm, w, b, x, y, eps * 1.002).mean()
    for attack in attacks_by(norm):
        if attack.name in WEAK | {"cw-l2"}:
            continue
        found = adversarial.evaluate(model, x, y, attack, norm, eps)
        # One step of l2 ignores the bounds, DeepFool those of l1 and linf as well.
        least = 0.1 if norm == "l1" else 0.05
        most = 0.2 if attack.name in ("fgsm", "deepfool", "bim", "mi-fgsm") else least
        assert floor <= found.robust_accuracy, attack.name
        assert found.robust_accuracy <= exact + most, attack.name


@pytest.mark.ci
@pytest.mark.parametrize("norm", zoo.NORMS)
def test_no_attack_breaks_what_cannot_be_broken(norm, line):
    """The exact answer is a floor under all of them, and all but noise do something."""
    model, w, b, x, y = line
    x, y = x[:24], y[:24]
    eps = zoo.radius(norm, w, b, x, y)
    exact = zoo.stands(norm, w, b, x, y, eps * 1.001)
    for attack in attacks_by(norm):
        if attack.name == "square":
            attack = adversarial.square(300)
        if attack.name == "cw-l2":
            attack = adversarial.carlini_wagner(40, searches=5, rate=0.05, c=1.0)
        found = adversarial.evaluate(model, x, y, attack, norm, eps, keep=True)
        assert not (exact & ~found.standing()).any(), attack.name
        assert found.robust_accuracy < 1 or attack.name == "noise", attack.name


@pytest.mark.parametrize("norm", zoo.NORMS)
def test_minimal_attacks_find_the_distance(norm, line):
    model, w, b, x, y = line
    found = adversarial.evaluate(model, x, y, adversarial.fab(60), norm, np.inf)
    for low, high in ((0.25, 0.35), (0.5, 0.5), (0.75, 0.65)):
        # The quantiles of the distances are the radii where that share stands.
        eps = zoo.radius(norm, w, b, x, y, 1 - low)
        assert found.distance[np.isfinite(found.distance)].size == len(x)
        share = float((found.distance <= eps * 1.03).mean())
        assert share == pytest.approx(low, abs=0.05), (low, high)


@pytest.mark.ci
def test_carlini_wagner_comes_near_the_exact_distance(line):
    model, _w, _b, x, y = line
    attack = adversarial.carlini_wagner(150, searches=6, rate=0.05, c=1.0)
    found = adversarial.evaluate(model, x[:20], y[:20], attack, "l2", np.inf)
    best = adversarial.evaluate(model, x[:20], y[:20], "fab-t", "l2", np.inf)
    assert (found.distance < 1.1 * best.distance + 0.01).all()


def test_examples_have_the_confidence_that_was_asked_for(line):
    model, _w, _b, x, y = line
    x, y = x[:10], y[:10]
    attack = adversarial.carlini_wagner(40, searches=4, rate=0.05, c=1.0, confidence=2)
    found = adversarial.evaluate(model, x, y, attack, "l2", np.inf, keep=True)
    z = model.predict(found.adversarial, verbose=0)
    own = z[np.arange(10), y]
    z[np.arange(10), y] = -np.inf
    fell = np.isfinite(found.distance)
    assert fell.any() and (z.max(1) - own)[fell].min() > 2 - 1e-3


@pytest.mark.parametrize("norm", zoo.NORMS)
@pytest.mark.parametrize("scale", [1, 255, 1e4])
def test_the_edge_of_the_ball_counts_at_any_scale(scale, norm):
    """Every point can be broken, and float32 is coarse where values are large."""
    rng = np.random.default_rng(0)
    w = np.sign(rng.normal(size=64))
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(1)])
    model.set_weights([w[:, None] / scale, np.zeros(1)])
    x = rng.uniform(0.2, 0.8, (60, 64)) * scale
    eps = 0.002 * scale
    most = eps * {"linf": 64, "l2": 8, "l1": 1}[norm]
    x += w * ((rng.uniform(0.1, 0.9, 60) * most - x @ w) / 64)[:, None]
    found = adversarial.evaluate(
        model,
        x,
        np.ones(60, int),
        ["fgsm", adversarial.pgd(steps=10)],
        norm,
        eps,
        bounds=(-2 * scale, 2 * scale),
        alone=True,
    )
    assert found.clean_accuracy == 1
    assert [r.accuracy for r in found.attacks] == [0, 0]
    assert found.robust_accuracy == found.standing().mean() == 0
    assert found.distance.max() <= eps * (1 + 1e-6)


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "apgd-ce"])
def test_sure_logits_are_attacked_like_others(attack):
    """With two classes there is one direction, however large the logits."""
    model, w, b = zoo.linear(classes=2)
    x = zoo.images(40)
    y = zoo.labels(w, b, x)
    eps = zoo.radius("linf", w, b, x, y)
    found = []
    for scale in (1, 1000):
        model.layers[-1].set_weights([w * scale, b * scale])
        result = adversarial.evaluate(model, x, y, attack, eps=eps)
        assert not result.warnings
        found.append(result.standing())
    assert 0.3 < found[0].mean() < 0.7
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize("z", [20.0, 60.0])
def test_one_sure_unit_has_a_gradient(z):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.set_weights([np.full((1, 1), z), np.zeros(1)])
    x = np.ones((5, 1))
    found = adversarial.evaluate(
        model, x, np.ones(5, int), "fgsm", eps=1.5, bounds=(-2, 2), outputs="logits"
    )
    assert found.robust_accuracy == 0


# ------------------------------------------------------ trained networks


@pytest.mark.parametrize("norm", mostly_ci(zoo.NORMS, ["linf"]))
def test_examples_are_in_the_ball_and_wrong(norm, trained):
    model, x, y = trained
    eps = {"linf": 0.1, "l2": 1.0, "l1": 6.0}[norm]
    found = adversarial.evaluate(
        model, x, y, ["pgd", "fab-t"], norm, eps, batch_size=50, keep=True
    )
    fell = ~found.standing() & (found.predicted == y)
    assert 0 < fell.sum()
    assert (zoo.norm_of(norm, found.adversarial - x) <= eps * (1 + 1e-4) + 1e-5).all()
    assert found.adversarial.min() >= 0 and found.adversarial.max() <= 1
    outputs = model.predict(found.adversarial, verbose=0)
    assert (outputs.argmax(1) != y)[fell].all()
    assert (found.adversarial == x).reshape(len(x), -1).all(1)[found.standing()].all()
    assert found.robust_accuracy == found.standing().mean()


def test_stronger_attacks_are_stronger(trained):
    model, x, y = trained
    attacks = ["noise", "fgsm", "pgd", "apgd-t"]
    found = adversarial.evaluate(model, x, y, attacks, eps=0.07, alone=True)
    noise, fgsm, pgd, apgd = (r.accuracy for r in found.attacks)
    assert noise >= fgsm >= pgd - 0.02 >= apgd - 0.04
    assert noise > apgd
    assert found.robust_accuracy <= apgd
    assert {r.tried for r in found.attacks} == {int((found.predicted == y).sum())}


@pytest.mark.ci
def test_several_radii_in_one_pass(trained):
    model, x, y = trained
    attacks = [adversarial.pgd(steps=10), adversarial.apgd("dlr-t", steps=20)]
    radii = [0.12, 0.0, 0.04, 0.04]
    found = adversarial.evaluate(model, x, y, attacks, eps=radii)
    assert found.eps == (0.0, 0.04, 0.12)
    assert found.robust[0] == found.clean_accuracy
    assert list(found.robust) == sorted(found.robust, reverse=True)
    for eps, share in zip(found.eps, found.robust, strict=True):
        single = adversarial.evaluate(model, x, y, attacks, eps=max(eps, 1e-9))
        assert share == pytest.approx(single.robust_accuracy, abs=0.02)
        assert found.standing(eps).mean() <= share + 1e-9


def test_slots_are_refilled(trained):
    """A batch far smaller than the data gives the same answer, and points that fell
    cost no further steps."""
    model, x, y = trained
    attack = adversarial.pgd(steps=20, random_start=False)
    whole = adversarial.evaluate(model, x, y, attack, eps=0.08, batch_size=256)
    small = adversarial.evaluate(model, x, y, attack, eps=0.08, batch_size=7)
    assert abs(whole.standing() ^ small.standing()).mean() < 0.02
    (result,) = small.attacks
    assert result.fallen > 0
    standing = result.tried - result.fallen
    assert result.steps < 21 * standing + 12 * result.fallen


def test_compiled_once(trained):
    model, x, y = trained
    run = adversarial.Evaluator(
        model,
        [adversarial.pgd(steps=5), adversarial.fab(steps=5)],
        eps=[0.02, 0.05],
        batch_size=32,
    )
    run(x[:100], y[:100])
    weights = model.get_weights()
    model.set_weights([1.1 * w for w in weights])
    run(x, y)
    model.set_weights(weights)
    assert run.traces == {"pgd": 1, "fab-t": 1}


def test_weights_are_read_anew(trained):
    model, x, y = trained
    run = adversarial.Evaluator(model, "fgsm", eps=0.02)
    before = run(x, y)
    weights = model.get_weights()
    model.layers[-1].set_weights([w[..., ::-1] for w in model.layers[-1].get_weights()])
    after = run(x, y)
    model.set_weights(weights)
    assert before.clean_accuracy > 0.9 > after.clean_accuracy


def test_the_seed_decides(trained):
    model, x, y = trained
    one, two, other = (
        adversarial.evaluate(
            model, x, y, ["pgd", "noise"], eps=0.06, keep=True, seed=seed
        )
        for seed in (1, 1, 2)
    )
    assert (one.adversarial == two.adversarial).all()
    assert (one.adversarial != other.adversarial).any()


@pytest.mark.parametrize("jit", mostly_ci([False, True], [False]))
def test_xla_gives_the_same_answer(jit, line):
    model, w, b, x, y = line
    eps = zoo.radius("linf", w, b, x, y)
    attacks = [adversarial.apgd("dlr-t", steps=30), adversarial.square(20)]
    found = adversarial.evaluate(model, x, y, attacks, eps=eps, jit=jit, batch_size=16)
    exact = zoo.stands("linf", w, b, x, y, eps).mean()
    assert found.robust_accuracy == pytest.approx(exact, abs=0.05)


def test_nothing_of_the_model_changes(trained):
    model, x, y = trained
    before = [np.array(ops.convert_to_numpy(v.value)) for v in model.variables]
    adversarial.evaluate(model, x, y, ["pgd", adversarial.square(20)], eps=0.01)
    after = [ops.convert_to_numpy(v.value) for v in model.variables]
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


# --------------------------------------------------- outputs, inputs, labels


ENDINGS = {
    "logits": lambda z: z,
    "activation": None,
    "softmax layer": keras.layers.Softmax(),
    "activation layer": keras.layers.Activation("softmax"),
    "operation": ops.softmax,
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_logits_are_found(ending):
    """Scaled so that probabilities saturate: behind the softmax nothing is left."""
    _, w, b = zoo.linear()
    inputs = keras.Input(zoo.SHAPE)
    activation = "softmax" if ending == "activation" else None
    dense = keras.layers.Dense(zoo.CLASSES, activation=activation)
    z = dense(keras.layers.Flatten()(inputs))
    model = keras.Model(inputs, ENDINGS[ending](z) if ENDINGS[ending] else z)
    dense.set_weights([60 * w, 60 * b])
    x = zoo.images(40)
    y = zoo.labels(w, b, x)
    eps = zoo.radius("linf", w, b, x, y)
    attack = adversarial.apgd("dlr-t", steps=40)
    found = adversarial.evaluate(model, x, y, attack, eps=eps)
    assert found.robust_accuracy == pytest.approx(
        zoo.stands("linf", w, b, x, y, eps).mean(), abs=0.05
    )
    assert not found.warnings
    # The model still ends as it did.
    sums = model.predict(x, verbose=0).sum(1)
    assert np.allclose(sums, 1) == (ending != "logits")


def test_nested_model_ends_in_softmax():
    inner, w, b = zoo.linear(activation="softmax")
    inputs = keras.Input(zoo.SHAPE)
    model = keras.Model(inputs, inner(inputs * 1.0))
    x = zoo.images(30)
    found = adversarial.evaluate(model, x, zoo.labels(w, b, x), "pgd", eps=0.01)
    assert not found.warnings


@pytest.mark.parametrize(
    "wrap", [keras.layers.SpectralNormalization, weights.WeightNormalization]
)
def test_wrapped_layer_ends_in_softmax(wrap):
    dense = keras.layers.Dense(3, activation="softmax")
    model = keras.Sequential(
        [keras.Input(zoo.SHAPE), keras.layers.Flatten(), wrap(dense)]
    )
    run = adversarial.Evaluator(model, "fgsm", eps=0.01)
    x = zoo.images(10)
    run(x, np.zeros(10, int))
    assert run.victim.ending is dense and not run.victim.hidden
    np.testing.assert_allclose(model.predict(x, verbose=0).sum(1), 1, rtol=1e-5)


class Own(keras.Model):
    """A subclass; its softmax is out of sight, or a layer that is made last."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden = hidden
        self.flatten = keras.layers.Flatten()
        self.dense = keras.layers.Dense(3, activation=None if hidden else "softmax")

    def call(self, x):
        z = self.dense(self.flatten(x))
        return ops.softmax(z) if self.hidden else z


@pytest.mark.parametrize("hidden", [False, True])
def test_subclassed_models(hidden):
    model = Own(hidden)
    x = zoo.images(40)
    model(x)
    y = model.predict(x, verbose=0).argmax(1)
    found = adversarial.evaluate(model, x, y, ["pgd", "fab-t"], eps=0.3)
    assert found.robust_accuracy < 0.5
    assert [w.code for w in found.warnings if w.code != "range"] == (
        ["hidden-logits"] if hidden else []
    )
    with pytest.raises(KerasNormError, match="cannot be called with the data"):
        adversarial.evaluate(model, x[:, :5], y, "pgd")


@pytest.mark.parametrize("activation", ["sigmoid", None])
def test_one_unit_means_two_classes(activation):
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(1, activation=activation)]
    )
    w = np.array([1.0, -2.0, 0.5, 1.0, -0.5], "float32")[:, None]
    model.set_weights([w, np.zeros(1, "float32")])
    x = np.random.default_rng(0).uniform(-1, 1, (200, 5)).astype("float32")
    z = x @ w[:, 0]
    y = (z > 0).astype(int)
    outputs = "auto" if activation else "logits"
    found = adversarial.evaluate(
        model,
        x,
        y[:, None],
        ["apgd-ce", "fab-t"],
        eps=0.1,
        bounds=(-2, 2),
        outputs=outputs,
    )
    assert (found.standing() == (np.abs(z) > 0.1 * 5.0)).mean() > 0.99


def test_one_hot_labels_and_integers(line):
    model, _, _, x, y = line
    one_hot = keras.utils.to_categorical(y, zoo.CLASSES)
    one, two = (
        adversarial.evaluate(model, x, labels, "pgd", eps=0.05)
        for labels in (y, one_hot)
    )
    assert (one.distance == two.distance).all()


def test_bounds_and_preprocessing_move_the_radius(line):
    """Pixels from 0 to 255 with the scaling outside or inside are the same problem."""
    model, _w, _b, x, y = line
    attack = adversarial.pgd(steps=20, random_start=False)
    plain = adversarial.evaluate(model, x, y, attack, eps=0.05)
    outside = adversarial.evaluate(
        model,
        255 * x,
        y,
        attack,
        eps=0.05 * 255,
        bounds=(0, 255),
        preprocessing=lambda x: x / 255,
    )
    assert (plain.standing() == outside.standing()).mean() > 0.97
    np.testing.assert_allclose(
        outside.median_distance, 255 * plain.median_distance, rtol=0.05
    )
    # Bounds per channel: where they leave no room, nothing moves.
    low = np.array([0.0, -1.0], "float32")
    high = np.array([1.0, 2.0], "float32")
    found = adversarial.evaluate(
        model, x, y, attack, eps=0.2, bounds=(low, high), keep=True
    )
    assert (found.adversarial[..., 0] <= 1).all() and (found.adversarial >= -1).all()
    assert (found.adversarial[..., 1] > 1).any()


def two_inputs(kind):
    a, c = keras.Input((4,), name="a"), keras.Input((3,), name="c")
    joined = keras.layers.Concatenate()([a, c])
    z = keras.layers.Dense(3, name="out")(joined)
    inputs = {"c": c, "a": a} if kind is dict else [c, a]
    return keras.Model(inputs, z)


@pytest.mark.parametrize(
    "kind, data, attacked",
    [
        (dict, dict, "a"),
        (list, list, 1),
        (list, list, "a"),
        (list, dict, 1),
        (list, dict, "a"),
    ],
)
def test_one_of_several_inputs_is_attacked(kind, data, attacked):
    model = two_inputs(kind)
    rng = np.random.default_rng(0)
    a, c = rng.random((50, 4)).astype("float32"), rng.random((50, 3)).astype("float32")
    x = {"a": a, "c": c} if data is dict else [c, a]
    y = model.predict(x, verbose=0).argmax(1)
    found = adversarial.evaluate(
        model, x, y, "pgd", eps=0.3, attacked=attacked, keep=True
    )
    assert found.clean_accuracy == 1 and 0 < found.robust_accuracy < 1
    assert found.adversarial.shape == a.shape
    moved = dict(x, a=found.adversarial) if data is dict else [c, found.adversarial]
    wrong = model.predict(moved, verbose=0).argmax(1) != y
    assert (wrong == ~found.standing()).all()


def test_mixed_precision():
    keras.utils.set_random_seed(0)
    with_policy = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(8, 3, dtype="mixed_bfloat16"),
            keras.layers.Flatten(dtype="mixed_bfloat16"),
            keras.layers.Dense(4, dtype="mixed_bfloat16"),
        ]
    )
    x = np.random.default_rng(0).random((40, 8, 8, 3)).astype("float32")
    y = with_policy.predict(x, verbose=0).astype("float32").argmax(1)
    found = adversarial.evaluate(with_policy, x, y, ["pgd", "fab-t"], eps=0.2)
    assert found.robust_accuracy < 0.9


def test_transfer(line, trained):
    model, x, y = trained
    other, _, _ = zoo.network(seed=1)
    attack = adversarial.transfer(other, adversarial.pgd(steps=10))
    found = adversarial.evaluate(model, x, y, [attack, "pgd"], eps=0.1)
    moved, white = found.attacks
    assert not moved.white_box and white.white_box
    assert 0 < moved.fallen and white.accuracy < found.clean_accuracy
    # One that leaves the ball still does.
    far = adversarial.transfer(other, adversarial.fab(steps=3))
    assert far.minimal and not attack.minimal
    # From the model itself it is the attack itself.
    own = adversarial.transfer(model, adversarial.pgd(steps=10), name="own")
    alone = adversarial.evaluate(
        model, x, y, [own, adversarial.pgd(steps=10)], eps=0.1, alone=True
    )
    assert alone.attacks[0].accuracy == pytest.approx(
        alone.attacks[1].accuracy, abs=0.03
    )
    with pytest.raises(KerasNormError, match="other classes"):
        few = adversarial.transfer(zoo.linear(classes=3)[0])
        adversarial.evaluate(line[0], line[3], line[4], few)


# ------------------------------------------------------------------ warnings


def codes(found):
    return {w.code for w in found.warnings}


@pytest.mark.ci
def test_zero_gradients_and_masking_are_flagged(trained):
    """Rounded inputs: no gradient, though the model is as weak as before."""
    model, x, y = trained
    inputs = keras.Input((8, 8, 3))
    masked = keras.Model(inputs, model(ops.round(inputs * 16) / 16))
    attacks = ["pgd", "apgd-ce", adversarial.square(400)]
    found = adversarial.evaluate(masked, x, y, attacks, eps=0.15)
    assert {"zero-gradients", "black-box-stronger"} <= codes(found)
    assert found.accuracy("pgd") > found.accuracy("square") + 0.05
    clean = adversarial.evaluate(model, x, y, attacks, eps=0.15)
    assert not codes(clean)


def test_shattered_gradients_are_flagged(trained):
    """A fine ripple of large slope: gradients point anywhere."""
    model, x, y = trained
    inputs = keras.Input((8, 8, 3))
    masked = keras.Model(inputs, model(inputs + 0.02 * ops.sin(1000.0 * inputs)))
    steps = adversarial.pgd(steps=10, length=0.02, random_start=False)
    attacks = [steps, adversarial.fgsm(), adversarial.square(400)]
    found = adversarial.evaluate(masked, x, y, attacks, eps=0.15)
    assert codes(found) & {"gradient-masking", "black-box-stronger"}


class AlwaysNoisy(keras.layers.Layer):
    """Noise in inference as well."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(1)

    def call(self, x):
        return x + keras.random.normal(ops.shape(x), stddev=0.2, seed=self.seed)


def test_randomized_models_are_flagged(trained):
    model, x, y = trained
    inputs = keras.Input((8, 8, 3))
    noisy = keras.Model(inputs, model(AlwaysNoisy()(inputs)))
    found = adversarial.evaluate(noisy, x, y, "pgd", eps=0.05)
    assert "randomized" in codes(found)
    assert "randomized" not in codes(adversarial.evaluate(model, x, y, "pgd", eps=0.05))


def test_wrong_range_is_flagged(line):
    model, _, _, x, y = line
    assert "range" in codes(
        adversarial.evaluate(model, x, y, "fgsm", eps=8 / 255, bounds=(0, 255))
    )
    assert "range" in codes(adversarial.evaluate(model, x, y, "fgsm", eps=8))
    assert "range" not in codes(adversarial.evaluate(model, x, y, "fgsm", eps=8 / 255))


def test_robust_accuracy_that_rises_is_flagged():
    """Classes that alternate: one step of a longer length lands in the right one
    again."""
    inputs = keras.Input((1,))
    wave = ops.sin(np.pi * inputs / 0.2)
    model = keras.Model(inputs, ops.concatenate([wave, -wave], -1))
    x = np.full((60, 1), 0.5) + np.linspace(-0.04, 0.04, 60)[:, None]
    y = model.predict(x, verbose=0).argmax(1)
    found = adversarial.evaluate(model, x, y, "fgsm", eps=[0.15, 0.4], bounds=(0, 1))
    assert found.robust[0] < 0.2
    assert "rising" in codes(found)


def test_every_code_is_documented():
    from conftest import ROOT

    page = (ROOT / "docs/adversarial.md").read_text("utf-8")
    assert not [c for c in CODES if f"### {c}\n" not in page]
    assert not [n for n in names() if f"`{n}`" not in page]


# ----------------------------------------------------------------- bad input


def bad_images(x):
    return np.where(x > 0.5, np.nan, x)


BAD = {
    "negative eps": ({"eps": -0.1}, "eps is no radius"),
    "NaN in eps": ({"eps": [0.1, float("nan")]}, "eps is no radius"),
    "no eps": ({"eps": []}, "eps is no radius"),
    "eps in words": ({"eps": "8/255"}, "eps is no radius"),
    "inf without an attack for it": ({"eps": np.inf}, "needs a radius"),
    "unknown norm": ({"norm": "l7"}, "no such norm"),
    "unknown attack": ({"attacks": "pdg"}, "no such attack: got 'pdg'"),
    "no attack": ({"attacks": []}, "no attack"),
    "the same name twice": ({"attacks": ["pgd", "pgd"]}, "one name"),
    "norm of another attack": ({"attacks": "cw-l2"}, "does not work by this norm"),
    "out of bounds": ({"bounds": (0.2, 0.8)}, "out of bounds"),
    "bounds the wrong way": ({"bounds": (1, 0)}, "no pair"),
    "bounds of another shape": ({"bounds": (np.zeros(7), np.ones(7))}, "no pair"),
    "infinite bounds": ({"bounds": (-np.inf, np.inf)}, "bounds are infinite"),
    "one infinite bound": ({"bounds": (0, [1, np.inf])}, "bounds are infinite"),
    "batch size": ({"batch_size": 0}, "batch_size=0. Expected a positive whole"),
    "seed of too many bits": ({"seed": 2**32 - 1}, "seed is no whole number"),
    "seed in words": ({"seed": "one"}, "Expected a whole number"),
    "a number as attack": ({"attacks": 5}, "cannot read an attack from this: got 5"),
    "outputs": ({"outputs": "scores"}, "Expected 'auto' or 'logits' or 'prob"),
    "attacked": ({"attacked": 2}, "no such input"),
    "labels of another length": ({"y": np.zeros(3, int)}, "labels do not fit"),
    "labels of no class": ({"y": np.full(60, 9)}, "does not have"),
    "labels of floats": ({"y": np.full(60, 0.5)}, "labels do not fit"),
    "labels that are not one-hot": ({"y": np.full((60, 5), 0.2)}, "not one-hot"),
    "nothing": ({"x": zoo.images(0), "y": np.zeros(0, int)}, "nothing to attack"),
    "images of another shape": ({"x": np.zeros((60, 5, 5, 2))}, "does not fit"),
    "NaN images": ({"x": bad_images(zoo.images())}, "NaN or infinite"),
    "no numbers": ({"x": np.full((60, 6, 6, 2), "a")}, "no numbers"),
    "no model": ({"model": lambda x: x}, "this is no Keras model: got function"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case, line, monkeypatch):
    model, _, _, x, y = line
    given = {"model": model, "x": x, "y": y, "attacks": "pgd", **BAD[case][0]}
    steps = []
    monkeypatch.setattr(
        Runner,
        "run",
        lambda *a, **k: steps.append(1),
    )
    with pytest.raises(KerasNormError, match=BAD[case][1]):
        adversarial.evaluate(**given)
    assert not steps


def test_outputs_that_are_no_classes():
    image = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
    x = np.zeros((4, 8, 8, 3), "float32")
    with pytest.raises(KerasNormError, match="outputs are not classes"):
        adversarial.evaluate(image, x, np.zeros(4, int))
    integers = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(9, 2),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )
    with pytest.raises(KerasNormError, match="integers"):
        adversarial.evaluate(integers, np.zeros((4, 4)), np.zeros(4, int))
    with pytest.raises(KerasNormError, match="which of the inputs"):
        adversarial.evaluate(
            two_inputs(list), [np.zeros((2, 3)), np.zeros((2, 4))], np.zeros(2, int)
        )


@pytest.mark.parametrize("what", [{"steps": 0}, {"restarts": 0}, {"steps": 1.5}])
@pytest.mark.parametrize(
    "make", [adversarial.pgd, adversarial.bim, adversarial.mi_fgsm]
)
def test_bad_settings_of_attacks(make, what):
    with pytest.raises(KerasNormError, match="Expected a positive whole number"):
        make(**what)


# -------------------------------------------------------------------- result


def test_results_are_shown(trained, tmp_path):
    model, x, y = trained
    found = adversarial.evaluate(
        model, x, y, ["pgd", "noise"], eps=[0.02, 0.1], keep=True
    )
    assert "robust" not in repr(found.distance)
    for word in ("pgd", "noise", "0.02", "points"):
        assert word in found.table() and word in found.to_markdown()
    data = json.loads(found.to_json())
    assert data["robust_accuracy"] == list(found.robust)
    assert len(data["attacks"]) == 4 and len(data["distance"]) == len(x)
    assert sum(n for n, _, _ in found.per_class.values()) == len(x)
    clean = sum(n * c for n, c, _ in found.per_class.values()) / len(x)
    assert clean == pytest.approx(found.clean_accuracy)
    for name in ("r.json", "r.md", "curve.png", "examples.npz"):
        found.save(tmp_path / name)
    found.grid(tmp_path / "grid.png", rows=2)
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"
    with np.load(tmp_path / "examples.npz") as kept:
        assert (kept["adversarial"] == found.adversarial).all()
    assert found.accuracy("noise", 0.02) == found.attacks[1].accuracy
    with pytest.raises(KerasNormError, match="no such attack was run"):
        found.accuracy("fgsm")
    without = adversarial.evaluate(model, x[:4], y[:4], "fgsm", eps=0.01)
    with pytest.raises(KerasNormError, match="not kept"):
        without.grid()


def test_median_distance_of_few():
    model, w, b = zoo.linear()
    x = zoo.images(8)
    y = zoo.labels(w, b, x)
    found = adversarial.evaluate(model, x, (y + 1) % zoo.CLASSES, "fgsm", eps=0.1)
    assert found.clean_accuracy == found.robust_accuracy == 0
    assert np.isnan(found.median_distance)
    assert json.loads(found.to_json())["median_distance"] is None
    still = adversarial.evaluate(model, x, y, "noise", eps=1e-6)
    assert np.isinf(still.median_distance) and still.robust_accuracy == 1


def test_attacks_are_plain_data():
    assert adversarial.pgd() == adversarial.pgd()
    assert adversarial.pgd(steps=7) != adversarial.pgd()
    assert [a.name for a in adversarial.standard()] == [
        "apgd-ce",
        "apgd-t",
        "fab-t",
        "square",
    ]
    assert isinstance(read("autoattack")[0], Attack)


def test_one_output_may_stand_in_a_dict():
    model, w, b = zoo.linear()
    inputs = keras.Input(zoo.SHAPE)
    model = keras.Model(inputs, {"classes": model(inputs)})
    x = zoo.images(20)
    y = zoo.labels(w, b, x)
    found = adversarial.evaluate(model, x, y, "pgd", eps=0.01)
    assert found.clean_accuracy == 1
    trained = adversarial.adversarial_training(model, steps=1, eps=0.01)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for given, target in ((loss, y), ({"classes": loss}, {"classes": y})):
        trained.compile("sgd", given)
        history = trained.fit(x, target, verbose=0).history
        assert np.isfinite(history["loss"]).all()


def test_training_refuses_an_input_of_integers():
    """Its gradient is none; what was left was random noise."""
    inputs = keras.Input((4,), dtype="uint8")
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    with pytest.raises(KerasNormError, match="integers"):
        adversarial.adversarial_training(model, eps=8, bounds=(0, 255))


def test_a_trainer_is_attacked_as_the_model_in_it():
    """In front of the softmax, behind which gradients vanish."""
    model, x, y = zoo.network()
    head = model.layers[-1]
    kernel, bias = head.get_weights()
    sharp = keras.models.clone_model(model)
    sharp.set_weights(model.get_weights())
    sharp.layers[-1].set_weights([100 * kernel, 100 * bias])
    sure = keras.Model(sharp.inputs, keras.layers.Softmax()(sharp.outputs[0]))
    trainer = adversarial.adversarial_training(sure, eps=0.2)
    found = [
        adversarial.evaluate(m, x, y, ["pgd"], "linf", 0.2) for m in (sure, trainer)
    ]
    assert found[0].robust == found[1].robust and not codes(found[1])
    np.testing.assert_array_equal(*(f.standing() for f in found))


def test_the_curve_agrees_with_the_distances():
    model, x, y = zoo.network()
    eps = [0.02, 0.05, 0.08, 0.12, 0.2]
    attack = adversarial.fab(steps=3, restarts=6)
    found = adversarial.evaluate(model, x, y, [attack], "linf", eps)
    assert found.robust == tuple(found.standing(e).mean() for e in eps)


def test_training_with_sizes_that_the_shape_does_not_say():
    inputs = keras.Input((None, None, 1))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    data = np.random.default_rng(0).uniform(size=(8, 6, 5, 1)).astype("float32")
    for norm in zoo.NORMS:
        for method in ("free", "pgd"):
            trainer = adversarial.adversarial_training(
                model, norm=norm, eps=0.1, method=method, steps=2, replays=2
            )
            trainer.compile(
                "sgd",
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                jit_compile=False,
            )

            def batches():
                while True:
                    yield data[:4], np.array([0, 1, 0, 1])

            source = batches()
            if keras.backend.backend() == "tensorflow":
                import tensorflow as tf

                spec = tf.TensorSpec((None, None, None, 1)), tf.TensorSpec((None,))
                source = tf.data.Dataset.from_generator(batches, output_signature=spec)
            trainer.fit(source, steps_per_epoch=2, shuffle=False, verbose=0)
            assert np.isfinite(trainer.get_weights()[0]).all()


def test_sources_that_cannot_be_evaluated_say_so(line):
    model, _, _, x, y = line

    class Endless(keras.utils.PyDataset):
        num_batches = None

        def __getitem__(self, index):
            return x[:4], y[:4]

    with pytest.raises(KerasNormError, match="no end"):
        adversarial.evaluate(model, Endless(), eps=0.1)
    uneven = [(x[:4], y[:4]), (x[:4, :-1], y[:4])]
    with pytest.raises(KerasNormError, match="Pad them alike"):
        adversarial.evaluate(model, iter(uneven), eps=0.1)
    named = adversarial.evaluate(model, x, {"z": y}, ["fgsm"], eps=0.01)
    assert named.robust == adversarial.evaluate(model, x, y, ["fgsm"], eps=0.01).robust


def of_one_size(model, size):
    """The same layers for batches of one size."""
    inputs = keras.Input(batch_shape=(size, *model.input_shape[1:]))
    return keras.Model(inputs, model(inputs))


@pytest.mark.parametrize("attack", ["pgd", "apgd-t", "fab-t", "deepfool", "square"])
def test_a_model_that_takes_batches_of_one_size(attack, line):
    model, _, _, x, y = line
    settings = {"eps": 0.01, "bounds": None}
    free = adversarial.evaluate(model, x, y, attack, **settings, batch_size=8)
    held = adversarial.evaluate(of_one_size(model, 8), x, y, attack, **settings)
    assert len(x) % 8
    np.testing.assert_array_equal(held.predicted, free.predicted)
    np.testing.assert_allclose(held.distance, free.distance, rtol=1e-4)


def test_a_stateful_model_is_left_as_it_is(rng):
    x, y = rng.uniform(size=(10, 4, 1)).astype("float32"), np.arange(10) % 2
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(4, 4, 1)),
            keras.layers.LSTM(3, stateful=True),
            keras.layers.Dense(2),
        ]
    )
    model.predict(x[:4], batch_size=4, verbose=0)
    before = [ops.convert_to_numpy(v) for v in model.variables]
    result = adversarial.evaluate(model, x, y, "pgd", eps=0.2)
    assert len(result.predicted) == 10
    for old, new in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(new), old)


@pytest.mark.parametrize("whole", [False, True])
def test_other_threads_see_the_activation_while_it_is_taken_off(whole):
    layers = (
        [keras.layers.Dense(3), keras.layers.Softmax()]
        if whole
        else [keras.layers.Dense(3, activation="softmax")]
    )
    model = keras.Sequential([keras.Input((4,)), *layers])
    last, x = model.layers[-1], np.ones((2, 4), "float32")
    before = vars(last).get("activation"), "call" in vars(last)
    y = keras.ops.convert_to_numpy(model(x))
    with victim._without(last), ThreadPoolExecutor(1) as pool:
        seen = pool.submit(lambda: keras.ops.convert_to_numpy(model(x))).result()
        off = keras.ops.convert_to_numpy(model(x))
        with victim._without(victim._ending(model)):
            pass
        again = keras.ops.convert_to_numpy(model(x))
    np.testing.assert_array_equal(seen, y)
    np.testing.assert_array_equal(off, again)
    assert not np.allclose(off, y)
    assert (vars(last).get("activation"), "call" in vars(last)) == before
