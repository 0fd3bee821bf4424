"""What bad input gets: every error fastbn raises about an argument, in one place.

Each message names the argument, what it was and what it must be. The checks run before any kernel and before any
statistic is touched.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
F64 = np.dtype(np.float64)

MOST_THREADS = 4096


def data(name: str, x: Any) -> Array:
    """An array of float16, bfloat16, float32 or float64, as it is."""
    if type(x) is np.ndarray and (x.dtype is F32 or x.dtype is F64):  # the usual case, settled by identity
        return x
    return _of_dtypes(
        name, x, "float16, bfloat16, float32 or float64", lambda d: d in (F32, F64, F16) or is_bfloat16(d)
    )


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether this is the dtype that ml_dtypes adds to NumPy (which has the same name in the other byte order)."""
    return dtype.name == "bfloat16" and dtype.itemsize == 2 and dtype.isnative


def parameters_like(x: Array) -> np.dtype[Any]:
    """The dtype of parameters and their gradients where nothing else says it: never half."""
    return F64 if x.dtype == F64 else F32


def _of_dtypes(name: str, x: Any, dtypes: str, served: Callable[[np.dtype[Any]], bool]) -> Array:
    x = _as_ndarray(name, x)
    if x.dtype == object and x.ndim == 0:
        raise TypeError(f"{name} is a {type(x.item()).__name__}, and must be an array of {dtypes}")
    if not served(x.dtype):
        swapped = (
            "; it is in the other byte order: use .astype(dtype.newbyteorder('='))" if not x.dtype.isnative else ""
        )
        raise TypeError(f"{name} has dtype {x.dtype}, and must be {dtypes}{swapped}")
    return x  # type: ignore[no-any-return]


def _as_ndarray(name: str, x: Any) -> Array:
    if type(x) is np.ndarray:
        return x
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be ignored; pass {name}.filled(...)")
    if isinstance(x, np.matrix):
        raise TypeError(f"{name} is a numpy.matrix, and must be an ndarray; pass numpy.asarray({name})")
    try:
        return np.asarray(x)
    except ValueError:  # NumPy's own says nothing of the argument
        raise TypeError(f"{name} is a ragged {type(x).__name__}, and must be an array of numbers") from None


def channel_axis(axis: Any, x: Array) -> int:
    """`axis` as a number from 0 to x.ndim - 1."""
    ndim = x.ndim
    if not 2 <= ndim <= 5:
        raise ValueError(f"x has shape {x.shape}, and must have 2 to 5 axes")
    if type(axis) is not int:
        axis = integer("axis", axis)
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis is {axis}, and must be from {-ndim} to {ndim - 1} for x of shape {x.shape}")
    return axis if axis >= 0 else axis + ndim  # type: ignore[no-any-return]


def parameter(name: str, p: Any, channels: int) -> Array | None:
    """A parameter a channel, contiguous, or None."""
    if p is None:
        return None
    p = _vector(name, p, channels)
    return p if p.flags.c_contiguous else np.ascontiguousarray(p)


def _vector(name: str, p: Any, channels: int) -> Array:
    if type(p) is not np.ndarray or (p.dtype is not F32 and p.dtype is not F64):
        p = _of_dtypes(name, p, "float32 or float64", lambda d: d in (F32, F64))
    if p.shape != (channels,):
        raise ValueError(f"{name} has shape {p.shape}, and must have shape ({channels},): one value a channel")
    return p  # type: ignore[no-any-return]


def running(running_mean: Any, running_var: Any, channels: int, *, update: bool) -> tuple[Any, Any]:
    """The running statistics: both or neither, one value a channel; if they are to be updated, writeable ndarrays."""
    if (running_mean is None) != (running_var is None):
        absent, present = ("running_mean", "running_var") if running_mean is None else ("running_var", "running_mean")
        raise ValueError(f"{absent} is None and {present} is not; give both or neither")
    if running_mean is None:
        if not update:
            raise ValueError("running_mean and running_var are None, and must be given unless training=True")
        return None, None
    for name, p in (("running_mean", running_mean), ("running_var", running_var)):
        checked = _vector(name, p, channels)
        if update:
            if checked is not p:
                raise TypeError(f"{name} is a {type(p).__name__}, and must be an ndarray to be updated in place")
            if not p.flags.writeable:
                raise ValueError(f"{name} is read-only, and must be writeable to be updated")
    if update and np.may_share_memory(running_mean, running_var):
        raise ValueError("running_mean and running_var share memory, and must be two arrays")
    return np.asarray(running_mean), np.asarray(running_var)


def eps(value: Any) -> float:
    """A positive, finite float."""
    if type(value) is not float:
        value = _number("eps", value)
    if not 0.0 < value < float("inf"):
        raise ValueError(f"eps is {value}, and must be greater than 0 and finite")
    return value  # type: ignore[no-any-return]


def momentum(value: Any) -> float:
    """A float from 0 to 1: the weight of the new batch."""
    if type(value) is not float:
        value = _number("momentum", value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"momentum is {value}, and must be from 0 to 1: the weight of the new batch")
    return value  # type: ignore[no-any-return]


def activation(name: Any, negative_slope: Any) -> float:
    """The activation's slope under 0: 1 is no activation."""
    if name is None:
        return 1.0
    if not isinstance(name, str) or name not in ("relu", "leaky_relu"):
        raise ValueError(f"activation is {name!r}, and must be None, 'relu' or 'leaky_relu'")
    if name == "relu":
        return 0.0
    slope = _number("negative_slope", negative_slope)
    # Under 0, y's sign would not tell what the activation did.
    if not 0.0 <= slope <= float(np.finfo(F32).max):
        raise ValueError(f"negative_slope is {slope}, and must be at least 0 and finite (in float32)")
    return slope


def _number(name: str, value: Any) -> float:
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{name} is {value!r}, and must be a number")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}, and must be a number") from None
    except OverflowError:
        return float("inf")


def positive(name: str, value: Any) -> int:
    """An integer of at least 1."""
    number = integer(name, value)
    if number < 1:
        raise ValueError(f"{name} is {number}, and must be at least 1")
    return number


def flag(name: str, value: Any) -> bool:
    """True or False; a string that says so is neither."""
    if value is True or value is False or isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(f"{name} is {value!r}, and must be True or False")


def threads(name: str, value: Any) -> int:
    """A number of threads: at least 1, and no more than anyone means."""
    number = positive(name, value)
    if number > MOST_THREADS:
        raise ValueError(f"{name} is {number}, and must be at most {MOST_THREADS}")
    return number


def enough_values(count: int, shape: tuple[int, ...]) -> None:
    """Training needs two values a channel: one has no variance."""
    if count == 1:
        raise ValueError(f"x has shape {shape}: one value a channel, and training must have at least 2")


def same(name: str, array: Array, x: Array) -> None:
    """`array` must have x's shape and dtype."""
    if array.shape != x.shape:
        raise ValueError(f"{name} has shape {array.shape}, and must have x's shape {x.shape}")
    if array.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {array.dtype}, and must have x's dtype {x.dtype}")


def output(name: str, out: Any, x: Array) -> None:
    """`out` must be a writeable ndarray of x's shape and dtype."""
    if type(out) is not np.ndarray:
        raise TypeError(f"{name} is a {type(out).__name__}, and must be an ndarray")
    same(name, out, x)
    if not out.flags.writeable:
        raise ValueError(f"{name} is read-only, and must be writeable")


def overlap(name: str, out: Any, others: dict[str, Any], *, same_as: tuple[str, ...] = ()) -> None:
    """`out` must not share memory with an input, unless it is exactly one of those named by `same_as`."""
    if out is None:
        return
    for other, array in others.items():
        if isinstance(array, np.ndarray) and _shares(out, array):
            if other in same_as and _is_exactly(out, array):
                continue
            exact = f", or be {other} itself" if other in same_as else ""
            raise ValueError(f"{name} overlaps {other} in memory, and must not{exact}")


def _shares(a: Array, b: Array) -> bool:
    try:  # bounds first, which settle all but interleaved arrays
        return np.may_share_memory(a, b) and np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _is_exactly(a: Array, b: Array) -> bool:
    if a is b:
        return True
    steps = [[s for s, n in zip(array.strides, array.shape, strict=True) if n > 1] for array in (a, b)]
    same_place = a.__array_interface__["data"] == b.__array_interface__["data"]
    return bool(same_place and a.shape == b.shape and steps[0] == steps[1])


def parameter_dtype(dtype: Any) -> np.dtype[Any]:
    """float32 or float64, native."""
    was = repr(dtype)
    if dtype is not None:  # which NumPy takes for float64
        try:
            found: np.dtype[Any] = np.dtype(dtype)
        except TypeError:
            pass
        else:
            was = str(found)
            if found in (F32, F64):
                return found
    raise TypeError(f"dtype is {was}, and must be float32 or float64")


def integer(name: str, value: Any) -> int:
    """An integer."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, and must be an integer") from None


def features(x: Any, axis: int, num_features: int) -> None:
    """x must have the layer's number of channels."""
    shape = data("x", x).shape
    ndim = len(shape)
    if -ndim <= axis < ndim and shape[axis] != num_features:
        raise ValueError(f"x has shape {shape}, and must have {num_features} channels (num_features) along axis {axis}")


def state(name: str, value: Any, mine: Array) -> Array:
    """A value for a layer's state: of the right shape, and a number."""
    array = _as_ndarray(name, value)
    if array.shape != mine.shape:
        raise ValueError(f"{name} has shape {array.shape} in state, and must have shape {mine.shape}")
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} has dtype {array.dtype} in state, and must be real numbers")
    if name == "num_batches_tracked" and not (np.isfinite(array) and array >= 0 and array == np.trunc(array)):
        raise ValueError(f"{name} is {array} in state, and must be an integer of at least 0")
    return array


def state_keys(state: Any, names: list[str]) -> None:
    """A mapping with exactly these keys."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state is a {type(state).__name__}, and must be a mapping, as state_dict returns")
    missing, unknown = [n for n in names if n not in state], [n for n in state if n not in names]
    if missing or unknown:
        raise ValueError(f"state lacks {missing} and has unknown {unknown}; it must have exactly {names}")
