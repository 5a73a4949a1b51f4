"""How much of a trained model's accuracy each fit keeps, and at what cost.

    python tests/benchmarks/fidelity.py [--network deep] [--swaps GN LN]
        [--fits affine refit] [--markdown PATH]
    python tests/benchmarks/fidelity.py --strangers [NETWORK ...] [--swaps LN RMS]
        [--fits affine refit distill]

With `--strangers` the networks are other people's: see `strangers.py`.

A CIFAR-10 ResNet is trained once and cached: one of 8 layers on images that are
standardized one by one (unmirrored, or contrast, which saw mirror images as well) or
by channel (wide), or one of 14 that are half as wide (deep). Its batch normalization
is swapped by `kerasnorm.rewrite` and fitted on unlabelled training images; "mirror"
distills the original's mean answer to an image and its mirror image, "views" that to
both, and to each of them moved by two pixels. Cost is the fit's time over that of
`predict` on the same images by the original, measured just before; of both, but for
distillation, the least of three. The pixels come from a JPEG copy of CIFAR-10, so they
are slightly lossy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import common
import keras
import strangers

import kerasnorm


NETWORKS = {
    "deep": {"depth": 14, "epochs": 10},
    "wide": {"depth": 8, "epochs": 6, "widths": (32, 64, 128)},
    "contrast": {"depth": 8, "epochs": 6, "widths": (32, 64, 128), "each": True},
    "unmirrored": {
        "depth": 8,
        "epochs": 7,
        "widths": (32, 64, 128),
        "each": True,
        "mirror": False,
    },
}
SWAPS = {
    "GN": {"method": "gn"},
    "GN, groups auto": {"method": "gn", "groups": "auto"},
    "LN": {"method": "ln"},
}


def mirrored(x):
    return x[:, :, ::-1]


def shifted(x, by):
    """The images moved down and right by so many pixels, with zeros in their place."""
    a, b = max(by, 0), max(-by, 0)
    x = keras.ops.pad(x, ((0, 0), (a, b), (a, b), (0, 0)))
    return x[:, b : b + x.shape[1] - a - b, b : b + x.shape[2] - a - b]


# What the networks were trained to answer alike.
VIEWS = (
    mirrored,
    lambda x: shifted(mirrored(x), 2),
    lambda x: shifted(x, -2),
)

# Fit, images, further options.
FITS = {
    "none": (None, 0, {}),
    "affine": ("affine", 256, {}),
    "refit": ("refit", 2048, {}),
    "distill": ("distill", 10_000, {}),
    "distill, mirror": ("distill", 10_000, {"views": mirrored}),
    "distill, views": ("distill", 10_000, {"views": VIEWS}),
}
# Share of the original accuracy to reach, in percent.
TARGETS = {
    ("GN", "affine"): 90,
    ("GN", "refit"): 95,
    ("GN", "distill"): 99,
    ("LN", "affine"): 95,
    ("LN", "refit"): 97,
    ("LN", "distill, mirror"): 100,
    ("LN", "distill, views"): 100,
}
LIMITS = {"affine": 8, "refit": 20}  # forward passes


def of_both(model):
    """The model's mean answer to an image and its mirror image."""
    answers = [
        keras.ops.softmax(model(x)) for x in (model.input, mirrored(model.input))
    ]
    return keras.Model(model.input, keras.ops.mean(keras.ops.stack(answers), 0))


def run(network="unmirrored", swaps=tuple(SWAPS), fits=tuple(FITS)):
    """The accuracies of the original and of its mean answer, and one row per swap and
    fit: labels, accuracy, share kept, seconds, passes."""
    model = common.trained_resnet(**NETWORKS[network])
    (x, _), (x_test, y_test) = common.cifar10(NETWORKS[network].get("each", False))
    original = common.accuracy(model, x_test, y_test)
    both = common.accuracy(of_both(model), x_test, y_test)
    rows = []
    for swap in swaps:
        arguments = SWAPS[swap]
        for fit in fits:
            method, images, more = FITS[fit]
            if method is None and arguments.get("groups") == "auto":
                continue  # it is the fit that chooses
            data = x[:images] if images else None
            once = common.forward_seconds(model, data) if images else 0.0
            seconds = 0.0
            for _ in range(3 if fit in LIMITS else 1):
                new, report = kerasnorm.rewrite(
                    model,
                    data=data,
                    fit=method,
                    fit_options={"samples": min(images, 2048), **more}
                    if images
                    else None,
                    return_report=True,
                    **arguments,
                )
                if report.fit:
                    spent = report.fit.seconds
                    seconds = min(seconds or spent, spent)
            kept = 100 * common.accuracy(new, x_test, y_test) / original
            passes = seconds / once if once else 0.0
            rows.append(
                (swap, fit, images, kept * original / 100, kept, seconds, passes)
            )
            print(*rows[-1], file=sys.stderr, flush=True)
    return original, both, rows


def table(original, both, rows):
    """The rows as markdown."""
    lines = [
        f"Original accuracy {original:.2f} % = 100 %, of its mean answer to an image "
        f"and its mirror image {both:.2f} %.",
        "",
        "| swap | fit | images | accuracy | kept | seconds | forward passes |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for swap, fit, images, accuracy, kept, seconds, passes in rows:
        cost = f"{seconds:.1f} | {passes:.1f}" if images else "0 | 0"
        lines.append(
            f"| {swap} | {fit} | {images} | {accuracy:.2f} % | {kept:.2f} % | {cost} |"
        )
    return "\n".join(lines)


def verdicts(rows):
    """What was to be reached and was not."""
    missed = []
    for swap, fit, _, _, kept, _, passes in rows:
        target = TARGETS.get((swap.split(",")[0], fit))
        if target is not None and kept < target:
            missed.append(f"{swap} {fit}: kept {kept:.2f} %, wanted {target} %")
        if passes > LIMITS.get(fit, float("inf")):
            missed.append(f"{swap} {fit}: {passes:.1f} passes, at most {LIMITS[fit]}")
    return missed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="unmirrored", choices=NETWORKS)
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument(
        "--strangers",
        nargs="*",
        choices=strangers.NETWORKS,
        help="networks that nobody here made, all by default",
    )
    parser.add_argument("--swaps", nargs="+", choices=[*SWAPS, *strangers.SWAPS])
    parser.add_argument("--fits", nargs="+", choices=FITS)
    options = parser.parse_args()
    if options.strangers is not None:
        rows = strangers.run(
            options.strangers or tuple(strangers.NETWORKS),
            options.swaps or tuple(strangers.SWAPS),
            options.fits or ("affine", "refit", "distill"),
        )
        text, missed = strangers.table(rows), strangers.verdicts(rows)
    else:
        *original, rows = run(
            options.network, options.swaps or tuple(SWAPS), options.fits or tuple(FITS)
        )
        text, missed = table(*original, rows), verdicts(rows)
    print(text)
    print("\n".join(missed) or "All targets reached.")
    if options.markdown:
        options.markdown.write_text(text + "\n", encoding="utf-8")
