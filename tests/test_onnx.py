"""ONNX's own tests of normalization, from the installed onnx package, through a backend as its runner knows them.

Node tests make their data when their module is imported; the tests of converted models have theirs in files. The
tolerances are ONNX's own.
"""

import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from conftest import F32, sample

import fastbn

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")
base = pytest.importorskip("onnx.backend.base", reason="this onnx has no backend tests")

NODES = [
    "test_batchnorm_epsilon",
    "test_batchnorm_epsilon_training_mode",
    "test_batchnorm_example",
    "test_batchnorm_example_training_mode",
    "test_mvn",
]
MODELS = [
    "test_BatchNorm1d_3d_input_eval",
    "test_BatchNorm2d_eval",
    "test_BatchNorm2d_momentum_eval",
    "test_BatchNorm3d_eval",
    "test_BatchNorm3d_momentum_eval",
]
LEFT_OUT = {
    "test_mvn_expanded": "no normalization in it, but the means, squares and roots that make one",
    "test_mvn_expanded_ver18": "the same",
    "light_densenet121.onnx": "a network that needs convolution and pooling",
    "light_inception_v2.onnx": "the same",
    "light_resnet50.onnx": "the same",
    "light_shufflenet.onnx": "the same",
}


# ---- the backend ----


def batch_normalization(opset, settings, x, scale, bias, mean, var):
    """ONNX's momentum weighs the old statistics, and its running variance is the population's."""
    eps, new = settings.get("epsilon", 1e-5), 1 - settings.get("momentum", 0.9)
    if opset < 14:  # before, the running statistics of a training step were given by further outputs
        assert settings.get("is_test", opset >= 7) and settings.get("spatial", 1), "training before opset 14"
    if not settings.get("training_mode", 0):
        return (fastbn.batch_norm(x, mean, var, scale, bias, eps=eps),)
    mean, var = mean.copy(), var.copy()
    y = fastbn.batch_norm(x, mean, var, scale, bias, training=True, momentum=new, unbiased=False, eps=eps)
    return y, mean, var


def mean_variance_normalization(opset, settings, x):
    """(x - mean)/(σ + 1e-9) over `axes`: every place along the other axes is a channel of its own.

    σ + 1e-9 and √(σ² + 1e-18) differ by less than 1e-9, and are the same where σ is 0.
    """
    reduced = sorted(a % x.ndim for a in settings.get("axes", (0, 2, 3)))
    order = [a for a in range(x.ndim) if a not in reduced] + reduced
    turned = x.transpose(order)
    channels = int(np.prod([x.shape[a] for a in order[: -len(reduced)]]))
    y, _ = fastbn.batch_norm_forward(turned.reshape(channels, -1), eps=1e-18, axis=0)
    return (y.reshape(turned.shape).transpose(np.argsort(order)),)


OPERATORS = {
    "BatchNormalization": batch_normalization,
    "MeanVarianceNormalization": mean_variance_normalization,
}


class FastbnRep(base.BackendRep):
    """A model, ready to run."""

    def __init__(self, model):
        self.graph, self.opset = model.graph, next(i.version for i in model.opset_import if i.domain == "")

    def run(self, inputs, **kwargs):
        values = {t.name: onnx.numpy_helper.to_array(t) for t in self.graph.initializer}
        free = [i.name for i in self.graph.input if i.name not in values]
        values |= zip(free, inputs, strict=True)
        for node in self.graph.node:
            settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            outputs = OPERATORS[node.op_type](self.opset, settings, *(values[name] for name in node.input))
            values |= zip(node.output, outputs, strict=True)
        return tuple(values[o.name] for o in self.graph.output)


class FastbnBackend(base.Backend):
    """What onnx calls a backend."""

    @classmethod
    def is_compatible(cls, model, device="CPU", **kwargs):
        return all(node.op_type in OPERATORS for node in model.graph.node)

    @classmethod
    def prepare(cls, model, device="CPU", **kwargs):
        super().prepare(model, device, **kwargs)  # checks the model
        return FastbnRep(model)


# ---- the tests ----


@pytest.fixture(scope="module")
def nodes():
    """The node tests by name. Importing an operator's module makes its cases; the loader would make all 1900."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_module("onnx.backend.test.case.node.batch_normalization")
        import_module("onnx.backend.test.case.node.meanvariancenormalization")
        from onnx.backend.test.case.node import _NodeTestCases

    return {case.name: case for case in _NodeTestCases if case.name.startswith(("test_batchnorm_", "test_mvn"))}


@pytest.fixture(scope="module")
def models():
    """The models in files that normalize, by name, with their folders."""
    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    found = {}
    for path in [*data.glob("*/test_*/model.onnx"), *data.glob("*/*.onnx")]:
        model = onnx.load(path)
        if not OPERATORS.keys().isdisjoint(node.op_type for node in model.graph.node):
            found[path.parent.name if path.name == "model.onnx" else path.name] = model, path.parent
    return found


def test_none_is_missing(nodes, models):
    """What onnx has is what is run here, or left out for a reason."""
    assert sorted([*nodes, *models]) == sorted([*NODES, *MODELS, *LEFT_OUT])
    for name, (model, _) in models.items():
        assert FastbnBackend.is_compatible(model) == (name in MODELS)
    for name, case in nodes.items():
        assert FastbnBackend.is_compatible(case.model) == (name in NODES)


def similar(got, want, rtol, atol):
    """As the runner compares."""
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", NODES)
def test_node(kernels, nodes, name):
    case = nodes[name]
    assert case.data_sets
    for inputs, want in case.data_sets:
        similar(FastbnBackend.run_model(case.model, inputs), want, case.rtol, case.atol)


@pytest.mark.parametrize("name", MODELS)
def test_model(kernels, models, name):
    model, folder = models[name]
    sets = sorted(folder.glob("test_data_set_*"))
    assert sets
    for data in sets:
        inputs, want = (
            [onnx.numpy_helper.to_array(onnx.load_tensor(path)) for path in sorted(data.glob(f"{kind}_*.pb"))]
            for kind in ("input", "output")
        )
        similar(FastbnBackend.prepare(model).run(inputs), want, 1e-3, 1e-7)  # the loader's defaults


@pytest.mark.parametrize("axes", [(0, 2, 3), (0,), (2, 3), (0, 1, 2, 3), (-1, 1), (3, 0)], ids=str)
def test_mean_variance_normalization_over_other_axes(axes):
    """Against ONNX's reference evaluator, which goes by the operator's definition: E[x²] - E[x]²."""
    reference = pytest.importorskip("onnx.reference", reason="this onnx has no reference evaluator")
    x = sample((4, 3, 5, 2), F32)
    node = onnx.helper.make_node("MeanVarianceNormalization", ["x"], ["y"], axes=axes)
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, x.shape) for name in "xy"]
    graph = onnx.helper.make_graph([node], "mvn", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = reference.ReferenceEvaluator(model).run(None, {"x": x})
    similar(FastbnBackend.run_model(model, [x]), want, 1e-4, 1e-6)
