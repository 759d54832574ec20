"""Training steps on texts of very different lengths: padded, unpadded and packed.

    python benchmarks/bench_packing.py                     # topics of Python's help(), of up to thousands of words
    python benchmarks/bench_packing.py --data FOLDER       # documents in the .txt files of FOLDER

The same batches of documents are timed in turn in one process in three ways: padded to the longest document of the
batch, as a tokenizer does (unpad=False); with the padding removed by the model (unpad=True); and packed into one row,
as DataCollatorWithFlattening does. A ratio below 1 is faster than padded. Documents are separated by empty lines; in a
file without empty lines, each line is a document. A document with fewer than --shortest words is joined with the next
one. A document with more than --longest words is cut. Only the lengths count: token ids are random. A training step is
forward and backward of the mean output of an encoder of base width without a head, in float32, without dropout and with
random weights.
"""

import argparse
from pathlib import Path

import torch
from bench_models import BASE, train_step
from common import ALL_VARIANTS, VARIANTS, alternate, count, output_folder, print_table, save
from transformers import DataCollatorWithFlattening

from lion_hf import LionConfig, LionModel


VOCABULARY = 30522


def text_folder(text):
    """Parse an option that must be a folder with .txt files."""
    folder = Path(text)
    if not any(folder.glob("*.txt")):
        raise argparse.ArgumentTypeError(f"{text} is not a folder with .txt files")
    return folder


def documents(folder):
    if folder is None:
        from pydoc_data.topics import topics

        yield from topics.values()
        return
    for file in sorted(folder.glob("*.txt")):
        text = file.read_text(encoding="utf-8", errors="replace")  # only the number of words matters
        yield from text.split("\n\n" if "\n\n" in text else "\n")


def draw_lengths(arguments, parser):
    count = arguments.batches * arguments.rows
    lengths, words = [], 0
    for document in documents(arguments.data):
        words += len(document.split())
        if words >= arguments.shortest:
            lengths.append(words)
            words = 0
    if len(lengths) < count:
        parser.error(
            f"{arguments.data or 'help()'} has {len(lengths)} documents of at least {arguments.shortest} words, but "
            f"{arguments.batches} batches of {arguments.rows} need {count}. Lower --shortest, --batches or --rows, or "
            "give another --data."
        )
    return torch.tensor(lengths)[torch.randperm(len(lengths))[:count]].clamp(max=arguments.longest)


def padded_and_packed(lengths):
    """Return one batch twice: as a tokenizer pads it, and as DataCollatorWithFlattening packs it."""
    texts = [torch.randint(1, VOCABULARY, (int(length),)) for length in lengths]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": text} for text in texts])
    packed.pop("labels")
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}, packed


def steps(model, batches, unpad):
    runs = [train_step(model, batch) for batch in batches]

    def run():
        model.config.unpad = unpad
        for step in runs:
            step()

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=text_folder, help="folder with .txt files; default: the topics of Python's help()"
    )
    parser.add_argument("--variants", nargs="+", choices=ALL_VARIANTS, default=VARIANTS, help="default: those of LION")
    parser.add_argument("--shortest", type=count, default=128, help="fewest words of a document")
    parser.add_argument("--longest", type=count, default=2048, help="most words of a document")
    parser.add_argument("--rows", type=count, default=8, help="documents in a batch")
    parser.add_argument("--batches", type=count, default=4, help="number of batches")
    parser.add_argument("--layers", type=count, default=2, help="layers of the encoder")
    parser.add_argument("--seconds", type=float, default=10.0, help="minimum time for each variant")
    parser.add_argument("--rounds", type=count, default=3, help="minimum number of repeats")
    parser.add_argument("--output", type=output_folder, default="benchmarks/results", help="folder for results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    lengths = draw_lengths(arguments, parser)
    padded, packed = zip(*map(padded_and_packed, lengths.view(arguments.batches, arguments.rows)), strict=True)
    tokens, positions = int(lengths.sum()), sum(batch["input_ids"].numel() for batch in padded)
    share = 1 - tokens / positions
    print(
        f"{len(lengths)} documents of {lengths.min()} to {lengths.max()} tokens; {share:.0%} of the tokens is padding"
    )
    rows = []
    for variant in arguments.variants:
        config = LionConfig(
            mask_type=variant,
            vocab_size=VOCABULARY,
            num_hidden_layers=arguments.layers,
            max_position_embeddings=arguments.longest,
            **BASE,
        )
        model = LionModel(config, add_pooling_layer=False).train()
        candidates = {
            "padded": steps(model, padded, False),
            "unpadded": steps(model, padded, True),
            "packed": steps(model, packed, False),
        }
        times = alternate(candidates, arguments.seconds, arguments.rounds)
        for way, seconds in times.items():
            rows.append(
                {
                    "model": variant,
                    "batch": way,
                    "padding": share,
                    "tokens/s": tokens / seconds,
                    "ratio": seconds / times["padded"],
                }
            )
        print_table(rows[-len(times) :])

    def picture(axis):
        for i, way in enumerate(("unpadded", "packed")):
            ratios = [row["ratio"] for row in rows if row["batch"] == way]
            axis.bar([x + 0.4 * i - 0.2 for x in range(len(ratios))], ratios, 0.38, label=way)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xticks(range(len(arguments.variants)), arguments.variants)
        axis.set(ylabel="training step / padded", title=f"below 1 is faster; {share:.0%} padding")
        axis.legend()

    save("bench_packing", arguments.output, rows, picture)


if __name__ == "__main__":
    main()
