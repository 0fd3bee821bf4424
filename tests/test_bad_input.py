"""What bad input gets: an error that names the argument, what it was and what it must be; nothing is touched."""

# ruff: noqa: E501 - the tables have one case a line

from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
from conftest import sample
from hypothesis import given
from hypothesis import strategies as st

import fastbn
from fastbn import convert

X = sample((4, 3, 5), np.float32)
F3, D3 = np.ones(3, np.float32), np.ones(3)


class Bad(NamedTuple):
    arguments: dict
    error: type
    words: str  # what the message must contain, parts separated by " … "


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


# x and axis: for every function that takes them.
BAD_X = {
    "rank 1": Bad({"x": np.ones(3)}, ValueError, "x has shape (3,), and must have 2 to 5 axes"),
    "rank 0": Bad({"x": np.float32(1)}, ValueError, "x has shape (), and must have 2 to 5 axes"),
    "rank 6": Bad({"x": np.ones((1, 3, 1, 1, 1, 2))}, ValueError, "x has shape (1, 3, 1, 1, 1, 2), and must have 2 to 5 axes"),
    "int64": Bad({"x": np.ones((4, 3), int)}, TypeError, "x has dtype int64, and must be float16, bfloat16, float32 or float64"),
    "bool": Bad({"x": np.ones((4, 3), bool)}, TypeError, "x has dtype bool, and must be float16, bfloat16, float32 or float64"),
    "uint8": Bad({"x": np.ones((4, 3), np.uint8)}, TypeError, "x has dtype uint8, and must be float16, bfloat16, float32 or float64"),
    "complex64": Bad({"x": np.ones((4, 3), np.complex64)}, TypeError, "x has dtype complex64, and must be float16, bfloat16, float32 or float64"),
    "object": Bad({"x": np.ones((4, 3), object)}, TypeError, "x has dtype object, and must be float16, bfloat16, float32 or float64"),
    "None": Bad({"x": None}, TypeError, "x is a NoneType, and must be an array of float16, bfloat16, float32 or float64"),
    "strings": Bad({"x": [["a", "b"]]}, TypeError, "x has dtype <U1, and must be float16, bfloat16, float32 or float64"),
    "structured": Bad({"x": np.zeros((4, 3), "f4,f4")}, TypeError, "x has dtype … must be float16, bfloat16, float32 or float64"),
    "integers in a list": Bad({"x": [[1, 2], [3, 4]]}, TypeError, "x has dtype int64, and must be float16, bfloat16, float32 or float64"),
    "byte order": Bad({"x": X.astype(X.dtype.newbyteorder())}, TypeError, "x has dtype … byte order"),
    "masked": Bad({"x": np.ma.masked_less(X, 0)}, TypeError, "x is a masked array … .filled("),
    "matrix": Bad({"x": np.ones((4, 3)).view(np.matrix)}, TypeError, "x is a numpy.matrix, and must be an ndarray"),
    "axis above": Bad({"axis": 3}, ValueError, "axis is 3, and must be from -3 to 2"),
    "axis below": Bad({"axis": -4}, ValueError, "axis is -4, and must be from -3 to 2"),
    "axis float": Bad({"axis": 1.0}, TypeError, "axis is 1.0, and must be an integer"),
    "axis None": Bad({"axis": None}, TypeError, "axis is None, and must be an integer"),
    "num_threads 0": Bad({"num_threads": 0}, ValueError, "num_threads is 0, and must be at least 1"),
    "num_threads -1": Bad({"num_threads": -1}, ValueError, "num_threads is -1, and must be at least 1"),
    "num_threads float": Bad({"num_threads": 2.0}, TypeError, "num_threads is 2.0, and must be an integer"),
    "num_threads huge": Bad({"num_threads": 2**70}, ValueError, "num_threads is 1180591620717411303424, and must be"),
}  # fmt: skip

# weight, bias, eps and out: for every function that normalizes.
BAD_PARAMETERS = {
    "weight short": Bad({"weight": np.ones(2)}, ValueError, "weight has shape (2,), and must have shape (3,)"),
    "weight rank": Bad({"weight": np.ones((3, 1))}, ValueError, "weight has shape (3, 1), and must have shape (3,)"),
    "weight scalar": Bad({"weight": 1.0}, ValueError, "weight has shape (), and must have shape (3,)"),
    "weight int": Bad({"weight": np.ones(3, int)}, TypeError, "weight has dtype int64, and must be float32 or float64"),
    "weight half": Bad({"weight": np.ones(3, np.float16)}, TypeError, "weight has dtype float16, and must be float32 or float64"),
    "weight complex": Bad({"weight": np.ones(3, complex)}, TypeError, "weight has dtype complex128, and must be float32 or float64"),
    "weight masked": Bad({"weight": np.ma.masked_less(D3, 0)}, TypeError, "weight is a masked array"),
    "bias long": Bad({"bias": np.ones(4)}, ValueError, "bias has shape (4,), and must have shape (3,)"),
    "bias object": Bad({"bias": np.ones(3, object)}, TypeError, "bias has dtype object, and must be float32 or float64"),
    "eps 0": Bad({"eps": 0.0}, ValueError, "eps is 0.0, and must be greater than 0"),
    "eps int 0": Bad({"eps": 0}, ValueError, "eps is 0.0, and must be greater than 0"),
    "eps negative": Bad({"eps": -1e-5}, ValueError, "eps is -1e-05, and must be greater than 0"),
    "eps NaN": Bad({"eps": np.nan}, ValueError, "eps is nan, and must be greater than 0"),
    "eps infinite": Bad({"eps": np.inf}, ValueError, "eps is inf, and must be greater than 0 and finite"),
    "eps huge": Bad({"eps": 10**400}, ValueError, "eps is … and must be greater than 0 and finite"),
    "eps str": Bad({"eps": "1e-5"}, TypeError, "eps is '1e-5', and must be a number"),
    "eps None": Bad({"eps": None}, TypeError, "eps is None, and must be a number"),
    "eps complex": Bad({"eps": 1j}, TypeError, "eps is 1j, and must be a number"),
    "out shape": Bad({"out": np.zeros((4, 3, 6), "f4")}, ValueError, "out has shape (4, 3, 6), and must have x's shape (4, 3, 5)"),
    "out rank": Bad({"out": np.zeros(60, "f4")}, ValueError, "out has shape (60,), and must have x's shape (4, 3, 5)"),
    "out dtype": Bad({"out": np.zeros((4, 3, 5))}, TypeError, "out has dtype float64, and must have x's dtype float32"),
    "out list": Bad({"out": X.tolist()}, TypeError, "out is a list, and must be an ndarray"),
    "out read-only": Bad({"out": read_only(X)}, ValueError, "out is read-only, and must be writeable"),
}  # fmt: skip

# The running statistics: for batch_norm in both modes and batch_norm_eval_forward.
BAD_STATISTICS = {
    "mean alone": Bad({"running_var": None}, ValueError, "running_var is None … both or neither"),
    "var alone": Bad({"running_mean": None}, ValueError, "running_mean is None … both or neither"),
    "mean short": Bad({"running_mean": np.zeros(2)}, ValueError, "running_mean has shape (2,), and must have shape (3,)"),
    "var long": Bad({"running_var": np.ones(4)}, ValueError, "running_var has shape (4,), and must have shape (3,)"),
    "var int": Bad({"running_var": np.ones(3, int)}, TypeError, "running_var has dtype int64, and must be float32 or float64"),
    "mean half": Bad({"running_mean": np.ones(3, np.float16)}, TypeError, "running_mean has dtype float16, and must be"),
}  # fmt: skip

BAD_MOMENTUM = {
    "momentum above": Bad({"momentum": 1.1}, ValueError, "momentum is 1.1, and must be from 0 to 1"),
    "momentum below": Bad({"momentum": -0.1}, ValueError, "momentum is -0.1, and must be from 0 to 1"),
    "momentum NaN": Bad({"momentum": np.nan}, ValueError, "momentum is nan, and must be from 0 to 1"),
    "momentum huge": Bad({"momentum": 10**400}, ValueError, "momentum is … and must be from 0 to 1"),
    "momentum str": Bad({"momentum": "0.1"}, TypeError, "momentum is '0.1', and must be a number"),
    "momentum None": Bad({"momentum": None}, TypeError, "momentum is None, and must be a number"),
}

ONE_VALUE = {
    "one image": Bad({"x": np.ones((1, 3, 1))}, ValueError, "x has shape (1, 3, 1): one value a channel"),
    "one row": Bad({"x": np.ones((1, 3))}, ValueError, "x has shape (1, 3): one value a channel"),
    "a view with gaps": Bad(
        {"x": np.ones((1, 6, 1))[:, ::2]}, ValueError, "x has shape (1, 3, 1): one value a channel"
    ),
}

BAD_UPDATE = {
    "mean list": Bad({"running_mean": [0.0] * 3}, TypeError, "running_mean is a list, and must be an ndarray to be updated"),
    "var read-only": Bad({"running_var": read_only(D3)}, ValueError, "running_var is read-only, and must be writeable"),
    "mean read-only": Bad({"running_mean": read_only(F3)}, ValueError, "running_mean is read-only, and must be writeable"),
}  # fmt: skip

CALLS = {
    "batch_norm in training": (fastbn.batch_norm, {"running_mean": D3, "running_var": D3, "weight": F3, "bias": F3, "training": True}),
    "batch_norm": (fastbn.batch_norm, {"running_mean": D3, "running_var": D3, "weight": F3, "bias": F3}),
    "batch_norm_forward": (fastbn.batch_norm_forward, {"weight": F3, "bias": F3}),
    "batch_norm_eval_forward": (fastbn.batch_norm_eval_forward, {"running_mean": D3, "running_var": D3}),
    "moments": (fastbn.moments, {}),
}  # fmt: skip

TABLE = [
    pytest.param(call, bad, id=f"{call}-{name}")
    for table, calls in [
        (BAD_X, list(CALLS)),
        (BAD_PARAMETERS, [call for call in CALLS if call != "moments"]),
        (BAD_STATISTICS, ["batch_norm in training", "batch_norm", "batch_norm_eval_forward"]),
        (BAD_MOMENTUM, ["batch_norm in training", "batch_norm"]),
        (ONE_VALUE, ["batch_norm in training", "batch_norm_forward"]),
        (BAD_UPDATE, ["batch_norm in training"]),
    ]
    for call in calls
    for name, bad in table.items()
]


def fresh(arguments):
    """Arguments of its own for each test: what a mistaken call writes must not reach the next."""
    return {
        name: value.copy()
        if isinstance(value, np.ndarray) and name.startswith("running") and value.flags.writeable
        else value
        for name, value in arguments.items()
    }


def raises(call, error, words):
    with pytest.raises(error) as caught:
        call()
    message, at = str(caught.value), 0
    for part in words.split(" … "):
        found = message.find(part, at)
        assert found >= 0, f"{part!r} is not in {message!r}"
        at = found + len(part)


@pytest.mark.parametrize(("call", "bad"), TABLE)
def test_bad_argument(call, bad):
    """Statistics, `out` and x are what they were."""
    function, good = CALLS[call]
    arguments = fresh({"x": X} | good | bad.arguments)
    if call != "moments":
        arguments.setdefault("out", np.full(np.shape(arguments["x"]), 7, getattr(arguments["x"], "dtype", np.float32)))
    arrays = {name: (value, value.copy()) for name, value in arguments.items() if isinstance(value, np.ndarray)}
    raises(lambda: function(**arguments), bad.error, bad.words)
    for name, (value, before) in arrays.items():
        np.testing.assert_array_equal(value, before, err_msg=name)


def test_neither_statistics_nor_training():
    raises(lambda: fastbn.batch_norm(X), ValueError, "running_mean and running_var are None … training=True")
    raises(lambda: fastbn.batch_norm_eval_forward(X, None, None), ValueError, "running_mean and running_var are None")


def test_statistics_are_one_array():
    both = D3.copy()
    raises(
        lambda: fastbn.batch_norm(X, both, both, training=True), ValueError, "running_mean and running_var share memory"
    )
    assert (both == 1).all()


# ---- overlaps ----


@pytest.mark.parametrize("by", [1, 3, 59])
def test_out_partly_overlaps_x(by):
    buffer = sample((2, 60), np.float32).ravel()
    x, out = buffer[:60].reshape(4, 3, 5), buffer[by : by + 60].reshape(4, 3, 5)
    before, mean, var = buffer.copy(), D3.copy(), D3.copy()
    for function, arguments in [
        (fastbn.batch_norm, {"running_mean": mean, "running_var": var, "training": True}),
        (fastbn.batch_norm, {"running_mean": mean, "running_var": var}),
        (fastbn.batch_norm_forward, {}),
        (fastbn.batch_norm_eval_forward, {"running_mean": mean, "running_var": var}),
    ]:
        raises(lambda f=function, a=arguments: f(x, out=out, **a), ValueError, "out overlaps x in memory, and must not")
    np.testing.assert_array_equal(buffer, before)
    assert (mean == 1).all() and (var == 1).all()


class Wrapper:
    """Another library's array, over memory of its own."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return self.values


def test_out_overlaps_another_librarys_array():
    """A wrapper's memory is looked at like an ndarray's; y over exactly x is still allowed where nothing is kept."""
    buffer = sample((2, 60), np.float32).ravel()
    before = buffer.copy()
    x, moved = buffer[:60].reshape(4, 3, 5), buffer[3:63].reshape(4, 3, 5)
    raises(lambda: fastbn.batch_norm_forward(Wrapper(x), out=x), ValueError, "out overlaps x in memory, and must not")
    raises(lambda: fastbn.batch_norm(Wrapper(x), training=True, out=moved), ValueError, "out overlaps x in memory")
    _, saved = fastbn.batch_norm_forward(X)
    raises(lambda: fastbn.batch_norm_backward(Wrapper(x), saved, out=moved), ValueError, "out overlaps dy in memory")
    np.testing.assert_array_equal(buffer, before)
    y = fastbn.batch_norm_forward(x.copy())[0]
    np.testing.assert_array_equal(fastbn.batch_norm(Wrapper(x), training=True, out=x), y)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
def test_a_statistic_is_a_parameter(name, statistic):
    """Its update would change the parameter."""
    p = D3.copy()
    arguments = {"running_mean": D3.copy(), "running_var": D3.copy()} | {name: p, statistic: p}
    raises(
        lambda: fastbn.batch_norm(X, training=True, **arguments),
        ValueError,
        f"{name} shares memory with running_mean or running_var",
    )
    assert (p == 1).all()
    memory = np.ones(2 * len(D3))  # or part of it
    for part in (memory[: len(D3)], memory[len(D3) - 1 : -1]):
        arguments |= {name: part, statistic: memory[len(D3) - 2 : -2]}
        call = partial(fastbn.batch_norm, X, training=True, **arguments)
        raises(call, ValueError, f"{name} shares memory")
    arguments |= {name: memory[: len(D3)], statistic: memory[len(D3) :]}
    fastbn.batch_norm(X, training=True, **arguments)
    assert (memory[: len(D3)] == 1).all() and (memory[len(D3) :] != 1).all()


def test_out_is_x_in_another_order():
    """The same memory, element for element elsewhere."""
    x = sample((3, 3), np.float32)
    before = x.copy()
    raises(lambda: fastbn.batch_norm(x, training=True, out=x.T), ValueError, "out overlaps x")
    raises(lambda: fastbn.batch_norm(x, training=True, out=x[::-1]), ValueError, "out overlaps x")
    np.testing.assert_array_equal(x, before)


def test_saved_input_must_not_be_overwritten():
    """batch_norm_forward keeps x for the backward pass; so neither it nor backward writes there."""
    x = X.copy()
    raises(lambda: fastbn.batch_norm_forward(x, out=x), ValueError, "out overlaps x in memory, and must not")
    raises(
        lambda: fastbn.batch_norm_eval_forward(x, D3, D3, out=x), ValueError, "out overlaps x in memory, and must not"
    )
    _, saved = fastbn.batch_norm_forward(x)
    raises(lambda: fastbn.batch_norm_backward(X, saved, out=x), ValueError, "out overlaps x")
    np.testing.assert_array_equal(x, X)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("where", [np.s_[7:10], np.s_[7:22:5]], ids=["contiguous", "with gaps"])
def test_out_overlaps_a_parameter(name, training, where):
    out = np.zeros((4, 3, 5), np.float32)
    arguments = {"running_mean": D3.copy(), "running_var": D3.copy(), "weight": F3, "bias": F3, "training": training}
    arguments[name] = out.reshape(-1)[where]
    raises(lambda: fastbn.batch_norm(X, out=out, **arguments), ValueError, f"out overlaps {name}")
    assert (out == 0).all()


# ---- backward ----

BAD_BACKWARD = {
    "shape": Bad({"dy": X[:3]}, ValueError, "dy has shape (3, 3, 5), and must have x's shape (4, 3, 5)"),
    "order of axes": Bad({"dy": X.transpose(0, 2, 1)}, ValueError, "dy has shape (4, 5, 3), and must have x's shape (4, 3, 5)"),
    "broadcast": Bad({"dy": np.float32(1)}, ValueError, "dy has shape (), and must have x's shape (4, 3, 5)"),
    "dtype": Bad({"dy": X.astype("f8")}, TypeError, "dy has dtype float64, and must have x's dtype float32"),
    "int": Bad({"dy": X.astype(int)}, TypeError, "dy has dtype int64, and must be float16, bfloat16, float32 or float64"),
    "None": Bad({"dy": None}, TypeError, "dy is a NoneType, and must be an array of float16, bfloat16, float32 or float64"),
    "no saved": Bad({"saved": None}, TypeError, "saved is a NoneType, and must be what batch_norm_forward"),
    "saved is y": Bad({"saved": X}, TypeError, "saved is a ndarray, and must be what … batch_norm keeps nothing for a backward pass"),
    "out shape": Bad({"out": np.zeros((4, 3, 6), "f4")}, ValueError, "out has shape (4, 3, 6), and must have x's shape (4, 3, 5)"),
    "out dtype": Bad({"out": np.zeros((4, 3, 5))}, TypeError, "out has dtype float64, and must have x's dtype float32"),
    "out list": Bad({"out": []}, TypeError, "out is a list, and must be an ndarray"),
    "out read-only": Bad({"out": read_only(X)}, ValueError, "out is read-only, and must be writeable"),
    "num_threads": Bad({"num_threads": 0}, ValueError, "num_threads is 0, and must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_BACKWARD.values(), ids=BAD_BACKWARD)
@pytest.mark.parametrize("memory", [np.copy, np.asfortranarray])
def test_bad_backward(memory, bad):
    _, saved = fastbn.batch_norm_forward(memory(X), F3, F3)
    out = np.full((4, 3, 5), 7, np.float32)
    arguments = {"dy": X, "saved": saved, "out": out} | bad.arguments
    raises(lambda: fastbn.batch_norm_backward(**arguments), bad.error, bad.words)
    assert (out == 7).all()


def test_out_partly_overlaps_dy():
    buffer = sample((2, 60), np.float32).ravel()
    before = buffer.copy()
    _, saved = fastbn.batch_norm_forward(X)
    dy, out = buffer[:60].reshape(4, 3, 5), buffer[2:62].reshape(4, 3, 5)
    raises(
        lambda: fastbn.batch_norm_backward(dy, saved, out=out),
        ValueError,
        "out overlaps dy in memory … or be dy itself",
    )
    np.testing.assert_array_equal(buffer, before)


# ---- anything at all ----

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=3),
    st.sampled_from(
        [10**400, object(), {}, [], [[]], np.float32, ..., [[1.0], [1.0, 2.0]], np.float64(2), np.array(3)]
    ),
    st.tuples(
        st.lists(st.integers(0, 4), max_size=6).map(tuple),
        st.sampled_from(["f2", "f4", "f8", ">f2", ">f4", "i4", "u1", "?", "c8", "O", "U2", "M8[s]", "f4,i4", "V3"]),
    ).map(lambda made: np.zeros(*made)),
)


@given(
    call=st.sampled_from(sorted(CALLS)),
    arguments=st.dictionaries(
        st.sampled_from(["x", "running_mean", "running_var", "weight", "bias", "axis", "eps", "momentum", "out", "num_threads",
                         "residual", "activation", "negative_slope", "unbiased", "nan_policy", "training"]),
        ANYTHING,
        min_size=1,
        max_size=3,
    ),
)  # fmt: skip
def test_only_type_and_value_errors(call, arguments):
    """Any argument is taken, or refused by TypeError or ValueError with the statistics untouched."""
    function, good = CALLS[call]
    takes = function.__kwdefaults__.keys() | set(function.__code__.co_varnames[: function.__code__.co_argcount])
    arguments = {name: value for name, value in arguments.items() if name in takes}
    if isinstance(arguments.get("num_threads"), int):  # a large team is allowed, and slow
        arguments["num_threads"] = min(arguments["num_threads"], 8)
    statistics = {name: D3.copy() for name in ("running_mean", "running_var") if name in takes}
    try:
        function(**{"x": X} | good | statistics | arguments)
    except (TypeError, ValueError) as error:
        assert not isinstance(error, UnicodeError)
        for value in statistics.values():
            assert (value == 1).all()


@given(dy=ANYTHING, out=ANYTHING)
def test_backward_only_type_and_value_errors(dy, out):
    _, saved = fastbn.batch_norm_forward(X, residual=X, activation="relu")
    with pytest.raises((TypeError, ValueError)):
        fastbn.batch_norm_backward(dy, saved)
    if out is not None:
        with pytest.raises((TypeError, ValueError)):
            fastbn.batch_norm_backward(X, saved, out=out)
        with pytest.raises((TypeError, ValueError)):
            fastbn.batch_norm_backward(X, saved, out_residual=out)


@given(
    arguments=st.dictionaries(
        st.sampled_from(["num_features", "eps", "momentum", "affine", "track_running_stats", "unbiased", "trainable",
                         "nan_policy", "axis", "activation", "negative_slope", "dtype"]),
        ANYTHING,
        min_size=1,
        max_size=3,
    ),
    x=ANYTHING,
)  # fmt: skip
def test_layer_only_type_and_value_errors(arguments, x):
    """A layer is made and used, or refused by TypeError or ValueError."""
    features = arguments.get("num_features")
    if isinstance(features, int):  # many are allowed, and slow
        arguments["num_features"] = min(features, 1000)
    try:
        layer = fastbn.BatchNorm(**{"num_features": 3} | arguments)
        state = layer.state_dict()
        layer(x)
        layer.backward(x)
    except (TypeError, ValueError) as error:
        assert not isinstance(error, UnicodeError)
        return
    assert layer.state_dict().keys() == state.keys()


@given(
    state=st.one_of(
        ANYTHING,
        st.dictionaries(st.sampled_from([*fastbn.BatchNorm(3).state_dict(), "other"]), ANYTHING),
        st.tuples(st.sampled_from([*fastbn.BatchNorm(3).state_dict()]), ANYTHING).map(
            lambda one: fastbn.BatchNorm(3).state_dict() | dict([one])
        ),
    )
)
def test_state_only_type_and_value_errors(state):
    layer = fastbn.BatchNorm(3)
    before = {name: value.tobytes() for name, value in layer.state_dict().items()}
    try:
        layer.load_state_dict(state)
    except (TypeError, ValueError) as error:
        assert not isinstance(error, UnicodeError)
        assert {name: value.tobytes() for name, value in layer.state_dict().items()} == before


@pytest.mark.parametrize(
    "call", [fastbn.moments, fastbn.batch_norm_forward, fastbn.BatchNorm(2)], ids=["moments", "forward", "layer"]
)
def test_ragged(call):
    with pytest.raises(TypeError, match="x is a ragged list, and must be an array of numbers"):
        call([[1.0, 2.0], [3.0]])


def test_running_statistics_inside_out_are_refused(kernels):
    """In each function that reads them."""
    out, x = np.ones((4, 2), np.float32), np.zeros((4, 2), np.float32)
    for function in (fastbn.batch_norm, fastbn.batch_norm_eval_forward):
        with pytest.raises(ValueError, match="out overlaps running_mean in memory, and must not"):
            function(x, out[0], np.ones(2, np.float32), out=out)
    assert (out == 1).all()


# ---- anything at all, for the layers' kin and the conversions ----

MASK = np.ones((4, 5), bool)


def made(kind, *, call=(), back=(), **options):
    """A layer made with these options, called on these, and gone back over with these."""
    layer = kind(**options)
    layer(*call)
    layer.backward(*back)


KIN = {
    "masked": (fastbn.masked_batch_norm_forward, {"x": X, "mask": MASK, "weight": F3, "bias": None, "eps": 1e-5, "axis": 1, "activation": None, "out": None}),
    "masked backward": (fastbn.masked_batch_norm_backward, {"dy": X, "saved": fastbn.masked_batch_norm_forward(X, MASK * 0.5, F3)[1], "out": None}),
    "double backward": (fastbn.batch_norm_double_backward, {"ddx": X, "ddweight": F3, "ddbias": F3, "dy": X, "saved": fastbn.batch_norm_forward(X, F3, F3)[1]}),
    "fold": (fastbn.fold, {"weight": np.ones((3, 2)), "bias": D3, "bn": fastbn.BatchNorm(3), "axis": 0}),
    "Moments": (lambda **parts: fastbn.Moments(**parts).var(), {"count": 3, "mean": D3, "m2": D3}),
    "Moments.none": (fastbn.Moments.none, {"channels": 3}),
    "Moments.update": (lambda **chunk: fastbn.Moments.none(3).update(**chunk), {"x": X, "axis": 1, "num_threads": None}),
    "ghost": (lambda x, dy, **options: made(fastbn.GhostBatchNorm, call=(x,), back=(dy,), **options), {"num_features": 3, "virtual_batch_size": 2, "nan_policy": "raise", "x": X, "dy": X}),
    "in place": (lambda x, dy, **options: made(fastbn.InplaceBatchNorm, call=(x.copy() if isinstance(x, np.ndarray) else x,), back=(dy,), **options), {"num_features": 3, "activation": "leaky_relu", "negative_slope": 0.1, "x": X, "dy": X}),
    "masked layer": (lambda x, mask, dy, **options: made(fastbn.MaskedBatchNorm, call=(x, mask), back=(dy,), **options), {"num_features": 3, "trainable": True, "x": X, "mask": MASK, "dy": X}),
    "from_torch": (convert.from_torch, {"state": fastbn.BatchNorm(3).state_dict(), "prefix": "", "eps": 1e-5, "momentum": 0.1, "axis": 1, "dtype": None}),
    "from_keras": (convert.from_keras, {"weights": [D3] * 4, "momentum": 0.9, "epsilon": 1e-3, "axis": -1, "center": True, "scale": True}),
    "from_onnx": (convert.from_onnx, {"scale": D3, "B": D3, "input_mean": D3, "input_var": D3, "momentum": 0.9, "epsilon": 1e-3}),
    "from_flax": (convert.from_flax, {"variables": {"batch_stats": {"mean": D3, "var": D3}}, "momentum": 0.9, "epsilon": 1e-3}),
}  # fmt: skip


@pytest.mark.parametrize("call", KIN)
@given(data=st.data())
def test_kin_only_type_and_value_errors(call, data):
    """As for the operations: any argument is taken, or refused by TypeError or ValueError."""
    function, good = KIN[call]
    bad = data.draw(st.dictionaries(st.sampled_from(sorted(good)), ANYTHING, min_size=1, max_size=2))
    for name in ("num_features", "channels"):
        if isinstance(bad.get(name), int):  # many are allowed, and slow
            bad[name] = min(bad[name], 1000)
    try:
        with np.errstate(all="ignore"):
            function(**good | bad)
    except (TypeError, ValueError) as error:
        assert not isinstance(error, UnicodeError)
