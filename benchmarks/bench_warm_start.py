"""Similarity of a warm start to its source before any training: cosine of the last hidden states of real tokens.

    python benchmarks/bench_warm_start.py --model DATA/minilm --text DATA/wiki/validation.txt

DATA is the folder that examples/run_evidence.py describes. Any BERT with its tokenizer and any text file will do.
"""

import argparse
from pathlib import Path

import torch
from common import print_table
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from lion_hf.convert import from_bert


@torch.inference_mode()
def hidden_states(model, inputs):
    return model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a BERT with its tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="text file; each line is one text")
    parser.add_argument("--lines", type=int, default=32, help="lines to read")
    parser.add_argument("--max_length", type=int, default=128, help="most tokens of a line")
    arguments = parser.parse_args()
    if not arguments.text.is_file():
        parser.error(f"--text: there is no file {arguments.text}. Give a text file.")
    lines = [line for line in arguments.text.read_text(encoding="utf-8").splitlines() if line.strip()][
        : arguments.lines
    ]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    inputs = tokenizer(lines, truncation=True, max_length=arguments.max_length, padding=True, return_tensors="pt")
    source = AutoModel.from_pretrained(arguments.model, add_pooling_layer=False).eval()
    layers = range(source.config.num_hidden_layers)
    expected = hidden_states(source, inputs)
    rows = []
    for name, mask_type, softmax in (
        ("LION-LIT", "lit", ()),
        ("LION-D", "decay", ()),
        ("LION-S", "selective", ()),
        ("LION-S, every second layer softmax", "selective", layers[1::2]),
        ("LION-S, every layer softmax", "selective", layers),
    ):
        start = from_bert(source, mask_type, softmax_layers=softmax)
        cosine = cosine_similarity(hidden_states(start, inputs), expected, dim=-1)
        rows.append({"start": name, "mean cosine": cosine.mean().item(), "lowest": cosine.min().item()})
    print(f"{expected.shape[0]:,} tokens of {len(lines)} lines, {len(layers)} layers")
    print_table(rows)


if __name__ == "__main__":
    main()
