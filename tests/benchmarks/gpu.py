"""What an accelerator makes of kerasnorm: one table, on the JAX backend.

    python tests/benchmarks/gpu.py [--markdown table.md]
    python tests/benchmarks/gpu.py --only layers --methods batch group layer

Layers: the bytes that must move a second, and the time over that of a device-to-device
copy of as many bytes in the same run: 1.0 is the floor. Where an output depends on its
own position alone, the input must be read and the output written; with backward, the
input and the outputs' gradient read again and the input's written: 2 and 5 arrays.
Where it depends on others, which is tried and not listed, the statistics ask for one
more reading in each direction: 3 and 8. Then time over that of Keras's layer, of
flax's and of PyTorch's, where they have the method and are installed
(`pip install flax torch torchattacks`). Weight methods are timed with the convolution
whose kernel they normalize, over Keras's convolution without.

Models, on ResNet-50: a training step before and after `rewrite(.., "gn")`, the
throughput of PGD-20 and of APGD, beside torchattacks on torchvision's ResNet-50, and
the fits of the rewritten model. In float32 and in bfloat16.

On a CPU everything is smaller (`--small`); most of the time there is compilation, and
the figures say little about a GPU beyond that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import keras
import numpy as np
import timing
from keras import layers

import kerasnorm
from kerasnorm import adversarial
from kerasnorm.method.normalization import Normalization
from kerasnorm.method.registry import methods
from kerasnorm.numerics import backend


# Several times the cache: 50 MB on the largest GPUs, 32 to 100 MB on servers' CPUs.
IMAGES = {False: (256, 56, 56, 128), True: (8, 32, 32, 64)}
DTYPES = ("float32", "bfloat16")
COLUMNS = ("case", "dtype", "ms", "GB/s", "floor = 1", "Keras", "flax", "PyTorch")
# An accelerator has no caches of the last turn to warm: short turns say the same.
REPEATS, TURN = (7, timing.TURN) if backend.on_cpu() else (5, 2e-2)

KERAS = {
    "batch": layers.BatchNormalization,
    "sync": layers.BatchNormalization,  # `synchronized` is for TensorFlow alone
    "group": layers.GroupNormalization,
    "layer": layers.LayerNormalization,
    "instance": functools.partial(layers.GroupNormalization, groups=-1),
    "rms": layers.RMSNormalization,
    "scale": layers.UnitNormalization,
}


def has(module):
    return importlib.util.find_spec(module) is not None


class Table:
    """Rows that are printed as they come, and kept."""

    def __init__(self):
        self.lines = []
        self.line(COLUMNS)
        self.line(["---"] * 2 + ["---:"] * (len(COLUMNS) - 2))

    def line(self, cells):
        self.lines.append(f"| {' | '.join(cells)} |")
        print(self.lines[-1], flush=True)

    def row(self, case, dtype, seconds, gigabytes=None, floor=None, peers=()):
        peers = {**dict.fromkeys(("Keras", "flax", "PyTorch")), **dict(peers)}
        other = [None if t is None else seconds / t for t in peers.values()]
        cells = [gigabytes, floor, *other]
        formats = ["{:.0f}", "{:.1f}", "{:.2f}", "{:.2f}", "{:.2f}"]
        texts = [
            "" if v is None else f.format(v)
            for f, v in zip(formats, cells, strict=True)
        ]
        self.line([case, dtype, f"{1e3 * seconds:.2f}", *texts])


def least(sides):
    """Least seconds of each of some functions without arguments that take turns; None
    in, None out."""
    live = {name: f for name, f in sides.items() if f is not None}
    for f in live.values():
        timing.wait(f())
    times = {
        name: timing.repeats_of(lambda f=f: timing.wait(f()), TURN)
        for name, f in live.items()
    }
    found = dict.fromkeys(sides)
    for _ in range(REPEATS):
        for name, f in live.items():
            spent = timing.turn(f, times[name])
            found[name] = spent if found[name] is None else min(found[name], spent)
    return found


# ------------------------------------------------------------------- layers


def compiled(pool, f, *inputs):
    """A future of `f(*inputs)`, compiled: what takes the time is not Python."""
    lowered = jax.jit(f).lower(*inputs)
    made = pool.submit(lowered.compile)
    return lambda: functools.partial(made.result(), *inputs)


def steps(pool, call, x, dy, weights):
    """Forward, and forward and backward, of `call(x, weights) -> outputs, states`."""

    def both(x, dy, weights):
        y, pull, states = jax.vjp(call, x, weights, has_aux=True)
        return y, pull(dy.astype(y.dtype)), states

    return compiled(pool, call, x, weights), compiled(pool, both, x, dy, weights)


def training_call(layer, shape):
    """`call(x, weights) -> outputs, states` of a Keras layer in training mode, and its
    weights."""
    layer.build(shape)
    weights = [v.value for v in layer.trainable_variables]
    mode = {"training": True} if layer._call_has_training_arg else {}

    def call(x, weights):
        # Not `stateless_call`, which does not cast the weights as a call does.
        held = zip(layer.trainable_variables, weights, strict=True)
        with keras.StatelessScope(held) as scope:
            y = layer(x, **mode)
        return y, [scope.get_current_value(v) for v in layer.non_trainable_variables]

    return call, weights


def on_jax(pool, layer, x, dy):
    """The steps of a Keras layer."""
    call, weights = training_call(layer, x.shape)
    return steps(pool, call, x, dy, weights)


def on_flax(pool, method, x, dy):
    """The same of flax's layer; nothing where it has none."""
    if not has("flax"):
        return ()
    from flax import linen

    makers = {
        "batch": functools.partial(linen.BatchNorm, use_running_average=False),
        "group": functools.partial(linen.GroupNorm, 32),
        "layer": linen.LayerNorm,
        "instance": linen.InstanceNorm,
        "rms": linen.RMSNorm,
    }
    if method not in makers:
        return ()
    layer = makers[method](dtype=x.dtype)
    variables = jax.jit(layer.init)(jax.random.key(0), x[:1, :2, :2])
    params = variables.pop("params")

    def call(x, params):
        return layer.apply({"params": params, **variables}, x, mutable=["batch_stats"])

    return steps(pool, call, x, dy, params)


def on_torch(method, x, dy):
    """The same of PyTorch's layer, channels last in memory."""
    if not has("torch"):
        return ()
    import torch

    channels = x.shape[-1]
    makers = {
        "batch": lambda: torch.nn.BatchNorm2d(channels),
        "group": lambda: torch.nn.GroupNorm(32, channels),
        "layer": lambda: torch.nn.LayerNorm(channels),
        "instance": lambda: torch.nn.InstanceNorm2d(channels, affine=True),
        "rms": lambda: torch.nn.RMSNorm(channels),
    }
    if method not in makers:
        return ()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, str(x.dtype))
    layer = makers[method]().to(device)

    def tensor(a):
        t = torch.from_dlpack(a)
        # By channel: (n, c, h, w), a view of the same memory.
        return t if method in ("layer", "rms") else t.permute(0, 3, 1, 2)

    def forward():
        with torch.no_grad(), torch.autocast(device, dtype, dtype != torch.float32):
            return layer(tensor(x))

    def both():
        leaf = tensor(x).requires_grad_()
        with torch.autocast(device, dtype, dtype != torch.float32):
            y = layer(leaf)
        upstream = tensor(dy).to(y.dtype)
        return torch.autograd.grad(y, [leaf, *layer.parameters()], upstream)

    return lambda: forward, lambda: both


def copy_speed(x):
    """Seconds a byte of a copy on the device, read and written."""
    # A doubling, as a copy alone may be optimized away.
    double = jax.jit(lambda x: x * 2)
    return least({"copy": lambda: double(x)})["copy"] / (2 * x.nbytes)


@functools.cache
def arrays_moved(name):
    """How many arrays a method must read or write: forward, and with backward."""
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 64)).astype("float32")
    moved = x.copy()
    moved[0, 7] += 1  # seen by other samples, or further off than any window?
    call, weights = training_call(methods()[name].layer(), x.shape)
    call = jax.jit(call)
    before, after = (np.asarray(call(a, weights)[0]) for a in (x, moved))
    same = np.isclose(before, after, atol=1e-4)
    return (2, 5) if same[1].all() and same[0, :2].all() else (3, 8)


def measure_layers(table, small, chosen, dtypes):
    shape = IMAGES[small]
    keys = jax.random.split(jax.random.key(0))
    names = [n for n, m in methods().items() if m.layer and (not chosen or n in chosen)]
    for dtype in dtypes:
        x, dy = (jax.random.normal(key, shape, dtype) for key in keys)
        byte = copy_speed(x)
        table.row("copy", dtype, byte * 2 * x.nbytes, 1e-9 / byte, 1.0)
        policy = "mixed_bfloat16" if dtype == "bfloat16" else dtype
        sides = {}
        # All are compiled before any is timed, for which the host must be at rest.
        with ThreadPoolExecutor() as pool:
            for name in names:
                with reported(table, name, dtype):
                    sides[name] = all_sides(pool, name, policy, x, dy)
        for name, (found, moved) in sides.items():
            with reported(table, name, dtype):
                measure_layer(table, name, dtype, found, moved, x.nbytes, byte)


@contextlib.contextmanager
def reported(table, name, dtype):
    """Makes an error a row: one method's limits are no reason to stop."""
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0][:60]
        table.line([name, dtype, f"not run: {reason}", *[""] * 5])


def all_sides(pool, name, policy, x, dy):
    """`({who: (forward, with backward)}, arrays moved)`; the steps are compiled while
    the next are traced."""
    make = methods()[name].layer
    if not issubclass(make, Normalization):
        ours = make(convolution(x.shape, policy), dtype=policy)
        theirs, moved = convolution(x.shape, policy), None
    else:
        ours, moved = make(dtype=policy), arrays_moved(name)
        theirs = KERAS[name](dtype=policy) if name in KERAS else None
    found = {
        "ours": on_jax(pool, ours, x, dy),
        "Keras": on_jax(pool, theirs, x, dy) if theirs else (),
        "flax": on_flax(pool, name, x, dy),
        "PyTorch": on_torch(name, x, dy),
    }
    return {who: side for who, side in found.items() if side}, moved


def measure_layer(table, name, dtype, found, moved, nbytes, byte):
    for k, step in enumerate(("", " + backward")):
        times = least({who: side[k]() for who, side in found.items()})
        spent = times.pop("ours")
        floor = (None, None)
        if moved is not None:
            speed = spent / (moved[k] * nbytes)
            floor = (1e-9 / speed, speed / byte)
        table.row(f"{name}{step}", dtype, spent, *floor, times)


def convolution(shape, policy):
    return layers.Conv2D(shape[-1], 3, padding="same", dtype=policy)


# ------------------------------------------------------------------- models


def resnet(small, policy):
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(0)
    side = 32 if small else 224
    model = keras.applications.ResNet50(
        weights=None, input_shape=(side, side, 3), classifier_activation=None
    )
    keras.config.set_dtype_policy("float32")
    return model, side, 4 if small else 128


def training_step(model, x, y):
    # On the device: bringing them there is not the model's work.
    x, y = jax.device_put((x, y))
    model.compile(
        keras.optimizers.SGD(1e-3, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )
    return lambda: model.train_on_batch(x, y)


def measure_models(table, small, only, dtypes):
    for dtype in dtypes:
        policy = "mixed_bfloat16" if dtype == "bfloat16" else dtype
        model, side, batch = resnet(small, policy)
        rng = np.random.default_rng(0)
        x = rng.random((batch, side, side, 3), "float32")
        y = rng.integers(0, 1000, batch)
        if "step" in only:
            grouped = {
                "gn": kerasnorm.rewrite(model, "gn"),
                "gn of kerasnorm": kerasnorm.rewrite(model, "gn", layers="kerasnorm"),
            }
            sides = {name: training_step(m, x, y) for name, m in grouped.items()}
            found = least({"bn": training_step(model, x, y), **sides})
            label = f"ResNet-50 step, {batch} images of {side}"
            before = found.pop("bn")
            table.row(label, dtype, before)
            for name, spent in found.items():
                table.row(f"{label}, {name}", dtype, spent, peers={"Keras": before})
        if "attacks" in only:
            measure_attacks(table, dtype, model, x, small)
        if "fit" in only:
            for fit in ("affine", "refit"):
                data = rng.random(
                    (batch * (2 if small else 8), side, side, 3), "float32"
                )
                start = time.perf_counter()
                kerasnorm.rewrite(model, "gn", data=data, fit=fit, verbose=False)
                label = f"ResNet-50 fit {fit!r}, {len(data)} images of {side}"
                table.row(label, dtype, time.perf_counter() - start)


def measure_attacks(table, dtype, model, x, small):
    y = model.predict(x, verbose=0).argmax(1)
    steps = 4 if small else 20
    attacks = {
        f"PGD-{steps}": adversarial.pgd(steps=steps),
        f"APGD-{steps}": adversarial.apgd("ce", steps=steps),
    }
    for name, attack in attacks.items():
        # So near that nothing falls: every step is made on every image.
        run = adversarial.Evaluator(
            model, attack, eps=1e-6, batch_size=len(x), verbose=False
        )

        def ours(run=run):
            run(x, y)

        sides = {"ours": ours}
        if dtype == "float32" and has("torchattacks") and has("torchvision"):
            sides["PyTorch"] = of_torchattacks(name, steps, x)
        found = least(sides)
        spent = found.pop("ours")
        speed = len(x) / spent
        label = f"ResNet-50 {name}, {len(x)} images of {x.shape[1]}: {speed:.1f} a s"
        table.row(label, dtype, spent, peers=found)


def of_torchattacks(name, steps, x):
    import torch
    import torchattacks
    import torchvision

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torchvision.models.resnet50(weights=None).to(device).eval()
    images = torch.tensor(x.transpose(0, 3, 1, 2), device=device)
    with torch.no_grad():  # its attacks leave out what is wrong already
        labels = model(images).argmax(1)
    if name.startswith("PGD"):
        attack = torchattacks.PGD(model, eps=1e-6, alpha=1e-7, steps=steps)
    else:
        attack = torchattacks.APGD(model, eps=1e-6, steps=steps, n_restarts=1)

    def run():
        attack(images, labels)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["layers", "step", "attacks", "fit"]
    parser.add_argument("--only", nargs="*", choices=parts, default=parts)
    parser.add_argument("--methods", nargs="*", help="of the layers; all by default")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--small", action="store_true", default=backend.on_cpu())
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    arguments = parser.parse_args()
    if keras.backend.backend() != "jax":
        parser.error("this runs on the JAX backend: KERAS_BACKEND=jax")
    device = jax.devices()[0]
    about = (
        f"{device.device_kind} ({device.platform}), JAX {jax.__version__}, "
        f"Keras {keras.__version__}"
    )
    print(about + "\n")
    table = Table()
    if "layers" in arguments.only:
        measure_layers(table, arguments.small, arguments.methods, arguments.dtypes)
    measure_models(table, arguments.small, arguments.only, arguments.dtypes)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join([about, "", *table.lines, ""]), "utf-8")


if __name__ == "__main__":
    main()
