"""fastbn.nn: a small trainer for networks with batch normalization, in NumPy and fastbn's own kernels.

A layer is an object with ``y = layer(x)``, ``dx = layer.backward(dy)`` and ``layer.parameters()`` (`layer.py`); a
network is a `Sequential` of them; an optimizer walks its parameters; `fit` is the loop. Nothing is recorded or hidden.

Memory: each layer owns its output and its gradient and writes them anew at every call, so a steady training step
allocates no array the size of a batch. What a layer, a loss or a batch iterator returns is therefore valid until its
next call: copy what you keep.
"""

from . import schedules
from .activations import LeakyReLU, ReLU, Sigmoid, Tanh
from .batch_norm import BatchNorm, GhostBatchNorm
from .batches import Batches
from .checkpoints import Checkpoint
from .conv import Conv2d
from .dropout import Dropout
from .fit import accuracy, fit
from .flatten import Flatten
from .history import History
from .last_step import LastStep
from .layer import Layer
from .layer_norm import LayerNorm
from .linear import Linear
from .losses import BCEWithLogitsLoss, MSELoss, SoftmaxCrossEntropy
from .lstm import LSTM
from .optimizers import SGD, Adam, AdamW, Optimizer, RMSprop
from .pooling import AvgPool2d, GlobalAvgPool2d, MaxPool2d
from .residual import Residual
from .rnn import RNN
from .sequential import Sequential
from .update import update_bn

__all__ = [
    "LSTM",
    "RNN",
    "SGD",
    "Adam",
    "AdamW",
    "AvgPool2d",
    "BCEWithLogitsLoss",
    "BatchNorm",
    "Batches",
    "Checkpoint",
    "Conv2d",
    "Dropout",
    "Flatten",
    "GhostBatchNorm",
    "GlobalAvgPool2d",
    "History",
    "LastStep",
    "Layer",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "MSELoss",
    "MaxPool2d",
    "Optimizer",
    "RMSprop",
    "ReLU",
    "Residual",
    "Sequential",
    "Sigmoid",
    "SoftmaxCrossEntropy",
    "Tanh",
    "accuracy",
    "fit",
    "schedules",
    "update_bn",
]
