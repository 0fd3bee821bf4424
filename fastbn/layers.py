"""BatchNorm: parameters, running statistics, train() and eval(), backward()."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from . import checks
from .functional import Saved, batch_norm, batch_norm_backward, train_forward

Array = np.ndarray[Any, np.dtype[Any]]

STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class BatchNorm:
    """Batch normalization of any array of 2 to 5 axes, with torch's names and defaults.

    Parameters
    ----------
    num_features : int
        Channels.
    eps : float
        Added to the variance.
    momentum : float from 0 to 1
        The weight of the new batch in the running statistics.
    affine : bool
        Whether there are a weight and a bias.
    activation : {None, "relu", "leaky_relu"}
        Applied to the result, in the same pass over memory.
    negative_slope : float of at least 0
        leaky_relu's slope under 0.
    track_running_stats : bool
        Whether there are running statistics; without them the batch's own serve in eval mode too.
    axis : int
        The channel axis: 1 for NC and NCHW, -1 for channels-last.
    dtype : {float32, float64}
        Of the parameters and the running statistics. Data may be float16, bfloat16, float32 or float64.

    Attributes
    ----------
    weight, bias : ndarray, shape (num_features,), or None
    running_mean, running_var : ndarray, shape (num_features,), or None
    num_batches_tracked : int or None
    grad_weight, grad_bias : ndarray, shape (num_features,), or None
        Of the last `backward`.
    grad_residual : ndarray of x's shape, or None
        Of the last `backward`, where the forward pass had a residual.
    training : bool

    References
    ----------
    Ioffe and Szegedy (2015), Algorithms 1 and 2.
    """

    weight: Array | None
    bias: Array | None
    running_mean: Array | None
    running_var: Array | None
    num_batches_tracked: int | None

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        axis: int = 1,
        activation: str | None = None,
        negative_slope: float = 0.01,
        dtype: Any = np.float32,
    ) -> None:
        self.num_features = checks.positive("num_features", num_features)
        self.eps = checks.eps(eps)
        self.momentum = checks.momentum(momentum)
        self.axis = checks.integer("axis", axis)
        checks.activation(activation, negative_slope)
        self.activation, self.negative_slope = activation, negative_slope
        self.dtype = checks.parameter_dtype(dtype)
        checks.flag("affine", affine)
        checks.flag("track_running_stats", track_running_stats)
        self.training = True
        self.weight = np.ones(num_features, self.dtype) if affine else None
        self.bias = np.zeros(num_features, self.dtype) if affine else None
        self.running_mean = np.zeros(num_features, self.dtype) if track_running_stats else None
        self.running_var = np.ones(num_features, self.dtype) if track_running_stats else None
        self.num_batches_tracked = 0 if track_running_stats else None
        self.grad_weight: Array | None = None
        self.grad_bias: Array | None = None
        self.grad_residual: Array | None = None
        self._saved: Saved | None = None

    def __call__(self, x: Any, residual: Any = None, *, out: Array | None = None) -> Array:
        """y, of x's shape, dtype and memory order.

        In training: by the batch's statistics, which also update the running ones; `backward` may follow. In eval
        mode: by the running statistics, and nothing is kept for `backward`.

        Parameters
        ----------
        x : ndarray of float16, bfloat16, float32 or float64, 2 to 5 axes, num_features long along `axis`
        residual : ndarray of x's shape and dtype, optional
            Added before the activation.
        out : ndarray, optional
            Where to write; may be residual itself; in training it must not share memory with x.

        Raises
        ------
        TypeError, ValueError
            Naming the argument; the layer is then as it was.
        """
        checks.features(x, self.axis, self.num_features)
        if not self.training:
            y = batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias,
                training=self.running_mean is None, eps=self.eps, axis=self.axis, activation=self.activation,
                negative_slope=self.negative_slope, residual=residual, out=out,
            )  # fmt: skip
            self._saved = None
            return y
        y, self._saved = train_forward(
            x, self.running_mean, self.running_var, self.weight, self.bias,
            momentum=self.momentum, eps=self.eps, axis=self.axis, activation=self.activation,
            negative_slope=self.negative_slope, residual=residual, out=out,
        )  # fmt: skip
        if self.num_batches_tracked is not None and self._saved.layout.values:
            self.num_batches_tracked += 1
        return y

    def backward(self, dy: Any, *, out: Array | None = None, out_residual: Array | None = None) -> Array:
        """dx, leaving `grad_weight`, `grad_bias` and, if there was a residual, `grad_residual`.

        Parameters
        ----------
        dy : ndarray of y's shape and dtype
        out : ndarray, optional
            Where to write dx; may be dy itself.
        out_residual : ndarray, optional
            Where to write the residual's gradient; may be dy itself, but not out's memory.

        Raises
        ------
        ValueError
            Before any forward pass in training mode, or after one in eval mode, which keeps nothing.
        """
        if self._saved is None:
            raise ValueError(
                "backward has nothing to go back over: the last call must be one in training mode "
                "(eval mode keeps nothing; batch_norm_eval_forward does)"
            )
        dx, self.grad_weight, self.grad_bias, *rest = batch_norm_backward(
            dy, self._saved, out=out, out_residual=out_residual
        )
        self.grad_residual = rest[0] if rest else None
        assert dx is not None
        return dx

    def train(self, mode: bool = True) -> Self:
        """Normalize by the batch's statistics from now on (or, with ``mode=False``, by the running ones)."""
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Normalize by the running statistics from now on."""
        return self.train(False)

    def reset_running_stats(self) -> None:
        """Running mean 0, variance 1, no batches tracked, as at the start."""
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean[...] = 0
            self.running_var[...] = 1
            self.num_batches_tracked = 0

    def state_dict(self) -> dict[str, Array]:
        """Copies of parameters and statistics under torch's names; those that the layer does not have are absent."""
        return {name: np.array(getattr(self, name)) for name in STATE if getattr(self, name) is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take parameters and statistics from a `state_dict` (ours, or torch's as NumPy arrays).

        Raises
        ------
        TypeError, ValueError
            Naming the keys that are missing or not known, or the shape that is wrong; the layer is then as it was.
        """
        mine = self.state_dict()
        checks.state_keys(state, list(mine))
        new = {name: checks.state(name, state[name], mine[name]) for name in mine}
        for name, value in new.items():
            if name == "num_batches_tracked":
                self.num_batches_tracked = int(value)
            else:
                getattr(self, name)[...] = value

    def __getstate__(self) -> dict[str, Any]:
        """Without what the last forward pass left for `backward`: a copy or a pickle does not carry a batch."""
        return self.__dict__ | {"_saved": None}

    def __repr__(self) -> str:
        return (
            f"BatchNorm({self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.weight is not None}, track_running_stats={self.running_mean is not None}, "
            f"axis={self.axis}, activation={self.activation!r}, negative_slope={self.negative_slope}, "
            f"dtype={self.dtype})"
        )
