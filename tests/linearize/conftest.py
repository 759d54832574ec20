"""A small sentence encoder with random weights, its tokenizer, and text."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


WORDS = [f"w{i}" for i in range(60)]


def make_tokenizer():
    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    vocabulary = special | {word: i + 5 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{f"{k}_token": v for k, v in names.items()})


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A folder of sentence-transformers with a BERT of four layers."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=65, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=40, initializer_range=0.3,
    )  # fmt: skip
    model = BertModel(config)
    for layer in model.encoder.layer:  # attention that is far from a mean
        layer.attention.self.query.weight.data.mul_(2)
        layer.attention.output.dense.weight.data.mul_(3)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 40, "do_lower_case": False}))
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    return str(folder)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of lines of 3 to 60 words."""
    file, generator = tmp_path_factory.mktemp("text") / "text.txt", random.Random(0)
    lines = [" ".join(generator.choices(WORDS, k=generator.randint(3, 60))) for _ in range(120)]
    file.write_text("\n".join(lines))
    return str(file)
