"""`lion-linearize`: what it compares, that it learns, resumes exactly, and writes folders that others load."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, ModernBertConfig, RobertaConfig

from lion_hf.linearize import Recipe, linearize, load_pair
from lion_hf.linearize.command import main
from lion_hf.linearize.losses import LayerErrors, embedding_loss, embeddings, relative_error, spearman, states
from lion_hf.linearize.models import extend_positions, positions, student_of
from lion_hf.linearize.run import STATE, Linearizer
from lion_hf.linearize.text import Pieces


RECIPE = Recipe(steps=40, minutes=0, max_length=24, batch_size=8)


@pytest.fixture
def pair(source):
    pair = load_pair(source, "1,2", "selective", (4, 64), None)
    pair.teacher.double(), pair.student.double()
    return pair


def batch(pair, lengths=(9, 1, 6)):
    torch.manual_seed(1)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(5, 65, mask.shape), "attention_mask": mask}


# ------------------------------------------------------------------------------------------------ models and losses


def test_the_teacher_is_the_source_and_the_student_has_its_weights(source, pair):
    inputs = batch(pair)
    expected = AutoModel.from_pretrained(source).double().eval()(**inputs).last_hidden_state
    real = inputs["attention_mask"].bool()
    actual = states(pair.teacher, inputs)[-1]
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-9, atol=1e-9)
    assert pair.student.config.softmax_layers == [0, 3] and pair.student.config.normalize
    weights = pair.student.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in pair.teacher.state_dict().items())


def test_layers_are_compared_with_the_sources_attention_on_its_own_inputs(source, pair):
    """The definition: softmax attention by hand, on the hidden states of the source, over real tokens."""
    inputs = batch(pair)
    with torch.no_grad(), LayerErrors(pair) as comparison:
        hidden = states(pair.teacher, inputs)
    bert = AutoModel.from_pretrained(source).double().eval()
    real = inputs["attention_mask"].bool()
    for layer in (1, 2):
        x, attention = hidden[layer], bert.encoder.layer[layer].attention
        q, k, v = (
            getattr(attention.self, name)(x).unflatten(2, (2, 16)).transpose(1, 2) for name in ("query", "key", "value")
        )
        scores = (q @ k.transpose(2, 3) / 4).masked_fill(~real[:, None, None], -torch.inf)
        target = attention.output.dense((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        ours = pair.student.layers[layer].mixer(x, real)
        expected = (ours - target)[real].square().sum() / target[real].square().sum()
        torch.testing.assert_close(comparison.errors[layer], expected.detach(), rtol=1e-9, atol=0)


def test_gradients_of_the_first_stage_stay_in_the_linear_layers_and_do_not_depend_on_padding(pair):
    def gradients(inputs):
        pair.student.zero_grad()
        with torch.no_grad(), LayerErrors(pair, backward=True):
            states(pair.teacher, inputs)
        return {name: p.grad.clone() for name, p in pair.student.named_parameters() if p.grad is not None}

    inputs = batch(pair)
    padded = {name: torch.nn.functional.pad(x, (0, 5)) for name, x in inputs.items()}
    expected, actual = gradients(inputs), gradients(padded)
    assert {name.split(".")[1] for name in expected} == {"1", "2"} and all(".mixer." in name for name in expected)
    assert expected["layers.2.mixer.q_feature.weight"].abs().max() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in pair.teacher.parameters())


def test_packed_rows_are_compared_as_their_sequences_are(pair):
    inputs = batch(pair, (7, 7))
    packed = {
        "input_ids": inputs["input_ids"].reshape(1, -1),
        "position_ids": torch.arange(7).repeat(2)[None],
    }
    errors = []
    for given in (inputs, packed):
        with torch.no_grad(), LayerErrors(pair) as comparison:
            states(pair.teacher, given)
        errors.append(comparison.errors)
    torch.testing.assert_close(errors[1], errors[0], rtol=1e-9, atol=0)


def test_losses_are_zero_for_the_source_itself_and_errors_are_relative():
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    real = torch.tensor([[True] * 5, [True, True, False, False, False]])
    noisy = x.masked_fill(~real[..., None], 7.0)
    assert relative_error(noisy, x, real) == 0
    torch.testing.assert_close(relative_error(1.5 * x, x, None).item(), 0.25)
    vectors = embeddings(x, real.long(), "mean")
    torch.testing.assert_close(vectors[1], torch.nn.functional.normalize(x[1, :2].mean(0), dim=0))
    torch.testing.assert_close(embedding_loss(vectors, vectors).item(), 0.0)
    assert embedding_loss(-vectors, vectors) == 2  # cosines between texts are the same


def test_the_rank_correlation_counts_ranks_with_ties():
    x = torch.tensor([1.0, 2.0, 2.0, 5.0, -3.0])
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    y = torch.tensor([3.0, 1.0, 2.0, 9.0, 4.0])
    ranks = torch.tensor([[2.0, 3.5, 3.5, 5.0, 1.0], [3.0, 1.0, 2.0, 5.0, 4.0]])
    assert spearman(x, y) == pytest.approx(torch.corrcoef(ranks)[0, 1].item())


def test_a_longer_context_repeats_the_position_table(pair):
    before = states(pair.student, batch(pair))[-1]
    table = pair.student.embeddings.position_embeddings.weight.clone()
    extend_positions(pair.student, 100)
    torch.testing.assert_close(states(pair.student, batch(pair))[-1], before, rtol=0, atol=0)
    torch.testing.assert_close(pair.student.embeddings.position_embeddings.weight[40:80], table)
    assert states(pair.student, {"input_ids": torch.full((1, 100), 9)})[-1].isfinite().all()
    with pytest.raises(ValueError, match="--context is 60, but the source reads 100 tokens"):
        extend_positions(pair.student, 60)


@pytest.mark.parametrize("mask_type", ["lit", "decay", "selective"])
def test_every_variant_can_take_the_place_of_softmax_attention(source, mask_type):
    teacher = load_pair(source, "all", mask_type, (4, 64), None).teacher
    student = student_of(teacher, range(4), (4, 64))
    assert student.config.softmax_layers == [] and {x.mixer.variant.name for x in student.layers} == {mask_type}


SIZES = {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
FAMILIES = {
    "roberta": (RobertaConfig(**SIZES, max_position_embeddings=40), [0, 2], 38),
    "modernbert": (ModernBertConfig(**SIZES, **TOKENS, max_position_embeddings=40, local_attention=4), [0, 3], 40),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_encoders_are_compared_on_their_own_inputs_and_can_read_more(name, tmp_path):
    config, layers, known = FAMILIES[name]
    source = AutoModel.from_config(config).double().eval()
    source.save_pretrained(tmp_path)
    pair = load_pair(str(tmp_path), "default", "selective", (4, 64), None)
    pair.teacher.double(), pair.student.double()
    assert pair.layers == layers and positions(pair.teacher.config) == known
    inputs = batch(pair)
    real = inputs["attention_mask"].bool()
    inputs["input_ids"].masked_fill_(~real, config.pad_token_id)
    with torch.no_grad(), LayerErrors(pair) as comparison:
        target = states(pair.teacher, inputs)[-1]
    expected = source(**inputs).last_hidden_state
    torch.testing.assert_close(target[real], expected[real], rtol=1e-9, atol=1e-9)
    assert set(comparison.errors) == set(layers) and min(comparison.errors.values()) > 0
    before = states(pair.student, inputs)[-1]
    extend_positions(pair.student, 90)
    torch.testing.assert_close(states(pair.student, inputs)[-1][real], before[real], rtol=0, atol=0)
    assert states(pair.student, {"input_ids": torch.full((1, 90), 9)})[-1].isfinite().all()


def test_linear_layers_rotate_as_the_sources_layers_did(tmp_path):
    """Each with the theta of its own layer. At the start the products of z are the logits of the source's attention."""
    config = ModernBertConfig(**SIZES, **TOKENS, max_position_embeddings=40, local_attention=4, initializer_range=0.2)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    pairs = {
        rope: load_pair(str(tmp_path), "0,1", "selective", (4, 64), None, rope=rope) for rope in ("yes", "no", "auto")
    }
    thetas = {rope: [layer.mixer.rope_theta for layer in pair.student.layers] for rope, pair in pairs.items()}
    rotated = [160000.0, 10000.0, 10000.0, 160000.0]
    assert thetas == {"yes": rotated, "auto": rotated, "no": [None, None, *rotated[2:]]}
    pair = pairs["yes"]
    pair.teacher.double(), pair.student.double()
    x = torch.randn(1, 7, 32, dtype=torch.float64)
    for layer in (0, 1):
        theirs, ours = (model.layers[layer].mixer for model in (pair.teacher, pair.student))
        z = [features.log() for features in ours.recurrences(x)[0][:2]]
        z = [(y[..., :16] - y[..., 16:]) / 2 for y in z]
        logits = theirs(x, output_attentions=True)[1].log()
        near = logits.isfinite()
        shift = (z[0] @ z[1].mT - logits).masked_fill(~near, 0)
        expected = (shift.sum(-1) / near.sum(-1))[..., None].expand_as(shift)  # softmax does not see it
        torch.testing.assert_close(shift[near], expected[near], rtol=1e-9, atol=1e-9)


def test_a_source_without_rope_cannot_give_it(source):
    assert not load_pair(source, "all", "selective", (4, 64), None).student.config.rope_parameters
    with pytest.raises(ValueError, match="--rope is 'yes', but the source has no rotary positions"):
        load_pair(source, "all", "selective", (4, 64), None, rope="yes")
    with pytest.raises(ValueError, match="--rope is 'maybe'; it must be one of auto, yes, no"):
        load_pair(source, "all", "selective", (4, 64), None, rope="maybe")


@pytest.mark.parametrize("prefix", ["Bert", "ModernBert"])
def test_the_head_of_a_masked_language_model_is_kept(prefix, source, text, tmp_path):
    """With all layers kept, the predictions are the source's; training leaves the head as it is."""
    kind, config = (getattr(transformers, f"{prefix}{name}") for name in ("ForMaskedLM", "Config"))
    special = TOKENS if prefix == "ModernBert" else {}
    torch.manual_seed(0)
    model = kind(config(**SIZES, **special, max_position_embeddings=40, initializer_range=0.2)).eval()
    model.save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "source")
    pair = load_pair(str(tmp_path / "source"), "all", "selective", (4, 64), None)
    ids = torch.randint(5, 65, (2, 9))
    torch.testing.assert_close(pair.teacher(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    recipe = Recipe(steps=2, minutes=0, max_length=12, batch_size=2)
    linearize(str(tmp_path / "source"), tmp_path / "out", [text], recipe=recipe)
    found = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert type(found).__name__ == type(pair.student).__name__ == "LionForMaskedLM"
    for name, weight in pair.teacher.head.state_dict().items():
        if name != "decoder.weight":  # tied to the embeddings, which learn
            assert torch.equal(found.head.state_dict()[name], weight)


# ------------------------------------------------------------------------------------------------------------ training


def test_it_learns_the_source_and_the_folder_holds_what_it_learned(source, text, tmp_path):
    found = linearize(source, tmp_path / "out", [text], layers="all", recipe=RECIPE)
    for i in "0123":
        assert found["after"]["layers"][i] < 0.8 * found["before"]["layers"][i]
    assert found["after"]["hidden"] < 0.8 * found["before"]["hidden"]
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModel, AutoTokenizer))
    assert model.config.model_type == "lion" and model.config.softmax_layers == []
    inputs = tokenizer("w1 w2 w3 w9 w8", return_tensors="pt")
    alike = torch.nn.functional.cosine_similarity(
        model(**inputs).last_hidden_state, AutoModel.from_pretrained(source)(**inputs).last_hidden_state, dim=-1
    )
    assert alike.mean() > 0.8
    card = (tmp_path / "out" / "README.md").read_text()
    for measured in (found["before"]["spearman"], found["after"]["spearman"], found["after"]["layers"]["2"]):
        assert f" {measured:.4f} |" in card
    assert (
        "pipeline_tag: sentence-similarity" in card
        and "steps | 40 " in card
        and not (tmp_path / "out" / STATE).exists()
    )


@pytest.mark.slow
def test_sentence_transformers_loads_the_folder_with_its_pooling(source, text, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    out = tmp_path / "out"
    linearize(source, out, [text], recipe=Recipe(steps=2, minutes=0, max_length=24, batch_size=4), context=64)
    encoder = sentence_transformers.SentenceTransformer(str(out), device="cpu")
    assert encoder.max_seq_length == 64
    tokens = AutoTokenizer.from_pretrained(out)("w4 w5 w6", return_tensors="pt")
    hidden = AutoModel.from_pretrained(out)(**tokens).last_hidden_state
    expected = hidden.mean(1)[0].detach()
    torch.testing.assert_close(torch.tensor(encoder.encode("w4 w5 w6")), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop", [pytest.param(6, marks=pytest.mark.slow, id="first stage"), 30])
def test_an_interrupted_run_goes_on_to_the_same_weights(source, text, tmp_path, monkeypatch, stop):
    whole = linearize(source, tmp_path / "whole", [text], recipe=RECIPE)
    step = Linearizer._step

    def interrupted(self, share):
        if self.progress.step == stop:
            raise KeyboardInterrupt
        return step(self, share)

    arguments = (source, tmp_path / "out", [text])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Linearizer, "_step", interrupted)
        linearize(*arguments, recipe=RECIPE)
    with pytest.raises(ValueError, match="holds the state of a run with other options"):
        linearize(*arguments, recipe=RECIPE, layers="all")
    lines = []
    assert linearize(*arguments, recipe=RECIPE, say=lines.append) == whole
    assert f"resumed at step {stop}" in lines
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


def test_the_time_limit_ends_both_stages(source, text, tmp_path):
    recipe = Recipe(steps=10**6, minutes=0.02, max_length=24, batch_size=4)
    lines = []
    linearize(source, tmp_path / "out", [text], recipe=recipe, say=lines.append)
    assert any(line.startswith("stage 2") for line in lines)


def test_batches_depend_on_the_step_alone_and_long_texts_become_pieces(source, text):
    tokenizer = AutoTokenizer.from_pretrained(source)
    lines = Path(text).read_text().splitlines()
    pieces, again = (Pieces(lines, tokenizer, 16, 4, 5) for _ in range(2))
    for step in (40, 3, 40):
        torch.testing.assert_close(pieces.batch(step), again.batch(step))
    assert not torch.equal(pieces.batch(3)["input_ids"], pieces.batch(4)["input_ids"])
    assert max(map(len, pieces.training)) == 16
    words = sum(len(line.split()) for line in lines)
    assert sum(len(piece) - 2 for piece in pieces.training + pieces.held_out) == words
    assert len(pieces.measuring()) == -(-len(pieces.held_out) // 4)


def test_rows_have_few_lengths_and_never_more_tokens_than_the_source_reads(source, text):
    tokenizer = AutoTokenizer.from_pretrained(source)
    pieces = Pieces(Path(text).read_text().splitlines(), tokenizer, 19, 2, 5)
    lengths = {batch["input_ids"].shape[1] for batch in (*map(pieces.batch, range(60)), *pieces.measuring())}
    assert len(lengths) > 1 and lengths <= {8, 16, 19}
    assert max(map(len, pieces.training)) in lengths


def test_a_share_of_the_tokens_of_training_is_masked_and_no_special_one(source, text):
    lines = Path(text).read_text().splitlines()
    plain, masked, again = (
        Pieces(lines, AutoTokenizer.from_pretrained(source), 16, 64, 5, share) for share in (0.0, 0.3, 0.3)
    )
    for step in (3, 40):
        batch, expected = masked.batch(step), plain.batch(step)
        torch.testing.assert_close(batch, again.batch(step))
        ids, before = batch["input_ids"], expected["input_ids"]
        changed = ids != before
        assert (ids[changed] == 4).all() and (before[changed] > 4).all()
        assert changed.sum() / (before > 4).sum() == pytest.approx(0.3, abs=0.06)
    assert not torch.equal(masked.batch(3)["input_ids"] == 4, masked.batch(4)["input_ids"] == 4)
    torch.testing.assert_close(masked.measuring(), plain.measuring())
    without = AutoTokenizer.from_pretrained(source, mask_token=None)
    with pytest.raises(ValueError, match="--mask_share is 0.3, but the source's tokenizer has no mask token"):
        Pieces(lines, without, 16, 4, 5, 0.3)


# -------------------------------------------------------------------------------------------------------------- errors


MISTAKES = [
    ("{tmp}/none/x/y {out} --text {text}", "'{tmp}/none/x/y' is neither a folder nor a name on the Hub"),
    ("{tmp} {out} --text {text}", "'{tmp}' is not a checkpoint folder: it has no config.json"),
    ("{text} {out} --text {text}", "'{text}' is a file; give the folder of a checkpoint"),
    ("{source} {out} --text {tmp}/no.txt", "there is no file '{tmp}/no.txt'"),
    ("{source} {out} --text {tmp}/empty.txt", "holds 0 lines of text"),
    ("{source} {out} --text {tmp}/bytes", "is not text in UTF-8"),
    ("{source} {tmp} --text {text}", "'{tmp}' exists and is not empty; give another folder."),
    ("{source} {tmp} --text {text} --force", "was not written by lion-linearize, so --force does not"),
    ("{source} {source} --text {text}", "OUT is SOURCE"),
    ("{source} {text} --text {text}", "is a file; give a folder that does not exist yet"),
    ("{source} {out} --text {text} --layers 1,4", "--layers is '1,4'; the source has 4 layers"),
    ("{source} {out} --text {text} --layers one", "must be 'all', or different numbers from 0 to 3"),
    ("{source} {out} --text {text} --max_length 41", "the source reads at most 40 tokens"),
    ("{source} {out} --text {text} --max_length 2", "the tokenizer adds 2 tokens to each text"),
    ("{source} {out} --text {text} --steps 0", "--steps is 0; it must be at least 1"),
    ("{source} {out} --text {text} --first_share 2", "--first_share is 2.0; it must be from 0 to 1"),
    ("{source} {out} --text {text} --minutes -1", "it must be a finite number, 0 or more"),
    ("{source} {out} --text {text} --windows 1 9", "a finite number of tokens above 1"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(source, text, tmp_path, capsys, arguments, message):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    names = {"source": source, "text": text, "tmp": str(tmp_path), "out": str(tmp_path / "out")}
    assert main(arguments.format(**names).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("lion-linearize: error: ") and error.count("\n") == 1
    assert message.format(**names) in error
    assert not (tmp_path / "out").exists()


def test_a_pooling_that_is_not_known_is_refused_unless_it_is_not_needed(source, text, tmp_path):
    other = shutil.copytree(source, tmp_path / "other")
    (other / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ValueError, match="pools by pooling_mode_max_tokens; supported are the mean"):
        linearize(str(other), tmp_path / "out", [text], recipe=RECIPE)
    recipe = Recipe(steps=1, minutes=0, max_length=8, batch_size=2)
    found = linearize(str(other), tmp_path / "out", [text], recipe=recipe, target="hidden")
    assert "spearman" not in found["after"]
    with pytest.raises(ValueError, match="exists and is not empty; give another folder, or --force"):
        linearize(str(other), tmp_path / "out", [text], recipe=recipe, target="hidden")
    linearize(str(other), tmp_path / "out", [text], recipe=recipe, target="hidden", force=True)
