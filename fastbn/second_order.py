"""The gradient of the gradient: for losses that contain one, such as WGAN-GP's penalty on the norm of a critic's
gradient with respect to its input (Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", section 4).

The backward pass of a batch's n values a channel gives, with g = dy (after an activation dz = dy·act'(z)),
x̂ = (x - mean)/σ, σ = sqrt(var + eps) and E[·] the mean over the n values,

    dx = weight/σ · P g       P u = u - E[u] - x̂·E[u·x̂]        dweight = Σ g·x̂        dbias = Σ g

Let v, a, b be a loss's gradients with respect to these three. What follows is the gradient of

    J = Σ v·dx + a·dweight + b·dbias

with respect to dy, x and weight. It takes three facts: P is symmetric; Σ u·x̂ has the gradient P u / σ with respect to
x, for any u that does not depend on x; and σ has the gradient x̂/n. With s = E[g·x̂], t = E[v·x̂] and
q = E[v·P g] = E[v·g] - E[v]·E[g] - s·t,

    ∂J/∂g      = weight/σ · P v + a·x̂ + b
    ∂J/∂weight = n·q/σ
    ∂J/∂x      = ((a - weight·t/σ) · P g - (weight·s/σ) · P v - (weight·q/σ) · x̂) / σ

(in ∂J/∂x, a is from dweight, t and s from the two factors of s·t in q, and the last term from dx's factor 1/σ). With
fixed statistics x̂ is linear in x and P is the identity:

    ∂J/∂g = weight/σ · v + a·x̂ + b        ∂J/∂weight = Σ v·g/σ        ∂J/∂x = a·g/σ

An activation is linear on either side of 0: act'(z) counts as a constant, g = dy·act'(z) and ∂J/∂dy = act'(z) · ∂J/∂g.
Derived here; torch's `batchnorm_double_backward` computes the same function, and the tests compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from . import backends, checks
from .functional import Saved
from .layout import finish, like, output
from .pieces import PIECE, pieces

Array = np.ndarray[Any, np.dtype[Any]]


def batch_norm_double_backward(
    ddx: Any, ddweight: Any, ddbias: Any, dy: Any, saved: Saved, *, num_threads: int | None = None
) -> tuple[Array, Array, Array | None]:
    """The gradients of a loss with respect to dy, x and weight, by way of what `batch_norm_backward` gave of them.

    Parameters
    ----------
    ddx : ndarray of x's shape and dtype, or None
        The loss's gradient with respect to dx; None is 0.
    ddweight, ddbias : ndarray of float32 or float64, shape (channels,), or None
        The loss's gradients with respect to dweight and dbias; None is 0, and the only choice where the forward pass
        had no weight or no bias.
    dy : ndarray of x's shape and dtype
        What `batch_norm_backward` was given.
    saved : Saved
        What `batch_norm_forward` (the gradient flows through the batch's statistics) or `batch_norm_eval_forward` (they
        are constants) returned beside y. With an activation; without a residual.
    num_threads : int, optional
        Only an activation is computed by a kernel.

    Returns
    -------
    grad_dy, grad_x : ndarray
        Of x's shape, dtype and memory order.
    grad_weight : ndarray of shape (channels,) and of weight's dtype, or None
        None where the forward pass had no weight. What the loss's gradient with respect to bias gets is 0: bias decides
        nothing but where an activation bends.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.

    Notes
    -----
    Computed in float64 for every dtype, in NumPy, piece by piece: the temporaries take a few megabytes.
    """
    checks.saved(saved, Saved)
    checks.without_residual(saved)
    kernels, threads = backends.serving(num_threads)
    x, layout, channels = saved.x, saved.layout, saved.layout.channels
    shape = layout.outer, channels, layout.inner
    v = None if ddx is None else like("ddx", ddx, x, layout).reshape(shape)
    g = like("dy", dy, x, layout).reshape(shape)
    a = checks.cotangent("ddweight", ddweight, saved.weight, channels)[:, np.newaxis]
    b = checks.cotangent("ddbias", ddbias, saved.bias, channels)[:, np.newaxis]
    weight = np.ones((channels, 1)) if saved.weight is None else saved.weight.astype(np.float64)[:, np.newaxis]
    grad_dy, grad_x = (output("out", None, x, layout) for _ in range(2))
    count = layout.values
    grad_weight = np.zeros((channels, 1))

    def walk() -> Iterator[tuple[Any, slice, Array, Array, Array, Any]]:
        """Piece by piece: where, its channels, x̂, g, v and act'(z)."""
        for at in pieces(*shape, PIECE // 2):
            c, here = at[1], x.reshape(shape)[at]
            slope = _slopes(here, c, saved, kernels, threads)
            xhat = (here.astype(np.float64) - saved.mean[c, np.newaxis]) * inverse[c]
            yield at, c, xhat, g[at] * slope, _wide(v, at, xhat), slope

    with np.errstate(all="ignore"):
        inverse = 1 / np.sqrt(saved.var.astype(np.float64)[:, np.newaxis] + saved.eps)
        means = np.zeros((5, channels, 1))  # of g, g·x̂, v, v·x̂, x̂: 0 where the statistics are constants
        if saved.batch and count:
            for _, c, xhat, g_, v_, _ in walk():
                for mean, terms in zip(means, (g_, g_ * xhat, v_, v_ * xhat, xhat), strict=True):
                    mean[c] += _sum(terms)
            means /= count
            means[1] -= means[0] * means[4]  # x̂'s own is what rounding left of the mean: not 0, if that is large
            means[3] -= means[2] * means[4]

        def project(u: Array, mean: Array, mean_xhat: Array, c: slice, xhat: Array) -> Array:
            """P u, or u itself where the statistics are constants."""
            return u - mean[c] - xhat * mean_xhat[c] if saved.batch else u

        for _, c, xhat, g_, v_, _ in walk():
            # Σ P v · P g, but for x̂'s part: no large means that would cancel.
            grad_weight[c] += _sum((v_ - means[2][c]) * project(g_, means[0], means[1], c, xhat))
        scale = weight * inverse
        of_g, of_v, of_xhat = a * inverse, 0.0 * scale, 0.0 * scale
        if saved.batch and count:
            of_g = (a - scale * means[3]) * inverse
            of_v = scale * means[1] * inverse
            of_xhat = scale * (grad_weight / count) * inverse
        for at, c, xhat, g_, v_, slope in walk():
            pg, pv = (project(u, means[k], means[k + 1], c, xhat) for u, k in ((g_, 0), (v_, 2)))
            grad_dy[0].reshape(shape)[at] = slope * (scale[c] * pv + a[c] * xhat + b[c])
            grad_x[0].reshape(shape)[at] = of_g[c] * pg - of_v[c] * pv - of_xhat[c] * xhat
        grad_weight *= inverse
    return (
        finish(*grad_dy, layout),
        finish(*grad_x, layout),
        None if saved.weight is None else grad_weight[:, 0].astype(saved.weight.dtype),
    )


def _wide(v: Array | None, at: Any, otherwise: Array) -> Array:
    return np.zeros_like(otherwise) if v is None else v[at].astype(np.float64)


def _sum(terms: Array) -> Array:
    """(channels, 1), of (outer, channels, inner)."""
    total: Array = terms.sum(axis=2).sum(axis=0)
    return total[:, np.newaxis]


def _slopes(x: Array, c: slice, saved: Saved, kernels: Any, threads: int) -> Any:
    """act'(z), of z as the forward pass's kernel computes it; a number where there is no activation."""
    if saved.slope == 1:
        return np.float64(1)
    wide = np.ascontiguousarray(x, np.float64 if x.dtype == np.float64 else np.float32)
    z = np.empty(x.shape, wide.dtype)
    weight, bias = (None if p is None else p[c] for p in (saved.weight, saved.bias))
    kernels.normalize(wide, z, *x.shape, saved.mean[c], saved.var[c], weight, bias, saved.eps, None, 1.0, threads)
    return np.where(z <= 0, saved.slope, 1.0)
