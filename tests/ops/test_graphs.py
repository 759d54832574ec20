"""torch.compile makes few graphs of the operator, even for many lengths."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lion_hf.ops import api
from lion_hf.ops.api import bidirectional_linear_attention, two_sided_attention


# With chunks of 4: one chunk, full chunks, a last chunk that is not full, and more chunks than a group (64) holds.
LENGTHS = (7, 9, 12, 4, 5, 3, 1, 2, 8, 16, 17, 23, 64, 257, 256, 260, 300, 31, 6, 513)


def cases():
    yield pytest.param("chunk", "none", True, LENGTHS, id="chunk-none-True-quick")
    for form in ("attention", "chunk", "rnn", "auto"):
        for kind in ("none", "head", "token"):
            for training in (False, True):
                name = f"{form}-{kind}-{training}"
                yield pytest.param(form, kind, training, LENGTHS, id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize("form, kind, training, lengths", cases())
def test_twenty_lengths_make_six_graphs_at_most(form, kind, training, lengths, monkeypatch):
    monkeypatch.setattr(api, "CROSSOVER", {"cpu": dict.fromkeys(("none", "head", "token"), 14)})
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")

    def function(query, key, value, log_decay, key_mask, form=form):
        return bidirectional_linear_attention(
            query, key, value, log_decay, key_mask=key_mask, format=form, chunk_size=4, normalize=True
        )

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for length in lengths:
        tensors = [torch.rand(2, 2, length, 4, dtype=torch.float64) for _ in range(3)]
        if kind != "none":
            tensors.append(-torch.rand((2,) if kind == "head" else (2, 2, length), dtype=torch.float64))
        tensors = [x.requires_grad_(training) for x in tensors]
        inputs = [*tensors, *[None] * (4 - len(tensors)), torch.arange(length) < torch.tensor([[length], [1]])]
        actual, expected = compiled(*inputs), function(*inputs, form="attention")
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        if training:
            gradients = (torch.autograd.grad(y.sin().sum(), tensors) for y in (actual, expected))
            for a, b in zip(*gradients, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert counter.frame_count <= (6 if len(lengths) == 20 else 2)
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["token", pytest.param("channel", marks=pytest.mark.slow)])
def test_several_operators_train_in_one_graph_of_dynamic_lengths(kind):
    """With dynamic=True numbers in global variables become inputs of the graph, which its Functions cannot share."""
    torch.compiler.reset()

    def function(query, key, value, gates):
        value = two_sided_attention(query, key, value, gates, chunk_size=4)
        return two_sided_attention(query, key, value, gates, chunk_size=4)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
    query, key, value = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    gates = -torch.rand((1, 2, 5) if kind == "token" else (1, 2, 5, 4))
    inputs = query, key, value, gates.requires_grad_()
    actual, expected = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad(y.sin().sum(), inputs) for y in (actual, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    torch.compiler.reset()
