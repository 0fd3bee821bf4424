"""In-place activated batch normalization: y takes x's place, and is all that a backward pass needs.

Rota Bulò, Porzi and Kontschieder (2018), "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs", section
3. A network keeps the outputs of its layers anyway, as the inputs of those that follow; kept beside them, each
normalization's x is one tensor more. Where activation and affine map can be undone, x̂ follows from y:

    z = y where y > 0, y/slope elsewhere        x̂ = (z - bias)/weight

and with it everything that the ordinary backward pass computes from x. It is that pass's own kernel that does, on z in
place of x: with mean := bias, var := weight² and eps := 0 it sees (z - bias)/|weight|, x̂ but for weight's sign; with
weight·|weight|/σ for weight its dx is the right one, and its dweight needs the sign put right.

y was rounded, to u = 2⁻²⁴ of its size in float32 (2⁻⁵³, 2⁻¹¹, 2⁻⁸ in float64, float16, bfloat16), so that x̂ comes back
with an error of a few u·(|x̂| + |bias/weight|). That is as with the mean of a stored x, where x̂ has an error of
u·|mean/σ|, and nothing to speak of unless bias is large against weight. Where it would be about 1/16 and more the layer
refuses to work: |weight| must be at least 16·(2u·|bias| + least/min(slope, 1)), with the type's least number above 0;
and at least 1e-30 (float64: 1e-150), lest weight² vanish.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import backends, checks
from .functional import batch_norm, train_forward
from .layers import BatchNorm
from .layout import Layout, canonical, finish, like, output
from .pieces import PIECE, pieces

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(slots=True, eq=False)
class InplaceSaved:
    """What `InplaceBatchNorm.backward` needs: y, and numbers a channel.

    Attributes
    ----------
    y : ndarray
        The array that was x.
    axis : int
    sigma : ndarray of float64, shape (channels,)
        sqrt(var + eps).
    weight, bias : ndarray of float64, shape (channels,)
        As they were; 1 and 0 where there was none.
    slope : float
        The activation's under 0; 1 without one.
    batch : bool
        Whether the statistics were the batch's own.
    """

    y: Array
    axis: int
    sigma: Array
    weight: Array
    bias: Array
    slope: float
    batch: bool


class InplaceBatchNorm(BatchNorm):
    """`BatchNorm` that writes y over x and goes back from y: nothing else of the tensor's size is kept.

    ``y = bn(x)`` returns x itself, overwritten, in every mode. Until `backward`, y must not be changed: there is
    nothing from which the layer could notice.

    Parameters
    ----------
    num_features : int
    activation : {None, "leaky_relu"}
        relu cannot be undone.
    negative_slope : float above 0
    **options
        As for `BatchNorm`. weight must not be 0 anywhere in training, nor small against bias; see Raises below.

    Notes
    -----
    `backward` sees x̂ as exactly as y could be stored: with an error of a few units in the last place of the data's
    type, times 1 + abs(bias/weight). In bfloat16 a unit is 1/128.

    References
    ----------
    Rota Bulò, Porzi and Kontschieder (2018), section 3.
    """

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        checks.invertible(self.activation, self.negative_slope)

    def __call__(self, x: Any, residual: Any = None, *, out: Array | None = None) -> Array:
        """y, which is x overwritten.

        Parameters
        ----------
        x : writeable ndarray of float16, bfloat16, float32 or float64, 2 to 5 axes, num_features long along `axis`
            With gaps (a slice) it is overwritten all the same, by way of a copy.
        residual : None
            There can be none: x̂ would not follow from y.
        out : None, or x itself

        Raises
        ------
        TypeError, ValueError
            Naming the argument; x and the layer are then as they were. In training also where weight is 0, or so small
            against bias that x̂ could not be found again: ``|weight| < 16 * eps * |bias|``, with eps that of the data's
            type (2e-6·|bias| in float32), or next to nothing itself.
        """
        checks.features(x, self.axis, self.num_features)
        checks.absent("residual", residual, "from y alone x could not be found again")
        checks.overwritten("x", x)
        checks.itself("out", out, "x", x)
        slope = checks.invertible(self.activation, self.negative_slope)
        settings: dict[str, Any] = {
            "eps": self.eps, "axis": self.axis, "activation": self.activation, "negative_slope": self.negative_slope,
            "residual": None, "out": x,
        }  # fmt: skip
        running, given = (self.running_mean, self.running_var), (self.weight, self.bias)
        if not self.training:
            batch_norm(x, *running, *given, training=running[0] is None, **settings)
            self._saved = None
            return x  # type: ignore[no-any-return]
        weight, bias = (
            np.full(self.num_features, otherwise) if p is None else p.astype(np.float64)
            for p, otherwise in zip(given, (1.0, 0.0), strict=True)
        )
        if x.size:
            checks.invertible_weight(weight, bias, slope, x.dtype)
        batches = self.num_batches_tracked
        if self.trainable:
            _, saved, counts = train_forward(
                x, *running, *given, momentum=self._rate(batches), unbiased=self.unbiased, nan_policy=self.nan_policy,
                keep=False, **settings,
            )  # fmt: skip
            var: Array = saved.var
        else:
            checks.statistics(self)
            assert self.running_var is not None
            var, counts = self.running_var, False
            batch_norm(x, *running, *given, **settings)
        with np.errstate(all="ignore"):
            sigma = np.sqrt(var.astype(np.float64) + self.eps)
        self._saved = InplaceSaved(x, self.axis, sigma, weight, bias, slope, self.trainable)
        if batches is not None and counts:
            self.num_batches_tracked = batches + 1
        return x  # type: ignore[no-any-return]

    def backward(self, dy: Any, *, out: Array | None = None, out_residual: Array | None = None) -> Array:
        """dx, leaving `grad_weight` and `grad_bias`; y is left as it is.

        Parameters
        ----------
        dy : ndarray of y's shape and dtype
        out : ndarray, optional
            Where to write dx; may be dy, or y itself. In y's place it leaves nothing to go back over a second time, but
            then no other tensor is needed at all.
        out_residual : None

        Raises
        ------
        ValueError
            Before any forward pass in training mode, or after one in eval mode, which keeps nothing.
        """
        saved: InplaceSaved = self._kept()
        checks.absent("out_residual", out_residual, "there is no residual")
        y, layout = canonical("y", saved.y, saved.axis)
        gradient = like("dy", dy, y, layout)
        memory, dx = output("out", out, y, layout)
        others = {"dy": dy, "y": saved.y, "weight": self.weight, "bias": self.bias}
        checks.overlap("out", out, others, same_as=("dy", "y"))
        if out is not None and np.may_share_memory(out, saved.y):
            self._saved = None
        grad_weight, grad_bias = np.zeros(layout.channels), np.zeros(layout.channels)
        if y.size:
            _backward(gradient, y, memory, layout, saved, grad_weight, grad_bias)
        self.grad_weight = None if self.weight is None else grad_weight.astype(self.weight.dtype)
        self.grad_bias = None if self.bias is None else grad_bias.astype(self.bias.dtype)
        self.grad_residual = None
        return dx if memory is dx else finish(memory, dx, layout)


def _backward(
    dy: Array, y: Array, dx: Array, layout: Layout, saved: InplaceSaved, grad_weight: Array, grad_bias: Array
) -> None:
    """dx, dweight and dbias (float64, 0 so far), of arrays in memory order. dx may be dy or y."""
    kernels, threads = backends.serving()
    shape = layout.outer, layout.channels, layout.inner
    with np.errstate(all="ignore"):
        size = np.abs(saved.weight)
        var, scale = size * size, saved.weight * size / saved.sigma
        if saved.slope == 1:
            kernels.backward(
                dy, y, dx, *shape, saved.bias, var, scale, None, 0.0, grad_weight, grad_bias, saved.batch,
                None, None, 1.0, threads,
            )  # fmt: skip
        else:
            _backward_leaky(dy, y, dx, shape, saved, var, scale, grad_bias, grad_weight)
            grad_weight /= size
        grad_weight *= np.sign(saved.weight)


def _backward_leaky(
    dy: Array, y: Array, dx: Array, shape: tuple[int, int, int], saved: InplaceSaved, var: Array, scale: Array,
    sum_dz: Array, sum_dz_z: Array,
) -> None:  # fmt: skip
    """The same with z and dz = dy·act'(z) worked out piece by piece, in a little scratch, and the kernel's two steps.

    Whole, z and dz would be two tensors more: the kernel that works z out for itself does so from x. Writes dx, and the
    sums of dz and of dz·(z - bias).
    """
    kernels, threads = backends.serving()
    wide: Any = np.float64 if y.dtype == np.float64 else np.float32
    slope = wide(saved.slope)
    room = np.empty((2, min(PIECE, y.size)), wide)
    dy, y, dx = dy.reshape(shape), y.reshape(shape), dx.reshape(shape)

    def unfold(at: tuple[slice, slice, slice]) -> tuple[Array, Array]:
        here = y[at]
        z, dz = (part[: here.size].reshape(here.shape) for part in room)
        z[...] = here
        np.divide(z, slope, out=dz)
        (np.minimum if slope < 1 else np.maximum)(z, dz, out=z)  # of y and y/slope, the one on y's side of the bend
        cut = here <= 0
        np.multiply(cut, slope, out=dz)
        np.add(dz, ~cut, out=dz)
        np.multiply(dz, dy[at], out=dz)
        return z, dz

    def walk() -> Any:
        return pieces(*shape, PIECE)

    for at in walk():
        z, dz = unfold(at)
        c = at[1]
        sums = np.empty((2, z.shape[1]))
        kernels.gradient_moments(dz, z, *z.shape, saved.bias[c], sums[0], sums[1], threads)
        sum_dz[c] += sums[0]
        sum_dz_z[c] += sums[1]
    for at in walk():
        z, dz = unfold(at)
        c = at[1]
        if saved.batch:
            share = z.shape[0] * z.shape[2] / (shape[0] * shape[2])  # the kernel divides by the piece's own count
            kernels.input_gradient(
                dz, z, dz, *z.shape, saved.bias[c], var[c], scale[c], 0.0, sum_dz[c] * share, sum_dz_z[c] * share,
                threads,
            )  # fmt: skip
        else:
            dz *= (saved.weight[c] / saved.sigma[c]).astype(wide)[:, np.newaxis]
        dx[at] = dz
