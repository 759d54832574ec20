"""Which backend runs the operator: the forms of this package in PyTorch, or the fused kernels for GPUs."""

import functools
import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import is_abstract, is_exporting


logger = logging.getLogger(__name__)

# "torch" or "triton" forces the forms or the kernels; read once, at import.
BACKEND = os.environ.get("LION_BACKEND", "").lower()


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning the first time it is given."""
    logger.warning(message)


def fused_kernels(query: Tensor, key: Tensor, value: Tensor, form: str) -> Callable | None:
    """The operator in ops/triton, where it is wanted and takes these inputs. A GPU without it is told why, once."""
    if BACKEND not in ("", "torch", "triton"):
        raise ValueError(f"LION_BACKEND is {BACKEND!r}; allowed are 'torch' and 'triton', or leave it unset.")
    # The rnn form promises memory independent of the length, which states of chunks are not.
    if BACKEND == "torch" or not (BACKEND or query.is_cuda) or form == "rnn" or is_exporting():
        return None
    try:
        from .triton.launch import fused_linear_attention, unsupported
    except ImportError as error:
        reason = str(error)
    else:
        reason = unsupported(query, key, value)
        if reason is None:
            return fused_linear_attention
    if BACKEND == "triton":
        raise ValueError(
            f"LION_BACKEND=triton, but the fused kernels cannot be used: {reason}. Unset it to go without."
        )
    warn_once(f"LION runs without its fused GPU kernels: {reason}. LION_BACKEND=torch silences this warning.")
    return None


def fused_unit_silu(x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The feature map of ops/triton, where it takes this input: not in graphs, whose compilers fuse it themselves."""
    if BACKEND == "torch" or not (BACKEND or x.is_cuda) or x.dtype == torch.float64 or is_abstract(x):
        return None
    try:
        from .triton.features import unit_silu
    except ImportError:  # the operator has warned
        return None
    return unit_silu
