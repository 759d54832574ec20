"""The choice of the backend: the forms in PyTorch, or the fused kernels for GPUs."""

import functools
import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import is_abstract, is_exporting, is_transformed, makes_graph


logger = logging.getLogger(__name__)

# "torch" forces the forms in PyTorch, "triton" the fused kernels. Read once, at import.
BACKEND = os.environ.get("LION_BACKEND", "").lower()


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, once per message."""
    logger.warning(message)


def fused_kernels(form: str, query: Tensor, key: Tensor, value: Tensor, *log_decays: Tensor | None) -> Callable | None:
    """Return the operator in ops/triton if it is enabled and supports these inputs, otherwise None.

    The rnn form, exported graphs, torch.func and forward mode never use it. If it cannot be used for another reason, a
    warning gives the reason once; with LION_BACKEND=triton it is an error.
    """
    if BACKEND not in ("", "torch", "triton"):
        raise ValueError(f"LION_BACKEND is {BACKEND!r}; allowed are 'torch' and 'triton', or leave it unset.")
    # The memory of the rnn form must not depend on the length, but the kernels store a state for every chunk.
    if BACKEND == "torch" or not (BACKEND or query.is_cuda) or form == "rnn" or is_exporting():
        return None
    if is_transformed(query, key, value, *log_decays):
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
            f"LION_BACKEND=triton, but the fused kernels cannot be used: {reason}. Unset LION_BACKEND to run the forms "
            "in PyTorch."
        )
    warn_once(f"LION runs without its fused GPU kernels: {reason}. Set LION_BACKEND=torch to silence this warning.")
    return None


def state_no_kernels(value: Tensor) -> None:
    """Log once that options of the general operator have no fused kernels; with LION_BACKEND=triton it is an error."""
    if BACKEND == "triton":
        raise ValueError(
            "LION_BACKEND=triton, but the fused kernels compute LION's own operator only: the convention 'left', both "
            "directions, one set of tensors, and decays per head or token. Unset LION_BACKEND to run the forms in "
            "PyTorch."
        )
    if value.is_cuda and BACKEND != "torch" and not makes_graph():
        warn_once(
            "two_sided_attention runs in PyTorch: with these options there are no fused GPU kernels. Set "
            "LION_BACKEND=torch to silence this warning."
        )


def fused_band_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Callable | None:
    """Return the operator of ops/triton for softmax attention in a band if it supports these inputs, otherwise None.

    PyTorch computes the same, so nothing is said where the operator is not used, also with LION_BACKEND=triton: for
    float64, wide heads and dropout, in exported and traced graphs, in torch.func and in forward mode. Without
    LION_BACKEND, float32 with gradients is left to PyTorch, which takes 0.6 to 0.8 of the time there (H100).
    """
    if BACKEND == "torch" or not (BACKEND or query.is_cuda) or dropout or is_exporting() or torch.jit.is_tracing():
        return None
    if not BACKEND and query.dtype == torch.float32 and torch.is_grad_enabled() and query.requires_grad:
        return None
    if is_transformed(query, key, value):
        return None
    try:
        from .triton.band_launch import fused_band
        from .triton.launch import unsupported
    except ImportError:
        return None
    return fused_band if unsupported(query, key, value) is None else None


def fused_normed_silu(*tensors: Tensor) -> tuple[Callable, Callable] | None:
    """Return `normed_silu` and `normed_silu_of_both` of ops/triton if they support these inputs, otherwise None.

    All inputs have one shape and dtype.

    They are not used in graphs, whose compilers fuse the PyTorch operators themselves.
    """
    x = tensors[0]
    if BACKEND == "torch" or not (BACKEND or x.is_cuda) or x.dtype == torch.float64:
        return None
    if any(map(is_abstract, tensors)) or is_transformed(*tensors):
        return None
    try:
        from .triton.features import normed_silu, normed_silu_of_both
    except ImportError:  # fused_kernels logs the warning
        return None
    return normed_silu, normed_silu_of_both
