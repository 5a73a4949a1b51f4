"""The least-squares problems behind a fit; NumPy float64, no Keras.

Rows are observations (sampled positions of sampled inputs), columns are channels.
"""

from __future__ import annotations

import numpy as np


Array = np.ndarray


def kept(prediction: Array, target: Array) -> float:
    """Share of the target's variance that a prediction keeps, in [0, 1].

    1 - sum (prediction - target)^2 / sum (target - column mean)^2 over all columns
    together; rho squared of the columns when the prediction is their regression.
    """
    total = float(np.sum(np.var(target, 0, dtype="float64")) * len(target))
    error = float(np.sum(np.square(prediction - target), dtype="float64"))
    if total == 0:
        return 1.0 if error == 0 else 0.0
    return max(0.0, 1 - error / total)


def affine(
    z: Array,
    y: Array,
    *,
    scale: bool = True,
    center: bool = True,
    tied: bool = False,
    default: tuple[Array | float, Array | float] = (1.0, 0.0),
) -> tuple[Array, Array]:
    """Per column, the gamma and beta with the least mean (gamma z + beta - y)^2.

    gamma = cov(z, y) / var(z) and beta = mean y - gamma mean z; without a center
    gamma = mean (y - beta) z / mean z^2.

    Args:
        z: normalized values, shape (rows, columns).
        y: what they should become, of the same shape.
        scale: whether gamma may move.
        center: whether beta may move.
        tied: one gamma for all columns.
        default: gamma and beta where they may not move; gamma also where z is
            constant.

    Returns:
        gamma and beta, shape (columns,) each.
    """
    gamma, beta = (
        np.broadcast_to(np.asarray(d, "float64"), z.shape[1:]).copy() for d in default
    )
    z, y = z.astype("float64"), y.astype("float64")
    z_mean, y_mean = (z.mean(0), y.mean(0)) if center else (np.zeros_like(beta), beta)
    if scale:
        power = np.mean((z - z_mean) ** 2, 0)
        shared = np.mean((z - z_mean) * (y - y_mean), 0)
        # Rounding leaves a constant column a variance, but not a meaning.
        power[power <= 1e-12 * np.mean(z**2, 0) + 1e-30] = 0
        if tied:
            power, shared = np.broadcast_arrays(power.sum(), shared.sum(), gamma)[:2]
        np.divide(shared, power, out=gamma, where=power > 0)
    return gamma, y_mean - gamma * z_mean if center else beta


def ridge(
    x: Array, residual: Array, pull: float, intercept: bool
) -> tuple[Array, Array]:
    """The change of a linear map that explains a residual, kept small.

    Minimizes |x D + d - residual|^2 + pull * tr(x'x) / columns * |D|^2.

    Args:
        x: inputs of the map, shape (rows, inputs).
        residual: what is missing at its outputs, shape (rows, outputs).
        pull: strength of the pull towards no change, relative to the mean power of
            an input.
        intercept: whether d is free or zero.

    Returns:
        D, shape (inputs, outputs), and d, shape (outputs,).
    """
    x, residual = x.astype("float32"), residual.astype("float32")
    x_mean = x.mean(0) if intercept else np.zeros(x.shape[1], "float32")
    r_mean = residual.mean(0) if intercept else np.zeros(residual.shape[1], "float32")
    x, residual = x - x_mean, residual - r_mean
    # The products are the cost, and single precision is plenty beside the pull;
    # the solution of the small system is not.
    gram = (x.T @ x).astype("float64")
    power = np.trace(gram) / len(gram)
    gram[np.diag_indices_from(gram)] += (pull + 1e-9) * power + 1e-30
    change = np.linalg.solve(gram, (x.T @ residual).astype("float64"))
    return change, r_mean - x_mean @ change
