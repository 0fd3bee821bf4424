"""What is taken for an array, and what is refused: the kinds of input that callers have."""

import re

import ml_dtypes
import numpy as np
import pytest
from conftest import DTYPES, F16, F32, F64, load_kernels, parameters, same_bits, sample

import fastbn
from fastbn import backends

SHAPE = (6, 4, 5, 3)


class HasArray:
    """What offers itself by `__array__` alone."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return self.values


class HasDLPack:
    """What offers itself by `__dlpack__` alone, as an array library's own arrays may."""

    def __init__(self, values):
        self.values = values

    def __dlpack__(self, **how):
        return self.values.__dlpack__(**how)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


class Elsewhere(HasDLPack):
    """An array on another device, with CUDA's number."""

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, **how):
        raise BufferError("it lies on another device")


class Tagged(np.ndarray):
    """A subclass with nothing of its own."""


def memory_mapped(x, folder):
    path = folder / f"{x.ravel()[0]}.npy"
    np.save(path, x)
    return np.load(path, mmap_mode="r")


def read_only(x, folder):
    x = x.copy()
    x.flags.writeable = False
    return x


def nested(x, folder):
    """Lists of Python floats are float64: only that dtype can come as them."""
    return x.tolist() if x.dtype == F64 else x


TAKEN = {
    "C order": lambda x, folder: x.copy(),
    "Fortran order": lambda x, folder: np.asfortranarray(x),
    "transposed": lambda x, folder: np.ascontiguousarray(x.transpose(2, 0, 3, 1)).transpose(1, 3, 0, 2),
    "negative strides": lambda x, folder: np.ascontiguousarray(x[::-1, :, ::-1])[::-1, :, ::-1],
    "every second": lambda x, folder: np.repeat(np.repeat(x, 2, 0), 2, 3)[::2, :, :, ::2],
    "not aligned": lambda x, folder: np.frombuffer(b"." + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
    "read-only": read_only,
    "memory-mapped": memory_mapped,
    "subclass": lambda x, folder: x.copy().view(Tagged),
    "__array__": lambda x, folder: HasArray(x),
    "__dlpack__": lambda x, folder: HasDLPack(x.copy()),
    "nested lists": nested,
}


def unit_of(result, dtype):
    """eps of what the result is computed in, or of what it is rounded to."""
    return max(float(ml_dtypes.finfo(d).eps) for d in (result.dtype, F64 if dtype == F64 else F32))


@pytest.mark.parametrize("kind", TAKEN)
@pytest.mark.parametrize("backend", ["best", "reference"])  # the two ways through the checks
def test_taken(monkeypatch, backend, dtype, kind, tmp_path):
    """The same bits as from an array in C order, as x, as dy and as residual, and nothing is written to it.

    (The sums of another order of axes go another way: those differ by rounding.)
    """
    if kind == "__dlpack__" and dtype not in (F16, F32, F64):
        pytest.skip("NumPy has no DLPack for bfloat16")
    if kind == "memory-mapped" and dtype not in (F16, F32, F64):
        pytest.skip("a .npy file has no bfloat16")
    if backend == "reference":
        monkeypatch.setattr(backends, "_backend", load_kernels(backend))
    x, dy, residual = (sample(SHAPE, dtype, seed=seed) for seed in (0, 1, 2))
    weight, bias, mean, var = parameters(4, F32)
    y, saved = fastbn.batch_norm_forward(x, weight, bias, residual=residual, activation="relu")
    want = [y, *fastbn.batch_norm_backward(dy, saved), fastbn.batch_norm(x, mean, var), fastbn.moments(x).m2]
    given = [TAKEN[kind](array, tmp_path) for array in (x, dy, residual)]
    y, saved = fastbn.batch_norm_forward(given[0], weight, bias, residual=given[2], activation="relu")
    got = [y, *fastbn.batch_norm_backward(given[1], saved), fastbn.batch_norm(given[0], mean, var)]
    for result, expected in zip([*got, fastbn.moments(given[0]).m2], want, strict=True):
        assert type(result) is np.ndarray
        if kind in ("Fortran order", "transposed"):
            result, expected, unit = result.astype(F64), expected.astype(F64), unit_of(result, dtype)
            np.testing.assert_allclose(result, expected, rtol=0, atol=20 * unit * np.abs(expected).max())
        else:
            same_bits(np.ascontiguousarray(result), np.ascontiguousarray(expected))
    if isinstance(given[0], np.ndarray):
        np.testing.assert_array_equal(given[0], x)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("kind", ["every second", "read-only", "__array__", "list"])
def test_parameters_taken(name, kind):
    x = sample(SHAPE, F32)
    given = dict(zip(("weight", "bias", "running_mean", "running_var"), parameters(4, F64), strict=True))
    want = fastbn.batch_norm(x, **given)
    make = {
        "every second": lambda p: np.repeat(p, 2)[::2],
        "read-only": lambda p: read_only(p, None),
        "__array__": HasArray,
        "list": lambda p: p.tolist(),
    }
    given[name] = make[kind](given[name])
    same_bits(fastbn.batch_norm(x, **given), want)


# fmt: off
NUMBERS = "float16, bfloat16, float32 or float64"
SWAPPED = f"{NUMBERS}; it is in the other byte order: use .astype(dtype.newbyteorder('='))"
REFUSED = {
    "0-d": (np.float32(1), ValueError, "x has shape (), and must have 2 to 5 axes"),
    "a number": (1.5, ValueError, "x has shape (), and must have 2 to 5 axes"),
    "one axis": (np.ones(3, F32), ValueError, "x has shape (3,), and must have 2 to 5 axes"),
    "objects": (np.ones((4, 3), object), TypeError, "x has dtype object, and must be " + NUMBERS),
    "an object": (object(), TypeError, "x is a object, and must be an array of " + NUMBERS),
    "integers": (np.ones((4, 3), int), TypeError, "x has dtype int64, and must be " + NUMBERS),
    "complex": (np.ones((4, 3), complex), TypeError, "x has dtype complex128, and must be"),
    "long double": (np.ones((4, 3), np.longdouble), TypeError, "x has dtype float128, and must be"),
    "strings": (np.full((4, 3), "1.0"), TypeError, "x has dtype <U3, and must be"),
    "a record": (np.zeros((4, 3), "f4,f4"), TypeError, "x has dtype [('f0', '<f4'), ('f1', '<f4')], and must be"),
    "big-endian": (np.ones((4, 3), ">f4"), TypeError, "x has dtype >f4, and must be " + SWAPPED),
    "matrix": (np.ones((4, 3), F32).view(np.matrix), TypeError,
               "x is a numpy.matrix, and must be an ndarray; pass numpy.asarray(x)"),
    "masked array": (np.ma.ones((4, 3), F32), TypeError,
                     "x is a masked array, whose mask would be ignored; pass x.filled(...)"),
    "ragged": ([[1.0, 2.0], [3.0]], TypeError, "x is a ragged list, and must be an array of numbers"),
    "another device": (Elsewhere(np.ones((4, 3), F32)), TypeError,
                       "x is a Elsewhere that NumPy cannot read (it lies on another device), and must be an array"),
}
# fmt: on


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_refused(kind):
    value, error, words = REFUSED[kind]
    words = words.replace("float128", str(np.dtype(np.longdouble)))
    if kind == "long double" and np.dtype(np.longdouble) == F64:
        pytest.skip("here a long double is a float64")
    layer = fastbn.BatchNorm(3)
    for call in (fastbn.moments, fastbn.batch_norm_forward, layer, layer.eval()):
        with pytest.raises(error, match="^" + re.escape(words)):
            call(value)


def test_torch_tensors():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = sample(SHAPE, F32)
    same_bits(fastbn.batch_norm_forward(torch.from_numpy(x))[0], fastbn.batch_norm_forward(x)[0])
    needs = torch.from_numpy(x).requires_grad_()
    with pytest.raises(TypeError, match=r"x is a Tensor that NumPy cannot read .* pass its \.detach\(\)"):
        fastbn.batch_norm_forward(needs)


def test_dtypes_are_all_here():
    """A new dtype must be added to what is taken."""
    assert {str(d) for d in DTYPES} == {"float16", "bfloat16", "float32", "float64"}
