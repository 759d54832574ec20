"""Scans of a grid along several paths, and their mean, for image encoders (arXiv 2502.16249)."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .api import bidirectional_linear_attention, resolve_format
from .autograd import Options, lion
from .backend import fused_kernels
from .checks import check_arguments
from .tokens import default_scale, without_autocast


def snake_orders(
    height: int, width: int, device: torch.device | str | None = None, *, prefix_tokens: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """Return the two snake scans of a grid of patches, by default with a class token before it.

    The first scan follows the rows (row 0 to the right, row 1 to the left, ...), the second the columns (column 0 down,
    column 1 up, ...). Prefix tokens, such as the class token, come first in both.

    Args:
        height: number of rows of patches.
        width: number of patches in each row.
        device: device of the returned tensors; PyTorch's default device if None.
        prefix_tokens: number of tokens before the patches; 1 by default, 0 for a grid alone.

    Returns:
        Two pairs `(order, inverse)` of int64 tensors (prefix_tokens + height * width,). For tokens in raster order,
        `tokens[order]` is the sequence along the scan; `sequence[inverse]` is in raster order again.
    """
    raster = torch.arange(height * width, device=device).view(height, width)
    orders = []
    for lines in (raster, raster.transpose(0, 1)):
        odd = torch.arange(lines.shape[0], device=device).remainder(2).bool().unsqueeze(1)
        curve = torch.where(odd, lines.flip(1), lines).flatten()
        order = torch.cat([torch.arange(prefix_tokens, device=device), curve + prefix_tokens])
        orders.append((order, order.argsort()))
    return orders


def averaged_scans(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decays: Sequence[Tensor | None],
    orders: Sequence[tuple[Tensor, Tensor]],
    *,
    operator: Callable = bidirectional_linear_attention,
    format: str = "attention",
    chunk_size: int = 64,
    normalize: bool | str = True,
    eps: float = 1e-6,
    check_values: bool = True,
    **options: object,
) -> Tensor:
    """Compute linear attention with the mean of several decay masks, each along its own order of the tokens.

    This is how image encoders use the snake scans. The attention form of LION's operator builds the mean mask once. The
    other forms, and other operators, compute one scan after another, add numerators and denominators, and divide once.

    Args:
        query: (batch, heads, length, head_dim), any floating dtype.
        key: same shape as `query`.
        value: (batch, heads, length, value_dim).
        log_decays: one per scan, <= 0, all (heads,) or all (batch, heads, length) with the tokens in the order of
            `query`. With another operator, each may be any log-decay that the operator accepts, also None.
        orders: a pair `(order, inverse)` per scan, see `snake_orders`.
        operator: what each scan computes: `bidirectional_linear_attention` (default) or `two_sided_attention`.
        format: as in `bidirectional_linear_attention`.
        chunk_size: as in `bidirectional_linear_attention`.
        normalize: the mode of the operator. True (default) divides by the mean row sums, "mask" by the mean sums of the
            masks, "clamp" by the absolute value of the mean row sums, but at least 1. False returns the mean of what is
            not divided.
        eps: added to the mean denominator before the division.
        check_values: as in `bidirectional_linear_attention`.
        options: more options of the operator, with the tokens in the order of `query`. What has a length follows each
            order. A list or tuple holds one value per scan, for instance `log_weight=[first, second]`.

    Returns:
        (batch, heads, length, value_dim) in the dtype of `value`. The scale is `head_dim**-0.5` by default.

    Raises:
        ValueError: for invalid arguments as in the operator; if `log_decays` is empty, or with LION's operator, if its
            shapes are of both kinds; if there are not as many `orders` or values of an option as `log_decays`; if
            `cu_seqlens` or `return_denominator` is given.
    """
    if operator is bidirectional_linear_attention and isinstance(normalize, str):
        raise ValueError(
            f"normalize is {normalize!r}; LION's operator allows True and False. Set operator=two_sided_attention for "
            "other modes."
        )
    if operator is bidirectional_linear_attention and not options:
        return _lion_scans(query, key, value, log_decays, orders, format, chunk_size, normalize, eps, check_values)
    scans = _scans(query, key, value, log_decays, orders, options)
    largest = _largest_weights(scans, value) if normalize else None
    found = []
    for (order, inverse), arguments in zip(orders, scans, strict=True):
        if largest is not None:
            arguments = _less_weight(arguments, largest)
        n, c = operator(
            **{name: _follow(name, x, order) for name, x in arguments.items()},
            format=format, chunk_size=chunk_size, normalize=normalize, return_denominator=True, eps=eps,
            check_values=check_values,
        )  # fmt: skip
        found.append((n.index_select(2, inverse), c.index_select(2, inverse)))
    numerator, denominator = (functools.reduce(torch.add, parts) / len(scans) for parts in zip(*found, strict=True))
    if normalize:
        one = torch.ones_like(denominator) if largest is None else torch.exp(-largest).to(denominator.dtype)
        below = denominator.abs().maximum(one) if normalize == "clamp" else denominator + eps * one
        # 0 if nothing is read and `one` underflows; then the numerator is 0 too.
        numerator = numerator / torch.where(below == 0, 1, below).unsqueeze(-1)
    return numerator.to(value.dtype)


def _scans(query, key, value, log_decays, orders, options: dict) -> list[dict]:
    """Return the arguments of the operator for each scan, with the tokens in the order of the inputs."""
    for name in ("cu_seqlens", "return_denominator"):
        given = options.pop(name, None)
        if given is not None and given is not False:
            raise ValueError(
                f"{name} was given to averaged_scans, which does not support it; leave it out. Scans are paths through "
                "one grid, and their mean is divided once."
            )
    if isinstance(log_decays, Tensor) or not len(log_decays):
        given = f"a tensor of shape {tuple(log_decays.shape)}" if isinstance(log_decays, Tensor) else "empty"
        raise ValueError(f"log_decays is {given}; it must be a list that holds a log-decay or None for each scan.")
    several = {"orders": orders, **{name: x for name, x in options.items() if isinstance(x, (list, tuple))}}
    for name, values in several.items():
        if len(values) != len(log_decays):
            raise ValueError(
                f"{name} has {len(values)} entries and log_decays has {len(log_decays)}; both must have one for each "
                "scan. Give a tensor, not a list, for an option that all scans share."
            )
    length = query.shape[2] if query.dim() == 4 else None
    for pair in orders:
        if length is not None and any(tuple(x.shape) != (length,) for x in pair):
            raise ValueError(
                f"orders holds index tensors of shapes {[tuple(x.shape) for x in pair]}; they must be (length,) = "
                f"({length},) for the {length} tokens of query. See snake_orders, and its prefix_tokens."
            )
    return [
        {"query": query, "key": key, "value": value, "log_decay": log_decay}
        | {name: x[i] if name in several else x for name, x in options.items()}
        for i, log_decay in enumerate(log_decays)
    ]


def _follow(name: str, x: object, order: Tensor) -> object:
    """Permute an argument into an order if it has a length."""
    if name == "key_mask" and x is not None:
        return x.index_select(1, order)
    return x.index_select(2, order) if isinstance(x, Tensor) and x.dim() > 2 else x


def _largest_weights(scans: list[dict], value: Tensor) -> Tensor | None:
    """Return the largest log-weight (batch, heads, 1) of each row in any scan, at least 0; None without log-weights.

    Numerators and denominators of scans can be added only in the same units.
    """
    found = []
    for x in scans:
        for name in ("log_weight", "backward_log_weight"):
            if isinstance(x.get(name), Tensor):
                weight = x[name].detach().to(torch.promote_types(x[name].dtype, torch.float32))
                mask = x.get("key_mask")
                found.append(weight if mask is None else weight.masked_fill(~mask.bool().unsqueeze(1), 0))
    return torch.stack(found).amax((0, -1)).clamp(min=0).unsqueeze(-1) if found and value.shape[2] else None


def _less_weight(arguments: dict, largest: Tensor) -> dict:
    """Return arguments for which n and c are divided by exp(largest)."""
    less = {}
    for name, default in (("log_weight", None), ("backward_log_weight", "same")):
        weight = arguments.get(name, default)
        if not isinstance(weight, str):
            less[name] = (0 if weight is None else weight) - largest.expand(arguments["value"].shape[:3])
    diagonal = arguments.get("diagonal")
    if isinstance(diagonal, Tensor) and diagonal.dim() == 3:
        less["diagonal"] = diagonal * torch.exp(-largest).to(diagonal.dtype)
    return arguments | less


def _lion_scans(query, key, value, log_decays, orders, format, chunk_size, normalize, eps, check_values) -> Tensor:
    if len({log_decay.dim() for log_decay in log_decays}) != 1:
        raise ValueError(
            f"log_decays has the shapes {[tuple(x.shape) for x in log_decays]}; it must hold one for each scan, all of "
            "them (heads,) or all (batch, heads, length)."
        )
    for log_decay in log_decays:
        form = check_arguments(query, key, value, log_decay, format, chunk_size, None, None, check_values)
    form, chunk_size = resolve_format(form, query.shape[2], query.device, log_decays[0]), int(chunk_size)
    kernels = fused_kernels(form, query, key, value, *log_decays)
    if form == "attention" and kernels is None:
        result = "normalized" if normalize else "numerator"
        options = Options(form, chunk_size, default_scale(query), result, eps, list(orders))
        with without_autocast(query.device):
            return lion(query, key, value, None, options, *log_decays).to(value.dtype)
    found = []
    for log_decay, (order, inverse) in zip(log_decays, orders, strict=True):
        if kernels is not None:
            scale = default_scale(query)
            found.append(kernels(query, key, value, log_decay, None, None, scale, eps, "both", path=order))
        else:
            found.append(_along(order, inverse, query, key, value, log_decay, form, chunk_size))
    numerator, denominator = (functools.reduce(torch.add, parts) for parts in zip(*found, strict=True))
    scans = len(log_decays)
    if not normalize:
        return (numerator / scans).to(value.dtype)
    denominator = denominator + scans * eps
    denominator = denominator if eps else torch.where(denominator == 0, 1, denominator)
    return (numerator / denominator.unsqueeze(-1)).to(value.dtype)


def _along(order, inverse, query, key, value, log_decay, form: str, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Return the numerator and the denominator of one scan."""
    log_decay = log_decay if log_decay.dim() == 1 else log_decay.index_select(2, order)
    n, c = bidirectional_linear_attention(
        *(x.index_select(2, order) for x in (query, key, value)),
        log_decay,
        format=form,
        chunk_size=chunk_size,
        return_denominator=True,
        check_values=False,
    )
    return n.index_select(2, inverse), c.index_select(2, inverse)
