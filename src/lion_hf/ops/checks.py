"""Checks of arguments, which raise clear errors before anything is computed, and of when values may be read."""

from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.fx.experimental.proxy_tensor import get_proxy_mode


FORMATS = ("attention", "rnn", "chunk", "auto")


def check_arguments(query, key, value, log_decay, format, chunk_size, key_mask, scale, check_values=True) -> str:
    """Raise ValueError for invalid arguments; return the format in lower case.

    With `check_values`, the values of log_decay and key_mask are checked too, where reading them is cheap.
    """
    form = _check_options(format, chunk_size, scale)
    _check_tokens({"query": query, "key": key, "value": value})
    if query.shape != key.shape or query.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"the shapes of query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not "
            "match: query and key must have the same shape, value may differ in the last dimension only."
        )
    if log_decay is not None:
        batch, heads, length, _ = query.shape
        expected = {1: (heads,), 3: (batch, heads, length)}.get(log_decay.dim())
        if expected is None or log_decay.shape != expected or not log_decay.is_floating_point():
            raise ValueError(
                f"log_decay has shape {tuple(log_decay.shape)} and dtype {log_decay.dtype}; it must be None, or "
                f"floating point of shape (heads,) = ({heads},) or (batch, heads, length) = {(batch, heads, length)}."
            )
        if check_values:
            _check_no_growth("log_decay", log_decay)
    if key_mask is not None:
        check_key_mask(key_mask, query.shape[0], query.shape[2], check_values)
    return form


def check_two_sided(
    forward, backward, stated, diagonal, convention, direction, normalize, format, chunk_size, key_mask, scale,
    check_values,
) -> str:  # fmt: skip
    """Raise ValueError for invalid arguments of `two_sided_attention`; return the format in lower case.

    `forward` and `backward` are (query, key, value, log_decay, log_weight) of both sides, `stated` the arguments
    `backward_log_decay` and `backward_log_weight`.
    """
    form = _check_options(format, chunk_size, scale)
    _check_name("convention", convention, ("left", "entered", "between", "edge"))
    _check_name("direction", direction, ("both", "forward", "backward"))
    _check_name("normalize", normalize, (False, True, "mask", "clamp"))
    for name, x in zip(("backward_log_decay", "backward_log_weight"), stated, strict=True):
        if isinstance(x, str):
            _check_name(name, x, ("same",))
    value = forward[2]
    for prefix, side in (("", forward), ("backward_", backward)):
        if prefix and all(a is b for a, b in zip(forward, side, strict=True)):
            continue
        _check_side(prefix, side, value, check_values)
    if isinstance(diagonal, Tensor):
        batch, heads, length = value.shape[:3]
        expected = {1: (heads,), 3: (batch, heads, length)}.get(diagonal.dim())
        if expected is None or diagonal.shape != expected or not diagonal.is_floating_point():
            raise ValueError(
                f"diagonal has shape {tuple(diagonal.shape)} and dtype {diagonal.dtype}; it must be None, a number, or "
                f"floating point of shape (heads,) = ({heads},) or (batch, heads, length) = {(batch, heads, length)}."
            )
    elif diagonal is not None and not isinstance(diagonal, Real):
        raise ValueError(f"diagonal is {diagonal!r}; it must be None, a number or a tensor.")
    if key_mask is not None:
        check_key_mask(key_mask, value.shape[0], value.shape[2], check_values)
    return form


def _check_side(prefix: str, side, like: Tensor, check_values: bool) -> None:
    query, key, value, log_decay, log_weight = side
    _check_tokens({f"{prefix}query": query, f"{prefix}key": key, f"{prefix}value": value})
    batch, heads, length, _ = like.shape
    groups, width = query.shape[1], query.shape[3]
    if query.shape != key.shape or value.shape != like.shape or (query.shape[0], query.shape[2]) != (batch, length):
        raise ValueError(
            f"the shapes of {prefix}query {tuple(query.shape)}, {prefix}key {tuple(key.shape)} and {prefix}value "
            f"{tuple(value.shape)} do not match: query and key must have the same shape, and value may differ "
            f"from them in the heads and the last dimension only. Values of both sides have the same shape, "
            f"{tuple(like.shape)}."
        )
    if groups == 0 or heads % groups:
        raise ValueError(
            f"{prefix}query and {prefix}key have {groups} heads and value has {heads}; their number must be that of "
            "value, or a divisor of it."
        )
    if log_decay is not None:
        allowed = {1: (heads,), 2: (heads, width), 3: (batch, heads, length), 4: (batch, heads, length, width)}
        expected = allowed.get(log_decay.dim())  # only this one: each comparison of sizes is a guard in graphs
        if expected is None or log_decay.shape != expected or not log_decay.is_floating_point():
            raise ValueError(
                f"{prefix}log_decay has shape {tuple(log_decay.shape)} and dtype {log_decay.dtype}; it must be None, "
                f"or floating point of shape (heads,), (heads, head_dim), (batch, heads, length) or "
                f"(batch, heads, length, head_dim), here one of {', '.join(map(str, allowed.values()))}."
            )
        if check_values:
            _check_no_growth(f"{prefix}log_decay", log_decay)
    if log_weight is not None and (log_weight.shape != (batch, heads, length) or not log_weight.is_floating_point()):
        raise ValueError(
            f"{prefix}log_weight has shape {tuple(log_weight.shape)} and dtype {log_weight.dtype}; it must be None, or "
            f"floating point of shape (batch, heads, length) = {(batch, heads, length)}."
        )


def _check_options(format, chunk_size, scale) -> str:
    form = format.lower() if isinstance(format, str) else format
    if form not in FORMATS:
        raise ValueError(f"format is {format!r}; allowed are {', '.join(map(repr, FORMATS))}.")
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, (int, Integral)) or chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size!r}; it must be an integer of at least 1, for instance 64.")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale is {scale!r}; it must be positive. Negate the query for a negative scale.")
    return form


def _check_name(option: str, value: object, allowed: tuple) -> None:
    if not isinstance(value, (str, bool)) or value not in allowed:
        raise ValueError(f"{option} is {value!r}; allowed are {', '.join(map(repr, allowed))}.")


def _check_tokens(tensors: dict[str, Tensor]) -> None:
    for name, x in tensors.items():
        if x.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must have 4 dimensions (batch, heads, length, width). Use "
                "view(batch, length, heads, width).transpose(1, 2) to split heads."
            )
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}; it must be floating point. Convert it with .float().")


def _check_no_growth(name: str, log_decay: Tensor) -> None:
    if values_can_be_read(log_decay) and not bool((log_decay <= 0).all()):
        raise ValueError(
            f"{name} has a positive or NaN entry (largest: {log_decay.max().item()}); it is the logarithm of a "
            "decay in [0, 1], so every entry must be <= 0. Use logsigmoid, or clamp(max=0)."
        )


def check_key_mask(key_mask: Tensor, batch: int, length: int, check_values: bool = True) -> None:
    """Raise ValueError for a mask of another shape and, with `check_values`, for values other than 0 and 1."""
    if key_mask.shape != (batch, length):
        raise ValueError(
            f"key_mask has shape {tuple(key_mask.shape)}; it must be (batch, length) = {(batch, length)}, with True or "
            "1 for real tokens."
        )
    if check_values and values_can_be_read(key_mask) and not is_binary(key_mask):
        raise ValueError(
            "key_mask holds values other than 0 and 1; it must be True or 1 for real tokens, False or 0 for padding. "
            "Convert an additive mask (0 and -inf) with `mask == 0`."
        )


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """Raise ValueError unless `cu_seqlens` divides a single row of `length` tokens into sequences."""
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(
            f"cu_seqlens is a {type(cu_seqlens).__name__}; it must be an int32 or int64 tensor of shape "
            "(sequences + 1,). Use torch.tensor(cu_seqlens)."
        )
    if batch != 1:
        raise ValueError(
            f"cu_seqlens was given with a batch of {batch}; packed sequences are a single row, so the batch must be 1. "
            "Concatenate the rows along their tokens."
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; it must be int32 or int64 "
            "of shape (sequences + 1,), for at least one sequence."
        )
    if values_can_be_read(cu_seqlens):
        first, last, shortest = int(cu_seqlens[0]), int(cu_seqlens[-1]), int(cu_seqlens.diff().min())
        if first != 0 or last != length or shortest < 0:
            raise ValueError(
                f"cu_seqlens runs from {first} to {last}, and its smallest step is {shortest}; it must begin with 0, "
                f"end with {length}, the number of tokens of the row, and never decrease."
            )


def values_can_be_read(x: Tensor) -> bool:
    """Whether values can be read without waiting for an accelerator or breaking a graph."""
    return x.device.type == "cpu" and not is_abstract(x)


def is_abstract(x: Tensor) -> bool:
    """Whether a tensor has no values, or values that must not influence control flow.

    True while a graph is made, inside torch.func, on the meta device, and for subclasses such as FakeTensor.
    """
    return (
        makes_graph()
        or x.is_meta
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
        or get_proxy_mode() is not None
    )


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func transforms the computation, or forward mode differentiates one of the tensors."""
    if makes_graph():
        return False
    return torch._C._are_functorch_transforms_active() or any(
        x is not None and unpack_dual(x).tangent is not None for x in tensors
    )


def makes_graph() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is making a graph.

    One graph serves all batches and lengths, so its loops and branches must not depend on them.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_binary(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all())


def is_exporting() -> bool:
    # Not torch.compiler.is_exporting(): in some releases (2.11) it also returns True in graphs of torch.compile.
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling() if flag is None else flag
