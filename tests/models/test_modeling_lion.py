"""Text models: heads, losses, tied weights, initialisation, invalid inputs."""

import re

import pytest
import torch
from small_models import ALL_VARIANTS, TEXT_HEADS, VARIANTS, text_config, text_inputs, vision_config
from text_models import HIDDEN, NAMES, assert_same_model, build, inputs_for, labels_for

import lion_hf
from lion_hf.models import modeling_lion as modeling_lion
from lion_hf.nn import variant_class


# ----------------------------------------------------------------------------------------------- heads and losses


@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
@pytest.mark.parametrize(
    "name, shapes",
    [
        ("LionModel", {"last_hidden_state": (3, 11, HIDDEN), "pooler_output": (3, HIDDEN)}),
        ("LionForMaskedLM", {"logits": (3, 11, 61)}),
        ("LionForSequenceClassification", {"logits": (3, 4)}),
        ("LionForTokenClassification", {"logits": (3, 11, 4)}),
        ("LionForQuestionAnswering", {"start_logits": (3, 11), "end_logits": (3, 11)}),
        ("LionForMultipleChoice", {"logits": (3, 2)}),
    ],
)
def test_heads_return_what_their_name_says(mask_type, name, shapes):
    head = NAMES[name]
    outputs = build(head, mask_type, num_labels=4)(**inputs_for(head))
    assert {k: tuple(v.shape) for k, v in outputs.items()} == shapes
    assert all(v.isfinite().all() for v in outputs.values())


def test_masked_lm_loss_is_the_mean_over_the_labelled_tokens():
    model, inputs = build(lion_hf.LionForMaskedLM), text_inputs()
    labels = labels_for(lion_hf.LionForMaskedLM)["labels"]
    outputs = model(**inputs, labels=labels)
    chosen = labels != -100
    expected = torch.nn.functional.cross_entropy(outputs.logits[chosen], labels[chosen])
    torch.testing.assert_close(outputs.loss, expected)
    total = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(total, expected * chosen.sum() / 50)


@pytest.mark.parametrize("explicit", [True, False], ids=["problem_type", "by-labels"])
@pytest.mark.parametrize(
    "problem, num_labels", [("regression", 1), ("single_label_classification", 4), ("multi_label_classification", 4)]
)
def test_sequence_classification_loss_of_each_problem_type(problem, num_labels, explicit):
    labels, loss = {
        "regression": (torch.randn(3), lambda x, y: ((x[:, 0] - y) ** 2).mean()),
        "single_label_classification": (torch.tensor([2, 0, 3]), torch.nn.functional.cross_entropy),
        "multi_label_classification": (
            torch.randint(0, 2, (3, 4)).float(),
            torch.nn.functional.binary_cross_entropy_with_logits,
        ),
    }[problem]
    options = {"problem_type": problem} if explicit else {}
    model = build(lion_hf.LionForSequenceClassification, num_labels=num_labels, **options)
    outputs = model(**text_inputs(), labels=labels)
    torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))
    assert model.config.problem_type == problem


def test_regression_on_several_targets():
    model = build(lion_hf.LionForSequenceClassification, num_labels=3, problem_type="regression")
    labels = torch.randn(3, 3)
    outputs = model(**text_inputs(), labels=labels)
    torch.testing.assert_close(outputs.loss, ((outputs.logits - labels) ** 2).mean())


@pytest.mark.parametrize(
    "problem, num_labels", [("regression", 1), ("single_label_classification", 4), ("multi_label_classification", 4)]
)
def test_losses_of_parts_with_a_common_item_count_add_up(problem, num_labels):
    model = build(lion_hf.LionForSequenceClassification, num_labels=num_labels, problem_type=problem)
    inputs = text_inputs(batch=5)
    labels = {
        "regression": torch.randn(5),
        "single_label_classification": torch.tensor([2, 0, 3, 1, 1]),
        "multi_label_classification": torch.randint(0, 2, (5, 4)).float(),
    }[problem]
    whole = model(**inputs, labels=labels).loss
    parts = [
        model(**{k: v[s] for k, v in inputs.items()}, labels=labels[s], num_items_in_batch=labels.numel()).loss
        for s in (slice(0, 1), slice(1, 3), slice(3, 5))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_token_classification_loss_skips_unlabelled_tokens():
    model = build(lion_hf.LionForTokenClassification, num_labels=4)
    labels = torch.randint(0, 4, (3, 11))
    labels[1, 5:] = -100
    outputs = model(**text_inputs(), labels=labels)
    chosen = labels != -100
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits[chosen], labels[chosen]))


def test_question_answering_loss_is_the_mean_over_start_and_end():
    model = build(lion_hf.LionForQuestionAnswering)
    start, end = torch.tensor([1, 2, 3]), torch.tensor([4, 2, 99])  # the last end is out of range and is ignored
    inputs = text_inputs()
    outputs = model(**inputs, start_positions=start, end_positions=end)
    real, entropy = inputs["attention_mask"].bool(), torch.nn.functional.cross_entropy
    starts, ends = (x.masked_fill(~real, -torch.inf) for x in (outputs.start_logits, outputs.end_logits))
    torch.testing.assert_close(outputs.loss, (entropy(starts, start) + entropy(ends[:2], end[:2])) / 2)
    assert outputs.start_logits.is_contiguous() and outputs.end_logits.is_contiguous()
    assert model(**text_inputs(), start_positions=start).loss is None


@pytest.mark.parametrize(
    "start, end, message", [(0, 4, r"start_positions\[1\] is 0"), (3, -1, r"end_positions\[1\] is 0")]
)
def test_answers_on_padding_are_refused(start, end, message):
    model, ids = build(lion_hf.LionForQuestionAnswering), torch.randint(1, 50, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    labels = {"start_positions": torch.tensor([0, start]), "end_positions": torch.tensor([5, end])}
    with pytest.raises(ValueError, match=message + ", where attention_mask is 0"):
        model(ids, mask, **labels)
    assert model(
        ids, mask, start_positions=torch.tensor([0, 2]), end_positions=torch.tensor([[5], [9]])
    ).loss.isfinite()


def test_multiple_choice_scores_each_choice_as_a_text_of_its_own():
    model = build(lion_hf.LionForMultipleChoice)
    inputs = inputs_for(lion_hf.LionForMultipleChoice)
    labels = torch.tensor([1, 0, 1])
    outputs = model(**inputs, labels=labels)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, labels))
    flipped = model(**{k: v.flip(1) for k, v in inputs.items()})
    torch.testing.assert_close(flipped.logits, outputs.logits.flip(1))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    by_embeds = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(by_embeds.logits, outputs.logits)


@pytest.mark.parametrize("head", [lion_hf.LionForSequenceClassification, lion_hf.LionForTokenClassification])
def test_classifier_dropout_acts_in_training_only(head):
    model = build(head, classifier_dropout=0.5)
    inputs = text_inputs()
    torch.testing.assert_close(model(**inputs).logits, model(**inputs).logits)
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_inputs_embeds_replace_input_ids(mask_type):
    model, inputs = build(lion_hf.LionModel, mask_type), text_inputs()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    by_ids, by_embeds = model(**inputs), model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(by_embeds.last_hidden_state, by_ids.last_hidden_state)
    for wrong in ({}, {"input_ids": inputs["input_ids"], "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


def test_token_types_are_told_apart_and_default_to_0():
    model, inputs = build(lion_hf.LionModel), text_inputs()
    zeros = torch.zeros_like(inputs["input_ids"])
    plain = model(**inputs).last_hidden_state
    torch.testing.assert_close(model(**inputs, token_type_ids=zeros).last_hidden_state, plain)
    assert (model(**inputs, token_type_ids=zeros + 1).last_hidden_state - plain).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------- tied weights


@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_decoder_stays_tied_after_save_and_load_and_resize(tmp_path, mask_type):
    model, inputs = build(lion_hf.LionForMaskedLM, mask_type), text_inputs()
    model.save_pretrained(tmp_path)
    loaded = lion_hf.LionForMaskedLM.from_pretrained(tmp_path)
    assert_same_model(loaded, model, inputs)
    for tied in (model, loaded):
        assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    for size in (70, 50):
        loaded.resize_token_embeddings(size)
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert loaded.config.vocab_size == size
        ids = torch.randint(0, size, (2, 5))
        outputs = loaded(ids, labels=ids)
        assert outputs.logits.shape == (2, 5, size) and outputs.loss.isfinite()
    ids = torch.randint(0, 50, (2, 5))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits[..., :50])


def test_resized_model_survives_save_and_load(tmp_path):
    model = build(lion_hf.LionForMaskedLM)
    model.resize_token_embeddings(67)
    model.save_pretrained(tmp_path)
    loaded = lion_hf.LionForMaskedLM.from_pretrained(tmp_path)
    assert_same_model(loaded, model, {"input_ids": torch.randint(0, 67, (2, 5))})


def test_untied_decoder_is_a_parameter_of_its_own(tmp_path):
    model = build(lion_hf.LionForMaskedLM, tie_word_embeddings=False)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    model.save_pretrained(tmp_path)
    assert_same_model(lion_hf.LionForMaskedLM.from_pretrained(tmp_path), model, text_inputs())


@pytest.mark.parametrize("head", TEXT_HEADS, ids=lambda x: x.__name__)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_every_head_survives_save_and_load(tmp_path, head, mask_type):
    model, inputs = build(head, mask_type), inputs_for(head)
    model.save_pretrained(tmp_path)
    loaded, info = head.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_model(loaded, model, inputs)


def test_encoder_moves_between_heads(tmp_path):
    model, inputs = build(lion_hf.LionForMaskedLM), text_inputs()
    model.save_pretrained(tmp_path)
    for head in (lion_hf.LionModel, lion_hf.LionForSequenceClassification, lion_hf.LionForTokenClassification):
        loaded = head.from_pretrained(tmp_path).eval()
        encoder = getattr(loaded, "lion", loaded)
        encoder.save_pretrained(tmp_path / "bare")
        again = lion_hf.LionForMaskedLM.from_pretrained(tmp_path / "bare")
        assert_same_model(again.lion, model.lion, inputs)


# -------------------------------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("head", TEXT_HEADS, ids=lambda x: x.__name__)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_every_parameter_is_initialised_when_nothing_is_loaded(tmp_path, head, mask_type):
    model = head(text_config(mask_type))
    torch.save({}, tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    from_nothing = head.from_pretrained(tmp_path)
    for fresh in (model, head._from_config(text_config(mask_type)), from_nothing):
        for name, p in fresh.named_parameters():
            assert p.device.type == "cpu" and p.isfinite().all(), name
            if mask_type not in VARIANTS and (".mixer." in name and not re.search(r"\.[qkvo]_proj\.", name)):
                assert p.abs().max() < 20, name  # as its paper says
            elif "decay_logit" in name:
                assert 0 < p.abs().max() < 6
            elif "norm" in name:
                assert (p == (1 if name.endswith("weight") else 0)).all(), name
            elif name.endswith("bias"):
                assert (p == 0).all(), name
            else:
                assert abs(p.std() / 0.02 - 1) < 4 / p.numel() ** 0.5 and p.abs().max() < 0.13, name
        words = fresh.get_input_embeddings().weight
        assert (words[0] == 0).all() and (words[1:].abs().sum(1) > 0).all()


def test_lion_d_logits_are_standard_normal():
    config = text_config("decay", num_hidden_layers=20, hidden_size=64, num_attention_heads=64, intermediate_size=4)
    model = lion_hf.LionModel(config)
    logits = torch.cat([p.detach() for name, p in model.named_parameters() if name.endswith("decay_logit")])
    assert logits.numel() == 1280
    assert abs(logits.mean()) < 0.15 and abs(logits.std() - 1) < 0.1
    assert abs((logits.abs() > 1).float().mean() - 0.317) < 0.06


def test_lion_s_decays_start_near_one_half():
    model, inputs = lion_hf.LionModel(text_config()), text_inputs()
    logits = []
    model.layers[0].mixer.decay_proj.register_forward_hook(lambda m, x, y: logits.append(y))
    model(**inputs)
    assert (torch.sigmoid(-logits[0]) - 0.5).abs().max() < 0.15


def test_initialisation_does_not_touch_loaded_weights(tmp_path):
    model = build(lion_hf.LionModel, "decay")
    model.save_pretrained(tmp_path)
    loaded = lion_hf.LionForSequenceClassification.from_pretrained(tmp_path)
    for name, p in model.named_parameters():
        assert torch.equal(loaded.lion.get_parameter(name), p), name
    assert loaded.classifier.weight.std() > 0.005 and (loaded.classifier.bias == 0).all()


# ------------------------------------------------------------------------------------------- refusals and warnings


@pytest.mark.parametrize("head", TEXT_HEADS, ids=lambda x: x.__name__)
def test_an_image_configuration_is_refused_and_the_right_class_named(head):
    with pytest.raises(ValueError, match=f"{head.__name__} needs a LionConfig.*LionVisionConfig"):
        head(vision_config())
    with pytest.raises(ValueError, match="LionConfig"):
        head._from_config(vision_config())


def test_an_image_checkpoint_is_refused_by_a_text_model(tmp_path):
    lion_hf.LionVisionModel(vision_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"LionConfig|lion_vision"):
        lion_hf.LionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "paged|eager", "kernels-community/flash"])
def test_attn_implementation_is_refused_and_names_format(tmp_path, name):
    model = lion_hf.LionModel(text_config())
    format_hint = "config.format selects how LION is computed: 'attention', 'rnn', 'chunk' or 'auto'"
    message = f"attn_implementation is {re.escape(repr(name))}.*{format_hint}"
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation(name)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        lion_hf.LionModel.from_pretrained(tmp_path, attn_implementation=name)
    with pytest.raises(ValueError, match=message):
        lion_hf.LionModel._from_config(text_config(), attn_implementation=name)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attn_implementation_eager_is_no_error(tmp_path, name):
    config, ids = text_config("lit", softmax_layers=[0]), torch.arange(6)[None]
    model = lion_hf.LionModel(config).eval()
    expected = model(ids, output_attentions=True)
    model.save_pretrained(tmp_path)
    load, build = lion_hf.LionModel.from_pretrained, lion_hf.LionModel._from_config
    for loaded in (
        load(tmp_path, attn_implementation=name),
        load(tmp_path, config=config, attn_implementation=name),
        load(tmp_path, attn_implementation={"": name}),
        build(text_config("lit", softmax_layers=[0]), attn_implementation=name),
        model,
        type("Clinical", (lion_hf.LionModel,), {"__module__": "nowhere"})(text_config("lit", softmax_layers=[0])),
    ):
        loaded.load_state_dict(model.state_dict())
        loaded.set_attn_implementation(name)
        assert loaded.config._attn_implementation == name and loaded._supports_sdpa
        outputs = loaded.eval()(ids, output_attentions=True)
        assert torch.equal(outputs[0], expected[0])
        assert all(torch.equal(a, b) for a, b in zip(outputs.attentions, expected.attentions, strict=True))


@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_only_a_position_table_limits_the_length(mask_type):
    model = build(lion_hf.LionModel, mask_type, max_position_embeddings=12)
    assert model(torch.ones(1, 12).long()).last_hidden_state.isfinite().all()
    too_long = torch.randint(1, 61, (1, 90))
    if mask_type == "lit":
        with pytest.raises(ValueError, match="90 tokens.*max_position_embeddings = 12.*LION-D or LION-S"):
            model(too_long)
        with pytest.raises(ValueError, match="90 tokens"):
            model(inputs_embeds=torch.randn(1, 90, HIDDEN))
    else:
        assert model(too_long).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("pos_emb", [True, False])
def test_position_ids_select_rows_of_the_table_or_warn(warnings_of, pos_emb):
    model, ids = build(lion_hf.LionModel, "lit", pos_emb=pos_emb), torch.randint(1, 61, (2, 7))
    plain = model(ids).last_hidden_state
    natural = model(ids, position_ids=torch.arange(7)[None]).last_hidden_state
    reversed_ = model(ids, position_ids=torch.arange(7).flip(0).expand(2, -1)).last_hidden_state
    torch.testing.assert_close(natural, plain)
    if pos_emb:
        assert (reversed_ - plain).abs().max() > 1e-4 and "position_ids" not in warnings_of.text
    else:
        assert torch.equal(reversed_, plain) and "position_ids are ignored" in warnings_of.text


@pytest.mark.parametrize("mask_type", ["decay", "selective"])
def test_decay_tells_positions_and_lit_without_table_does_not(mask_type):
    order = torch.tensor([3, 1, 0, 2, 4])
    ids = torch.tensor([[11, 12, 13, 14, 15]])

    def change(model):
        a, b = model(ids).last_hidden_state, model(ids[:, order]).last_hidden_state
        return (b - a[:, order]).abs().max()

    assert change(build(lion_hf.LionModel, mask_type, torch.float64)) > 1e-5
    assert change(build(lion_hf.LionModel, "lit", torch.float64, pos_emb=False)) < 1e-9


# -------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("mask_type", [name for name in ALL_VARIANTS if not variant_class(name).text_normalize])
def test_attention_dropout_selects_the_attention_form_in_training(mask_type):
    rate = 0.4
    model = build(lion_hf.LionModel, mask_type, attention_probs_dropout_prob=rate, format="auto").train()
    inputs = text_inputs()
    plain = model.eval()(**inputs, output_attentions=True).attentions[0]
    dropped = model.train()(**inputs, output_attentions=True).attentions[0]
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], plain[kept] / (1 - rate))
    share = 1 - kept.sum() / (plain != 0).sum()
    assert abs(share - rate) < 0.1
    a, b = (model(**inputs).last_hidden_state for _ in range(2))
    assert not torch.equal(a, b), "dropout has no effect without output_attentions"


@pytest.mark.parametrize("form", ["rnn", "chunk"])
def test_attention_dropout_without_a_matrix_is_an_error_in_training_only(form):
    model, inputs = build(lion_hf.LionModel, attention_probs_dropout_prob=0.3, format=form), text_inputs()
    evaluated = model(**inputs).last_hidden_state
    model.config.format = "attention"
    torch.testing.assert_close(model(**inputs).last_hidden_state, evaluated, rtol=1e-5, atol=1e-6)
    model.config.format = form
    message = f"attention_probs_dropout_prob > 0 in training.*format='{form}'.*attention_probs_dropout_prob to 0"
    with pytest.raises(ValueError, match=message):
        model.train()(**inputs)


def test_hidden_dropout_acts_in_training_only():
    model, inputs = build(lion_hf.LionModel, hidden_dropout_prob=0.3), text_inputs()
    assert torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    model.train()
    assert not torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


@pytest.mark.parametrize("head", TEXT_HEADS, ids=lambda x: x.__name__)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_one_row_of_mask_serves_every_row(head, training):
    model, ids = build(head, dtype=torch.float64).train(training), torch.randint(1, 61, (3, 7))
    mask = torch.tensor([[0, 1, 1, 1, 0, 1, 0]])
    if head is lion_hf.LionForMultipleChoice:
        ids = torch.stack([ids, ids.flip(1)], 1)
    whole = mask.expand(*ids.shape)
    labels = {name: value % 6 for name, value in labels_for(head, 3, 7).items()}
    if head is lion_hf.LionForQuestionAnswering:
        labels = {name: torch.ones(3).long() for name in labels}
    expected = model(ids, whole, **labels)
    shared = [mask, mask[:, None, None]]
    if ids.dim() == 3:
        shared = [mask, mask[None], mask.expand(3, 7)[:, None], mask.expand(2, 7)[None]]
        shared += [mask[:, None, None], mask.expand(6, 7)[:, None, None], mask.expand(1, 2, 1, 1, 7)]
    for row in shared:
        outputs = model(ids, row, **labels)
        for a, b in zip(outputs.values(), expected.values(), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(ids, torch.ones(4, 7) if ids.dim() == 2 else torch.ones(5, 7))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(ids, torch.ones(4, 1, 1, 7))
