"""fastbn: batch normalization on NumPy arrays, on the CPU, at the speed that memory allows."""

__version__ = "0.1.0"

from .backends import config_context, set_backend, set_num_threads, show_config
from .folding import fold
from .functional import batch_norm, batch_norm_backward, batch_norm_eval_forward, batch_norm_forward
from .ghost import GhostBatchNorm
from .inplace import InplaceBatchNorm
from .layers import BatchNorm
from .masked import MaskedBatchNorm, masked_batch_norm_backward, masked_batch_norm_forward
from .memory import set_kept_memory
from .second_order import batch_norm_double_backward
from .statistics import Moments, moments

__all__ = [
    "BatchNorm",
    "GhostBatchNorm",
    "InplaceBatchNorm",
    "MaskedBatchNorm",
    "Moments",
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "batch_norm_eval_forward",
    "batch_norm_forward",
    "config_context",
    "fold",
    "masked_batch_norm_backward",
    "masked_batch_norm_forward",
    "moments",
    "set_backend",
    "set_kept_memory",
    "set_num_threads",
    "show_config",
]
