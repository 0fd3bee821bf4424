"""BatchNorm: parameters, running statistics, train() and eval(), backward()."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import numpy as np

from . import checks
from .functional import Saved, batch_norm, batch_norm_backward, batch_norm_eval_forward, train_forward

Array = np.ndarray[Any, np.dtype[Any]]

STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _host(value: Any) -> Array:
    """A copy in NumPy."""
    if not checks.on_gpu(value):
        return np.array(value)
    from .gpu import to_host

    return to_host(value)


def _assign(array: Any, value: Array) -> None:
    """array[...] = value, wherever the array is."""
    if not checks.on_gpu(array):
        array[...] = value
        return
    from .gpu import from_host

    from_host(value, array)


class BatchNorm:
    """Batch normalization of any array of 2 to 5 axes, with torch's names and defaults.

    Arrays on a GPU are taken too, of float16, float32 or float64, once `cuda` has moved the layer there.

    Parameters
    ----------
    num_features : int
        Channels.
    eps : float
        Added to the variance.
    momentum : float from 0 to 1, or None
        The weight of the new batch in the running statistics; None is their cumulative average over all batches.
    affine : bool, "weight" or "bias"
        Whether there are a weight and a bias, or which one.
    activation : {None, "relu", "leaky_relu"}
        Applied to the result, in the same pass over memory.
    negative_slope : float of at least 0
        leaky_relu's slope under 0.
    track_running_stats : bool
        Whether there are running statistics; without them the batch's own serve in eval mode too.
    unbiased : bool
        Whether the running variance takes the batches' unbiased variance (as in torch), or the population's (as in ONNX
        and Keras).
    trainable : bool
        Where False, the layer is frozen: in training mode too it normalizes by its running statistics, which stay as
        they are; `backward` treats them as constants. `freeze` and `unfreeze` change it later.
    nan_policy : {"propagate", "skip_update", "raise"}
        What a training batch with a NaN or an infinity does: see `batch_norm`.
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

    OWN_OPTIONS: ClassVar[tuple[str, ...]] = ()  # what a subclass is made with beside these, and is saved with it

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
        momentum: float | None = 0.1,
        affine: bool | str = True,
        track_running_stats: bool = True,
        unbiased: bool = True,
        trainable: bool = True,
        nan_policy: str = "propagate",
        axis: int = 1,
        activation: str | None = None,
        negative_slope: float = 0.01,
        dtype: Any = np.float32,
    ) -> None:
        self.num_features = checks.positive("num_features", num_features)
        self.eps = checks.eps(eps)
        self.momentum = None if momentum is None else checks.momentum(momentum)
        self.axis = checks.integer("axis", axis)
        checks.activation(activation, negative_slope)
        self.activation, self.negative_slope = activation, negative_slope
        self.dtype = checks.parameter_dtype(dtype)
        has_weight, has_bias = checks.affine(affine)
        checks.flag("track_running_stats", track_running_stats)
        self.unbiased = checks.flag("unbiased", unbiased)
        self.nan_policy = checks.nan_policy(nan_policy)
        self._trainable = checks.trainable(trainable, track_running_stats)
        self.training = True
        channels = self.num_features
        self.weight = np.ones(channels, self.dtype) if has_weight else None
        self.bias = np.zeros(channels, self.dtype) if has_bias else None
        self.running_mean = np.zeros(channels, self.dtype) if track_running_stats else None
        self.running_var = np.ones(channels, self.dtype) if track_running_stats else None
        self.num_batches_tracked = 0 if track_running_stats else None
        self.grad_weight: Array | None = None
        self.grad_bias: Array | None = None
        self.grad_residual: Array | None = None
        self._saved: Any = None  # what `backward` needs of the last call: a Saved, or what a subclass keeps

    @property
    def affine(self) -> bool | str:
        """Whether there are a weight and a bias: True, False, or the name of the only one."""
        if (self.weight is None) == (self.bias is None):
            return self.weight is not None
        return "bias" if self.weight is None else "weight"

    @property
    def track_running_stats(self) -> bool:
        """Whether there are running statistics."""
        return self.running_mean is not None

    @property
    def trainable(self) -> bool:
        """Whether training mode normalizes by the batch's statistics and updates the running ones: see `freeze`."""
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = checks.trainable(value, self.running_mean is not None)

    def __call__(self, x: Any, residual: Any = None, *, out: Array | None = None) -> Array:
        """y, of x's shape, dtype and memory order.

        In training: by the batch's statistics, which also update the running ones; `backward` may follow. Frozen: by
        the running statistics; `backward` may follow. In eval mode: by them too, and nothing is kept for `backward`.

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
        x = checks.features(x, self.axis, self.num_features, gpu=True)
        if not self.training:
            y = batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias,
                training=self.running_mean is None, eps=self.eps, axis=self.axis, activation=self.activation,
                negative_slope=self.negative_slope, residual=residual, out=out,
            )  # fmt: skip
            self._saved = None
            return y
        if not self.trainable:
            y, self._saved = batch_norm_eval_forward(
                x, self.running_mean, self.running_var, self.weight, self.bias,
                eps=self.eps, axis=self.axis, activation=self.activation, negative_slope=self.negative_slope,
                residual=residual, out=out,
            )  # fmt: skip
            return y
        batches = self.num_batches_tracked
        y, self._saved, counts = train_forward(
            x, self.running_mean, self.running_var, self.weight, self.bias,
            momentum=self._rate(batches), unbiased=self.unbiased, nan_policy=self.nan_policy,
            eps=self.eps, axis=self.axis, activation=self.activation,
            negative_slope=self.negative_slope, residual=residual, out=out,
        )  # fmt: skip
        if batches is not None and counts:
            self.num_batches_tracked = batches + 1
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
        saved: Saved = self._kept()
        dx, self.grad_weight, self.grad_bias, *rest = batch_norm_backward(dy, saved, out=out, out_residual=out_residual)
        self.grad_residual = rest[0] if rest else None
        assert dx is not None
        return dx

    def forget(self) -> None:
        """Let go of what the last call left for `backward`, x among it."""
        self._saved = None

    def _kept(self) -> Any:
        """What the last call left for `backward`."""
        checks.something_kept(self._saved)
        return self._saved

    def _rate(self, batches: int | None) -> float:
        """The weight of a new batch in the running statistics, after so many."""
        return 1 / ((batches or 0) + 1) if self.momentum is None else self.momentum

    def train(self, mode: bool = True) -> Self:
        """Normalize by the batch's statistics from now on (or, with ``mode=False``, by the running ones)."""
        self.training = checks.flag("mode", mode)
        return self

    def eval(self) -> Self:
        """Normalize by the running statistics from now on."""
        return self.train(False)

    def freeze(self) -> Self:
        """Normalize by the running statistics in training mode too, and leave them as they are.

        Raises
        ------
        ValueError
            Where there are none.
        """
        self.trainable = False
        return self

    def unfreeze(self) -> Self:
        """Undo `freeze`."""
        self.trainable = True
        return self

    def reset_running_stats(self) -> None:
        """Running mean 0, variance 1, no batches tracked, as at the start.

        With ``momentum=None`` and a pass over the data in training mode, the statistics are then estimated anew
        ("precise" batch normalization: Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3).
        """
        if self.running_mean is not None and self.running_var is not None:
            _assign(self.running_mean, np.zeros(self.num_features, self.dtype))
            _assign(self.running_var, np.ones(self.num_features, self.dtype))
            self.num_batches_tracked = 0

    def state_dict(self) -> dict[str, Array]:
        """Copies of parameters and statistics under torch's names; those that the layer does not have are absent.

        NumPy's arrays, also of a layer on a GPU.
        """
        return {name: _host(getattr(self, name)) for name in STATE if getattr(self, name) is not None}

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
                _assign(getattr(self, name), value)

    def cuda(self, like: Any = None) -> Self:
        """Move parameters and running statistics to a GPU, for input that is there.

        Parameters
        ----------
        like : array on a GPU, optional
            They become arrays of its library (CuPy, torch) and on its device; without it, Numba's, on the current one.

        Returns
        -------
        BatchNorm
            Itself.

        Raises
        ------
        ImportError
            Where numba-cuda is not installed: ``pip install 'fastbn[cuda]'``.
        TypeError
            Where `like` is no array on a GPU.
        """
        from .gpu import moved

        checks.like_on_gpu(like)
        return self._moved(lambda value: moved(_host(value), like))

    def cpu(self) -> Self:
        """Move parameters and running statistics to NumPy's arrays: undo `cuda`."""
        return self._moved(_host)

    def _moved(self, move: Callable[[Any], Any]) -> Self:
        names = [*STATE[:4], "grad_weight", "grad_bias"]
        new = {name: None if getattr(self, name) is None else move(getattr(self, name)) for name in names}
        self.__dict__.update(new, _saved=None, grad_residual=None)
        return self

    def scale_shift(self) -> tuple[Array, Array]:
        """What eval mode does, as ``x * scale + shift``: see `fastbn.folding.scale_shift`."""
        from .folding import scale_shift

        return scale_shift(self)

    def save(self, path: Any) -> None:
        """Write parameters, statistics and options to a safetensors file: see `fastbn.convert.save`."""
        from .convert import save

        save(self, path)

    @classmethod
    def load(cls, path: Any, **options: Any) -> Self:
        """The layer in a file that `save`, or torch, wrote: see `fastbn.convert.load`."""
        from .convert import load

        return load(path, cls, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Without what the last forward pass left for `backward`: a copy or a pickle does not carry a batch."""
        return self.__dict__ | {"_saved": None, "grad_residual": None}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine!r}, track_running_stats={self.running_mean is not None}, unbiased={self.unbiased}, "
            f"trainable={self.trainable}, nan_policy={self.nan_policy!r}, axis={self.axis}, "
            f"activation={self.activation!r}, negative_slope={self.negative_slope}, dtype={self.dtype})"
        )
