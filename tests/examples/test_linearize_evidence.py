"""The evidence on conversions: what it compares, and its tables."""

import json
import sys

import pytest
import torch


@pytest.fixture
def evidence(examples):
    import linearize_evidence

    return linearize_evidence


@pytest.fixture
def vectors():
    torch.manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(40, 6, dtype=torch.float64), dim=-1)


def test_a_rotation_keeps_all_cosines_and_a_shuffle_none(evidence, vectors):
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    found = evidence.compared(vectors, vectors @ rotation)
    assert found["random"] == pytest.approx(1) and found["neighbours"] == pytest.approx(1)
    assert abs(found["cosine"]) < 0.9
    shuffled = evidence.compared(vectors, vectors[torch.randperm(40)])
    assert abs(shuffled["random"]) < 0.3


def test_neighbours_are_those_of_the_source(evidence, vectors):
    """Noise that is small beside random cosines hides the order of near ones: only their correlation falls."""
    groups = torch.eye(6, dtype=torch.float64).repeat(7, 1)[:40]
    source = torch.nn.functional.normalize(groups + 0.01 * vectors, dim=-1)
    other = torch.nn.functional.normalize(groups + 0.01 * vectors.flip(0), dim=-1)
    found = evidence.compared(source, other)
    assert found["random"] > 0.3 and abs(found["neighbours"] - found["random"]) > 0.1


def predicted(loss, accuracy):
    """Return what a model predicts of masked tokens; the first half of the rows is harder by 1 nat."""
    halves = {"reported": (loss, accuracy), "compared": (loss + 1, accuracy)}
    numbers = {
        f"{half} {name}": x for half, pair in halves.items() for name, x in zip(("loss", "accuracy"), pair, strict=True)
    }
    return numbers | {f"{half} tokens": 100 for half in halves}


def test_tables_show_the_stored_numbers(evidence, tmp_path, monkeypatch, capsys):
    models = [evidence.SOURCE, *evidence.MODELS]
    score = {"random": 0.9712, "neighbours": 0.9034, "cosine": 0.98}
    row = {"learning_rate": 1e-4, "sweep": {"0.0001": 0.41}, "accuracy": [0.84, 0.85], "loss": [0.4, 0.42]}
    card = ["| error of layer 0 | 0.6000 | 0.1234 |", "| steps | 1,200 |"]
    rows = {
        "convert": {
            "models": {
                name: {"command": "lion-linearize", "minutes": 29.6, "threads": 2, "card": card} for name in models[1:]
            },
        },
        "embeddings": {"texts": {"reviews": 1007}, "models": {name: {"reviews": score} for name in models[1:]}},
        "sentiment": {models[0]: row, models[1]: row | {"accuracy": [0.83, 0.838]}},
        "masked": {
            "unigram entropy": 6.66,
            "sources": {"BERT": predicted(4.5, 0.26) | {"steps": 3000}},
            "conversions": [
                {"source": "BERT", "layers": "all", "rope": "no", "mask_share": 0.15, "minutes": 2.5, "command": "x"}
                | predicted(4.61, 0.248)
            ],
        },
        "length": {models[2]: {"8192": {"texts": 32, "random": 0.88, "cosine": 0.91}}},
    }
    (tmp_path / "linearize.json").write_text(json.dumps(rows))
    monkeypatch.setattr(sys, "argv", ["linearize_evidence.py", "--draw", "--results", str(tmp_path)])
    evidence.main()
    shown = capsys.readouterr().out
    for text in (
        "29.6 minutes, threads: 2", "| error of layer 0 | 0.6000 | 0.1234 |", "| 0.971 | 0.903 | 0.980 |",
        "| 83.40 | 83.00 to 83.80 | 1.10 |", "| BERT | all | no | 15% | 5.610 | 4.610 | 0.110 | 24.80 | 1.20 | 2.5 |",
        "| 8,192 tokens |", "| 0.880 / 0.910 |",
    ):  # fmt: skip
        assert text in shown


def test_missing_data_is_an_error(evidence, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["linearize_evidence.py", "--data", str(tmp_path), "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="lacks minilm/config.json, wiki/train.txt"):
        evidence.main()
