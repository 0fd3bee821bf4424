"""The layer's options, most about the running statistics: momentum=None, unbiased, affine, freeze, nan_policy."""

import numpy as np
import pytest
from conftest import F16, F32, F64, parameters, same_bits, sample

import fastbn
from fastbn import nn

SHAPE = (6, 3, 5)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def batches(n=4, dtype=F32):
    return [sample(SHAPE, dtype, seed=seed) * (seed + 1) for seed in range(n)]


def statistics_of(x, ddof):
    x = x.astype(F64).transpose(1, 0, 2).reshape(3, -1)
    return x.mean(axis=1), x.var(axis=1, ddof=ddof)


def state_bits(layer):
    return {name: value.tobytes() for name, value in layer.state_dict().items()}


# ---- momentum and variance ----


@pytest.mark.parametrize("unbiased", [True, False])
def test_momentum_none_is_the_average_of_all_batches(kernels, unbiased):
    layer = fastbn.BatchNorm(3, momentum=None, unbiased=unbiased, dtype=F64)
    means, variances = zip(*(statistics_of(x, int(unbiased)) for x in batches()), strict=True)
    for x in batches():
        layer(x)
    assert layer.num_batches_tracked == 4
    np.testing.assert_allclose(layer.running_mean, np.mean(means, axis=0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(layer.running_var, np.mean(variances, axis=0), rtol=1e-6, atol=1e-6)


def test_momentum_none_begins_anew_after_a_reset(kernels):
    """Precise statistics: reset, and one pass in training mode."""
    layer = fastbn.BatchNorm(3, dtype=F64)
    layer(batches()[0])
    layer.reset_running_stats()
    layer.momentum = None
    x = batches()[1]
    layer(x)
    mean, var = statistics_of(x, 1)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_unbiased(kernels, momentum, unbiased):
    """Of the function and of the layer; y is the same either way."""
    x = batches()[0]
    mean, var = np.full(3, 2.0), np.full(3, 3.0)
    layer = fastbn.BatchNorm(3, momentum=momentum, unbiased=unbiased, affine=False, dtype=F64)
    layer.running_mean[...], layer.running_var[...] = mean, var
    batch_mean, batch_var = statistics_of(x, int(unbiased))
    want_mean = (1 - momentum) * mean + momentum * batch_mean
    want_var = (1 - momentum) * var + momentum * batch_var
    y = fastbn.batch_norm(x, mean, var, training=True, momentum=momentum, unbiased=unbiased)
    np.testing.assert_allclose(mean, want_mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(var, want_var, rtol=1e-6, atol=1e-6)
    same_bits(layer(x), y)
    same_bits(layer.running_mean, mean)
    same_bits(layer.running_var, var)
    same_bits(y, fastbn.batch_norm_forward(x)[0])


# ---- which parameters there are ----


@pytest.mark.parametrize("affine", [True, False, "weight", "bias"])
def test_affine(kernels, affine):
    x, dy = sample(SHAPE, F32), sample(SHAPE, F32, seed=1)
    layer = fastbn.BatchNorm(3, affine=affine)
    weight, bias = parameters(3, F32)[:2]
    weight, bias = weight if affine in (True, "weight") else None, bias if affine in (True, "bias") else None
    for mine, p in ((layer.weight, weight), (layer.bias, bias)):
        assert (mine is None) == (p is None)
        if p is not None:
            mine[...] = p
    assert layer.affine == affine and f"affine={affine!r}" in repr(layer)
    y, saved = fastbn.batch_norm_forward(x, weight, bias)
    dx, dweight, dbias = fastbn.batch_norm_backward(dy, saved)
    same_bits(layer(x), y)
    same_bits(layer.backward(dy), dx)
    for mine, gradient in ((layer.grad_weight, dweight), (layer.grad_bias, dbias)):
        assert (mine is None) == (gradient is None)
        if gradient is not None:
            same_bits(mine, gradient)
    assert set(layer.state_dict()) == {*STATISTICS, *(n for n in ("weight", "bias") if affine in (True, n))}


# ---- frozen ----


def test_frozen(kernels):
    """In training mode: the running statistics normalize and stay; backward takes them as constants."""
    x, dy = sample(SHAPE, F32), sample(SHAPE, F32, seed=1)
    layer = fastbn.BatchNorm(3)
    for name, value in zip(("weight", "bias", *STATISTICS), parameters(3, F32), strict=False):
        getattr(layer, name)[...] = value
    before = state_bits(layer)
    y, saved = fastbn.batch_norm_eval_forward(
        x, *(layer.state_dict()[n] for n in ("running_mean", "running_var", "weight", "bias"))
    )
    assert layer.freeze() is layer and not layer.trainable and layer.training
    same_bits(layer(x), y)
    for got, want in zip(
        (layer.backward(dy), layer.grad_weight, layer.grad_bias), fastbn.batch_norm_backward(dy, saved), strict=True
    ):
        same_bits(got, want)
    assert state_bits(layer) == before
    same_bits(layer.eval()(x), y)
    layer.train()
    assert layer.unfreeze() is layer and layer.trainable
    with pytest.raises(TypeError, match="trainable is 'no', and must be True or False"):
        layer.trainable = "no"
    assert layer.trainable
    layer(x)
    assert state_bits(layer) != before


def test_frozen_from_the_start():
    layer = fastbn.BatchNorm(3, trainable=False)
    layer(sample(SHAPE, F32))
    assert layer.num_batches_tracked == 0 and (layer.running_mean == 0).all()
    with pytest.raises(ValueError, match="trainable is False, and must be True where track_running_stats is False"):
        fastbn.BatchNorm(3, trainable=False, track_running_stats=False)
    with pytest.raises(ValueError, match="trainable is False, and must be True where track_running_stats is False"):
        fastbn.BatchNorm(3, track_running_stats=False).freeze()


def test_frozen_layer_of_a_network_is_not_optimized():
    layer = nn.BatchNorm(3)
    assert len(list(layer.parameters())) == 2
    assert not list(layer.freeze().parameters())


# ---- NaN ----

BAD = {
    "NaN": np.nan,
    "inf": np.inf,
    "-inf": -np.inf,
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [F32, F64, F16], ids=str)
def test_nan_is_seen_and_the_statistics_are_as_asked(kernels, dtype, bad):
    """y is what it is under every policy; other channels are not touched by it."""
    x = sample(SHAPE, dtype)
    x[2, 1, 3] = BAD[bad]
    clean = fastbn.batch_norm_forward(sample(SHAPE, dtype))[0]
    results = {}
    for policy in ("propagate", "skip_update"):
        layer = fastbn.BatchNorm(3, nan_policy=policy, momentum=None)
        before = state_bits(layer)
        results[policy] = y = layer(x)
        assert np.isnan(y[:, 1]).any()
        same_bits(np.ascontiguousarray(y[:, [0, 2]]), np.ascontiguousarray(clean[:, [0, 2]]))
        if policy == "propagate":
            assert layer.num_batches_tracked == 1
            assert not np.isfinite(layer.running_var[1]) and np.isfinite(layer.running_var[[0, 2]]).all()
        else:
            assert state_bits(layer) == before
            layer(sample(SHAPE, dtype))
            assert layer.num_batches_tracked == 1 and np.isfinite(layer.running_var).all()
    same_bits(results["propagate"], results["skip_update"])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("with_out", [False, True])
def test_nan_raises_before_anything_is_written(kernels, bad, with_out):
    x = sample(SHAPE, F32)
    layer = fastbn.BatchNorm(3, nan_policy="raise")
    layer(x)
    before, saved = state_bits(layer), layer._saved
    x[2, 1, 3] = BAD[bad]
    out = np.full_like(x, 7) if with_out else None
    with pytest.raises(ValueError, match=r"x has NaN, infinite or too large values \(in 1 channels, the first is 1\)"):
        layer(x, out=out)
    assert state_bits(layer) == before and layer._saved is saved
    assert out is None or (out == 7).all()
    mean, var = np.zeros(3), np.ones(3)
    with pytest.raises(ValueError, match="x has NaN"):  # in place, x is as it was
        copy = x.copy()
        fastbn.batch_norm(copy, mean, var, training=True, nan_policy="raise", out=copy)
    np.testing.assert_array_equal(copy, x)
    assert (mean == 0).all() and (var == 1).all()
    assert np.isnan(layer.eval()(x)[2, 1, 3]) or np.isinf(layer(x)[2, 1, 3])  # eval mode takes no statistics: no policy


def test_statistics_too_large_for_the_running_ones(kernels):
    """A variance that float32 cannot hold is no number there: the policies see it."""
    x = (sample(SHAPE, F64) * 1e30).astype(F64)
    layer = fastbn.BatchNorm(3, nan_policy="skip_update")
    layer(x)
    assert layer.num_batches_tracked == 0 and (layer.running_var == 1).all()
    with pytest.raises(ValueError, match="too large values"):
        fastbn.BatchNorm(3, nan_policy="raise")(x)
    wide = fastbn.BatchNorm(3, nan_policy="raise", dtype=F64)
    wide(x)
    assert wide.num_batches_tracked == 1


# ---- bad settings ----

POLICIES = "'propagate', 'skip_update', 'raise'"


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"unbiased": "no"}, TypeError, "unbiased is 'no', and must be True or False"),
        ({"trainable": 1}, TypeError, "trainable is 1, and must be True or False"),
        ({"nan_policy": "ignore"}, ValueError, f"nan_policy is 'ignore', and must be one of {POLICIES}"),
        ({"nan_policy": None}, ValueError, f"nan_policy is None, and must be one of {POLICIES}"),
        ({"affine": "gamma"}, ValueError, "affine is 'gamma', and must be True, False, 'weight' or 'bias'"),
        ({"affine": None}, TypeError, "affine is None, and must be True or False"),
    ],
)  # fmt: skip
def test_bad_settings(settings, error, words):
    with pytest.raises(error) as caught:
        fastbn.BatchNorm(3, **settings)
    assert str(caught.value) == words
    if settings.keys() & {"unbiased", "nan_policy"}:
        for training in (True, False):
            with pytest.raises(error) as caught:
                fastbn.batch_norm(np.ones(SHAPE), np.zeros(3), np.ones(3), training=training, **settings)
            assert str(caught.value) == words


@pytest.mark.parametrize("name", ["weight", "running_var"])
def test_a_state_beyond_the_layers_dtype(name):
    layer = fastbn.BatchNorm(3)
    before = state_bits(layer)
    state = {key: value.astype(F64) for key, value in layer.state_dict().items()}
    state[name][1] = 1e300
    with pytest.raises(
        ValueError, match=f"{name} has values in state that are too large, and must fit the layer's dtype"
    ):
        layer.load_state_dict(state)
    assert state_bits(layer) == before
