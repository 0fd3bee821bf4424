"""What bad input gets: every error fastbn raises about an argument, in one place.

Each message names the argument, what it was and what it must be. The checks run before any kernel and before any
statistic is touched.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Mapping
from math import inf
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
    not_on_gpu(name, x)
    try:
        array = np.asarray(x)
        if array.dtype == object and array.ndim == 0 and hasattr(x, "__dlpack__"):
            array = np.from_dlpack(x)
    except Exception as error:  # whatever it is, it says nothing of the argument
        kind = type(x).__name__
        if isinstance(x, (list, tuple)):
            raise TypeError(f"{name} is a ragged {kind}, and must be an array of numbers") from None
        hint = ""
        if hasattr(x, "detach"):  # torch's
            hint = ": pass its .detach().cpu().numpy(), or .detach().cpu().float().numpy() where it is bfloat16"
        raise TypeError(f"{name} is a {kind} that NumPy cannot read ({error}), and must be an array{hint}") from None
    return array


def channel_axis(axis: Any, shape: tuple[int, ...]) -> int:
    """`axis` as a number from 0 to the number of axes - 1."""
    ndim = len(shape)
    if not 2 <= ndim <= 5:
        raise ValueError(f"x has shape {shape}, and must have 2 to 5 axes")
    axis = integer("axis", axis)
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis is {axis}, and must be from {-ndim} to {ndim - 1} for x of shape {shape}")
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
        _vector(name, p, channels)
        if update:
            if not in_place(p):
                raise TypeError(f"{name} is a {type(p).__name__}, and must be an ndarray to be updated in place")
            if not p.flags.writeable:
                raise ValueError(f"{name} is read-only, and must be writeable to be updated")
    if update and np.may_share_memory(running_mean, running_var):
        raise ValueError("running_mean and running_var share memory, and must be two arrays")
    return np.asarray(running_mean), np.asarray(running_var)


def not_a_parameter(running_mean: Any, running_var: Any, weight: Any, bias: Any) -> None:
    """An update in place of what is weight or bias itself, or part of it, would change that."""
    if running_mean is None:
        return
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and (_one_memory(p, running_mean) or _one_memory(p, running_var)):
            raise ValueError(f"{name} shares memory with running_mean or running_var, and must be an array of its own")


def _one_memory(a: Any, b: Any) -> bool:
    """Of two arrays that each have their own memory, only the objects need be compared."""
    if a is b:
        return True
    if type(a) is not np.ndarray or type(b) is not np.ndarray or (a.base is None and b.base is None):
        return False
    return _shares(a, b)


def eps(value: Any) -> float:
    """A positive, finite float."""
    if type(value) is not float:
        value = _number("eps", value)
    if not 0.0 < value < inf:
        raise ValueError(f"eps is {value}, and must be greater than 0 and finite")
    return value  # type: ignore[no-any-return]


def momentum(value: Any) -> float:
    """A float from 0 to 1: the weight of the new batch."""
    if type(value) is not float:
        value = _number("momentum", value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"momentum is {value}, and must be from 0 to 1: the weight of the new batch")
    return value  # type: ignore[no-any-return]


NAN_POLICIES = ("propagate", "skip_update", "raise")


def nan_policy(value: Any) -> str:
    """What a batch with a NaN does to the running statistics."""
    if not isinstance(value, str) or value not in NAN_POLICIES:
        raise ValueError(f"nan_policy is {value!r}, and must be one of {', '.join(map(repr, NAN_POLICIES))}")
    return value


def representable(mean: Array, var: Array, dtype: np.dtype[Any]) -> bool:
    """Whether a batch's statistics are numbers of the running statistics' dtype."""
    most = np.finfo(dtype).max
    return bool((np.abs(mean) <= most).all() and (var <= most).all())


def finite_statistics(mean: Array, var: Array, dtype: np.dtype[Any]) -> None:
    """Raises unless they are `representable`."""
    if not representable(mean, var, dtype):
        most = np.finfo(dtype).max
        channels = np.flatnonzero(~((np.abs(mean) <= most) & (var <= most)))
        raise ValueError(
            f"x has NaN, infinite or too large values (in {channels.size} channels, the first is {channels[0]}), and "
            "must not with nan_policy='raise'"
        )


def affine(value: Any) -> tuple[bool, bool]:
    """Whether there is a weight, and whether there is a bias."""
    if isinstance(value, str):
        if value not in ("weight", "bias"):
            raise ValueError(f"affine is {value!r}, and must be True, False, 'weight' or 'bias'")
        return value == "weight", value == "bias"
    both = flag("affine", value)
    return both, both


def trainable(value: Any, has_statistics: bool) -> bool:
    """A layer that is not is normalized by its running statistics, and must have them."""
    if not flag("trainable", value) and not has_statistics:
        raise ValueError("trainable is False, and must be True where track_running_stats is False")
    return bool(value)


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
        return inf


def positive(name: str, value: Any) -> int:
    """An integer of at least 1."""
    number = integer(name, value)
    if number < 1:
        raise ValueError(f"{name} is {number}, and must be at least 1")
    return number


def not_negative(name: str, value: Any) -> int:
    """An integer of at least 0."""
    number = integer(name, value)
    if number < 0:
        raise ValueError(f"{name} is {number}, and must be at least 0")
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


def in_place(array: Any) -> bool:
    """What may be written to: an ndarray itself, or one on a file. Other subclasses may mean something else by it."""
    return type(array) in (np.ndarray, np.memmap)


def output(name: str, out: Any, x: Array) -> None:
    """`out` must be a writeable ndarray of x's shape and dtype."""
    if not in_place(out):
        raise TypeError(f"{name} is a {type(out).__name__}, and must be an ndarray")
    same(name, out, x)
    if not out.flags.writeable:
        raise ValueError(f"{name} is read-only, and must be writeable")


def overlap(name: str, out: Any, others: dict[str, Any], *, same_as: tuple[str, ...] = ()) -> None:
    """`out` must not share memory with an input, unless it is exactly one of those named by `same_as`."""
    if out is None:
        return
    for other, given in others.items():
        array = given if given is None else _as_ndarray(other, given)  # a library's array lies somewhere, too
        if array is not None and _shares(out, array):
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
    same_place = a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
    return bool(same_place and a.shape == b.shape and steps[0] == steps[1])


def saved(value: Any, kind: type, *, gpu: bool = False) -> None:
    """What a forward pass returned for its backward pass; on a GPU, if that is served."""
    if not isinstance(value, kind):
        raise TypeError(
            f"saved is a {type(value).__name__}, and must be what batch_norm_forward or batch_norm_eval_forward "
            "returned beside y; batch_norm keeps nothing for a backward pass"
        )
    if not gpu and type(value) is not kind:
        raise TypeError("saved is of a forward pass on a GPU, and must be of one on the CPU")


def no_residual(out_residual: Any) -> None:
    """Without a residual there is no gradient of one."""
    if out_residual is not None:
        raise ValueError("out_residual is given, and must be None where the forward pass had no residual")


def moments_vector(name: str, values: Any) -> Array:
    """A vector of float64, one value a channel."""
    array = _as_ndarray(name, values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} has dtype {array.dtype}, and must be real numbers")
    return array.astype(F64, copy=False)


def moments(count: int, mean: Array, m2: Array) -> None:
    """A count, and two vectors of as many channels."""
    if (m2 < 0).any():
        raise ValueError(f"m2 has {m2.min()}, and must be sums of squares: at least 0")
    if not 0 <= count < 2**63:
        said = str(count) if abs(count) < 2**99 else "a number of more than 99 bits"
        raise ValueError(f"count is {said}, and must be from 0 to 2**63 - 1")
    if mean.ndim != 1 or mean.shape != m2.shape:
        raise ValueError(f"mean has shape {mean.shape} and m2 {m2.shape}, and both must have shape (channels,)")


def enough_for_variance(count: int, needed: int) -> None:
    """One value, or two for the unbiased variance."""
    if count < needed:
        raise ValueError(f"count is {count}, and must be at least {needed} for this variance")


def same_channels(mine: int, other: int) -> None:
    """Moments merge channel by channel."""
    if mine != other:
        raise ValueError(f"moments of {other} channels cannot merge with those of {mine}")


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


def features(x: Any, axis: int, num_features: int, *, gpu: bool = False) -> Array:
    """x as an array, which must have the layer's number of channels; left as it is on a GPU, if that is served."""
    there = gpu and type(x) is not np.ndarray and on_gpu(x)
    if not there:
        x = data("x", x)
    shape = device_interface("x", x)["shape"] if there else x.shape
    ndim = len(shape)
    if -ndim <= axis < ndim and shape[axis] != num_features:
        raise ValueError(f"x has shape {shape}, and must have {num_features} channels (num_features) along axis {axis}")
    return x  # type: ignore[no-any-return]


def state(name: str, value: Any, mine: Array) -> Array:
    """A value for a layer's state: of the right shape, a number, and of the layer's dtype."""
    array = _as_ndarray(name, value)
    if array.shape != mine.shape:
        raise ValueError(f"{name} has shape {array.shape} in state, and must have shape {mine.shape}")
    if array.dtype.kind not in "fiu" and not is_bfloat16(array.dtype):
        raise TypeError(f"{name} has dtype {array.dtype} in state, and must be real numbers")
    if name == "num_batches_tracked" and not (0 <= array < 2**63 and array == np.trunc(array)):
        raise ValueError(f"{name} is {array} in state, and must be an integer of at least 0")
    with np.errstate(all="ignore"):
        new: Array = array.astype(mine.dtype)
    if (np.isfinite(array) & ~np.isfinite(new)).any():
        raise ValueError(f"{name} has values in state that are too large, and must fit the layer's dtype {mine.dtype}")
    return new


def state_keys(state: Any, names: list[str]) -> None:
    """A mapping with exactly these keys."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state is a {type(state).__name__}, and must be a mapping, as state_dict returns")
    missing, unknown = [n for n in names if n not in state], [n for n in state if n not in names]
    if missing or unknown:
        raise ValueError(f"state lacks {missing} and has unknown {unknown}; it must have exactly {names}")


# ---- conversions, saving and folding ----


def instance(name: str, value: Any, kind: type) -> None:
    """An object of a class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}, and must be a {kind.__name__}")


def path(value: Any) -> str:
    """A place in the file system; a number would be taken for an open file."""
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(f"path is a {type(value).__name__}, and must be a str or path-like")
    return os.fsdecode(value)


def epsilon(value: Any) -> float:
    """`eps` where it is called epsilon."""
    number = _number("epsilon", value)
    if not 0.0 < number < inf:
        raise ValueError(f"epsilon is {number}, and must be greater than 0 and finite")
    return number


def momentum_of_old(value: Any) -> float:
    """A momentum that weighs the old statistics."""
    number = _number("momentum", value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"momentum is {number}, and must be from 0 to 1: the weight of the old statistics")
    return number


def vectors(named: Mapping[str, tuple[str, Any]], channels: int | None = None) -> dict[str, Array]:
    """Parameters and statistics of any floating type and byte order, one value a channel.

    named: our name → the name for the error, and the value. channels: how many there must be; as many as the first has,
    if None.
    """
    arrays: dict[str, Array] = {}
    for mine, (name, value) in named.items():
        array = _as_ndarray(name, value)
        if not (is_bfloat16(array.dtype) or (array.dtype.kind == "f" and array.itemsize <= 8)):
            raise TypeError(f"{name} has dtype {array.dtype}, and must be float16, bfloat16, float32 or float64")
        if channels is None and array.ndim == 1 and array.size:
            channels = array.size
        if array.shape != (channels,):
            many = "channels" if channels is None else channels
            raise ValueError(f"{name} has shape {array.shape}, and must have shape ({many},): one value a channel")
        arrays[mine] = array
    return arrays


def variance(name: str, values: Array | None, eps: float) -> None:
    """No variance is negative, but for rounding, which `eps` makes up for. NaN passes: it is what the source has."""
    if values is None:
        return
    wrong = np.flatnonzero(values.astype(F64) + eps <= 0)
    if wrong.size:
        raise ValueError(f"{name} has {values[wrong[0]]} in channel {wrong[0]}, and must be variances: at least 0")


def count(name: str, value: Any) -> int:
    """An integer of at least 0, as a 0-d array."""
    array = _as_ndarray(name, value)
    if array.shape != () or array.dtype.kind not in "fiu":
        raise ValueError(f"{name} has shape {array.shape} and dtype {array.dtype}, and must be one integer, shape ()")
    if not (np.isfinite(array) and array >= 0 and array == np.trunc(array)):
        raise ValueError(f"{name} is {array}, and must be an integer of at least 0")
    return int(array)


TORCH = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def torch_state(state: Any, prefix: Any) -> dict[str, Any]:
    """What a state_dict has for one BatchNorm, by name without the prefix: statistics both or neither, none unknown."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state is a {type(state).__name__}, and must be a mapping, as state_dict returns")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix is a {type(prefix).__name__}, and must be a str")
    found = {key[len(prefix) :]: key for key in state if isinstance(key, str) and key.startswith(prefix)}
    known = [prefix + name for name in TORCH]
    if not found.keys() & set(TORCH[:4]):
        raise ValueError(f"state has none of {known[:4]}, and must have parameters or statistics under these names")
    unknown = [key for name, key in found.items() if name not in TORCH]
    if unknown:
        raise ValueError(f"state has unknown keys {unknown} beside those of a BatchNorm, {known}")
    statistics = found.keys() & {"running_mean", "running_var"}
    missing = [prefix + name for name in TORCH[2:4] if name not in found]
    if missing and (statistics or "num_batches_tracked" in found):
        raise ValueError(f"state lacks {missing}, and must have {known[2]} and {known[3]}, or no statistics at all")
    return {name: state[found[name]] for name in TORCH if name in found}


def keras_weights(weights: Any, names: list[str]) -> dict[str, Any]:
    """The weights of Keras's layer by name, of a sequence in their order or a mapping; exactly these."""
    if isinstance(weights, Mapping):
        missing, unknown = [n for n in names if n not in weights], [n for n in weights if n not in names]
        if missing or unknown:
            raise ValueError(
                f"weights lacks {missing} and has unknown {unknown}; with these scale and center it must have "
                f"exactly {names}"
            )
        return {name: weights[name] for name in names}
    try:
        values = list(weights)
    except TypeError:
        raise TypeError(f"weights is a {type(weights).__name__}, and must be a sequence or a mapping") from None
    if len(values) != len(names):
        raise ValueError(
            f"weights has {len(values)} arrays, and with these scale and center must have {len(names)}: {names}"
        )
    return dict(zip(names, values, strict=True))


def flax_variables(variables: Any) -> dict[str, tuple[str, Any]]:
    """Name → the name for the error, and the value, of linen's two collections or nnx's one level."""
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables is a {type(variables).__name__}, and must be a mapping")
    collections = {"params": ("scale", "bias"), "batch_stats": ("mean", "var")}
    found: dict[str, tuple[str, Any]] = {}
    unknown: list[str] = []
    if any(name in variables for name in collections):
        unknown += [str(key) for key in variables if key not in collections]
        for name, known in collections.items():
            inner = variables.get(name, {})
            if not isinstance(inner, Mapping):
                raise TypeError(f"variables[{name!r}] is a {type(inner).__name__}, and must be a mapping")
            found |= {key: (f"{name}.{key}", inner[key]) for key in known if key in inner}
            unknown += [f"{name}.{key}" for key in inner if key not in known]
    else:
        flat = ("scale", "bias", "mean", "var")
        found = {key: (key, variables[key]) for key in flat if variables.get(key) is not None}
        unknown += [str(key) for key in variables if key not in flat]
    missing = [key for key in ("mean", "var") if key not in found]
    if missing or unknown:
        raise ValueError(
            f"variables lacks {missing} and has unknown {unknown}; it must have batch_stats (mean and var) and may "
            "have params (scale and bias), of one BatchNorm"
        )
    return found


def statistics(bn: Any) -> None:
    """A layer must have running statistics."""
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("bn has no running statistics (track_running_stats is False), and must have them")
    not_on_gpu("bn.running_mean", bn.running_mean)


def held(target: str, bn: Any, axis: int | None) -> None:
    """A layer must be one that another library can hold; axis: the only channel axis there, or None."""
    statistics(bn)
    if bn.activation is not None:
        raise ValueError(
            f"bn.activation is {bn.activation!r}, and must be None: {target} has none; set it to None and put the "
            "activation after it there"
        )
    if bn.momentum is None:
        raise ValueError(
            f"bn.momentum is None (a cumulative average), and must be a number: {target} knows no other; set one"
        )
    momentum(bn.momentum)
    if axis is not None and bn.axis != axis:
        raise ValueError(
            f"bn.axis is {bn.axis}, and must be {axis}: {target} has its channels there; set it, and turn the data"
        )


def from_the_file(options: Mapping[str, Any]) -> None:
    """What a file's tensors say cannot be given beside it."""
    for name in ("num_features", "affine", "track_running_stats"):
        if name in options:
            raise TypeError(f"{name} is given, and must come from the file's tensors")


def saved_class(name: Any, cls: type) -> None:
    """A layer is loaded as what it was, or as what is derived from it."""
    if name not in [base.__name__ for base in cls.__mro__]:
        raise ValueError(f"it holds a {name}, and must be loaded as one, not as a {cls.__name__}")


def file_options(key: str, text: Any, names: list[str]) -> dict[str, Any] | None:
    """The options in a file's metadata, all of them known; None where there are none."""
    if text is None:
        return None
    try:
        options = json.loads(text)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"its metadata has {text[:80]!r} under {key!r}, and must have JSON of a layer's options")
    unknown = [name for name in options if name not in names]
    if unknown:
        raise ValueError(f"its metadata has unknown options {unknown}; this version of fastbn knows {names}")
    return options


def file_tensors(tensors: Mapping[str, Any], parameters: Any, track: Any) -> dict[str, Any]:
    """A file's tensors, which must be those that its options say; beside a bias there is a weight, for torch."""
    weight, bias = affine(parameters)
    flag("track_running_stats", track)
    there = {"weight": weight or bias, "bias": bias} | dict.fromkeys(TORCH[2:], track)
    names = [name for name in TORCH if there[name]]
    missing, unknown = [n for n in names if n not in tensors], [n for n in tensors if n not in names]
    if missing or unknown:
        raise ValueError(f"it lacks {missing} and has unknown {unknown}; by its options it must have exactly {names}")
    return {name: tensors[name] for name in names}


def ones(name: str, values: Array) -> None:
    """All 1, as what stands for a parameter that the layer does not have."""
    if not (values == 1).all():
        raise ValueError(f"{name} has other values than 1, and must be 1: by the options the layer has a bias alone")


def output_axis(axis: Any, weight: Array, channels: int) -> int:
    """weight's axis of output channels, counted from the start."""
    ndim = weight.ndim
    number = integer("axis", axis)
    if not -ndim <= number < ndim:
        raise ValueError(f"axis is {number}, and must be from {-ndim} to {ndim - 1} for weight of shape {weight.shape}")
    if weight.shape[number] != channels:
        raise ValueError(
            f"weight has shape {weight.shape}, and must have {channels} (bn's num_features) along axis {number}"
        )
    return number % ndim


def output_bias(bias: Any, channels: int) -> Array:
    """A bias of the layer before, of any type of data."""
    array = data("bias", bias)
    if array.shape != (channels,):
        raise ValueError(f"bias has shape {array.shape}, and must have shape ({channels},): one value a channel")
    return array


def fits(name: str, wide: Array, dtype: np.dtype[Any]) -> Array:
    """`wide` as `dtype`, which must be able to hold it."""
    with np.errstate(all="ignore"):
        result: Array = wide.astype(dtype)
    if (np.isfinite(wide) & ~np.isfinite(result)).any():
        raise ValueError(
            f"{name} when folded has {np.abs(wide[np.isfinite(wide)]).max():.3g}, and must fit weight's dtype {dtype}; "
            "pass weight as a wider type"
        )
    return result


# ---- masks, ghost batches, in place, second order ----


def mask(value: Any, x: Array, axis: int) -> tuple[Array, Array | None]:
    """Which positions of x (of its shape without the channel axis) count, and each one's weight; None: 1 each.

    Both are new. Weights of nothing but 0 and 1 are a boolean mask.
    """
    array = _as_ndarray("mask", value)
    if array.dtype.kind not in "buif" and not is_bfloat16(array.dtype):
        raise TypeError(f"mask has dtype {array.dtype}, and must be bool, or real numbers (weights)")
    positions = x.shape[:axis] + x.shape[axis + 1 :]
    given = array.shape
    if array.ndim == x.ndim and given[axis] == 1:
        array = array.squeeze(axis)
    if array.ndim != len(positions) or any(m not in (1, n) for m, n in zip(array.shape, positions, strict=True)):
        raise ValueError(
            f"mask has shape {given}, and must have shape {positions} (x's {x.shape} without its channel axis), with 1 "
            "for any of these numbers, or with a 1 in the channel axis beside them"
        )
    weights = None
    if array.dtype != bool:
        with np.errstate(over="ignore"):  # of a wider float: infinite, and refused
            array = array.astype(F64)
        if not ((array >= 0) & (array < np.inf)).all():
            wrong = array[~((array >= 0) & (array < np.inf))].flat[0]
            raise ValueError(f"mask has a weight of {wrong}, and must have weights of at least 0 that are finite")
        if not ((array == 0) | (array == 1)).all():
            weights = np.array(np.broadcast_to(array, positions))
        array = array > 0
    return np.array(np.broadcast_to(array, positions)), weights


def enough_valid(count: int, shape: tuple[int, ...]) -> None:
    """`enough_values`, of those that a mask leaves."""
    if count == 1:
        raise ValueError(f"x has shape {shape} and mask leaves one value a channel, and training must have at least 2")


def enough_weight(total: float) -> None:
    """A weight is how often a value counts: training needs more than one value a channel."""
    if not 1 < total < inf:
        raise ValueError(
            f"mask has weights that sum to {total}, and must in training have such as sum to more than 1 (a weight is "
            "how often its value counts) and to a finite number"
        )


def masked_saved(value: Any, kind: type) -> None:
    """What a masked forward pass kept."""
    if not isinstance(value, kind):
        raise TypeError(
            f"saved is a {type(value).__name__}, and must be what masked_batch_norm_forward returned beside y"
        )


def something_kept(value: Any) -> None:
    """A layer's backward pass needs a forward pass."""
    if value is None:
        raise ValueError(
            "backward has nothing to go back over: the last call must be one in training mode "
            "(eval mode keeps nothing; batch_norm_eval_forward does)"
        )


def absent(name: str, value: Any, why: str) -> None:
    """What this class's base has and it has not."""
    if value is not None:
        raise ValueError(f"{name} is given, and must be None: {why}")


def not_batch_axis(axis: int, shape: tuple[int, ...] | None = None) -> None:
    """The batch axis, 0, is cut; it cannot be the channel axis. `shape`: x's, from which `axis` may be counted back."""
    if axis == 0 or (shape is not None and axis == -len(shape)):
        of = "" if shape is None else f" for x of shape {shape}"
        raise ValueError(f"axis is {axis}{of}, and must not be the first, the batch's")


def virtual_batch(size: int, shape: tuple[int, ...]) -> None:
    """Training needs two values a channel, in each virtual batch."""
    if size == 1:
        raise ValueError(
            f"virtual_batch_size is 1, and must be at least 2 for x of shape {shape}: each row has one value a channel"
        )


def invertible(activation_: Any, negative_slope: Any) -> float:
    """`activation`, of one that can be undone."""
    slope = activation(activation_, negative_slope)
    if activation_ == "relu":
        raise ValueError("activation is 'relu', and must be None or 'leaky_relu' in place: relu cannot be undone")
    if slope < float(np.finfo(F32).tiny):
        raise ValueError(
            f"negative_slope is {slope}, and must be at least {np.finfo(F32).tiny:.3g} in place: what is 0 cannot be "
            "undone"
        )
    return slope


def _precision(dtype: np.dtype[Any]) -> tuple[float, float]:
    """From 1 to the next number, and from 0."""
    if is_bfloat16(dtype):
        return 2.0**-7, 2.0**-133
    info = np.finfo(dtype)
    return float(info.eps), float(info.smallest_subnormal)


def invertible_weight(weight: Array, bias: Array, slope: float, dtype: np.dtype[Any]) -> None:
    """weight and bias (float64) by which y, stored as `dtype`, can be turned back into x̂ to 1/16 of a deviation."""
    unit, least = _precision(dtype)
    floor = 1e-150 if dtype == F64 else 1e-30  # their squares, and the gradients' over them, are still numbers
    bound = np.maximum(16 * (unit * np.abs(bias) + least / min(slope, 1.0)), floor)
    wrong = np.flatnonzero(np.abs(weight) < bound)
    if wrong.size:
        c = wrong[0]
        raise ValueError(
            f"weight is {weight[c]:.6g} where bias is {bias[c]:.6g} (in {wrong.size} channels, the first is {c}), and "
            f"must be at least {bound[c]:.3g} in size there: backward divides what is left of y in {dtype} by it"
        )


def itself(name: str, value: Any, other: str, array: Any) -> None:
    """None, or that very object."""
    if value is not None and value is not array:
        raise ValueError(f"{name} is another array than {other}, and must be None or {other} itself")


def overwritten(name: str, x: Any) -> None:
    """An array that will be written over: a writeable ndarray in which no two elements share memory."""
    output(name, x, data(name, x))
    reach = 0  # bytes over which the axes so far are spread
    for step, n in sorted((abs(step), n) for step, n in zip(x.strides, x.shape, strict=True) if n > 1):
        if x.size and step < reach + x.itemsize:
            raise ValueError(f"{name} has elements that overlap in memory (strides {x.strides}), and must not")
        reach += (n - 1) * step


def without_residual(saved: Any) -> None:
    """The double backward knows no residual."""
    if saved.residual:
        raise ValueError("saved is of a forward pass with a residual, and must be of one without")


def cotangent(name: str, value: Any, parameter_: Array | None, channels: int) -> Array:
    """A cotangent of a parameter's gradient, as float64; 0 for None. It must be None where there is no parameter."""
    if value is None:
        return np.zeros(channels)
    if parameter_ is None:
        raise ValueError(f"{name} is given, and must be None where the forward pass had no {name[2:]}")
    checked = parameter(name, value, channels)
    assert checked is not None
    return checked.astype(F64)


def rows(name: str, x: Any) -> Array:
    """`data` with at least one row."""
    x = data(name, x)
    if not x.ndim or not len(x):
        raise ValueError(f"{name} has shape {x.shape}, and must have at least one row")
    return x  # type: ignore[no-any-return]


def some_counted(layers: Any) -> None:
    """A re-estimation of statistics must have had a batch to take them of."""
    for bn in layers:
        if not np.any(bn.num_batches_tracked):
            raise ValueError(f"x has no batch that counts for {bn!r}, and must have one (see its nan_policy)")


# ---- optimizers' state, schedules and estimators ----


def exact_state(name: str, value: Any, mine: Array) -> Array:
    """`state` of the same dtype: what continues bit for bit."""
    array = _as_ndarray(name, value)
    if array.dtype != mine.dtype:
        raise TypeError(f"{name} has dtype {array.dtype} in state, and must have dtype {mine.dtype}")
    return state(name, array, mine)


def number_in(
    name: str, value: Any, low: float, high: float = inf, *, above: bool = False, below: bool = False
) -> float:
    """A float from `low` to `high`; `above`: not `low` itself; `below`: not `high` itself, which infinity never is."""
    number = _number(name, value)
    below = below or high == inf
    if not (low < number if above else low <= number) or not (number < high if below else number <= high):
        least = f"greater than {low:g}" if above else f"at least {low:g}"
        most = "finite" if high == inf else f"less than {high:g}" if below else f"at most {high:g}"
        raise ValueError(f"{name} is {value!r}, and must be {least} and {most}")
    return number


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of a few strings."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}, and must be one of {', '.join(map(repr, choices))}")
    return value


def hidden_layer_sizes(value: Any) -> list[int]:
    """An integer, or any number of them, each at least 1."""
    try:
        sizes = list(value)
    except TypeError:
        sizes = [value]
    return [positive(f"hidden_layer_sizes[{i}]", size) for i, size in enumerate(sizes)]


def enough_rows(rows: int, batch_size: int) -> None:
    """A network with batch normalization cannot be trained on a single row."""
    if rows == 1:
        raise ValueError("X has n_samples=1, and must have at least 2 rows with batch_norm=True")
    if batch_size == 1:
        raise ValueError("batch_size is 1, and must be at least 2 with batch_norm=True")


def weights_leave(rows: int) -> None:
    """Rows of weight 0 are left out; all of them cannot be."""
    if not rows:
        raise ValueError("sample_weight, times class_weight, is zero for every row, and must not be for at least one")


def known_classes(y: Any, classes: Any) -> None:
    """Labels that the classifier knows."""
    unknown = np.setdiff1d(y, classes)
    if unknown.size:
        known = np.asarray(classes).tolist()
        raise ValueError(f"y has classes {unknown.tolist()}, and must have no others than {known}")


def fitted_shape(name: str, value: int, mine: int) -> None:
    """What a network that goes on training was made for."""
    if value != mine:
        raise ValueError(f"y has {value} {name}, and must have {mine}, as in the fit that this one continues")


def needs(what: str, package: str, extra: str) -> str:
    """What an ImportError says."""
    return f"{what} needs {package}: pip install 'fastbn[{extra}]'"


def batch_size(value: Any) -> None:
    """An integer, or "auto"."""
    if not isinstance(value, str):
        positive("batch_size", value)
    elif value != "auto":
        raise ValueError(f"batch_size is {value!r}, and must be 'auto' or an integer of at least 1")


def ghost_size(value: Any) -> None:
    """None, or an integer; one row has no variance."""
    if value is not None and positive("virtual_batch_size", value) == 1:
        raise ValueError("virtual_batch_size is 1, and must be None or at least 2")


def classes(value: Any, mine: Any) -> None:
    """partial_fit must be told of all classes, and always of the same."""
    if value is None and mine is None:
        raise ValueError("classes is None, and must be all classes of the stream at the first partial_fit")
    if not (value is None or mine is None or np.array_equal(value, mine)):
        raise ValueError(f"classes is {value}, and must be None or as at first, {mine}")


def class_weight_of_part(value: Any) -> None:
    """All of y is needed for "balanced"."""
    if isinstance(value, str):
        raise ValueError(
            f"class_weight is {value!r}, and must be None or a dict in partial_fit: a part of a stream does not tell "
            "how frequent the classes are"
        )


def class_weight(value: Any) -> None:
    """The weights of a dict are numbers of at least 0, and finite; the other forms are scikit-learn's to check."""
    for label, weight in value.items() if isinstance(value, Mapping) else ():
        number_in(f"class_weight[{label!r}]", weight, 0)


def same_structure(asked: Mapping[str, Any], fitted: Mapping[str, Any]) -> None:
    """A fit that goes on from another has its network, and must not ask for a different one."""
    for name, value in fitted.items():
        if asked[name] != value:
            raise ValueError(f"{name} is {asked[name]!r}, and must be {value!r}, as in the fit that this one continues")


def endless(name: str, value: Any, wrong: bool) -> None:
    """An option that needs to know when training ends."""
    if wrong:
        raise ValueError(f"{name} is {value!r}, which partial_fit cannot serve: it knows no end")


def finite_network(arrays: Mapping[str, Array]) -> None:
    """Training must not end in NaN or infinity."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"training left {name} with values that are not finite: X or y may have large values and must then be "
                "scaled first, or learning_rate_init is too large"
            )


# ---- feed-forward layers and losses of fastbn.nn ----


def pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """An integer for height and width alike, or one for each, of at least `least`."""
    both = (value, value)
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name} is {value!r}, and must be an integer or a pair of them: height and width")
        both = value[0], value[1]
    try:
        height, width = operator.index(both[0]), operator.index(both[1])
    except TypeError:
        raise TypeError(f"{name} is {value!r}, and must be an integer or a pair of them: height and width") from None
    if min(height, width) < least:
        raise ValueError(f"{name} is {value!r}, and must be at least {least}")
    return height, width


def image_axis(value: Any) -> int:
    """The channel axis of NCHW or of NHWC."""
    number = integer("axis", value)
    if number not in (1, -1):
        raise ValueError(f"axis is {number}, and must be 1 (channels first) or -1 (channels last)")
    return number


def of_layer(name: str, array: Any, dtype: np.dtype[Any]) -> None:
    """An ndarray of the layer's dtype."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is a {type(array).__name__}, and must be an ndarray")
    if data(name, array).dtype != dtype:
        raise TypeError(f"{name} has dtype {array.dtype}, and must have the layer's dtype {dtype}")


def images(name: str, array: Array, channels: int | None, axis: int) -> None:
    """NCHW or NHWC, of so many channels (any, if None)."""
    if array.ndim != 4 or (channels is not None and array.shape[axis] != channels):
        names = ["batch", "height", "width"]
        names.insert(1 if axis == 1 else 3, "channels" if channels is None else str(channels))
        raise ValueError(f"{name} has shape {array.shape}, and must have shape ({', '.join(names)}) with axis={axis}")


def window_fits(x: Array, window: tuple[int, int], room: tuple[int, int]) -> None:
    """A window is no larger than the padded image."""
    if window[0] > room[0] or window[1] > room[1]:
        raise ValueError(
            f"x has shape {x.shape}, and must have images of at least kernel_size, {window}; with their padding they "
            f"have {room}"
        )


def least_axes(name: str, array: Array, least: int) -> None:
    """An array of so many axes or more."""
    if array.ndim < least:
        raise ValueError(f"{name} has shape {array.shape}, and must have at least {least} axes")


def last_axis(name: str, array: Array, features: int) -> None:
    """Rows of so many features."""
    if array.ndim < 2 or array.shape[-1] != features:
        raise ValueError(f"{name} has shape {array.shape}, and must have shape (batch, ..., {features})")


def shape_of(name: str, array: Array, shape: tuple[int, ...]) -> None:
    """An array of exactly this shape."""
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, and must have shape {shape}, as the layer's result had")


def called(value: Any) -> Any:
    """What a layer's last call left for `backward`."""
    if value is None:
        raise ValueError("backward has nothing to go back over: call the layer first")
    return value


def loss_called(value: Any) -> Any:
    """What a loss's last call left for `backward`, which uses it up."""
    if value is None:
        raise ValueError("backward has nothing to go back over: call the loss first, and backward once after it")
    return value


def features_to_normalize(value: Any) -> int:
    """Two or more: one has no variance."""
    number = integer("num_features", value)
    if number < 2:
        raise ValueError(f"num_features is {number}, and must be at least 2: one value has no variance")
    return number


def deviation(init: Any, fan_in: int) -> float:
    """The standard deviation of weights at the start."""
    if isinstance(init, str) and init == "he":
        return float((2 / fan_in) ** 0.5)
    if isinstance(init, (int, float)) and not isinstance(init, bool) and 0 <= init < inf:
        return float(init)
    raise ValueError(f"init is {init!r}, and must be 'he', 'glorot' or a standard deviation of at least 0")


def rows_of_layer(name: str, array: Any, width: int, dtype: np.dtype[Any], count: int | None = None) -> None:
    """An ndarray (batch, width) of the layer's dtype, of as many rows as the x that went before it."""
    of_layer(name, array, dtype)
    if array.ndim != 2 or array.shape[1] != width:
        raise ValueError(f"{name} has shape {array.shape}, and must have shape (batch, {width})")
    if count is not None and len(array) != count:
        raise ValueError(f"{name} has shape {array.shape}, and must have as many rows as x, {count}")


def followed(layer: Any, channels: int, axis: int | None, following: Any) -> None:
    """A BatchNorm of a layer's outputs; `axis`: where a convolution has them."""
    if following.num_features != channels:
        raise ValueError(
            f"the BatchNorm after {layer!r} has num_features {following.num_features}, and must have {channels}"
        )
    if axis is not None and following.axis not in (axis, axis + 4, axis - 4):
        raise ValueError(f"the BatchNorm after {layer!r} has axis {following.axis}, and must have {axis}")


def predictions(name: str, value: Any) -> Array:
    """A network's output: float32 or float64, at least one row."""
    array = data(name, value)
    if array.dtype not in (F32, F64):
        raise TypeError(f"{name} has dtype {array.dtype}, and must be float32 or float64")
    if not array.ndim or not array.size:
        raise ValueError(f"{name} has shape {array.shape}, and must have shape (batch, ...), no axis of it 0")
    return array


def targets(name: str, value: Any, of: str, output: Array, most: float | None = None) -> Array:
    """What a network's output should have been, in that one's shape; from 0 to `most`, if given."""
    array = _as_ndarray(name, value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} has dtype {array.dtype}, and must be real numbers")
    if array.shape != output.shape:
        column = f" or {output.shape[:1]}" if output.shape[1:] == (1,) else ""
        if not column or array.shape != output.shape[:1]:
            raise ValueError(f"{name} has shape {array.shape}, and must have {of}'s shape {output.shape}{column}")
        array = array[:, np.newaxis]
    if most is not None:
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= most):
            raise ValueError(f"{name} goes from {low} to {high}, and must be from 0 to {most:g}")
    return array


def sample_weight(value: Any, rows: int) -> tuple[Array, float]:
    """A weight for each row, and their sum: of at least 0, not all 0, finite."""
    array = _as_ndarray("sample_weight", value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"sample_weight has dtype {array.dtype}, and must be real numbers")
    if array.shape != (rows,):
        raise ValueError(f"sample_weight has shape {array.shape}, and must have shape ({rows},): one a row")
    total = float(array.sum(dtype=F64))
    if not (array.min() >= 0 and 0 < total < inf):
        raise ValueError(
            f"sample_weight goes from {array.min()} to {array.max()}, and must be of at least 0, finite and not all 0"
        )
    return array, total


# ---- diagnostics ----


def loss(value: Any) -> None:
    """Called with a network's output and the targets; `backward` gives the gradient."""
    if not callable(value) or not callable(getattr(value, "backward", None)) or isinstance(value, type):
        raise TypeError(f"loss is {value!r}, and must be a loss, as nn.MSELoss() is: callable, with a backward()")


def some_parameters(model: Any) -> None:
    """A network whose gradient can be looked at."""
    if not any(True for _ in model.parameters()):
        raise ValueError(f"model is {model!r}, and must have parameters to take gradients of")


def optimizer_of(value: Any, model: Any) -> None:
    """An optimizer of this very network."""
    if value.model is not model:
        raise ValueError(f"optimizer is a {type(value).__name__} of another model, and must be one of this model")


def step_size(name: str, value: Any) -> float:
    """What an optimizer may be given as: a learning rate."""
    try:
        return number_in(name, value, 0, above=True)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, and must be an nn.Optimizer or a learning rate") from None


def step_sizes(value: Any) -> Array:
    """A sequence of positive numbers, as float64."""
    array = _as_ndarray("steps", value)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "fiu":
        raise ValueError(f"steps is {value!r}, and must be a sequence of step sizes, at least one")
    for number in array.tolist():
        number_in("steps", number, 0, above=True)
    return array.astype(F64)


def percentiles(value: Any) -> Array:
    """A sequence of numbers from 0 to 100, as float64."""
    array = _as_ndarray("percentiles", value)
    if array.ndim != 1 or array.dtype.kind not in "fiu":
        raise ValueError(f"percentiles is {value!r}, and must be a sequence of numbers from 0 to 100")
    for number in array.tolist():
        number_in("percentiles", number, 0, 100)
    return array.astype(F64)


# ---- recurrent layers ----


def steps_to_normalize(value: Any, norm: Any) -> int | None:
    """How many time steps have statistics: needed by the norms that have them step by step, and by no other."""
    if norm not in ("sum", "recurrent"):
        if value is not None:
            raise ValueError(f"steps is {value!r}, and must be None with norm={norm!r}, which has no step's statistics")
        return None
    if value is None:
        raise ValueError(f"steps is None, and must be the length of the longest training sequence with norm={norm!r}")
    return positive("steps", value)


def trainable_steps(shape: tuple[int, ...], steps: int, most: int) -> None:
    """Beyond the last step that has statistics there is nothing to train."""
    if steps > most:
        raise ValueError(f"x has shape {shape}, {steps} steps, and in training must have at most {most} (steps)")


def sequence(name: str, array: Array, width: int | None, batch_first: bool) -> None:
    """Sequences of at least one step, so many features wide (any, if None)."""
    if array.ndim != 3 or (width is not None and array.shape[2] != width):
        first = "batch, steps" if batch_first else "steps, batch"
        last = "features" if width is None else width
        raise ValueError(
            f"{name} has shape {array.shape}, and must have shape ({first}, {last}) with batch_first={batch_first}"
        )
    if not array.shape[1 if batch_first else 0]:
        raise ValueError(f"{name} has shape {array.shape}, without a step, and must have at least one step")


def initial_state(name: str, array: Array, shape: tuple[int, int]) -> None:
    """A row for each sequence of the batch."""
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, and must have shape {shape}: batch, hidden_size")


def counts(name: str, value: Any, mine: Array) -> Array:
    """Numbers of batches, one a step: no step had more than the one before it."""
    array = _as_ndarray(name, value)
    good = array.shape == mine.shape and array.dtype.kind in "fiu"
    if (
        not good
        or not ((array >= 0) & (array == np.trunc(array)) & (array < 2**63)).all()
        or (np.diff(array) > 0).any()
    ):
        raise ValueError(f"{name} is {array} in state, and must be {mine.size} integers of at least 0 that never rise")
    return array


# ---- arrays on a GPU ----


def on_gpu(x: Any) -> bool:
    """Whether an array lies on a GPU."""
    if isinstance(x, type):  # which has the attribute, and no array
        return False
    try:
        return getattr(x, "__cuda_array_interface__", None) is not None
    except Exception:  # it does, and will not say where; `device_interface` will tell why
        return True


def _kind(x: Any) -> str:
    return f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}"


def not_on_gpu(name: str, x: Any) -> None:
    """Raises for an array on a GPU where only arrays on the CPU are served."""
    if on_gpu(x):
        raise TypeError(
            f"{name} is a {_kind(x)} on a GPU, and must be an array on the CPU: what serves arrays on a GPU is "
            "batch_norm, batch_norm_forward, batch_norm_eval_forward, batch_norm_backward, moments and BatchNorm"
        )


def one_side(name: str, x: Any, others: Mapping[str, Any]) -> None:
    """All arrays are on a GPU, or all on the CPU."""
    side, sides = on_gpu(x), ("the CPU", "a GPU")
    for other, array in others.items():
        if array is not None and on_gpu(array) != side:
            raise TypeError(
                f"{other} is a {_kind(array)} on {sides[not side]} and {name} a {_kind(x)} on {sides[side]}, and both "
                "must be on the same side (a layer moves by its cuda(like=x) and cpu())"
            )


def same_device(name: str, number: int | None, mine: int | None) -> None:
    """Two arrays are not known to be on different GPUs."""
    if number is not None and mine is not None and number != mine:
        raise ValueError(f"{name} is on GPU {number}, and must be on x's, GPU {mine}")


def device_dtype(name: str, typestr: Any) -> np.dtype[Any]:
    """float16, float32 or float64."""
    dtype: np.dtype[Any] | None
    try:
        dtype = np.dtype(typestr)
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if dtype is None or dtype not in (F16, F32, F64):
        raise TypeError(f"{name} has dtype {dtype or typestr}, and must be float16, float32 or float64 on a GPU")
    return dtype


def no_mask(name: str, mask: Any) -> None:
    """The interface's own idea of a masked array."""
    if mask is not None:
        raise TypeError(f"{name} is a masked array, whose mask would be ignored, and must have none")


def aligned(name: str, address: int, dtype: np.dtype[Any]) -> None:
    """The first element lies where a GPU can load it from."""
    if address % dtype.itemsize:
        raise ValueError(
            f"{name} begins at the address {address:#x}, and must begin at a multiple of its itemsize {dtype.itemsize}"
        )


def whole_strides(name: str, strides: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Elements lie at multiples of their size from each other."""
    if any(step % dtype.itemsize for step in strides):
        raise ValueError(f"{name} has strides {strides}, and must have multiples of its itemsize {dtype.itemsize}")


def vector(name: str, p: Array, channels: int) -> None:
    """A value a channel, float32 or float64."""
    _vector(name, p, channels)


def device_interface(name: str, array: Any) -> Mapping[str, Any]:
    """What an array on a GPU says of itself."""
    try:
        interface: Mapping[str, Any] = array.__cuda_array_interface__
    except Exception as error:
        hint = f"; pass {name}.detach() if it requires a gradient" if hasattr(array, "detach") else ""
        raise TypeError(
            f"{name} is a {_kind(array)} that must say where it lies, and does not ({error}){hint}"
        ) from None
    if not isinstance(interface, Mapping):
        raise TypeError(f"{name}.__cuda_array_interface__ is {interface!r}, and must be a dict")
    shape: Any
    strides: Any
    data: Any
    shape, strides, data = (interface.get(key) for key in ("shape", "strides", "data"))
    if not _whole(shape) or min(shape, default=0) < 0:
        _bad_interface(name, "shape", shape, "a tuple of integers of at least 0")
    if not isinstance(interface.get("typestr"), str):
        _bad_interface(name, "typestr", interface.get("typestr"), "a string, as '<f4'")
    if not (isinstance(data, tuple) and len(data) == 2 and _whole(data) and isinstance(data[1], bool)):
        _bad_interface(name, "data", data, "a tuple of an address and a bool")
    if strides is not None and not (_whole(strides) and len(strides) == len(shape)):
        _bad_interface(name, "strides", strides, "None or a tuple of integers, one an axis")
    return interface


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, tuple) and all(isinstance(number, (int, np.integer)) for number in numbers)


def _bad_interface(name: str, key: str, value: Any, must: str) -> None:
    raise TypeError(f"{name}.__cuda_array_interface__ has {key} {value!r}, and must have {must}")


def like_on_gpu(like: Any) -> None:
    """None, or an array on a GPU."""
    if like is not None and not on_gpu(like):
        raise TypeError(f"like is a {_kind(like)}, and must be None or an array on a GPU")


# ---- the trainer ----


def made(name: str, value: Any, kind: type) -> None:
    """An `instance`, and not its class, which has the same attributes."""
    if isinstance(value, type):
        raise TypeError(f"{name} is the class {value.__name__} itself, and must be an instance of {kind.__name__}")
    instance(name, value, kind)


def optimizer_within(value: Any, model: Any) -> None:
    """An optimizer of this network's parameters, or of some of them."""
    mine = [parameter for parameter, _ in model.parameters()]
    ids = set(map(id, mine))
    if not all(id(parameter) in ids for parameter, _ in value.model.parameters()):
        optimizer_of(value, model)


def function(name: str, value: Any) -> None:
    """What is called, or None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} is {value!r}, and must be something that can be called, or None")


def pair_of_data(name: str, value: Any) -> tuple[Any, Any]:
    """Data and targets, in a tuple or list: an array of two rows is neither."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        kind = type(value).__name__
        many = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
        raise TypeError(f"{name} is a {kind}{many}, and must be a pair: (x, targets)")
    return value[0], value[1]


def labels(name: str, value: Any, rows: int) -> Array:
    """A class's number for each row."""
    array = _as_ndarray(name, value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {array.dtype}, and must be integers: the numbers of the classes")
    if array.shape != (rows,):
        raise ValueError(f"{name} has shape {array.shape}, and must have shape ({rows},): one a row of x")
    return array


def logits(name: str, shape: tuple[int, ...]) -> None:
    """Of what gives a number for each of several classes."""
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(f"{name} gives outputs of shape {shape}, and must give one logit a class, of at least 2")


def checkpoint_place(place: str) -> None:
    """A file, or where there can be one."""
    folder = os.path.dirname(place)
    if os.path.isdir(place):
        raise IsADirectoryError(f"checkpoint {place!r} is a folder, and must be a file")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"checkpoint {place!r} needs the folder {folder!r}, which must exist")
    if os.path.exists(place) and not os.path.isfile(place):
        raise OSError(f"checkpoint {place!r} is a device or the like, and must be an ordinary file")
