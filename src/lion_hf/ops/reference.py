"""The textbook: what LION computes, by its definition, slow and readable. Every form and kernel is tested against it.

A query i reads every key j, to its left and to its right. On the way from j to i the key is multiplied by the decay of
each token that it leaves, its own first: M_ij = d_j d_(j+1) .. d_(i-1) from the left, d_j d_(j-1) .. d_(i+1) from the
right, M_ii = 1. No cumulative sums, no chunks, no logarithms: one decay is multiplied at a time.

    y_i = scale * sum_j M_ij (q_i . k_j) v_j        normalize: divided by  scale * sum_j M_ij (q_i . k_j) + eps
"""

import torch


def textbook_mask(decay):
    """M (..., L, L) from decays in [0, 1] (..., L)."""
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
    """y (B, H, L, E) from query, key (B, H, L, D) and value (B, H, L, E), in their dtype.

    log_decay is None (M is 1), (H,) or (B, H, L); key_mask (B, L) is 0 where a key counts for nothing; scale is
    D**-0.5 by default.
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
    """The same y without mask and normalization, token by token: one state read from the left, one from the right.

    decay (B, H, L) in [0, 1].
    """
    left, right, length = [], [], query.shape[2]
    state = future = torch.zeros_like(key[:, :, 0, :, None] * value[:, :, 0, None, :])  # (B, H, D, E)
    for i in range(length):
        state = state + key[:, :, i, :, None] * value[:, :, i, None, :]
        left.append(torch.einsum("bhd,bhde->bhe", query[:, :, i], state))
        state = state * decay[:, :, i, None, None]  # leaves token i
    for i in reversed(range(length)):
        right.append(torch.einsum("bhd,bhde->bhe", query[:, :, i], future))
        future = (future + key[:, :, i, :, None] * value[:, :, i, None, :]) * decay[:, :, i, None, None]
    return query.shape[3] ** -0.5 * (torch.stack(left, 2) + torch.stack(right[::-1], 2))
