"""The forms tied together by one autograd Function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import attention_backward, attention_forward
from .chunk import chunk_backward, chunk_forward
from .decays import unclamped_gradient
from .global_state import global_backward, global_forward
from .recurrent import rnn_backward, rnn_forward
from .tokens import Tokens, accumulation_dtype, without_autocast


_FORMS = {
    "attention": (attention_forward, attention_backward),
    "chunk": (chunk_forward, chunk_backward),
    "rnn": (rnn_forward, rnn_backward),
    "global": (global_forward, global_backward),
}


class LionFunction(torch.autograd.Function):
    """Keeps its inputs as they came, and a normalised output; every form recomputes the rest."""

    @staticmethod
    def forward(ctx, query, key, value, key_mask, options, *log_decays):
        form, chunk_size, scale, result, eps, orders = options
        ctx.options = options
        x = _tokens(query, key, value, key_mask, result)
        out, row_sums = _FORMS[form][0](x, _decays(form, log_decays, orders), scale, chunk_size)
        normalized = None, None
        if result == "normalized":
            row_sums.add_(eps)
            out.div_(row_sums.unsqueeze(-1))
            normalized = out, row_sums
        ctx.save_for_backward(query, key, value, key_mask, *normalized, *log_decays)
        return (out, row_sums) if result == "both" else out

    @staticmethod
    def backward(ctx, dy, dc=None):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "LION's operator has no second derivative, and backward was called with create_graph=True. Leave "
                "create_graph out, or build the output from lion_hf.ops.attention_scores, which has one."
            )
        query, key, value, key_mask, out, row_sums, *log_decays = ctx.saved_tensors
        form, chunk_size, scale, result, _, orders = ctx.options
        x = _tokens(query, key, value, key_mask, result)
        with without_autocast(query.device):
            dy = dy.to(x.dtype)
            if result == "normalized":  # y = n / m, m = c + eps
                dy = dy / row_sums.unsqueeze(-1)
                dc = (dy * out).sum(-1).neg_()
            decays = _decays(form, log_decays, orders)
            dq, dk, dv, *dgates = _FORMS[form][1](x, decays, dy, dc, scale, chunk_size)
        if dv.shape[-1] > value.shape[-1]:  # the column of ones
            dv = dv[..., :-1]
        if key_mask is not None:
            keep = key_mask[:, None, :, None].bool()
            dk, dv = torch.where(keep, dk, 0), torch.where(keep, dv, 0)
        dgates = (unclamped_gradient(gradient, g, x.dtype) for gradient, g in zip(dgates, log_decays, strict=True))
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None, *dgates


def _decays(form: str, log_decays: Sequence[Tensor], orders: Sequence | None):
    """What a form takes: attention takes scans, pairs of log-decays and orders, the others the one log-decay."""
    if form == "attention":
        return list(zip(log_decays, orders or [None] * len(log_decays), strict=True))
    return log_decays[0] if log_decays else None


def _tokens(query, key, value, key_mask, result) -> Tokens:
    return Tokens(query, key, value, key_mask, result != "numerator", accumulation_dtype(query, key, value))
