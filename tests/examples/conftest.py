import logging

import pytest
from glue_script import TINY, WORDS, rows, write
from image_script import picture
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def without_curves(monkeypatch):
    """Skip the plot, which takes longer than a tiny training run."""
    from lion_hf.training import reports

    monkeypatch.setattr(reports, "plot_curves", lambda *args: None)


@pytest.fixture
def said(monkeypatch):
    """All warnings of lion_hf. Transformers' loggers do not pass them on to pytest."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("lion_hf", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with three classes of eight images each, not square."""
    root = tmp_path_factory.mktemp("images")
    for number, name in enumerate(("ash", "elm", "oak")):
        (root / name).mkdir()
        for i in range(8):
            picture(8 * number + i).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def run_glue(tmp_path, monkeypatch):
    """The main function of the script, in an empty folder."""
    import run_glue

    monkeypatch.chdir(tmp_path)
    return run_glue.main


@pytest.fixture
def mlm(tmp_path, monkeypatch):
    """run_mlm.py on a file, with a tokenizer that has begin and end tokens."""
    import run_mlm

    from lion_hf.training.text import train_tokenizer

    monkeypatch.chdir(tmp_path)
    write("corpus.txt", "\n".join(line.partition(",")[0] for line in rows(48, "abc").splitlines()))
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 80, 64)
    tokens = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]", **tokens
    ).save_pretrained("tokenizer")
    flags = ["--train_file=corpus.txt", "--tokenizer_name=tokenizer", "--max_length=16", "--line_by_line=true"]
    flags += ["--validation_share=0.25"]
    flags += [flag for flag in TINY if "vocab" not in flag]
    return lambda folder, *more: run_mlm.main([f"--output_dir={folder}", *flags, *more])
