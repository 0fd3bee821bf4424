"""update_bn: the running statistics of a trained network, estimated anew ("precise" batch normalization)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import checks, layers
from ..pieces import parts
from .layer import Layer
from .recurrent import Recurrent

Array = np.ndarray[Any, np.dtype[Any]]


def update_bn(model: Layer, x: Array, *, batch_size: int = 1000) -> None:
    """Replace the running statistics of a network's BatchNorms by averages over a data set.

    While a network trains, its running statistics average over batches that earlier weights have seen, with most of
    the weight on the last few. Here the network, as it is now, goes through x in batches, in training mode; afterwards
    each BatchNorm's running mean and variance are the plain averages of its batches' (``momentum=None``). Parameters
    are not touched; momenta and modes are then as they were. BatchNorms that are frozen, or have no running statistics,
    are passed over; a network without any other is left alone. In recurrent layers each time step's statistics are
    estimated anew, too.

    Parameters
    ----------
    model : Layer
        A `Sequential`, or any layer; one with a list `layers` is looked into.
    x : ndarray of the model's dtype, shape (rows, ...)
        A few thousand rows of training data are enough for most networks.
    batch_size : int
        Most rows of a batch. The batches' sizes differ by one row at most, so that all rows weigh about as much; none
        has a single row, unless x has. Larger batches estimate better: with all of x in one, the statistics are exact.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be. Whatever a layer raises, and after KeyboardInterrupt, the
        statistics are as they were.

    Notes
    -----
    There is nothing to go back over afterwards: call the model again before `backward`. torch has it as
    ``torch.optim.swa_utils.update_bn``.

    References
    ----------
    Wu and Johnson (2021), "Rethinking 'Batch' in BatchNorm", section 3.
    """
    checks.instance("model", model, Layer)
    x = checks.rows("x", x)
    batch_size = checks.positive("batch_size", batch_size)
    every = list(_walk(model))
    norms: list[Any] = [layer for layer in every if isinstance(layer, layers.BatchNorm) and layer.trainable]
    norms = [bn for bn in norms if bn.track_running_stats]
    norms += [norm for layer in every if isinstance(layer, Recurrent) for norm in layer.step_norms()]
    if not norms:
        return
    modes = [(layer, layer.training) for layer in every]
    before = [(bn, bn.momentum, copy.copy(bn.num_batches_tracked)) for bn in norms]
    copies = [(np.array(bn.running_mean), np.array(bn.running_var)) for bn in norms]
    try:
        for bn in norms:
            bn.momentum = None
            bn.reset_running_stats()
        model.train()
        for part in parts(len(x), batch_size, 2):
            model(x[part])
        checks.some_counted(norms)
    except BaseException:
        for (bn, _, count), (mean, var) in zip(before, copies, strict=True):
            bn.running_mean[...], bn.running_var[...] = mean, var
            bn.num_batches_tracked = count
        raise
    finally:
        for bn, momentum, *_ in before:
            bn.momentum = momentum
            bn.forget()
        for layer, mode in modes:
            layer.training = mode


def _walk(model: Any) -> Iterator[Any]:
    """The layer and those in it."""
    yield model
    for layer in getattr(model, "layers", ()):
        yield from _walk(layer)
