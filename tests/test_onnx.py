"""ONNX's own node tests of BatchNormalization, from the installed onnx package."""

import warnings
from importlib import import_module

import numpy as np
import pytest

import fastbn

pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")


@pytest.fixture(scope="module")
def cases():
    """The node tests by name. Importing an operator's module makes its cases; the loader would make all 1900."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_module("onnx.backend.test.case.node.batch_normalization")
        from onnx.backend.test.case.node import _NodeTestCases

    return {case.name: case for case in _NodeTestCases if case.name.startswith("test_batchnorm_")}


def attributes(case):
    (node,) = case.model.graph.node
    return {a.name: a.i if a.name == "training_mode" else a.f for a in node.attribute}


@pytest.mark.parametrize("name", ["test_batchnorm_example", "test_batchnorm_epsilon"])
def test_inference(kernels, cases, name):
    for (x, scale, bias, mean, var), (want,) in cases[name].data_sets:
        y = fastbn.batch_norm(x, mean, var, scale, bias, eps=attributes(cases[name]).get("epsilon", 1e-5))
        np.testing.assert_allclose(y, want, rtol=cases[name].rtol, atol=cases[name].atol)


@pytest.mark.parametrize("name", ["test_batchnorm_example_training_mode", "test_batchnorm_epsilon_training_mode"])
def test_training(kernels, cases, name):
    """ONNX's momentum weighs the old statistics, and its running variance is the population's."""
    settings = attributes(cases[name])
    assert settings["training_mode"] == 1
    for (x, scale, bias, mean, var), (want, want_mean, want_var) in cases[name].data_sets:
        new = 1 - settings.get("momentum", 0.9)
        running_mean, running_var = mean.copy(), var.copy()
        y = fastbn.batch_norm(
            x, running_mean, running_var, scale, bias,
            training=True, momentum=new, eps=settings.get("epsilon", 1e-5),
        )  # fmt: skip
        count = x.size // x.shape[1]
        population = (running_var - (1 - new) * var) * (count - 1) / count + (1 - new) * var
        for got, expected in ((y, want), (running_mean, want_mean), (population, want_var)):
            np.testing.assert_allclose(got, expected, rtol=cases[name].rtol, atol=cases[name].atol)
