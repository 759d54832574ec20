"""The definition of the operator, written from the products of decays and nothing else: the oracle of the tests.

No cumulative sums, no chunks, no exponent tricks: M_ij is multiplied together one decay at a time.
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
    """y (B, H, L, E) in the dtype of the inputs; see lion_ops for the meaning of the arguments."""
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
