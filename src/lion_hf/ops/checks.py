"""What the operator accepts, and what may be looked at to tell: clear errors before anything is computed."""

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode


FORMATS = ("attention", "rnn", "chunk", "auto")


def check_arguments(query, key, value, log_decay, format, chunk_size, key_mask, scale, check_values=True) -> str:
    """Raises ValueError on anything that does not fit; returns the format in lower case. Values are read on request."""
    form = format.lower() if isinstance(format, str) else format
    if form not in FORMATS:
        raise ValueError(f"format is {format!r}; allowed are {', '.join(map(repr, FORMATS))}.")
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size!r}; it must be an integer of at least 1, for instance 64.")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale is {scale!r}; it must be positive. Negate the query for a negative scale.")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must have 4 dimensions (batch, heads, length, width). Use "
                "view(batch, length, heads, width).transpose(1, 2) to split heads."
            )
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}; it must be floating point. Convert it with .float().")
    if query.shape != key.shape or query.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit: query and "
            "key need the same shape, value may differ in the last dimension only."
        )
    if log_decay is not None:
        batch, heads, length, _ = query.shape
        expected = {1: (heads,), 3: (batch, heads, length)}.get(log_decay.dim())
        if expected is None or log_decay.shape != expected or not log_decay.is_floating_point():
            raise ValueError(
                f"log_decay has shape {tuple(log_decay.shape)} and dtype {log_decay.dtype}; allowed are None, floating "
                f"point (heads,) = ({heads},) and (batch, heads, length) = {(batch, heads, length)}."
            )
        if check_values and values_can_be_read(log_decay) and not bool((log_decay <= 0).all()):
            raise ValueError(
                f"log_decay has a positive or NaN entry (largest: {log_decay.max().item()}); it is the logarithm of a "
                "decay in [0, 1], so every entry must be <= 0. Use logsigmoid, or clamp(max=0)."
            )
    if key_mask is not None:
        if key_mask.shape != (query.shape[0], query.shape[2]):
            raise ValueError(
                f"key_mask has shape {tuple(key_mask.shape)}; it must be (batch, length) = "
                f"{(query.shape[0], query.shape[2])} with True or 1 for real tokens."
            )
        if check_values and values_can_be_read(key_mask) and not is_binary(key_mask):
            raise ValueError(
                "key_mask holds values other than 0 and 1; it marks real tokens with True or 1. An additive mask "
                "(0 and -inf) becomes one by `mask == 0`."
            )
    return form


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """Raises ValueError unless `cu_seqlens` divides a single row of `length` tokens into sequences."""
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(
            f"cu_seqlens is a {type(cu_seqlens).__name__}; it must be an int32 or int64 tensor of shape "
            "(sequences + 1,). Use torch.tensor(cu_seqlens)."
        )
    if batch != 1:
        raise ValueError(
            f"cu_seqlens was given with a batch of {batch}; sequences are packed into a single row, so the batch must "
            "be 1. Join the rows along their tokens."
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; it must be int32 or int64 "
            "of shape (sequences + 1,), with the bounds of at least one sequence."
        )
    if values_can_be_read(cu_seqlens):
        first, last, shortest = int(cu_seqlens[0]), int(cu_seqlens[-1]), int(cu_seqlens.diff().min())
        if first != 0 or last != length or shortest < 0:
            raise ValueError(
                f"cu_seqlens runs from {first} to {last} and its shortest sequence has {shortest} tokens; it must run "
                f"from 0 to the {length} tokens of the row and never decrease."
            )


def values_can_be_read(x: Tensor) -> bool:
    """Reading values must neither wait for an accelerator nor break a graph, and there must be some."""
    return x.device.type == "cpu" and not is_abstract(x)


def is_abstract(x: Tensor) -> bool:
    """Whether a tensor stands for values that are not there, or that no choice may depend on: while a graph is made of
    it, within torch.func, on the meta device, and in subclasses such as FakeTensor."""
    return (
        makes_graph()
        or x.is_meta
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
        or get_proxy_mode() is not None
    )


def makes_graph() -> bool:
    """Whether a graph is made, by torch.compile, torch.export or torch.jit.trace: one for all batches and lengths, so
    that no loop and no choice in it may depend on them."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_binary(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all())


def is_exporting() -> bool:
    check = getattr(torch.compiler, "is_exporting", None)  # torch >= 2.7
    return check() if check is not None else torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
