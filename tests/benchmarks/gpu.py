"""What an accelerator makes of kerasnorm: one table, on the JAX backend.

    python tests/benchmarks/gpu.py [--markdown table.md]
    python tests/benchmarks/gpu.py --only layers --methods batch group layer

Layers: the bytes that must move (forward: the input read, the output written; with
backward: those, and the input and the outputs' gradient read, the input's written) a
second, and the time over that of a device-to-device copy of as many bytes in the same
run: 1.0 is the floor. Then time over that of Keras's layer, of flax's and of PyTorch's,
where they have the method and are installed (`pip install flax torch torchattacks`).
Weight methods are timed with the convolution whose kernel they normalize, over Keras's
convolution without.

Models, on ResNet-50: a training step before and after `rewrite(.., "gn")`, the
throughput of PGD-20 and of APGD, beside torchattacks on torchvision's ResNet-50, and
the fits of the rewritten model. In float32 and in bfloat16.

On a CPU everything is smaller (`--small`); most of the time there is compilation, and
the figures say little about a GPU beyond that it runs.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import time
from pathlib import Path


os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import keras
import numpy as np
import timing
from keras import layers

import kerasnorm
from kerasnorm import adversarial, backend
from kerasnorm.method import methods
from kerasnorm.normalization import Normalization


# Several times the cache: 50 MB on the largest GPUs, 32 to 100 MB on servers' CPUs.
IMAGES = {False: (256, 56, 56, 128), True: (8, 32, 32, 64)}
DTYPES = ("float32", "bfloat16")
COLUMNS = ("case", "dtype", "ms", "GB/s", "copy = 1", "Keras", "flax", "PyTorch")
REPEATS = 7

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
        name: timing.repeats_of(lambda f=f: timing.wait(f()))
        for name, f in live.items()
    }
    found = dict.fromkeys(sides)
    for _ in range(REPEATS):
        for name, f in live.items():
            spent = timing.turn(f, times[name])
            found[name] = spent if found[name] is None else min(found[name], spent)
    return found


# ------------------------------------------------------------------- layers


def on_jax(layer, x, dy):
    """Forward, and forward and backward, of a Keras layer in training mode."""
    layer.build(x.shape)
    weights = [v.value for v in layer.trainable_variables]
    kwargs = {"training": True} if layer._call_has_training_arg else {}

    def call(x, *weights):
        # Not `stateless_call`, which does not cast the weights as a call does.
        held = zip(layer.trainable_variables, weights, strict=True)
        with keras.StatelessScope(held) as scope:
            y = layer(x, **kwargs)
        return y, [scope.get_current_value(v) for v in layer.non_trainable_variables]

    def both(x, dy, *weights):
        y, pull, moved = jax.vjp(call, x, *weights, has_aux=True)
        return y, pull(dy), moved

    forward, both = jax.jit(call), jax.jit(both)
    return lambda: forward(x, *weights), lambda: both(x, dy, *weights)


def on_flax(method, x, dy):
    """The same of flax's layer; None, None where it has none."""
    if not has("flax"):
        return None, None
    from flax import linen

    makers = {
        "batch": lambda: linen.BatchNorm(use_running_average=False, epsilon=1e-3),
        "group": lambda: linen.GroupNorm(32, epsilon=1e-3),
        "layer": lambda: linen.LayerNorm(epsilon=1e-3),
        "instance": lambda: linen.InstanceNorm(epsilon=1e-3),
        "rms": lambda: linen.RMSNorm(),
    }
    if method not in makers:
        return None, None
    layer = makers[method]()
    variables = layer.init(jax.random.key(0), x)
    params = variables.pop("params")

    def call(x, params):
        return layer.apply({"params": params, **variables}, x, mutable=["batch_stats"])

    def both(x, dy, params):
        y, pull, moved = jax.vjp(call, x, params, has_aux=True)
        return y, pull(dy.astype(y.dtype)), moved

    forward, both = jax.jit(call), jax.jit(both)
    return lambda: forward(x, params), lambda: both(x, dy, params)


def on_torch(method, x, dy):
    """The same of PyTorch's layer, channels last in memory."""
    if not has("torch"):
        return None, None
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
        return None, None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, str(x.dtype))
    layer = makers[method]().to(device)

    def tensor(a):
        t = torch.tensor(np.asarray(a, "float32"), device=device).to(dtype)
        # By channel: (n, c, h, w), a view of the same memory.
        return t if method in ("layer", "rms") else t.permute(0, 3, 1, 2)

    tx, tdy = tensor(x), tensor(dy)

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def forward():
        with torch.no_grad(), torch.autocast(device, dtype, dtype != torch.float32):
            layer(tx)
        wait()

    def both():
        leaf = tx.detach().requires_grad_()
        with torch.autocast(device, dtype, dtype != torch.float32):
            y = layer(leaf)
        torch.autograd.grad(y, [leaf, *layer.parameters()], tdy.to(y.dtype))
        wait()

    return forward, both


def copy_speed(x):
    """Seconds a byte of a copy on the device, read and written."""
    # A doubling, as a copy alone may be optimized away.
    double = jax.jit(lambda x: x * 2)
    return least({"copy": lambda: double(x)})["copy"] / (2 * x.nbytes)


def measure_layers(table, small, chosen):
    shape = IMAGES[small]
    for dtype in DTYPES:
        policy = "mixed_bfloat16" if dtype == "bfloat16" else dtype
        x, dy = (jnp.asarray(a, dtype) for a in timing.inputs(shape))
        byte = copy_speed(x)
        table.row("copy", dtype, byte * 2 * x.nbytes, 1e-9 / byte, 1.0)
        for name, method in methods().items():
            if method.layer is None or (chosen and name not in chosen):
                continue
            weight = not issubclass(method.layer, Normalization)
            try:
                if weight:
                    ours = method.layer(convolution(shape, policy), dtype=policy)
                    theirs = convolution(shape, policy)
                else:
                    ours = method.layer(dtype=policy)
                    theirs = KERAS[name](dtype=policy) if name in KERAS else None
                sides = on_jax(ours, x, dy)
                keras_s = (None, None) if theirs is None else on_jax(theirs, x, dy)
                for k, (step, moved) in enumerate((("", 2), (" + backward", 5))):
                    found = least(
                        {
                            "ours": sides[k],
                            "Keras": keras_s[k],
                            "flax": on_flax(name, x, dy)[k],
                            "PyTorch": on_torch(name, x, dy)[k],
                        }
                    )
                    spent = found.pop("ours")
                    speed = spent / (moved * x.nbytes)
                    floor = (None, None) if weight else (1e-9 / speed, speed / byte)
                    table.row(f"{name}{step}", dtype, spent, *floor, found)
            except Exception as error:  # one method's limits are no reason to stop
                reason = str(error).splitlines()[0][:60]
                table.line([name, dtype, f"not run: {reason}", *[""] * 5])


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
    model.compile(
        keras.optimizers.SGD(1e-3, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )
    return lambda: model.train_on_batch(x, y)


def measure_models(table, small, only):
    for dtype in DTYPES:
        policy = "mixed_bfloat16" if dtype == "bfloat16" else dtype
        model, side, batch = resnet(small, policy)
        rng = np.random.default_rng(0)
        x = rng.random((batch, side, side, 3), "float32")
        y = rng.integers(0, 1000, batch)
        if "step" in only:
            grouped = kerasnorm.rewrite(model, "gn")
            sides = {
                "gn": training_step(grouped, x, y),
                "bn": training_step(model, x, y),
            }
            found = least(sides)
            label = f"ResNet-50 step, {batch} images of {side}"
            table.row(label, dtype, found["bn"])
            table.row(f"{label}, gn", dtype, found["gn"], peers={"Keras": found["bn"]})
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
            sides["PyTorch"] = of_torchattacks(name, steps, x, y)
        found = least(sides)
        spent = found.pop("ours")
        speed = len(x) / spent
        label = f"ResNet-50 {name}, {len(x)} images of {x.shape[1]}: {speed:.1f} a s"
        table.row(label, dtype, spent, peers=found)


def of_torchattacks(name, steps, x, y):
    import torch
    import torchattacks
    import torchvision

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torchvision.models.resnet50(weights=None).to(device).eval()
    images = torch.tensor(x.transpose(0, 3, 1, 2), device=device)
    labels = torch.tensor(y, device=device)
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
        measure_layers(table, arguments.small, arguments.methods)
    measure_models(table, arguments.small, arguments.only)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join([about, "", *table.lines, ""]), "utf-8")


if __name__ == "__main__":
    main()
