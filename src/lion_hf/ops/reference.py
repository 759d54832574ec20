"""The definition of LION's operator, slow and readable. Every form and kernel is tested against it.

Query i reads every key j, on its left and on its right, with a weight that is multiplied by the decay mask M. Its entry
M_ij is the product of the decays of all tokens from j up to, but not including, i. With `normalize`, y_i is divided by
scale * sum_j M_ij (q_i . k_j) + eps.

    M_ij = d_j d_(j+1) .. d_(i-1)  for j < i        M_ij = d_j d_(j-1) .. d_(i+1)  for j > i        M_ii = 1
    y_i = scale * sum_j M_ij (q_i . k_j) v_j

This file multiplies one decay at a time and uses no cumulative sums, chunks or logarithms.
"""

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
