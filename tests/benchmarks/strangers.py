"""Networks that nobody here made: what each swap and fit keeps of them.

The networks, the photographs and the protocol are those of ``../shared/fidelity``:
the first images are for the fit, without labels, and accuracy is that on images that
no fit saw. Every choice but the method is left to `kerasnorm.rewrite`.
"""

from __future__ import annotations

import io
import itertools
import sys
from dataclasses import dataclass

import common
import numpy as np

import kerasnorm


# Images of each fit: a photograph costs as much as a thousand pictures of CIFAR-10.
IMAGES = {
    "imagenet": {"affine": 256, "refit": 600, "distill": 600},
    "cifar10": {"affine": 256, "refit": 2048, "distill": 10_000},
}
TESTED = {"imagenet": 400, "cifar10": 4000}
NETWORKS = {
    "EfficientNet-Lite0": "imagenet",
    "ResNet-20": "cifar10",
    "ResNet-8": "cifar10",
}
SWAPS = {
    "GN, auto": {"method": "gn"},
    "GN, 16 channels": {"method": "gn", "groups": "paper"},
    "LN": {"method": "ln"},
    "RMS": {"method": "rms"},
    "FRN": {"method": "frn"},
    "IN": {"method": "in"},
    "DyT": {"method": "dyt"},
}


@dataclass(frozen=True)
class Row:
    """What one swap and fit kept: accuracy in percent of the original's, percent of
    test images answered as the original does, the report's estimate of that, cost."""

    network: str
    swap: str
    fit: str
    images: int
    kept: float
    agreed: float
    estimate: tuple[float, float]
    passes: float
    seconds: float


def photographs():
    """The 1000 photographs and their labels; pixels of 0 to 255."""
    from PIL import Image

    with np.load(common.SHARED / "fidelity" / "imagenet_sample.npz") as d:
        raw, ends, labels = d["jpeg"].tobytes(), d["offsets"], d["labels"]
    spans = itertools.pairwise(ends)
    images = [np.asarray(Image.open(io.BytesIO(raw[a:b]))) for a, b in spans]
    return np.stack(images).astype("float32"), labels


def network(name):
    """`(model, images for fits, test images, test labels)`."""
    fidelity = common.SHARED / "fidelity"
    if name == "EfficientNet-Lite0":
        x, y = photographs()
        x = (x - 127) / 128
        model = kerasnorm.load(fidelity / "efficientnet_lite0_imagenet.keras")
        return model, x[:600], x[600:], y[600:]
    (x, _), (x_test, y_test) = common.cifar10_pixels()
    x, x_test = x[:10_000], x_test[: TESTED["cifar10"]]
    y_test = y_test[: TESTED["cifar10"]]
    if name == "ResNet-20":
        mean = np.array([0.485, 0.456, 0.406], "float32")
        scale = np.array([0.229, 0.224, 0.225], "float32")
        x, x_test = ((v / 255 - mean) / scale for v in (x, x_test))
        return kerasnorm.load(fidelity / "resnet20_cifar10.keras"), x, x_test, y_test
    path = common.SHARED / "models" / "published" / "tiny_resnet8_keras37"
    return kerasnorm.load(path / "trainedResnet.h5"), x, x_test, y_test


def answers(model, x):
    return model.predict(x, batch_size=64, verbose=0).argmax(-1)


# Share of the original accuracy to keep, in percent, and forward passes to spend.
TARGETS = {
    ("EfficientNet-Lite0", "affine"): {"GN, auto": 95, "LN": 95},
    ("EfficientNet-Lite0", "refit"): {
        "GN, auto": 97.5,
        "LN": 97.5,
        "GN, 16 channels": 85,
        "RMS": 85,
        "FRN": 85,
        "IN": 75,
    },
    ("EfficientNet-Lite0", "distill"): {"GN, auto": 98.5, "GN, 16 channels": 96},
    ("ResNet-20", "affine"): {"GN, auto": 97, "LN": 97},
    ("ResNet-20", "refit"): {
        "GN, auto": 98.5,
        "LN": 98.5,
        "GN, 16 channels": 98,
        "RMS": 97,
        "FRN": 97,
        "IN": 90,
    },
    ("ResNet-20", "distill"): {"GN, auto": 99.7, "GN, 16 channels": 99.5},
    ("ResNet-8", "affine"): {"GN, auto": 95, "LN": 95},
    ("ResNet-8", "refit"): {
        "GN, auto": 98,
        "LN": 98,
        "GN, 16 channels": 97,
        "RMS": 96,
        "FRN": 96,
        "IN": 88,
    },
    ("ResNet-8", "distill"): {"GN, auto": 99.5, "GN, 16 channels": 99},
}
LIMITS = {"affine": 8, "refit": 25}  # of EfficientNet-Lite0


def run(networks=tuple(NETWORKS), swaps=tuple(SWAPS), fits=("affine", "refit")):
    """One `Row` for each network, swap and fit, each printed as it comes."""
    rows = []
    for name in networks:
        model, x, x_test, y_test = network(name)
        y_test = y_test.ravel()
        old = answers(model, x_test)
        right = np.mean(old == y_test)
        for swap in swaps:
            for fit in fits:
                data = x[: IMAGES[NETWORKS[name]][fit]]
                once = common.forward_seconds(model, data, repeats=1)
                new, report = kerasnorm.rewrite(
                    model,
                    data=data,
                    fit=fit,
                    return_report=True,
                    verbose=False,
                    **SWAPS[swap],
                )
                given, (told,) = answers(new, x_test), report.fit.agreement
                rows.append(
                    Row(
                        name,
                        swap,
                        fit,
                        len(data),
                        100 * np.mean(given == y_test) / right,
                        100 * np.mean(given == old),
                        (100 * told.low, 100 * told.high),
                        report.fit.seconds / once,
                        report.fit.seconds,
                    )
                )
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def table(rows):
    """The rows as markdown."""
    lines = [
        "| network | swap | fit | images | kept | agree | told | passes | seconds |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r.network} | {r.swap} | {r.fit} | {r.images} | {r.kept:.1f} % "
        f"| {r.agreed:.1f} % | {r.estimate[0]:.0f} to {r.estimate[1]:.0f} % "
        f"| {r.passes:.1f} | {r.seconds:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def verdicts(rows):
    """What was to be reached and was not."""
    missed = []
    for r in rows:
        target = TARGETS.get((r.network, r.fit), {}).get(r.swap, 0)
        if r.kept < target:
            missed.append(
                f"{r.network}, {r.swap} {r.fit}: kept {r.kept:.1f} %, wanted {target} %"
            )
        limit = LIMITS.get(r.fit, np.inf) if "Net-Lite" in r.network else np.inf
        if r.passes > limit:
            missed.append(
                f"{r.network}, {r.swap} {r.fit}: {r.passes:.1f} passes, at most {limit}"
            )
    return missed
