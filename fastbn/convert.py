"""A BatchNorm's parameters and statistics to and from those of other libraries, and to and from files.

Nothing of the other libraries is imported: what comes in is anything that NumPy reads (arrays, jax's arrays, torch's
CPU tensors without gradient), what goes out is NumPy arrays, new ones. What each of them means:

============  ===================  ================  ================  ============
source        momentum weighs      its default, eps  running variance  channel axis
============  ===================  ================  ================  ============
torch         the new batch        0.1, 1e-5         unbiased          1
Keras 3       the old statistics   0.99, 1e-3        population        -1
ONNX 15       the old statistics   0.9, 1e-5         population        1
Flax          the old statistics   0.99, 1e-5        population        -1
============  ===================  ================  ================  ============

A layer made by ``from_…`` goes on training as its source would: `momentum` is turned into the weight of the new batch,
and `unbiased` set. Half-precision parameters become float32; any float64 among them makes the layer float64, unless
`dtype` says otherwise. Everything is checked before the layer is made.

The other way, ``to_…`` refuses what changes the result and has no place there: an activation, and for ONNX another
channel axis. Not carried over, as they belong to the training: `unbiased`, `trainable` and `nan_policy`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from . import checks, files
from .layers import BatchNorm

Array = np.ndarray[Any, np.dtype[Any]]
Layer = TypeVar("Layer", bound=BatchNorm)

AFFINE: dict[tuple[bool, bool], bool | str] = {  # by whether there are a weight and a bias
    (True, True): True,
    (True, False): "weight",
    (False, True): "bias",
    (False, False): False,
}


# ---- torch ----


def from_torch(
    state: Mapping[str, Any],
    prefix: str = "",
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    axis: int = 1,
    dtype: Any = None,
    **options: Any,
) -> BatchNorm:
    """A layer from a ``state_dict`` of a torch.nn.BatchNorm1d, 2d, 3d or SyncBatchNorm.

    Parameters
    ----------
    state : mapping
        weight, bias, running_mean, running_var, num_batches_tracked: those that the module has. Without
        num_batches_tracked (torch before 0.4.1) the count starts at 0.
    prefix : str
        What stands before these names in the state of a whole network, the dot included: "layer1.0.bn1.". Keys that do
        not start with it are ignored; those that do must be the five names.
    eps, momentum : float
        The module's own: a state does not hold them. momentum may be None.
    axis : int
        The channel axis of the data that the layer is to take.
    dtype : {float32, float64}, optional
    **options
        More of BatchNorm's: activation, unbiased …

    Returns
    -------
    BatchNorm
        In training mode, as every new layer.

    Raises
    ------
    TypeError, ValueError
        Naming the key.
    """
    values = checks.torch_state(state, prefix)
    arrays, batches = _from_state(values, prefix)
    checks.variance(prefix + "running_var", arrays.get("running_var"), checks.eps(eps))
    layer = _layer(BatchNorm, arrays, dtype, eps=eps, momentum=momentum, axis=axis, **options)
    return _counted(layer, batches)


def to_torch(bn: BatchNorm, prefix: str = "") -> dict[str, Array]:
    """The layer's state, as torch.nn.BatchNorm1d, 2d and 3d take it.

    A state holds neither eps, momentum nor whether there is a weight: make the module with them,
    ``BatchNorm2d(bn.num_features, eps=bn.eps, momentum=bn.momentum, affine=…, track_running_stats=…)``. It holds no
    channel axis, which is always 1 there, and no activation, which is to follow the module.

    Parameters
    ----------
    bn : BatchNorm
    prefix : str
        To stand before each name.

    Returns
    -------
    dict of str to ndarray
        Copies; num_batches_tracked is a 0-d int64. ``{name: torch.from_numpy(value) …}`` is what ``load_state_dict``
        takes. A layer with a bias alone gets a weight of ones beside it, as torch has no such module; one with a
        weight alone fits a module made with ``bias=False``.

    Raises
    ------
    TypeError
    """
    checks.instance("bn", bn, BatchNorm)
    state = _vectors(bn)
    if bn.weight is None and bn.bias is not None:
        state = {"weight": np.ones_like(bn.bias)} | state
    state = {prefix + name: value for name, value in state.items()}
    if bn.num_batches_tracked is not None:
        state[prefix + "num_batches_tracked"] = np.array(bn.num_batches_tracked, np.int64)
    return state


# ---- Keras ----


def from_keras(
    weights: Sequence[Any] | Mapping[str, Any],
    *,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    axis: int = -1,
    center: bool = True,
    scale: bool = True,
    dtype: Any = None,
    **options: Any,
) -> BatchNorm:
    """A layer from the weights and settings of a keras.layers.BatchNormalization (Keras 3).

    Parameters
    ----------
    weights : sequence or mapping
        gamma, beta, moving_mean, moving_variance, in the order of ``get_weights()`` or by these names; gamma only if
        `scale`, beta only if `center`.
    momentum : float from 0 to 1
        The weight of the old statistics.
    epsilon : float
    axis : int
    center, scale : bool
        Whether there is a beta, a gamma.
    dtype : {float32, float64}, optional
    **options
        More of BatchNorm's. ``unbiased=True`` where the training was done by TensorFlow's fused kernel, whose running
        variance is the unbiased one.

    Returns
    -------
    BatchNorm

    Raises
    ------
    TypeError, ValueError
        Naming the weight.
    """
    theirs = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    if not checks.flag("scale", scale):
        del theirs["weight"]
    if not checks.flag("center", center):
        del theirs["bias"]
    values = checks.keras_weights(weights, list(theirs.values()))
    return _from_old_weighing(
        {name: (key, values[key]) for name, key in theirs.items()},
        dtype, momentum=momentum, epsilon=epsilon, axis=axis, **options,
    )  # fmt: skip


def to_keras(bn: BatchNorm) -> tuple[dict[str, Any], list[Array]]:
    """What makes and fills a keras.layers.BatchNormalization (Keras 3).

    Parameters
    ----------
    bn : BatchNorm
        With running statistics, without activation, and with a momentum that is not None.

    Returns
    -------
    config : dict
        axis, momentum (of the old statistics), epsilon, center, scale: ``BatchNormalization(**config)``.
    weights : list of ndarray
        For ``set_weights``, once the layer is built: gamma, beta, moving_mean, moving_variance, those that it has.

    Raises
    ------
    TypeError, ValueError
        Where Keras has no such layer.
    """
    momentum = _held("Keras's BatchNormalization", bn)
    config = {
        "axis": int(bn.axis),
        "momentum": momentum,
        "epsilon": float(bn.eps),
        "center": bn.bias is not None,
        "scale": bn.weight is not None,
    }
    return config, list(_vectors(bn).values())


# ---- ONNX ----


def from_onnx(
    scale: Any,
    B: Any,
    input_mean: Any,
    input_var: Any,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    dtype: Any = None,
    **options: Any,
) -> BatchNorm:
    """A layer from the inputs and attributes of an ONNX BatchNormalization (operator set 15).

    Parameters
    ----------
    scale, B, input_mean, input_var : array of shape (channels,)
    epsilon : float
    momentum : float from 0 to 1
        The weight of the old statistics.
    dtype : {float32, float64}, optional
    **options
        More of BatchNorm's; `axis` is 1, as always in ONNX, unless given.

    Returns
    -------
    BatchNorm

    Raises
    ------
    TypeError, ValueError
        Naming the input.
    """
    values = {"weight": scale, "bias": B, "running_mean": input_mean, "running_var": input_var}
    names = dict(zip(values, ONNX, strict=True))
    return _from_old_weighing(
        {name: (names[name], value) for name, value in values.items()},
        dtype, momentum=momentum, epsilon=epsilon, **options,
    )  # fmt: skip


ONNX = ("scale", "B", "input_mean", "input_var")


def to_onnx(bn: BatchNorm) -> tuple[dict[str, Array], dict[str, float]]:
    """The inputs and attributes of an ONNX BatchNormalization (operator set 15).

    Parameters
    ----------
    bn : BatchNorm
        With running statistics, without activation, with a momentum that is not None and axis 1.

    Returns
    -------
    inputs : dict of str to ndarray
        scale, B, input_mean, input_var, in the operator's order. Where the layer has no weight or no bias, ones and
        zeros, as these inputs are not optional.
    attributes : dict of str to float
        epsilon and momentum (of the old statistics): ``make_node("BatchNormalization", ["X", *inputs], ["Y"],
        **attributes)`` is the layer in eval mode; for training add ``training_mode=1`` and two outputs.

    Raises
    ------
    TypeError, ValueError
        Where ONNX has no such operator.
    """
    momentum = _held("ONNX's BatchNormalization", bn, axis=1)
    values = _vectors(bn)
    ones = np.ones_like(values["running_mean"])
    values = {"weight": ones, "bias": np.zeros_like(ones)} | values
    return dict(zip(ONNX, values.values(), strict=True)), {"epsilon": float(bn.eps), "momentum": momentum}


# ---- Flax ----


def from_flax(
    variables: Mapping[str, Any],
    *,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    axis: int = -1,
    dtype: Any = None,
    **options: Any,
) -> BatchNorm:
    """A layer from the variables of a flax.linen.BatchNorm or flax.nnx.BatchNorm.

    Parameters
    ----------
    variables : mapping
        Of linen: ``{"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}``. Of nnx: the four by their names,
        as ``nnx.state(module)`` gives them as a pure dict. scale and bias may be absent.
    momentum : float from 0 to 1
        The weight of the old statistics.
    epsilon : float
    axis : int
    dtype : {float32, float64}, optional
    **options
        More of BatchNorm's.

    Returns
    -------
    BatchNorm

    Raises
    ------
    TypeError, ValueError
        Naming the variable.
    """
    theirs = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    values = checks.flax_variables(variables)
    return _from_old_weighing(
        {name: values[key] for name, key in theirs.items() if key in values},
        dtype, momentum=momentum, epsilon=epsilon, axis=axis, **options,
    )  # fmt: skip


def to_flax(bn: BatchNorm) -> tuple[dict[str, Any], dict[str, dict[str, Array]]]:
    """What makes and fills a flax.linen.BatchNorm.

    Parameters
    ----------
    bn : BatchNorm
        With running statistics, without activation, and with a momentum that is not None.

    Returns
    -------
    config : dict
        axis, momentum (of the old statistics), epsilon, use_bias, use_scale: ``nn.BatchNorm(**config)``.
    variables : dict
        ``{"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}``, for ``apply``; scale and bias where the
        layer has them.

    Raises
    ------
    TypeError, ValueError
        Where Flax has no such layer.
    """
    momentum = _held("Flax's BatchNorm", bn)
    values = _vectors(bn)
    config = {
        "axis": int(bn.axis),
        "momentum": momentum,
        "epsilon": float(bn.eps),
        "use_bias": bn.bias is not None,
        "use_scale": bn.weight is not None,
    }
    variables = {
        "params": {theirs: values[name] for theirs, name in (("scale", "weight"), ("bias", "bias")) if name in values},
        "batch_stats": {"mean": values["running_mean"], "var": values["running_var"]},
    }
    return config, variables


# ---- files ----

KEY = "fastbn"  # of the options in a file's metadata

# The options as JSON holds them; attributes may have been set to NumPy's numbers.
OPTIONS: dict[str, Callable[[BatchNorm], Any]] = {
    "num_features": lambda bn: int(bn.num_features),
    "eps": lambda bn: float(bn.eps),
    "momentum": lambda bn: None if bn.momentum is None else float(bn.momentum),
    "affine": lambda bn: bn.affine,
    "track_running_stats": lambda bn: bn.track_running_stats,
    "unbiased": lambda bn: bool(bn.unbiased),
    "trainable": lambda bn: bool(bn.trainable),
    "nan_policy": lambda bn: bn.nan_policy,
    "axis": lambda bn: int(bn.axis),
    "activation": lambda bn: bn.activation,
    "negative_slope": lambda bn: float(bn.negative_slope),
    "dtype": lambda bn: bn.dtype.name,
    "training": lambda bn: bool(bn.training),
}


def save(bn: BatchNorm, path: str | os.PathLike[str]) -> None:
    """Write a layer to a safetensors file.

    The tensors are those of `to_torch`, under torch's names, so that ``safetensors.torch.load_file`` reads them and
    torch.nn.BatchNorm1d, 2d and 3d take them. The layer's options are in the file's metadata, as JSON, under "fastbn".

    The file is written beside its place and moved there when it is complete and on the disk: if anything goes
    wrong before (a full disk, Ctrl-C), what stood there stays, and nothing is left beside it.

    Parameters
    ----------
    bn : BatchNorm
    path : str or path-like
        Where a file stands already, it is replaced, and its permissions are kept.

    Raises
    ------
    ImportError
        Without the package safetensors: ``pip install 'fastbn[io]'``.
    TypeError, ValueError
        Where an attribute was set to what no layer can have.
    OSError
        As the system says.
    """
    safetensors = _safetensors()
    place = os.path.realpath(checks.path(path))
    checks.instance("bn", bn, BatchNorm)
    options = {name: get(bn) for name, get in OPTIONS.items()} | {name: getattr(bn, name) for name in bn.OWN_OPTIONS}
    tensors = to_torch(bn)
    _restore(type(bn), options, tensors)  # what cannot be loaded again is not saved
    files.write(place, safetensors.numpy.save(tensors, {KEY: json.dumps(options | {"class": type(bn).__name__})}))


def load(path: str | os.PathLike[str], cls: type[Layer] = BatchNorm, **options: Any) -> Layer:  # type: ignore[assignment]
    """Read a layer from a safetensors file, as `save` or torch wrote it.

    Parameters
    ----------
    path : str or path-like
        A file of `save` gives an equal layer. One without options, such as ``safetensors.torch.save_file`` writes from
        the state of a torch.nn.BatchNorm, gives a layer with BatchNorm's defaults, which are torch's. For one layer
        out of a larger file see `from_torch`.
    cls : type
        The class of the layer that was saved, or one derived from it.
    **options
        Others than the file's: `momentum`, `axis` …

    Returns
    -------
    BatchNorm

    Raises
    ------
    ImportError
        Without the package safetensors: ``pip install 'fastbn[io]'``.
    ValueError
        Naming the file, and what it lacks or has wrong.
    OSError
        As the system says.
    """
    safetensors = _safetensors()
    place = checks.path(path)
    with open(place, "rb") as file:
        data = file.read()
    try:
        found = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{place!r} is not a safetensors file: {error}") from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    try:
        tensors = {name: _tensor(name, tensor) for name, tensor in found}
        checks.from_the_file(options)
        kinds: list[type[BatchNorm]] = [BatchNorm, *BatchNorm.__subclasses__()]
        own = {name for kind in kinds for name in kind.OWN_OPTIONS}
        known = [*OPTIONS, "class", *sorted(own)]
        stored = checks.file_options(KEY, header.get("__metadata__", {}).get(KEY), known)
        if stored is not None:
            checks.saved_class(stored.pop("class", BatchNorm.__name__), cls)
        return _restore(cls, stored, tensors, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place!r} holds no BatchNorm: {error}") from error


def _safetensors() -> ModuleType:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "saving and loading layers needs the package safetensors, which cannot be imported "
            f"({error}): pip install 'fastbn[io]'"
        ) from error
    return safetensors


def _tensor(name: str, tensor: Mapping[str, Any]) -> Array:
    """A tensor of a file; safetensors' own reader knows no bfloat16."""
    dtypes = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4"}
    kind = tensor["dtype"]
    if kind not in dtypes:
        raise TypeError(f"{name} has dtype {kind}, and must be one of {', '.join(dtypes)}")
    array = np.frombuffer(tensor["data"], dtypes[kind]).reshape(tensor["shape"])
    if kind == "BF16":  # the upper half of a float32
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array


def _restore(cls: type[Layer], options: dict[str, Any] | None, tensors: dict[str, Array], **more: Any) -> Layer:
    """A layer from what is in a file; options None: the file has none, and is torch's."""
    if options is None:
        arrays, batches = _from_state(checks.torch_state(tensors, ""), "")
        training = checks.flag("training", more.pop("training", True))
        return _counted(_layer(cls, arrays, more.pop("dtype", None), **more), batches).train(training)
    rest = options | more
    training = checks.flag("training", rest.pop("training", True))
    channels = checks.positive("num_features", rest.pop("num_features", None))
    affine, track = rest.pop("affine", True), rest.pop("track_running_stats", True)
    arrays, batches = _from_state(checks.file_tensors(tensors, affine, track), "", channels)
    if affine == "bias":
        checks.ones("weight", arrays.pop("weight"))
    return _counted(_layer(cls, arrays, rest.pop("dtype", None), channels, **rest), batches).train(training)


def _from_state(state: Mapping[str, Any], prefix: str, channels: int | None = None) -> tuple[dict[str, Array], int]:
    """The arrays of a state whose keys are checked, and num_batches_tracked."""
    name = "num_batches_tracked"
    batches = checks.count(prefix + name, state[name]) if name in state else 0
    return checks.vectors({n: (prefix + n, value) for n, value in state.items() if n != name}, channels), batches


def _counted(layer: Layer, batches: int) -> Layer:
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked = batches
    return layer


# ---- shared ----


def _vectors(bn: BatchNorm) -> dict[str, Array]:
    """Copies of the arrays that a layer has, under torch's names and in torch's order."""
    values = {name: getattr(bn, name) for name in ("weight", "bias", "running_mean", "running_var")}
    return {name: np.array(value, order="C") for name, value in values.items() if value is not None}


def _layer(
    cls: type[Layer], arrays: dict[str, Array], dtype: Any, channels: int | None = None, **options: Any
) -> Layer:
    """A layer with copies of these arrays, which are checked."""
    if channels is None:
        channels = next(iter(arrays.values())).size
    if dtype is None:
        dtype = np.result_type(np.float32, *arrays.values())
    layer = cls(
        channels,
        affine=AFFINE["weight" in arrays, "bias" in arrays],
        track_running_stats="running_mean" in arrays,
        dtype=dtype,
        **options,
    )
    checks.variance("running_var", arrays.get("running_var"), layer.eps)
    for name, value in arrays.items():
        getattr(layer, name)[...] = value
    return layer


def _from_old_weighing(
    named: dict[str, tuple[str, Any]], dtype: Any, *, momentum: Any, epsilon: Any, **options: Any
) -> BatchNorm:
    """A layer from a library whose momentum weighs the old statistics. named: our name → its name there, and value."""
    eps, old = checks.epsilon(epsilon), checks.momentum_of_old(momentum)
    arrays = checks.vectors(named)
    checks.variance(named["running_var"][0], arrays["running_var"], eps)
    return _layer(BatchNorm, arrays, dtype, momentum=_complement(old), eps=eps, **{"unbiased": False} | options)


def _held(target: str, bn: Any, axis: int | None = None) -> float:
    """Momentum as the weight of the old statistics, of a layer that `target` can hold."""
    checks.instance("bn", bn, BatchNorm)
    checks.held(target, bn, axis)
    return _complement(bn.momentum)


def _complement(momentum: float) -> float:
    """1 - momentum in decimal: 0.99 gives 0.01, and that gives 0.99 again."""
    return float(1 - Decimal(repr(float(momentum))))
