"""torch's own test cases of batch normalization, from the installed torch.testing._internal.

A fresh interpreter collects them (this file, run as a program), for importing torch's suites changes the process: it
freezes torch's flags and loads another hypothesis profile. It also computes what is expected: by torch, in float64, of
the very numbers that fastbn gets, whatever their dtype. The errors allowed are conftest.py's.
"""

import json
import pickle
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    BF16,
    DTYPES,
    F32,
    WIDE,
    close_gradients,
    close_y,
    computed,
    oracle_forward,
    run_python,
    same_bits,
    unit,
)

import fastbn

# What torch 2.13 has. Another count is another suite: look at what came, or went.
MODULES = {"BatchNorm1d": 8, "BatchNorm2d": 7, "BatchNorm3d": 7}
ERRORS = {"BatchNorm1d": 2, "BatchNorm2d": 2, "BatchNorm3d": 2}
OPERATIONS = {"nn.functional.batch_norm": 12, "native_batch_norm": 10}
OPERATIONS_LEFT_OUT = {
    "nn.functional.batch_norm without_cudnn": "for CUDA alone",
    "_native_batch_norm_legit": "native_batch_norm's cases, through another entry",
    "_batch_norm_with_update": "the same",
}
# Cases that fastbn refuses, and the words in which. What of such a case does not depend on it is compared.
REFUSED = {
    "no channel axis": "x has shape",  # (0,): torch takes any rank that holds no values
    "momentum under 0": "momentum is -",  # running statistics would run away
}
REFUSALS = {
    "nn.functional.batch_norm": {"no channel axis": 2, "momentum under 0": 3},
    "native_batch_norm": {"momentum under 0": 3},
}

# One instruction set serves for all, whose bits are the same; Numba compiles for each dtype, and is run on one.
RUN_ON = [(backend, dtype) for backend in ("cython x86-64", "reference") for dtype in DTYPES] + [("numba", F32)]
operations_on = pytest.mark.parametrize(("kernels", "dtype"), RUN_ON, indirect=True, ids=str)
# (A layer has no backend of its own: Numba is left to the operations.)
modules_on = pytest.mark.parametrize(
    ("kernels", "dtype"), [on for on in RUN_ON if on[1] in WIDE and on[0] != "numba"], indirect=True, ids=str
)


# ---- collecting: in an interpreter of its own ----


def collect(path):
    import torch
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    torch.manual_seed(20150211)

    def numpy(tensor):
        if tensor is None:
            return None
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            return "bfloat16", tensor.view(torch.int16).numpy().copy()
        return str(tensor.dtype).removeprefix("torch."), tensor.numpy().copy()

    def double(tensor, grad=True):
        return None if tensor is None else tensor.detach().clone().double().requires_grad_(grad)

    def like(tensor, low):
        return torch.testing.make_tensor(tensor.shape, dtype=tensor.dtype, device="cpu", low=low, high=2)

    def gradients(y, dy, *inputs):
        """Of each input, None where there is none."""
        there = [t for t in inputs if t is not None]
        found = iter(torch.autograd.grad(y, there, dy.double(), allow_unused=True))
        return [None if t is None else next(found) for t in inputs]

    def modules(info, dtype):
        for training in (True, False):
            for given in info.module_inputs_func(info, "cpu", dtype, False, training=training):
                constructor, (x,) = given.constructor_input, given.forward_input.args
                module = info.module_cls(*constructor.args, **constructor.kwargs).to(dtype).train(training)
                for name, value in module.state_dict().items():
                    if value.dtype == dtype:
                        value.copy_(like(value, 0.5 if name == "running_var" else -2))
                before = {name: numpy(value.clone()) for name, value in module.state_dict().items()}
                module.double()
                wide, dy = double(x), like(x, -2)
                module(wide)  # the running statistics see two batches
                y = module(wide)
                yield {
                    "name": f"{given.desc or 'plain'} {tuple(x.shape)}, {'train' if training else 'eval'}",
                    "x": numpy(x), "dy": numpy(dy), "training": training, "before": before, "y": numpy(y),
                    "after": {name: numpy(value) for name, value in module.state_dict().items()},
                    "gradients": [numpy(g) for g in gradients(y, dy, wide, module.weight, module.bias)],
                    "settings": {
                        "num_features": module.num_features, "eps": module.eps, "momentum": module.momentum,
                        "track_running_stats": module.track_running_stats,
                        "affine": module.affine and (True if module.bias is not None else "weight"),
                    },
                }  # fmt: skip

    def errors(info):
        for given in info.module_error_inputs_func(info, "cpu", torch.float32, False, training=True):
            constructor, (x,) = given.module_error_input.constructor_input, given.module_error_input.forward_input.args
            yield {"args": constructor.args, "kwargs": constructor.kwargs, "x": numpy(x), "why": given.error_regex}

    def operations(op, dtype):
        for sample in op.sample_inputs("cpu", dtype, requires_grad=False):
            if op.name == "native_batch_norm":
                weight, bias, mean, var, training, momentum, eps = sample.args
                sample.args, sample.kwargs = (
                    (mean, var, weight, bias), {"training": training, "momentum": momentum, "eps": eps}
                )  # fmt: skip
            x, dy = sample.input, like(sample.input, -2)
            mean, var, weight, bias = sample.args
            settings = {"training": False, "momentum": 0.1, "eps": 1e-5} | sample.kwargs
            wide = [double(mean, False), double(var, False), double(weight), double(bias)]
            wide_x = double(x)
            saved = []
            if op.name == "native_batch_norm":
                y, *saved = torch.native_batch_norm(wide_x, wide[2], wide[3], wide[0], wide[1], **settings)
            else:
                y = torch.nn.functional.batch_norm(wide_x, *wide, **settings)
            yield {
                "name": f"{tuple(x.shape)} {settings}", "x": numpy(x), "dy": numpy(dy), "settings": settings,
                "statistics": [numpy(mean), numpy(var)], "parameters": [numpy(weight), numpy(bias)], "y": numpy(y),
                "gradients": [numpy(g) for g in gradients(y, dy, wide_x, wide[2], wide[3])],
                "after": [numpy(t) for t in wide[:2]], "saved": [numpy(t) for t in saved],
            }  # fmt: skip

    found = {"modules": {}, "errors": {}, "operations": {}, "names": []}
    for info in module_db:
        name = info.module_cls.__name__
        if "BatchNorm" in name:
            found["modules"][name] = {
                str(d).removeprefix("torch."): list(modules(info, d)) for d in (torch.float32, torch.float64)
            }
            found["errors"][name] = list(errors(info))
    for op in op_db:
        if "batch_norm" in op.name:
            full = f"{op.name} {op.variant_test_name}".strip()
            found["names"].append(full)
            if full in OPERATIONS:
                found["operations"][full] = {
                    str(d).removeprefix("torch."): list(operations(op, d))
                    for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
                }
    Path(path).write_bytes(pickle.dumps(found))


# ---- what came back ----


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    for package, needed in (
        ("torch", "make peers"),
        ("expecttest", "pip install expecttest, which torch's own tests import"),
    ):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: {needed}")
    path = tmp_path_factory.mktemp("torch") / "cases"
    here = json.dumps(str(Path(__file__).parent))
    run_python(f"import sys; sys.path.insert(0, {here}); import test_torch_suites as t; t.collect({str(path)!r})")
    return pickle.loads(path.read_bytes())


def array(packed):
    """A tensor as it came: (dtype's name, values)."""
    if packed is None:
        return None
    name, values = packed
    return values.view(BF16) if name == "bfloat16" else values


def each(cases, check):
    """Every case, by name."""
    for case in cases:
        try:
            check(case)
        except Exception as error:
            raise AssertionError(f"{case['name']}: {error}") from error


def widened(p, dtype):
    """Parameters and statistics are never half: those that torch keeps in half go into float32, as they are."""
    return None if p is None else array(p).astype(computed(dtype))


def refusal(case):
    """Why fastbn refuses a case of an operation, or None."""
    if array(case["x"]).ndim < 2:
        return "no channel axis"
    return "momentum under 0" if case["settings"]["momentum"] < 0 else None


def check_results(got, case, x, mean, var, weight, bias, batch, eps):
    """y and gradients. mean and var, by which x is normalized, give the scale of the errors allowed."""
    want = [array(p) for p in (case["y"], *case["gradients"])]
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None) and (a is None or a.shape == b.shape)
    assert got[0].dtype == got[1].dtype == x.dtype
    close_y(got[0], want[0], weight, bias, 1)
    close_gradients(got[1:], want[1:], array(case["dy"]), x, mean, var, weight, 1, batch, eps)


def check_running(name, got, want, dtype):
    """Each update rounds once; in float64, torch's sums round as well."""
    allowed = (4 if dtype == F32 else 32) * unit(dtype) * np.maximum(np.abs(want), 1)
    assert got.dtype == dtype and (np.abs(got - want) <= allowed).all(), name


# ---- the tests ----


def test_none_is_missing(suites):
    """What torch has is what is run here, or left out for a reason."""
    assert sorted(suites["names"]) == sorted([*OPERATIONS, *OPERATIONS_LEFT_OUT])
    assert suites["modules"].keys() == MODULES.keys() and suites["operations"].keys() == OPERATIONS.keys()
    for name, dtypes in suites["modules"].items():
        assert {d: len(cases) for d, cases in dtypes.items()} == dict.fromkeys(map(str, WIDE), 2 * MODULES[name])
    for name, dtypes in suites["operations"].items():
        assert {d: len(cases) for d, cases in dtypes.items()} == dict.fromkeys(map(str, DTYPES), OPERATIONS[name])
        for cases in dtypes.values():
            refused = [why for why in map(refusal, cases) if why]
            assert {why: refused.count(why) for why in refused} == REFUSALS[name]
    assert {name: len(cases) for name, cases in suites["errors"].items()} == ERRORS


@operations_on
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(kernels, suites, dtype, name):
    def check(case):
        x, dy, why = array(case["x"]), array(case["dy"]), refusal(case)
        mean, var, weight, bias = (widened(p, dtype) for p in (*case["statistics"], *case["parameters"]))
        settings = case["settings"]
        if why:
            with pytest.raises(ValueError, match=REFUSED[why]):
                fastbn.batch_norm(x, mean, var, weight, bias, **settings)
            settings = settings | {"momentum": 0.1}
        if why == "no channel axis":
            return
        training, eps = settings["training"], settings["eps"]
        if training:
            y, saved = fastbn.batch_norm_forward(x, weight, bias, eps=eps)
            _, at_mean, at_var = oracle_forward(x, None, None, 1)
        else:
            y, saved = fastbn.batch_norm_eval_forward(x, mean, var, weight, bias, eps=eps)
            at_mean, at_var = mean.copy(), var.copy()
        gradients = fastbn.batch_norm_backward(dy, saved)
        check_results((y, *gradients), case, x, at_mean, at_var, weight, bias, training, eps)
        same_bits(fastbn.batch_norm(x, mean, var, weight, bias, **settings), y)
        if mean is not None and why is None:
            for what, got, want in zip(("mean", "var"), (mean, var), case["after"], strict=True):
                check_running(what, got, array(want), computed(dtype))
        if training and case["saved"]:
            want, inverse = (array(p) for p in case["saved"])
            np.testing.assert_allclose(saved.mean, want, rtol=0, atol=4 * unit(computed(dtype)) * at_var.max() ** 0.5)
            np.testing.assert_allclose(1 / np.sqrt(saved.var + eps), inverse, rtol=8 * unit(computed(dtype)))

    each(suites["operations"][name][str(dtype)], check)


@modules_on
@pytest.mark.parametrize("name", MODULES)
def test_module(kernels, suites, dtype, name):
    """Two batches, and back from the second; in eval mode by a frozen layer, as its backward pass is torch's there."""

    def check(case):
        x, dy, training = array(case["x"]), array(case["dy"]), case["training"]
        layer = fastbn.BatchNorm(**case["settings"], dtype=dtype)
        assert list(layer.state_dict()) == list(case["before"])
        layer.load_state_dict({name: array(value) for name, value in case["before"].items()})
        batch = training or layer.running_mean is None
        at_mean, at_var = (None, None) if batch else (layer.running_mean.copy(), layer.running_var.copy())
        if batch and x.size:
            _, at_mean, at_var = oracle_forward(x, None, None, 1)
        if not batch:
            y = layer.eval()(x)
            layer.freeze()
            same_bits(layer.train()(x), y)
        else:
            layer(x)
            y = layer(x)
        got = y, layer.backward(dy), layer.grad_weight, layer.grad_bias
        if x.size:
            check_results(got, case, x, at_mean, at_var, layer.weight, layer.bias, batch, layer.eps)
        else:
            assert got[0].shape == got[1].shape == x.shape
        if not training and batch:
            same_bits(layer.eval()(x), y)
        after = {name: array(value) for name, value in case["after"].items()}
        if not x.size and training:
            after["num_batches_tracked"] = 0  # torch counts empty batches, whose statistics it leaves out
        for key, value in layer.state_dict().items():
            if key == "num_batches_tracked":
                assert value == after[key]
            else:
                check_running(key, value, after[key], dtype)

    each(suites["modules"][name][str(dtype)], check)


@pytest.mark.parametrize("name", MODULES)
def test_module_errors(suites, name):
    """torch says so at the first call; here nobody gets that far."""
    for case in suites["errors"][name]:
        assert case["why"] == "eps must be positive"
        with pytest.raises(ValueError, match=r"eps is .*, and must be greater than 0 and finite"):
            fastbn.BatchNorm(*case["args"], **case["kwargs"])
        with pytest.raises(ValueError, match=r"eps is .*, and must be greater than 0 and finite"):
            fastbn.batch_norm(array(case["x"]), training=True, **case["kwargs"])
