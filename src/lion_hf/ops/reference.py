"""The definitions of the operators, slow and readable. Every form and kernel is tested against them.

LION's own operator (`textbook`): query i reads every key j, on its left and on its right, with a weight that is
multiplied by the decay mask M. Its entry M_ij is the product of the decays of all tokens from j up to, but not
including, i. With `normalize`, y_i is divided by scale * sum_j M_ij (q_i . k_j) + eps.

    M_ij = d_j d_(j+1) .. d_(i-1)  for j < i        M_ij = d_j d_(j-1) .. d_(i+1)  for j > i        M_ii = 1
    y_i = scale * sum_j M_ij (q_i . k_j) v_j

The general operator (`textbook_two_sided`): both sides may have their own tensors and every channel c of the key its
own decays, a convention says whether the decays of i and j belong to M_ij, and d_i is free.

    y_i = scale * (d_i v_i + sum_(j<i) sum_c q_ic k_jc M_ijc v_j + sum_(j>i) sum_c q_ic k_jc M_ijc v_j)

This file multiplies decays, or adds their logarithms, one at a time. It uses no cumulative sums and no chunks.
"""

import functools
import math

import torch


def textbook_mask(decay):
    """Return the decay mask M (..., L, L) of decays (..., L) in [0, 1]."""
    length = decay.shape[-1]
    one = torch.ones_like(decay[..., :1])
    lower, upper = [one], [one]  # lower[i]: M_i0 .. M_ii; upper[j]: M_0j .. M_jj
    for t in range(1, length):
        lower.append(torch.cat([lower[-1] * decay[..., t - 1 : t], one], -1))
        upper.append(torch.cat([upper[-1] * decay[..., t : t + 1], one], -1))
    pad = torch.nn.functional.pad
    below = torch.stack([pad(row, (0, length - row.shape[-1])) for row in lower], -2)
    above = torch.stack([pad(column, (0, length - column.shape[-1])) for column in upper], -1)
    return below.tril() + above.triu(1)


def textbook(query, key, value, log_decay=None, key_mask=None, normalize=False, scale=None, eps=1e-6):
    """Return y (B, H, L, E) for query and key (B, H, L, D) and value (B, H, L, E), computed in their dtype.

    log_decay is None (M is 1 everywhere), (H,) or (B, H, L). key_mask (B, L) is 0 for keys to ignore. scale is D**-0.5
    by default.
    """
    batch, heads, length, width = query.shape
    scale = width**-0.5 if scale is None else scale
    weights = torch.einsum("bhid,bhjd->bhij", query, key)
    if log_decay is not None:
        decay = log_decay.exp()
        decay = decay.view(1, heads, 1).expand(batch, heads, length) if decay.dim() == 1 else decay
        weights = weights * textbook_mask(decay)
    if key_mask is not None:
        weights = weights * key_mask.view(batch, 1, 1, length).to(weights.dtype)
    numerator = scale * torch.einsum("bhij,bhje->bhie", weights, value)
    if not normalize:
        return numerator
    return numerator / (scale * weights.sum(-1, keepdim=True) + eps)


def textbook_recurrent(query, key, value, decay):
    """Return the same y, without key mask and normalisation, from two states that are updated token by token.

    One state runs from left to right, the other from right to left. decay (B, H, L) is in [0, 1].
    """
    left, right, length = [], [], query.shape[2]
    state = future = torch.zeros_like(key[:, :, 0, :, None] * value[:, :, 0, None, :])  # (B, H, D, E)
    for i in range(length):
        state = state + key[:, :, i, :, None] * value[:, :, i, None, :]
        left.append(torch.einsum("bhd,bhde->bhe", query[:, :, i], state))
        state = state * decay[:, :, i, None, None]  # the state leaves token i
    for i in reversed(range(length)):
        right.append(torch.einsum("bhd,bhde->bhe", query[:, :, i], future))
        future = (future + key[:, :, i, :, None] * value[:, :, i, None, :]) * decay[:, :, i, None, None]
    return query.shape[3] ** -0.5 * (torch.stack(left, 2) + torch.stack(right[::-1], 2))


def textbook_exponents(log_decay, convention):
    """Return log M_ij for j < i, and -inf for all other pairs, (..., L, L), for log-decays (..., L).

    The decays of the tokens between j and i always count. The convention says what the two ends add.
    """
    length, nothing = log_decay.shape[-1], torch.zeros_like(log_decay)
    reader, writer = {
        "left": (nothing, log_decay),  # the token that is left, j, decays
        "entered": (log_decay, nothing),  # the token that is entered, i, decays
        "between": (nothing, nothing),
        "edge": (log_decay / 2, log_decay / 2),  # both decay by the square root
    }[convention]
    between, rows = log_decay[..., :0], []  # between[j]: the sum of the tokens j + 1 .. i - 1
    for i in range(length):
        row = reader[..., i : i + 1] + between + writer[..., :i]
        rows.append(torch.nn.functional.pad(row, (0, length - i), value=-math.inf))
        between = torch.cat([between + log_decay[..., i : i + 1], nothing[..., :1]], -1)
    return torch.stack(rows, -2)


def textbook_two_sided(query, key, value, log_decay=None, *, key_mask=None, cu_seqlens=None, **options):
    """Return what `two_sided_attention` returns, whose docstring explains the arguments, in the dtype of the inputs.

    It needs memory for L x L x D weights. What is not divided overflows where exp(log_weight) does.
    """
    inputs = options | {"query": query, "key": key, "value": value, "log_decay": log_decay}
    if cu_seqlens is None:
        return _one_sequence(key_mask=key_mask, **inputs)
    results = []
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        if start < stop:
            part = {n: x[:, :, start:stop] if torch.is_tensor(x) and x.dim() > 2 else x for n, x in inputs.items()}
            results.append(_one_sequence(key_mask=None if key_mask is None else key_mask[:, start:stop], **part))
    if options.get("return_denominator"):
        return tuple(torch.cat(parts, 2) for parts in zip(*results, strict=True))
    return torch.cat(results, 2)


def _one_sequence(
    query, key, value, log_decay, key_mask, convention="left", direction="both", diagonal=None, log_weight=None,
    backward_query=None, backward_key=None, backward_value=None, backward_log_decay="same", backward_log_weight="same",
    normalize=False, return_denominator=False, scale=None, eps=1e-6,
):  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    keep = (torch.ones_like(value[:, 0, :, 0]) if key_mask is None else key_mask).bool()[:, None]  # (B, 1, L)
    back_query = query if backward_query is None else backward_query
    back_key = key if backward_key is None else backward_key
    back_value = value if backward_value is None else backward_value
    back_decay = log_decay if isinstance(backward_log_decay, str) else backward_log_decay
    back_weight = log_weight if isinstance(backward_log_weight, str) else backward_log_weight
    query, key, value = _prepared(query, key, value, keep)
    back_query, back_key, back_value = _prepared(back_query, back_key, back_value, keep)

    # Logarithms of M_ij exp(log_weight_j): `own` (B, H, L) for j = i, and both sides (B, H, 1 or D, L, L).
    own = _log_weight(log_weight, value, keep)
    left = textbook_exponents(_by_channel(log_decay, value), convention) + own[:, :, None, None]
    right = textbook_exponents(_by_channel(back_decay, value).flip(-1), convention).flip(-2, -1)
    right = right + _log_weight(back_weight, value, keep)[:, :, None, None]
    left = torch.full_like(left, -math.inf) if direction == "backward" else left
    right = torch.full_like(right, -math.inf) if direction == "forward" else right

    # d_i is given, or `factor` times the score of the token with itself.
    given = torch.is_tensor(diagonal) and diagonal.dim() == 3
    factor = torch.as_tensor(1.0 if diagonal is None or given else diagonal, dtype=value.dtype).view(-1, 1)
    score = diagonal if given else factor * (query * key).sum(-1)

    # Weights are divided by the largest one that the row reads, so that nothing overflows. `one` is 1 in these units.
    read = _log_weight(None, value, keep) if given else torch.where(factor == 0, -math.inf, own)
    largest = [left.amax((2, 4)), right.amax((2, 4)), read, own if normalize == "mask" else read]
    unit = functools.reduce(torch.maximum, largest).detach()
    unit = torch.where(unit.isinf(), 0, unit)  # the row reads nothing
    left, right = ((x - unit[:, :, None, :, None]).exp() for x in (left, right))
    own, one = (own - unit).clamp(max=0).exp(), (-unit).exp()
    d = torch.where(keep, score, 0) * (torch.where(keep, one, 0) if given else own)

    forward = (query.mT[..., None] * key.mT[..., None, :] * left).sum(2)  # sum_c q_ic k_jc M_ijc
    backward = (back_query.mT[..., None] * back_key.mT[..., None, :] * right).sum(2)
    n = scale * (d[..., None] * value + forward @ value + backward @ back_value)
    c = scale * (d + forward.sum(-1) + backward.sum(-1))
    if normalize == "mask":
        c = own + left.mean(2).sum(-1) + right.mean(2).sum(-1)
    if return_denominator:
        return n / one[..., None], c / one
    below = {False: one, True: c + eps * one, "mask": c + eps * one, "clamp": c.abs().maximum(one)}[normalize]
    return n / torch.where(below == 0, 1, below)[..., None]  # 0 if all scores are 0 and `one` underflows


def _prepared(query, key, value, keep):
    """Repeat groups of heads, and remove what masked tokens write."""
    query, key = (x.repeat_interleave(value.shape[1] // x.shape[1], 1) for x in (query, key))
    return query, torch.where(keep[..., None], key, 0), torch.where(keep[..., None], value, 0)


def _log_weight(log_weight, value, keep):
    """Return the log-weights (B, H, L), -inf for masked tokens."""
    return torch.where(keep, torch.zeros_like(value[..., 0]) if log_weight is None else log_weight, -math.inf)


def _by_channel(log_decay, value):
    """Return log-decays of any rank as (1 or B, H, 1 or D, L)."""
    heads, length = value.shape[1:3]
    if log_decay is None:
        return value.new_zeros(1, heads, 1, length)
    if log_decay.dim() < 3:
        return log_decay.reshape(1, heads, -1, 1).expand(-1, -1, -1, length)
    return log_decay.unsqueeze(2) if log_decay.dim() == 3 else log_decay.mT


def textbook_causal(query, key, value, decay, convention):
    """Return d_i v_i + F_i of the general operator with d_i = q_i . k_i, step by step; decay (B, H, L, D) in [0, 1].

    The state S (B, H, D, E) and what is read from it are written as the papers of each convention write them.
    """
    outputs, state = [], (key[:, :, 0, :, None] * value[:, :, 0, None, :]) * 0
    for i in range(query.shape[2]):
        q, a = query[:, :, i, None, :], decay[:, :, i, :, None]
        new = key[:, :, i, :, None] * value[:, :, i, None, :]
        if convention == "left":  # LION: add, read, then decay
            state = state + new
            outputs.append(q @ state)
            state = a * state
        elif convention == "entered":  # RetNet, GLA, Mamba-2: decay, add, then read
            state = a * state + new
            outputs.append(q @ state)
        elif convention == "between":  # RWKV: read the state of the token before and the new pair, then decay and add
            outputs.append(q @ (state + new))
            state = a * state + new
        elif convention == "edge":  # half of the decay before reading, half of it after
            state = a.sqrt() * state + new
            outputs.append(q @ state)
            state = a.sqrt() * state
    return torch.cat(outputs, 2)


def textbook_scan(read, write, value, decay):
    """Return sum_(j<i) sum_c r_ic w_jc (product of the decays strictly between j and i)_c v_j, (B, H, L, E).

    Every side of every convention is this scan, read before its step: its own decay is a part of r_i or of w_j.
    """
    outputs, state = [], (write[:, :, 0, :, None] * value[:, :, 0, None, :]) * 0
    for i in range(read.shape[2]):
        outputs.append(read[:, :, i, None, :] @ state)
        state = decay[:, :, i, :, None] * state + write[:, :, i, :, None] * value[:, :, i, None, :]
    return torch.cat(outputs, 2)
