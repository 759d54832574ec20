"""LION on a GPU: the operator, training steps, images of any size, and the search for the kernels' constants.

    pip install flash-linear-attention           # optional: adds two causal calls of simple_gla to `operator`
    python benchmarks/bench_gpu.py autotune      # first: sets the constants that the others run with
    python benchmarks/bench_gpu.py operator
    python benchmarks/bench_gpu.py training
    python benchmarks/bench_gpu.py resolution

All candidates of one length are timed in turn, by the device's own clock, from cold caches, and the median counts; what
the host needs to launch small kernels is hidden. Repeats, or more until the seconds have passed, for each comparison:

    autotune     10, 1 s    tiles and warps of the kernels; the crossover of the forms in PyTorch
    operator     20, 2 s    bfloat16, 16k tokens, 12 heads of 64; without and with backward
    training      5, 5 s    bfloat16 autocast, AdamW. Images: base, 256 of 224 pixels. Text: bare encoders of
                            BERT-large's shape, 32k tokens. Eager and with every layer compiled. Random weights, no
                            dropout
    resolution    3, 3 s    base, batches of 8, bfloat16 autocast

Each part is meant to take less than 8 minutes on an H100, most of it compilation; `PART --help` lists what shortens it.
A candidate that fails for want of memory is n/a. "peak MiB" is what a run takes beyond weights, states of the optimizer
and inputs. Tables, as Markdown, are printed: those of the README are copies of them, with the device's name, which the
last lines tell; `operator` and `training` end with the goals, met or not. JSON and pictures go to benchmarks/results.
To look for failures in the kernels: pytest tests/ops/test_lion_triton.py. Without a GPU the same commands try this
script at the sizes you give, with the forms in PyTorch (`autotune` in Triton's interpreter, TRITON_INTERPRET=1): no
measurement.
"""

import argparse

import gpu_autotune
import gpu_models
import gpu_operator
import torch


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    gpu_operator.add_part(parts)
    gpu_models.add_parts(parts)
    gpu_autotune.add_part(parts)
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    try:
        arguments.main(arguments)
    except argparse.ArgumentError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
