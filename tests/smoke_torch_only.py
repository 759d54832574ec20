"""Check that operators and layers need only PyTorch. Run by .ci/run in an environment without Transformers.

python tests/smoke_torch_only.py
"""

import sys

import torch

import lion_hf
from lion_hf.ops.api import attention_scores


def operators() -> None:
    """Every form of every kind of decay agrees with the matrix, and has gradients."""
    query, key, value = (torch.randn(2, 3, 11, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    for decay in (None, -torch.rand(3, dtype=torch.float64), -torch.rand(2, 3, 11, dtype=torch.float64)):
        expected = attention_scores(query, key, decay) @ value
        for form in ("attention", "rnn", "chunk", "auto"):
            mixed = lion_hf.bidirectional_linear_attention(query, key, value, decay, format=form, chunk_size=4)
            torch.testing.assert_close(mixed, expected)
            mixed.sum().backward()


def layers() -> None:
    """A mixer and an encoder run, and padding changes nothing."""
    mixer = lion_hf.nn.Mixer(24, 3)
    mixer(torch.randn(2, 7, 24))
    encoder = lion_hf.nn.Encoder(24, depth=2, heads=3).eval()
    x = torch.randn(1, 7, 24)
    mask = torch.arange(9)[None] < 7
    padded = torch.nn.functional.pad(x, (0, 0, 0, 2))
    torch.testing.assert_close(encoder(padded, mask)[:, :7], encoder(x), rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    assert sys.modules.get("transformers") is None
    operators()
    layers()
    python = sys.version.split()[0]
    sys.stdout.write(f"lion_hf {lion_hf.__version__} works with torch {torch.__version__} alone, python {python}\n")
