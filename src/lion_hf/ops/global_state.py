"""The chunk and rnn forms without decay: every token reads the same state, sum_j k_j v_j^T."""

import torch

from .tokens import ALL, Tokens, slices


def global_forward(x: Tokens, scale, block):
    parts = _parts(x, block)
    state = _state(x, parts).mul_(scale)
    if len(parts) == 1:
        return x.split(torch.matmul(x.queries(), state))
    y = x.empty_output()
    for part in parts:
        y[:, :, part] = torch.matmul(x.queries(part), state)
    return x.split(y)


def global_backward(x: Tokens, dy, dc, scale, block):
    dy = x.join(dy, dc)
    parts = _parts(x, block)
    state = _state(x, parts)
    dstate = torch.zeros_like(state)
    for part in parts:
        dstate += torch.matmul(x.queries(part).transpose(-1, -2), dy[:, :, part])
    dq = torch.matmul(dy, state.mul_(scale).transpose(-1, -2))
    dstate *= scale
    dk = torch.matmul(x.values(), dstate.transpose(-1, -2))
    return dq, dk, torch.matmul(x.keys(), dstate)


def _parts(x: Tokens, block: int | None) -> list[slice]:
    """Return slices of `block` tokens, or all tokens if `block` is None. A graph must not depend on their number."""
    return [ALL] if block is None else slices(0, x.query.shape[2], block)


def _state(x: Tokens, parts: list[slice]) -> torch.Tensor:
    state = torch.matmul(x.keys(parts[0]).transpose(-1, -2), x.values(parts[0]))
    for part in parts[1:]:
        state += torch.matmul(x.keys(part).transpose(-1, -2), x.values(part))
    return state
