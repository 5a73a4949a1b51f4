"""The compass: candidates, verdicts, reports, the monitor, the command line."""

from __future__ import annotations

import html.parser
import json
import os
import pathlib
import shutil
import subprocess

import keras
import numpy as np
import pytest
from keras import ops

import kerasnorm
import kerasnorm_cli as cli
from kerasnorm import KerasNormError
from kerasnorm.callbacks import PropertyMonitor
from kerasnorm.callbacks.property_monitor import figures
from kerasnorm.method.registry import get
from kerasnorm.properties import Measurement, Site, measure, rules
from kerasnorm.properties.candidates import STUDIED, fresh, put_under
from kerasnorm.properties.confirm import train


layers = keras.layers


def network(norm=layers.BatchNormalization, blocks=2, size=8):
    x = inputs = keras.Input((size, size, 3))
    for k in range(blocks):
        x = layers.Conv2D(8, 3, padding="same", use_bias=False, name=f"conv{k}")(x)
        x = norm(name=f"norm{k}")(x) if norm else x
        x = layers.ReLU(name=f"relu{k}")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(4, name="head")(x), name="tiny")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(48, 8, 8, 3)).astype("float32")
    y = np.arange(48) % 4
    x += y[:, None, None, None] * 0.5
    return x, y


@pytest.fixture(scope="module")
def found(images):
    """All of the paper's methods on one network, trained a little."""
    keras.utils.set_random_seed(0)
    x, y = images
    return kerasnorm.compass(network(), x, y, batch_sizes=16, confirm=5)


# ------------------------------------------------------------------- candidates


def test_fresh_weights_follow_the_initializers_and_the_seed():
    model = network()
    for layer in model.layers:
        layer.set_weights([np.full(w.shape, 7.0) for w in layer.get_weights()])
    one, same, other = fresh(model, 0), fresh(model, 0), fresh(model, 1)
    for a, b in zip(one.get_weights(), same.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    kernels = [m.get_layer("conv0").get_weights()[0] for m in (one, other)]
    assert not np.allclose(*kernels)
    gamma, beta, mean, variance = one.get_layer("norm0").get_weights()
    assert (gamma == 1).all() and (variance == 1).all()
    assert (beta == 0).all() and (mean == 0).all()
    limit = np.sqrt(6 / (9 * 3 + 9 * 8))  # Glorot uniform
    assert np.abs(kernels[0]).max() <= limit
    for value in model.get_weights():
        assert (value == 7.0).all()


def test_fresh_leaves_the_random_generator_alone():
    import random

    model, state = network(), random.getstate()
    fresh(model, 3)
    assert random.getstate() == state


def test_fresh_draws_inside_subclassed_models():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return self.dense(x)

        def get_config(self):
            return {}

    model = Own()
    model(np.zeros((1, 2), "float32"))
    before = ops.convert_to_numpy(model.dense.kernel)
    one, two = fresh(model, 0), fresh(model, 0)
    after = ops.convert_to_numpy(one.dense.kernel)
    assert not np.allclose(before, after)
    np.testing.assert_array_equal(after, ops.convert_to_numpy(two.dense.kernel))


def test_all_candidates_start_from_the_same_kernels(images):
    base = fresh(network(), 0)
    kernels = {}
    for name in ("batch", "group", "none", "weight"):
        model, _ = put_under(base, name, [ops.convert_to_tensor(images[0][:16])])
        layer = model.get_layer("conv1")
        kernel = getattr(layer, "layer", layer).kernel
        kernels[name] = ops.convert_to_numpy(kernel)
    for name in ("group", "none", "weight"):
        # A fold of the untrained statistics changes 1 / sqrt(1 + epsilon).
        np.testing.assert_allclose(kernels[name], kernels["batch"], rtol=2e-3)


def test_methods_start_as_their_papers_say(images):
    x = [ops.convert_to_tensor(images[0][:16])]
    base = fresh(network(), 0)
    weight, _ = put_under(base, "weight", x)
    inner = keras.Model(weight.inputs[0], weight.get_layer("conv1").output)
    y = ops.convert_to_numpy(inner(x[0]))
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-3)
    scaled, _ = put_under(base, "scaled_weight_standardization", x)
    gains = [scaled.get_layer(f"conv{k}").gain for k in range(2)]
    assert gains == [1.0, "relu"]  # the first reads the image
    for k in range(2):
        np.testing.assert_array_equal(scaled.get_layer(f"conv{k}").gamma, 1)


def test_given_weights_are_kept(images):
    model = network()
    new, _ = put_under(model, "weight", None)
    x = images[0][:4]
    np.testing.assert_allclose(
        ops.convert_to_numpy(new(x)), ops.convert_to_numpy(model(x)), atol=1e-5
    )


# --------------------------------------------------------------------- verdicts


def made_up(**series):
    """A measurement with the given values along depth."""
    n = len(next(iter(series.values())))
    base = {
        "variance": [1.0] * n,
        "gradient": [1.0] * n,
        "cosine": [0.1] * n,
        "effective_rank": [20.0] * n,
        "relative_step": [1e-3] * n,
        "dead": [0.0] * n,
    }
    values = {**base, **series}
    sites = [
        Site(
            f"layer{k}",
            "Dense",
            "linear",
            k + 1,
            **{p: v[k] for p, v in values.items()},
        )
        for k in range(n)
    ]
    sites.append(Site("output", "Dense", "output", n + 1, dependence=0.0))
    return Measurement("made up", tuple(sites), 64, 64, 0.01)


@pytest.mark.parametrize(
    "series, words",
    [
        ({"variance": 10.0 ** np.arange(8)}, "activation variance grows"),
        ({"variance": 10.0 ** -np.arange(8)}, "activation variance shrinks"),
        ({"gradient": 10.0 ** -np.arange(8)}, "on the way back grows"),
        ({"cosine": [0.0] + [0.99995] * 7}, "no longer told apart"),
        ({"dead": [0.0] * 7 + [0.95]}, "95% of the units dead"),
        ({"variance": [1.0] * 7 + [np.inf]}, "not finite"),
        ({"gradient": [0.0] * 8}, "0 at some depth"),
    ],
)
def test_what_rules_out(series, words):
    out = rules.findings(made_up(**series), get("batch"), 0.9)
    assert len(out) == 1 and words in out[0].text


def test_steps_rule_out_what_nothing_holds():
    m = made_up(relative_step=[0.2] * 8)
    assert "nothing holds it" in rules.findings(m, get("none"), 0.9)[0].text
    assert not rules.findings(m, get("none"), 0.0)
    assert not rules.findings(m, get("batch"), 0.9)


def test_dependence_rules_out_where_it_enters():
    """Not where depth has amplified it."""
    noisy = made_up(dependence=[0.0, 1.5] + [1.4] * 6)
    assert "depth 2" in rules.findings(noisy, get("batch"), 0.9)[0].text
    assert not rules.findings(
        made_up(dependence=[0.0, 0.1] + [1.4] * 6), get("batch"), 0.9
    )


def test_a_sound_network_is_not_ruled_out():
    assert not rules.findings(made_up(cosine=[0.1] * 8), get("layer"), 0.9)


def test_score_orders_as_the_theory_says():
    def score(method="batch", **series):
        return rules.score(
            made_up(cosine=[0.1] * 8) if not series else made_up(**series),
            get(method),
            0.9,
        )

    best = score()
    assert score(cosine=[0.1] * 4 + [0.9] * 4) < best
    assert score(effective_rank=[20.0] * 7 + [2.0]) < best
    assert score("none") < best == score("group")


def test_small_batches_rule_out_batch_methods(images):
    """At two samples a batch, an output is more about the other sample."""
    x, y = images
    found = kerasnorm.compass(
        network(blocks=4), x, y, methods=["bn", "gn"], batch_sizes=[2, 48], samples=16
    )
    by_name = {c.name: c for c in found.candidates}
    for c in found.candidates:
        assert c.batch_size == c.measurement.batch_size
    assert set(by_name) == {
        f"{m}, batch {n}" for m in ("batch", "group") for n in (2, 48)
    }
    dependence = {
        n: rules.output(by_name[f"batch, batch {n}"].measurement, "dependence")
        for n in (2, 48)
    }
    assert dependence[2] is None  # one companion: nobody to exchange it for
    assert dependence[48] > 0
    assert rules.output(by_name["group, batch 48"].measurement, "dependence") == 0


def test_learning_rates_scale_the_steps(images):
    x, _ = images
    found = kerasnorm.compass(
        network(), x, methods=["none"], learning_rates=[0.01, 1e4], momentum=0.0
    )
    small, large = sorted(found.candidates, key=lambda c: c.learning_rate)
    assert not small.ruled_out
    assert small.batch_size == 48  # 64, but for the data
    assert [f.property for f in large.ruled_out] == ["step"]
    for a, b in zip(small.measurement.sites, large.measurement.sites, strict=True):
        if a.relative_step is not None:
            assert b.relative_step == pytest.approx(1e6 * a.relative_step)


def test_degenerate_sites_rule_out(images):
    x = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dense(3),
        ]
    )
    found = kerasnorm.compass(model, x, methods=["instance", "layer"])
    assert found.best.method == "layer"
    last = found.candidates[-1]
    assert last.method == "instance" and last.ruled_out[0].property == "shape"


def test_a_model_without_normalization(images):
    found = kerasnorm.compass(
        network(norm=None), images[0], methods=["none", "ws", "bn"]
    )
    by_method = {c.method: c for c in found.candidates}
    assert by_method["none"].measurement is not None
    assert by_method["weight_standardization"].measurement is not None
    assert by_method["batch"].measurement is None
    assert "does not apply" in by_method["batch"].sentence


@pytest.mark.ci
def test_all_methods_of_the_paper(found):
    assert {c.method for c in found.candidates} == set(STUDIED)
    assert found.best is not None and found.best is found.candidates[0]
    kept = [c for c in found.candidates if not c.ruled_out]
    assert len(kept) >= 8
    scores = [c.score for c in kept]
    assert scores == sorted(scores, reverse=True)
    for c in found.candidates:
        assert c.sentence and c.name in str(found)


@pytest.mark.ci
def test_confirmation_trains_what_is_left(found):
    for c in found.candidates:
        if c.ruled_out:
            assert c.training is None
        else:
            assert len(c.training.losses) == 5
            assert c.training.final == pytest.approx(c.training.losses[-1])
    assert "loss after" in str(found)


def test_the_model_is_untouched(images):
    x, y = images
    model = network()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = model.get_weights()
    kerasnorm.compass(model, x, y, methods=["bn", "wn"], confirm=2)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def perceptron(*widths):
    return keras.Sequential([keras.Input((6,)), *map(layers.Dense, widths)])


@pytest.mark.parametrize("wrap", ["scale", "sphere"])
def test_wrapped_optimizers(wrap):
    """Their momentum, and their like for a model of other weights."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 6)).astype("float32"), np.arange(16) % 3
    model = perceptron(4, 3)
    step = measure(model, x, y, learning_rate=1.0).profile("relative_step")[1].max()
    optimizer = keras.optimizers.SGD(0.3 / step)
    if wrap == "scale":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    else:
        flows = list(kerasnorm.sphere.scale_invariant_weights(model))
        optimizer = kerasnorm.sphere.OnSphere(optimizer, flows)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    [c] = kerasnorm.compass(
        model, x, y, methods=["none"], weights="given", confirm=2
    ).candidates
    # With the momentum of 0.9 that is taken where there is none, it would be ruled out.
    assert not c.ruled_out and len(c.training.losses) == 2


def test_training_pairs_labels_and_losses_by_name():
    inputs = keras.Input((6,))
    heads = [layers.Dense(n, name=k)(inputs) for k, n in (("z", 1), ("a", 3))]
    model = keras.Model(inputs, heads)
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    y = {"a": np.zeros((8, 3)), "z": np.zeros((8, 1))}
    z, a = model.predict(x, verbose=0)
    loss = 100 * (z**2).mean() + np.abs(a).mean()
    losses, weights = {"a": "mae", "z": "mse"}, {"a": 1.0, "z": 100.0}
    found = train(model, x, y, 1, 8, 0.1, losses, weights)
    assert found.final == pytest.approx(loss, rel=1e-4)
    model.compile("sgd", losses, loss_weights=weights)
    [c] = kerasnorm.compass(
        model,
        iter([x]),
        y,
        methods=["none"],
        learning_rates=1e-4,
        weights="given",
        confirm=1,
    ).candidates
    assert c.training.final == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"methods": ["gruop"]}, "unknown normalization method"),
        ({"methods": []}, "no method"),
        ({"batch_sizes": [0]}, "batch_sizes"),
        ({"learning_rates": [-1.0]}, "learning_rates"),
        ({"momentum": 1.0}, "momentum"),
        ({"weights": "pretrained"}, "'fresh' or 'given'"),
        ({"confirm": 3}, "labels"),
        ({"confirm": 2.5, "y": np.zeros(48)}, "confirm=2.5. Expected a whole number"),
        ({"batch_sizes": [16, 64]}, "64.*48 samples"),
        ({"report": "r.txt"}, "report cannot be written"),
        ({"report": "no/such/r.md"}, "report cannot be written"),
        ({"x": np.zeros((4, 5), "float32")}, "shape"),
    ],
)
def test_bad_arguments_are_refused(images, change, words):
    with pytest.raises(KerasNormError, match=words):
        kerasnorm.compass(**{"model": network(), "x": images[0], **change})


def test_one_method_that_fails_leaves_the_others(images, monkeypatch):
    from kerasnorm.properties import candidates

    put_under = candidates.put_under

    def failing(model, method, *args):
        if method.name in broken:
            raise RuntimeError("out of order")
        return put_under(model, method, *args)

    monkeypatch.setattr(candidates, "put_under", failing)
    broken = ["layer"]
    found = kerasnorm.compass(network(), images[0], methods=["bn", "ln"])
    assert [c.method for c in found.candidates] == ["batch", "layer"]
    assert found.candidates[1].ruled_out[0].property == "error"
    assert "RuntimeError: out of order" in str(found)
    broken = ["layer", "batch"]
    with pytest.raises(KerasNormError, match="no method could be measured"):
        kerasnorm.compass(network(), images[0], methods=["bn", "ln"])


# ---------------------------------------------------------------------- reports


class Page(html.parser.HTMLParser):
    """Checks that tags match; collects what would be fetched."""

    EMPTY = ("meta", "img", "br", "link", "hr")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.fetched, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        known = dict(attrs)
        self.fetched += [known[k] for k in ("src", "href") if k in known]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.ci
def test_html_report(found, tmp_path):
    pytest.importorskip("matplotlib")
    found.save(tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert page.tags.count("img") == 3  # heat map, depth, training
    assert all(s.startswith("data:image/svg+xml;base64,") for s in page.fetched)
    text = " ".join(page.text)
    for c in found.candidates:
        assert c.name in text and c.sentence in text
    assert page.tags.count("details") == len(found.measurements())


def test_html_escapes_names(images):
    model = network()
    model.name = "<script>alert(1)"
    text = measure(model, images[0]).to_html()
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_html_without_matplotlib(images, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = Page(measure(network(), images[0]).to_html())
    assert "img" not in page.tags
    assert "matplotlib" in " ".join(page.text)


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")


def browser():
    """One that runs without a window: `$BROWSER`, on the path, or playwright's."""
    for name in (os.environ.get("BROWSER"), *BROWSERS, "firefox"):
        path = name and shutil.which(name)
        if path:
            return path
    held = pathlib.Path.home() / ".cache/ms-playwright"
    shells = [*held.glob("chromium*/*/*shell"), *held.glob("chromium*/*/chrome")]
    return str(shells[0]) if shells else None


@pytest.mark.ci
def test_html_in_a_real_browser(found, tmp_path):
    """The page is laid out, its images decoded, nothing fetched."""
    pytest.importorskip("matplotlib")
    path = browser()
    if path is None:
        pytest.skip("no chromium or firefox on this machine: set BROWSER to one")
    report = tmp_path / "report.html"
    text = found.to_html()
    # What the page became is written into it, where `--dump-dom` shows it.
    probe = """<script>addEventListener("load", () => {
      const good = [...document.images].filter(i => i.complete && i.naturalWidth > 50);
      const sheet = document.querySelector("table").getBoundingClientRect();
      document.title = ["loaded", good.length, document.images.length,
        sheet.width > 300, performance.getEntriesByType("resource")
          .filter(e => !e.name.startsWith("data:")).length].join(" ");
    })</script></body>"""
    report.write_text(text.replace("</body>", probe), "utf-8")
    shot = tmp_path / "shot.png"
    flags = ["--headless", f"--screenshot={shot}"]
    if "firefox" in path:
        command = [path, *flags, "--profile", str(tmp_path), report.as_uri()]
        subprocess.run(command, check=True, timeout=120, capture_output=True)
        assert shot.stat().st_size > 20_000
        return
    command = [path, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000"]
    run = subprocess.run(
        [*command, report.as_uri()],
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert "<title>loaded 3 3 true 0</title>" in run.stdout


@pytest.mark.ci
def test_other_reports(found, tmp_path):
    pytest.importorskip("matplotlib")
    for ending in ("json", "md", "png"):
        found.save(tmp_path / f"c.{ending}")
    found.heat_map(tmp_path / "heat.png")
    data = json.loads((tmp_path / "c.json").read_text())
    assert len(data["candidates"]) == len(STUDIED)
    for ending in ("c.png", "heat.png"):
        assert (tmp_path / ending).read_bytes().startswith(b"\x89PNG")
    assert found.best.name in (tmp_path / "c.md").read_text()


# --------------------------------------------------------------------- the monitor


def compiled(model):
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def test_monitor_logs_what_measure_says(images):
    x, y = images
    model = compiled(network())
    monitor = PropertyMonitor(x, y, samples=16, layers=("gradient",))
    history = model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=[monitor])
    after = measure(model, x, y, samples=16)
    assert [step for step, _ in monitor.history] == [3, 6]
    seen = monitor.history[-1][1]
    assert [site.path for site in seen.sites] == [site.path for site in after.sites]
    for a, b in zip(seen.sites, after.sites, strict=True):
        for name in Site.figures():
            # The monitor's pass is one graph, whose sums are in another order.
            wanted, found = getattr(b, name), getattr(a, name)
            if wanted is not None:
                wanted = pytest.approx(wanted, rel=1e-4, abs=1e-5)
            assert found == wanted, (a.path, name)
    logged = history.history
    assert len(logged["effective_rank"]) == 2
    for path in ("conv0", "norm0", "conv1", "head"):
        value = after.at(path).gradient
        assert logged[f"gradient/{path}"][-1] == pytest.approx(value, rel=1e-5)
    assert monitor.seconds > 0 and 0 < monitor.share < 1


def test_monitor_changes_nothing(images):
    """The same weights, to the last bit, with and without it; dropout included."""
    x, y = images

    def train(callbacks):
        keras.utils.set_random_seed(3)
        model = network()
        model = keras.Sequential([model, layers.Dropout(0.5, seed=1), layers.Dense(4)])
        model.build((None, 8, 8, 3))
        compiled(model).fit(
            x, y, batch_size=16, epochs=2, verbose=0, callbacks=callbacks
        )
        return model.get_weights()

    watched = train([PropertyMonitor(x, y, every_steps=1, samples=8)])
    for a, b in zip(watched, train([]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_monitor_by_steps(images, capsys):
    x, y = images
    monitor = PropertyMonitor(
        x, every=None, every_steps=2, samples=8, prefix="p_", verbose=1
    )
    model = compiled(network())
    history = model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=[monitor])
    assert [step for step, _ in monitor.history] == [2, 4, 6]
    assert "p_cosine" in history.history
    assert "3 measurements took" in capsys.readouterr().out  # the cost is stated


def test_monitor_counts_the_steps_of_an_execution():
    """On the batches of a generator, read once."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 6)).astype("float32"), np.arange(32) % 3
    model = perceptron(4, 3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, steps_per_execution=4)
    batches = (x[k : k + 8] for k in range(0, 32, 8))
    monitor = PropertyMonitor(batches, y, every=None, every_steps=4)
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[monitor])
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[monitor])
    assert [step for step, _ in monitor.history] == [4, 8, 12, 16]
    assert monitor.history[0][1].samples == 32


def test_the_data_has_no_dead_units():
    assert figures(made_up(dead=[0.9, 0.2, 0.1]))["dead"] == 0.2


def test_monitor_writes_summaries(images, tmp_path):
    pytest.importorskip("tensorflow")
    from tensorflow.python.summary.summary_iterator import summary_iterator

    x, y = images
    monitor = PropertyMonitor(x, y, samples=8, log_dir=tmp_path)
    compiled(network()).fit(x, y, batch_size=24, verbose=0, callbacks=[monitor])
    [file] = tmp_path.iterdir()
    tags = {v.tag for e in summary_iterator(str(file)) for v in e.summary.value}
    assert {"properties/gradient/conv0", "properties/variance_growth"} <= tags


def test_monitor_refuses():
    for wrong in ({"every": 0}, {"every_steps": -1}, {"layers": ("charm",)}):
        with pytest.raises(KerasNormError):
            PropertyMonitor(np.zeros((4, 3)), **wrong)
    model = compiled(network())
    monitor = PropertyMonitor(np.zeros((4, 3), "float32"))
    with pytest.raises(KerasNormError, match="shape"):
        model.fit(np.zeros((4, 8, 8, 3)), np.zeros(4), verbose=0, callbacks=[monitor])


# ---------------------------------------------------------------- the command line


@pytest.fixture
def folder(images, tmp_path, monkeypatch):
    network().save(tmp_path / "model.keras")
    np.savez(tmp_path / "x.npz", x=images[0], y=images[1])
    np.save(tmp_path / "x.npy", images[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_command_measure(folder, capsys):
    pytest.importorskip("matplotlib")
    words = ["measure", "model.keras", "--data", "x.npz", "--report", "r.html"]
    assert cli.main(words) == 0
    assert "conv0" in capsys.readouterr().out
    Page((folder / "r.html").read_text("utf-8"))
    assert cli.main(["measure", "model.keras", "--data", "x.npy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"][0]["path"] == "conv0"


def test_command_compass(folder, capsys):
    words = ["compass", "model.keras", "--data", "x.npz", "--methods", "bn", "ln"]
    assert cli.main([*words, "--confirm", "2", "--report", "r.md"]) == 0
    shown = capsys.readouterr().out
    assert "layer" in shown and "saved r.md" in shown
    assert cli.main([*words, "--json", "--batch-size", "8", "16"]) == 0
    assert len(json.loads(capsys.readouterr().out)["candidates"]) == 4


@pytest.mark.parametrize(
    "words",
    [
        ["measure", "model.keras"],
        ["measure", "model.keras", "--data", "x.npz", "--report", "r.txt"],
        ["compass", "model.keras", "--data", "x.npy", "--confirm", "3"],
        ["compass", "model.keras", "--data", "x.npz", "--learning-rate", "0"],
        ["measure", "model.keras", "--data", "x.npz", "--report", "no/r.md"],
    ],
)
def test_commands_refuse_before_any_work(folder, words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
