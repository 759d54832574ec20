"""Training steps of a masked language model with logits of all tokens, and of masked tokens only.

    python benchmarks/bench_masked_loss.py                 # 8 texts of 1,024 tokens, vocabulary of 50,368
    python benchmarks/bench_masked_loss.py --layers 12     # a whole encoder of base size

A training step is forward and backward of the loss of `LionForMaskedLM`, in float32, without dropout and with random
weights, tokens and masks. "MiB" is the peak memory that one step adds in a fresh process, gradients included, as the
operating system measures it (Linux). "ratio" is time or memory over those of the step with all logits, which is timed
in turn with the others in one process: below 1, logits of masked tokens only are faster or smaller.
"""

import argparse

import torch
from bench_models import BASE, train_step
from common import ALL_VARIANTS, added_memory, alternate, count, output_folder, peak_memory, print_table, save

from lion_hf import LionConfig, LionForMaskedLM


def share(text):
    """Parse an option that must be a share of the tokens."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} was given; it must be greater than 0 and at most 1")
    return number


def make_step(arguments, masked, sparse):
    """Return the training step with a share of masked tokens."""
    torch.manual_seed(0)
    config = LionConfig(
        mask_type=arguments.variant,
        vocab_size=arguments.vocabulary,
        num_hidden_layers=arguments.layers,
        hidden_dropout_prob=0.0,
        max_position_embeddings=max(512, arguments.length),
        sparse_prediction=sparse,
        **BASE,
    )
    model = LionForMaskedLM(config).train()
    ids = torch.randint(1, arguments.vocabulary, (arguments.batch, arguments.length))
    labels = torch.where(torch.rand(ids.shape) < masked, ids, -100)
    labels[0, 0] = ids[0, 0]  # one at least
    return train_step(model, {"input_ids": ids, "labels": labels})


def measure(arguments, masked):
    """Return the rows of a share of masked tokens: all logits, and those of the masked tokens."""
    ways = {"all": False, "masked": True}
    times = alternate({way: make_step(arguments, masked, sparse) for way, sparse in ways.items()}, arguments.seconds, 1)
    sizes = ("batch", "length", "vocabulary", "layers", "variant")
    shape = [text for name in sizes for text in (f"--{name}", str(getattr(arguments, name)))]
    mib = {way: peak_memory(__file__, *shape, "--one_case", str(masked), way) for way in ways}
    return [
        {
            "masked": masked,
            "logits": way,
            "s": times[way],
            "time ratio": times[way] / times["all"],
            "MiB": mib[way],
            "memory ratio": mib[way] / mib["all"],
        }
        for way in ways
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", nargs="+", type=share, default=[0.3, 0.15], help="shares of masked tokens")
    parser.add_argument("--batch", type=count, default=8, help="texts in a batch")
    parser.add_argument("--length", type=count, default=1024, help="tokens in a text")
    parser.add_argument("--vocabulary", type=count, default=50368, help="tokens in the vocabulary")
    parser.add_argument("--layers", type=count, default=2, help="layers of the encoder, of base width")
    parser.add_argument("--variant", choices=ALL_VARIANTS, default="selective", help="variant of LION")
    parser.add_argument("--seconds", type=float, default=0.0, help="minimum time for each comparison")
    parser.add_argument("--output", type=output_folder, default="benchmarks/results", help="folder for results")
    parser.add_argument("--one_case", nargs=2, metavar=("SHARE", "LOGITS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_case:
        masked, way = arguments.one_case
        print(added_memory(make_step(arguments, float(masked), way == "masked")))
        return
    rows = []
    for masked in arguments.shares:
        rows += measure(arguments, masked)
        print_table(rows[-2:])

    def picture(axis):
        names = [f"{row['masked']:.0%} masked" for row in rows[1::2]]
        for i, what in enumerate(("time", "memory")):
            ratios = [row[f"{what} ratio"] for row in rows[1::2]]
            axis.bar([x + 0.4 * i - 0.2 for x in range(len(ratios))], ratios, 0.38, label=what)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xticks(range(len(names)), names)
        axis.set(ylabel="masked tokens only over all tokens", ylim=(0, 1.1))
        axis.legend()

    save("bench_masked_loss", arguments.output, rows, picture)


if __name__ == "__main__":
    main()
