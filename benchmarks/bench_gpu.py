"""Benchmarks on a GPU: operator, training steps, the modern block, images of any size, search for kernel constants.

    pip install flash-linear-attention           # optional: adds two causal calls of simple_gla to `operator`
    python benchmarks/bench_gpu.py autotune      # prints the constants to set before the other parts are run
    python benchmarks/bench_gpu.py operator
    python benchmarks/bench_gpu.py training
    python benchmarks/bench_gpu.py modern
    python benchmarks/bench_gpu.py resolution

All candidates of one length are timed in turn, with the device's clock and from cold caches; the median is printed. The
time that the host needs to launch small kernels is hidden. Minimum repeats and minimum time for each comparison:

    autotune     10, 1 s    tiles and warps of the kernels; the crossover of the PyTorch forms
    operator     20, 2 s    bfloat16, 16k tokens, 12 heads of 64; without and with backward
    training      5, 5 s    bfloat16 autocast, AdamW. Images: base, 256 of 224 pixels. Text: encoders of BERT-large's
                            shape without a head, 32k tokens. Eager and with every layer compiled. Random weights, no
                            dropout
    modern        3, 3 s    lion-s-modern-base and Transformers' ModernBERT-base, without a head, 16k tokens, bfloat16
                            autocast; inference and training steps
    resolution    3, 3 s    base, batches of 8, bfloat16 autocast

Each part should take less than 8 minutes on an H100, most of it for compilation. `PART --help` lists the options that
shorten it. A candidate that runs out of memory is n/a. "peak MiB" is the memory of a run beyond weights, optimizer
states and inputs. The tables are printed as Markdown, and docs/benchmarks.md quotes them; the last lines name the
device. `operator` and `training` end with a table of goals, and whether each is met. JSON files and pictures are
written to benchmarks/results. The kernels are tested by tests/ops/test_lion_triton.py. Without a GPU the same commands
run the PyTorch forms at the sizes you give (`autotune` uses Triton's interpreter and needs TRITON_INTERPRET=1). That
only checks that this script works; the times mean nothing.
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
