"""fastbn: batch normalization on NumPy arrays, on the CPU, at the speed that memory allows."""

__version__ = "0.1.0"

from .backends import config_context, set_backend, set_num_threads, show_config
from .functional import batch_norm, batch_norm_backward, batch_norm_eval_forward, batch_norm_forward
from .layers import BatchNorm
from .statistics import Moments, moments

__all__ = [
    "BatchNorm",
    "Moments",
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_eval_forward",
    "batch_norm_forward",
    "config_context",
    "moments",
    "set_backend",
    "set_num_threads",
    "show_config",
]
