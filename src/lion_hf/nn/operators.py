"""The operators of variants, and how a mixer calls them for one scan or several."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.api import attention_scores, bidirectional_linear_attention, two_sided_attention
from ..ops.scans import averaged_scans
from .registry import Recurrence, Variant, at_least_float32


Path = tuple[Tensor, Tensor]


class Operator(NamedTuple):
    """The functions of an operator.

    Args:
        run: computes the output of one scan, like `bidirectional_linear_attention`.
        scores: computes the matrix of the attention form, like `attention_scores`; None if there is none.
        average: computes the output with the mean mask of several scans, like `averaged_scans`; None if that is not
            supported.
        linear: whether the output is a matrix times the values. The matrix is then the output for the values of an
            identity, and needs no `scores`.
        options: whether `run` takes `direction` and fewer heads of query and key than of value, and `average` takes
            lists of arguments, one entry for each scan.
    """

    run: Callable[..., Tensor]
    scores: Callable[..., Tensor] | None = None
    average: Callable[..., Tensor] | None = None
    linear: bool = False
    options: bool = False


# Values of `Recurrence.operator`. Mixers do not check values, so that NaN in one row does not fail the whole batch.
OPERATORS = {
    "linear_attention": Operator(
        *(partial(f, check_values=False) for f in (bidirectional_linear_attention, attention_scores, averaged_scans))
    ),
    "two_sided": Operator(
        partial(two_sided_attention, check_values=False),
        average=partial(averaged_scans, operator=two_sided_attention, check_values=False),
        linear=True,
        options=True,
    ),
}


def require_operator(variant: type[Variant], recurrences: Sequence[Recurrence]) -> str:
    """Return the name of the operator that a variant requests.

    Raises:
        ValueError: if there is no such operator, the variant does not state it, or its scans do not share what the
            operator needs them to share.
    """
    first = recurrences[0]
    if first.operator not in OPERATORS or first.operator not in variant.operators:
        raise ValueError(
            f"{variant.label} requests the operator {first.operator!r}; it must be one of its operators = "
            f"{variant.operators!r} and of the existing operators {', '.join(map(repr, OPERATORS))}."
        )
    several = len(recurrences) > 1
    if several and not OPERATORS[first.operator].options and not _same(recurrences, arguments=True):
        raise ValueError(
            f"{variant.label} changes query, key or value, which several scans share. It supports a single "
            "scan only: set scans = 1 in its class."
        )
    return first.operator


def run_scans(
    operator: Operator,
    recurrences: Sequence[Recurrence],
    paths: Sequence[Path] | None,
    normalize: bool,
    form: dict[str, Any],
    masks: dict[str, Any],
) -> Tensor:
    """Return the output of one scan, or of the mean of several along their paths.

    Args:
        operator: the operator that the recurrences request.
        recurrences: one for each scan.
        paths: one for each of several scans.
        normalize: whether to divide by row sums, unless the recurrences say it themselves.
        form: the arguments `format` and `chunk_size`.
        masks: further arguments of a single scan.
    """
    query, key, value, log_decay, _, arguments = recurrences[0]
    if len(recurrences) == 1:
        return operator.run(query, key, value, log_decay, **{"normalize": normalize, **arguments, **form}, **masks)
    arguments = {"normalize": normalize, **_by_scan(recurrences), **form}
    decays = [recurrence.log_decay for recurrence in recurrences]
    if _same(recurrences):
        return operator.average(query, key, value, decays, paths, **arguments)
    normalize, eps = arguments.pop("normalize"), arguments.pop("eps", 1e-6)
    if normalize not in (True, False):
        raise ValueError(
            f"Several scans that change query, key or value cannot be divided by normalize={normalize!r}. Use a single "
            "scan: set scans = 1 in the class of the variant."
        )
    total = 0
    for i, (scan, path) in enumerate(zip(recurrences, paths, strict=True)):
        own = {name: x[i] if isinstance(x, list) else x for name, x in arguments.items()}
        value = F.pad(at_least_float32(scan.value), (0, 1), value=1.0)  # the output for v = 1 is the row sum
        total = total + operator.average(scan.query, scan.key, value, [scan.log_decay], [path], normalize=False, **own)
    mean = total / len(paths)
    mixed = mean[..., :-1] / (mean[..., -1:] + eps) if normalize else mean[..., :-1]
    return mixed.to(recurrences[0].value.dtype)


def matrix_of_identity(
    operator: Operator,
    recurrences: Sequence[Recurrence],
    paths: Sequence[Path] | None,
    normalize: bool,
    masks: dict[str, Any],
) -> Tensor:
    """Return the matrix (batch, heads, length, length) of a linear operator, from its output for an identity.

    It is divided as the outputs are, and in float32 or wider.
    """
    value = recurrences[0].value
    batch, heads, length = value.shape[:3]
    dtype = torch.float64 if torch.float64 in (value.dtype, recurrences[0].query.dtype) else torch.float32
    identity = torch.eye(length, dtype=dtype, device=value.device)
    identity = identity.expand(batch, heads, -1, -1)
    recurrences = [recurrence._replace(value=identity) for recurrence in recurrences]
    return run_scans(operator, recurrences, paths, normalize, {"format": "attention"}, masks)


def has_matrix(operator: Operator, recurrences: Sequence[Recurrence]) -> bool:
    """Whether the output is one matrix times the values, which `scores` or `matrix_of_identity` returns."""
    if operator.scores is not None:
        return True
    own = any(recurrence.arguments.get("backward_value") is not None for recurrence in recurrences)
    return operator.linear and not own and all(x.value is recurrences[0].value for x in recurrences)


def _same(recurrences: Sequence[Recurrence], arguments: bool = False) -> bool:
    """Whether all scans have the same query, key and value (and arguments)."""
    parts = [[*x[:3], *((value for _, value in sorted(x.arguments.items())) if arguments else ())] for x in recurrences]
    return all(a is b for other in parts[1:] for a, b in zip(parts[0], other, strict=True))


def _by_scan(recurrences: Sequence[Recurrence]) -> dict[str, Any]:
    """Return the arguments of several scans: one value if it is the same for all of them, otherwise a list."""
    merged = {}
    for name, first in recurrences[0].arguments.items():
        values = [recurrence.arguments[name] for recurrence in recurrences]
        tensors = any(isinstance(x, Tensor) for x in values)
        same = all(x is first for x in values) if tensors else all(x == first for x in values)
        merged[name] = first if same else values
    return merged
