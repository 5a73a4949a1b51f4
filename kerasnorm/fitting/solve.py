"""The least-squares problems behind a fit; NumPy float64, no Keras.

Rows are observations (sampled positions of sampled inputs), columns are channels.
Problems are built up from sums over rows, so that no rows have to be held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


Array = np.ndarray

# Strengths of the pull of a linear layer towards what it was, strongest first.
PULLS = tuple(10.0**k for k in range(3, -5, -1))
# A change that makes up for less of the error on rows held out is not made.
WORTH = 1e-3


class Sums:
    """Sums over rows of values z and of what they should become, y, column by column:
    all that a scale and a shift are solved from, or judged by."""

    def __init__(self, z: Array | None = None, y: Array | None = None):
        self.n = 0
        if z is not None and y is not None:
            self.add(z, y)

    def add(self, z: Array, y: Array) -> None:
        """Adds rows, `(rows, columns)` each."""
        if not len(z):
            return
        z, y = z.astype("float64"), y.astype("float64")
        if not self.n:  # squares of what is far from zero would lose their digits
            self.origin = z.mean(0), y.mean(0)
            self.z = self.y = self.zz = self.zy = self.yy = np.zeros(z.shape[1])
        z, y = z - self.origin[0], y - self.origin[1]
        self.n += len(z)
        self.z, self.y = self.z + z.sum(0), self.y + y.sum(0)
        self.zz = self.zz + np.einsum("nc,nc->c", z, z)
        self.zy = self.zy + np.einsum("nc,nc->c", z, y)
        self.yy = self.yy + np.einsum("nc,nc->c", y, y)

    def means(self) -> tuple[Array, Array]:
        """Mean z and mean y."""
        return self.origin[0] + self.z / self.n, self.origin[1] + self.y / self.n

    def about(self, z: Array, y: Array) -> tuple[Array, Array, Array]:
        """Mean squares and mean product of z and y about these points."""
        dz, dy = z - self.origin[0], y - self.origin[1]
        mz, my = self.z / self.n, self.y / self.n
        return (
            self.zz / self.n - 2 * dz * mz + dz**2,
            self.zy / self.n - dz * my - dy * mz + dz * dy,
            self.yy / self.n - 2 * dy * my + dy**2,
        )

    def error(self, gamma: Array, beta: Array) -> float:
        """Mean over rows of |gamma z + beta - y|^2."""
        z, y = self.means()
        power, shared, wanted = self.about(z, y)
        off = gamma * z + beta - y
        return float(np.sum(gamma**2 * power - 2 * gamma * shared + wanted + off**2))

    def kept(self, gamma: Array, beta: Array) -> float:
        """Share of the variance of y that gamma z + beta keeps, in [0, 1].

        1 - error / variance over all columns together; rho squared of the columns when
        gamma and beta are their regression.
        """
        if not self.n:
            return 0.0
        total = float(np.sum(self.about(*self.means())[2]))
        error = max(0.0, self.error(gamma, beta))
        if total <= 0:
            return 1.0 if error <= 0 else 0.0
        return max(0.0, 1 - error / total)


def affine(
    sums: Sums,
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
        sums: of normalized values z and of what they should become, y.
        scale: whether gamma may move.
        center: whether beta may move.
        tied: one gamma for all columns.
        default: gamma and beta where they may not move; gamma also where z is
            constant.

    Returns:
        gamma and beta, shape (columns,) each.
    """
    z, y = sums.means()
    gamma, beta = (
        np.broadcast_to(np.asarray(d, "float64"), z.shape).copy() for d in default
    )
    at = (z, y) if center else (np.zeros_like(z), beta)
    if scale:
        power, shared, _ = sums.about(*at)
        # Rounding leaves a constant column a variance, but not a meaning.
        size = sums.about(np.zeros_like(z), y)[0]
        power = np.where(power <= 1e-12 * size + 1e-30, 0.0, power)
        if tied:
            power, shared = np.broadcast_arrays(power.sum(), shared.sum(), gamma)[:2]
        np.divide(shared, power, out=gamma, where=power > 0)
    return gamma, at[1] - gamma * at[0] if center else beta


class Products:
    """Sums of products over rows of inputs and residuals, by group."""

    def __init__(self, origin: tuple[Array, Array]):
        self.origin = origin  # what is subtracted first, `(groups, 1, columns)` each
        self.n = 0
        self.x = self.r = self.xx = self.xr = self.rr = np.zeros(())

    def add(self, x: Array, r: Array) -> None:
        """Adds rows, `(groups, rows, columns)` each."""
        # The products are the cost, and single precision is plenty beside the pull;
        # the solution of the small system is not.
        x, r = x - self.origin[0], r - self.origin[1]
        turned = x.swapaxes(1, 2)
        self.n += x.shape[1]
        self.x = self.x + x.sum(1, dtype="float64")
        self.r = self.r + r.sum(1, dtype="float64")
        self.xx = self.xx + (turned @ x).astype("float64")
        self.xr = self.xr + (turned @ r).astype("float64")
        self.rr = self.rr + np.square(r).sum(1, dtype="float64")


class Normal:
    """The normal equations of a change of linear maps that explains a residual.

    Each of `groups` maps has its own inputs and outputs.

    Args:
        intercept: whether the change has a shift as well.
    """

    def __init__(self, intercept: bool):
        self.intercept = intercept
        self.rows: Products | None = None
        self.held: Products | None = None

    def add(self, x: Array, residual: Array, held: Array) -> None:
        """Adds rows: inputs `(rows, groups, inputs)`, what is missing at the outputs,
        `(rows, groups, outputs)`, and which rows are held out: what is solved on the
        others is judged by them."""
        x = np.ascontiguousarray(x.astype("float32").swapaxes(0, 1))
        r = np.ascontiguousarray(residual.astype("float32").swapaxes(0, 1))
        if not x.shape[1]:
            return
        if self.rows is None:
            means = x.mean(1, keepdims=True), r.mean(1, keepdims=True)
            if not self.intercept:
                means = np.zeros_like(means[0]), np.zeros_like(means[1])
            self.rows, self.held = Products(means), Products(means)
        for out, products in ((~held, self.rows), (held, self.held)):
            if products is not None and out.any():
                products.add(x[:, out], r[:, out])

    @property
    def finite(self) -> bool:
        """Whether there is something that can be solved."""
        return self.rows is not None and bool(np.isfinite(self.rows.xx).all())

    def solve(self, pull: float) -> tuple[Array, Array]:
        """D, `(groups, inputs, outputs)`, and d, `(groups, outputs)`, that minimize
        |x D + d - residual|^2 + pull * tr(x'x) / inputs * |D|^2."""
        rows: Any = self.rows
        gram, product = rows.xx.copy(), rows.xr.copy()
        x, r = (o[:, 0].astype("float64") for o in rows.origin)
        if self.intercept:
            mx, mr = rows.x / rows.n, rows.r / rows.n
            gram -= rows.n * mx[:, :, None] * mx[:, None, :]
            product -= rows.n * mx[:, :, None] * mr[:, None, :]
            x, r = x + mx, r + mr
        at = np.arange(gram.shape[-1])
        power = gram[:, at, at].mean(1)
        gram[:, at, at] += ((pull + 1e-9) * power + 1e-30)[:, None]
        change = np.linalg.solve(gram, product)
        if not self.intercept:
            return change, np.zeros_like(change[:, 0])
        return change, r - np.einsum("gi,gio->go", x, change)

    def error(self, change: Array, shift: Array, weights: Array) -> float:
        """Weighted sum of squares that a change leaves on the rows held out."""
        held: Any = self.held
        x, r = (o[:, 0].astype("float64") for o in held.origin)
        off = shift + np.einsum("gi,gio->go", x, change) - r
        left = held.r - np.einsum("gi,gio->go", held.x, change)
        total = held.rr - 2 * off * left + held.n * off**2
        total = total + np.sum(change * (held.xx @ change - 2 * held.xr), 1)
        return float(np.sum(np.maximum(total, 0) * weights))

    def best(
        self, pulls: Sequence[float] = PULLS, weights: Array | float = 1.0
    ) -> tuple[Array, Array] | None:
        """The change that leaves the least on the rows held out, None where that is
        none: the pull is weakened as long as it pays. With nothing held out, what a
        weak pull gives."""
        if self.rows is None or not self.rows.n:
            return None
        if self.held is None or not self.held.n:
            return self.solve(1e-1)
        found, least, worse = None, np.inf, 0
        weights = np.asarray(weights)
        none = np.zeros_like(self.rows.xr), np.zeros_like(self.rows.r)
        start = self.error(*none, weights)
        for pull in pulls:
            solution = self.solve(pull)
            error = self.error(*solution, weights)
            if not np.isfinite(error):
                break
            if error < least:
                found, least, worse = solution, error, 0
            else:
                worse += 1
                if worse == 2:
                    break
        return found if least < (1 - WORTH) * start else None
