import re

import pytest
import torch
from small_models import (
    ALL_VARIANTS,
    FORMS,
    VARIANTS,
    decays_of,
    record_mixing,
    spread_decays,
    text_config,
    vision_config,
)

import lion_hf
from lion_hf.nn import variant_class
from lion_hf.nn.block import DropPath


HEADS = (lion_hf.LionVisionModel, lion_hf.LionForImageClassification)
ORDERS = ("normal", "s")
HIDDEN = 24


def build(head, mask_type="selective", dtype=torch.float32, **options):
    """Return a model in which every weight has an effect: random biases, norms and decays, and different tokens."""
    model = head(vision_config(mask_type, **options)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "projection" in name or "embeddings" in name:
                parameter.normal_(std=0.3)
    return spread_decays(model).eval()


def images(batch=3, height=16, width=16, dtype=torch.float32, channels=3):
    return torch.randn(batch, channels, height, width, dtype=dtype)


def assert_same_model(actual, expected, pixels):
    """Check that weights are bit-equal, and outputs equal to rounding, which depends on the alignment of weights."""
    a, b = actual.state_dict(), expected.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for x, y in zip(actual.eval()(pixels).values(), expected.eval()(pixels).values(), strict=True):
        torch.testing.assert_close(x, y)


# ----------------------------------------------------------------------------------------------- outputs and losses


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_outputs_have_the_class_token_and_every_patch(mask_type, order):
    outputs = build(lion_hf.LionVisionModel, mask_type, order=order)(images())
    assert {k: tuple(v.shape) for k, v in outputs.items()} == {
        "last_hidden_state": (3, 17, HIDDEN),
        "pooler_output": (3, HIDDEN),
    }
    outputs = build(lion_hf.LionForImageClassification, mask_type, order=order)(images())
    assert outputs.logits.shape == (3, 5) and outputs.loss is None


@pytest.mark.parametrize("explicit", [True, False], ids=["problem_type", "by-labels"])
@pytest.mark.parametrize(
    "problem, num_labels", [("regression", 1), ("single_label_classification", 4), ("multi_label_classification", 4)]
)
def test_loss_of_each_problem_type(problem, num_labels, explicit):
    labels, loss = {
        "regression": (torch.randn(3), lambda x, y: ((x[:, 0] - y) ** 2).mean()),
        "single_label_classification": (torch.tensor([2, 0, 3]), torch.nn.functional.cross_entropy),
        "multi_label_classification": (
            torch.randint(0, 2, (3, 4)).float(),
            torch.nn.functional.binary_cross_entropy_with_logits,
        ),
    }[problem]
    options = {"problem_type": problem} if explicit else {}
    outputs = build(lion_hf.LionForImageClassification, num_labels=num_labels, **options)(images(), labels=labels)
    torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))


@pytest.mark.parametrize("cls_tok", [True, False])
def test_the_image_is_read_from_the_class_token_or_the_mean_over_all_tokens(cls_tok):
    model = build(lion_hf.LionForImageClassification, cls_tok=cls_tok)
    pixels = images()
    outputs = model.lion_vision(pixels)
    tokens = outputs.last_hidden_state
    expected = tokens[:, 0] if cls_tok else tokens.sum(1) / 17
    torch.testing.assert_close(outputs.pooler_output, expected)
    torch.testing.assert_close(model(pixels).logits, model.classifier(expected))


def test_without_labels_the_pooled_image_is_returned():
    model = lion_hf.LionForImageClassification(vision_config(num_labels=0)).eval()
    pixels = images()
    torch.testing.assert_close(model(pixels).logits, model.lion_vision(pixels).pooler_output)


def test_final_norm_stands_after_the_last_block_and_hidden_states_before_it():
    model, pixels = build(lion_hf.LionVisionModel), images()
    outputs = model(pixels, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    assert torch.equal(outputs.hidden_states[0], model.embeddings(pixels))
    assert torch.equal(outputs.hidden_states[1], model.layers[0](outputs.hidden_states[0]))
    assert torch.equal(outputs.last_hidden_state, model.norm(outputs.hidden_states[-1]))


@pytest.mark.parametrize("head", HEADS, ids=lambda x: x.__name__)
def test_tuples_hold_the_values_of_the_output_class(head):
    model, pixels = build(head, order="s"), images()
    options = {"output_hidden_states": True, "output_attentions": True}
    if head is lion_hf.LionForImageClassification:
        options["labels"] = torch.tensor([0, 1, 2])
    expected = model(pixels, **options).to_tuple()
    actual = model(pixels, **options, return_dict=False)
    assert type(actual) is tuple and len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        for x, y in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
            assert torch.equal(x, y)


# ---------------------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize("size", [(16, 16), (12, 20)], ids=["square", "wide"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_forms_agree_in_outputs_and_every_gradient(mask_type, order, size):
    model = build(lion_hf.LionForImageClassification, mask_type, torch.float64, order=order)
    pixels, labels = images(3, *size, dtype=torch.float64).requires_grad_(), torch.tensor([0, 4, 2])
    results = {}
    for form in (*FORMS, "auto"):
        model.config.format = form
        model.zero_grad()
        pixels.grad = None
        outputs = model(pixels, labels=labels)
        outputs.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        results[form] = {"logits": outputs.logits.detach(), "pixels": pixels.grad.clone(), **gradients}
    for form, tensors in results.items():
        for name, x in tensors.items():
            expected = results["attention"][name]
            assert expected.abs().max() > 1e-9, f"{name} has no gradient"
            # A shift of all keys of a head almost cancels in the division. Such small gradients have a fixed tolerance.
            assert (x - expected).abs().max() <= 1e-9 * expected.abs().max().clamp(min=1e-3), f"{form} {name}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ORDERS)
def test_permuted_batch_permutes_the_output_and_an_image_alone_gives_the_same(form, order):
    model = build(lion_hf.LionForImageClassification, dtype=torch.float64, order=order, format=form)
    pixels = images(4, dtype=torch.float64)
    logits = model(pixels).logits
    permutation = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(pixels[permutation]).logits, logits[permutation], rtol=1e-9, atol=1e-12)
    for i in range(4):
        torch.testing.assert_close(model(pixels[i : i + 1]).logits[0], logits[i], rtol=1e-9, atol=1e-12)


def test_format_changed_on_a_live_model_acts_at_the_next_forward():
    model, pixels = build(lion_hf.LionVisionModel, format="chunk"), images()
    with pytest.raises(ValueError, match="output_attentions"):
        model(pixels, output_attentions=True)
    model.config.format = "Attention"
    assert len(model(pixels, output_attentions=True).attentions) == 2


# --------------------------------------------------------------------------------------------------------- orders


@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_snake_order_changes_a_model_with_decay_only(mask_type):
    normal = build(lion_hf.LionVisionModel, mask_type, torch.float64)
    snake = lion_hf.LionVisionModel(vision_config(mask_type, order="s")).double().eval()
    weights = normal.state_dict()
    snake.load_state_dict({name: weights[name.replace("_2", "")] for name in snake.state_dict()})
    pixels = images(dtype=torch.float64)
    change = (snake(pixels).last_hidden_state - normal(pixels).last_hidden_state).abs().max()
    if mask_type == "lit":
        assert change == 0
    else:
        assert change > 1e-4


@pytest.mark.parametrize("mask_type, suffix", [("decay", "decay_logit"), ("selective", "decay_proj")])
def test_each_scan_has_its_own_decay(mask_type, suffix):
    model = build(lion_hf.LionForImageClassification, mask_type, torch.float64, order="s")
    pixels = images(dtype=torch.float64)
    expected = model(pixels).logits
    for name in (suffix, f"{suffix}_2"):
        parameters = dict(model.lion_vision.layers[0].mixer.named_parameters())
        touched = parameters.get(name, parameters.get(f"{name}.bias"))
        with torch.no_grad():
            touched.add_(1.5)
        changed = model(pixels).logits
        assert (changed - expected).abs().max() > 1e-5, name
        expected = changed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_type", ["decay", "selective"])
def test_a_transposed_image_swaps_the_two_scans(mask_type, form):
    """Rows of the transposed image are columns of the image, so swapping the decays undoes the transposition."""
    model = build(lion_hf.LionVisionModel, mask_type, torch.float64, order="s", format=form)
    pixels = images(2, 12, 20, dtype=torch.float64)
    tokens = model(pixels).last_hidden_state
    with torch.no_grad():
        kernel = model.embeddings.patch_embeddings.projection.weight
        kernel.copy_(kernel.transpose(2, 3).clone())
        for layer in model.layers:
            for name, first in layer.mixer.named_parameters():
                if "decay" in name and "_2" not in name:
                    second = layer.mixer.get_parameter(
                        name.replace("decay_logit", "decay_logit_2").replace("decay_proj", "decay_proj_2")
                    )
                    kept = first.clone()
                    first.copy_(second)
                    second.copy_(kept)
    transposed = model(pixels.transpose(2, 3)).last_hidden_state
    patches = transposed[:, 1:].unflatten(1, (5, 3)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(patches, tokens[:, 1:], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(transposed[:, 0], tokens[:, 0], rtol=1e-9, atol=1e-12)


def test_without_decay_the_order_of_patches_means_nothing_unless_positions_are_learned():
    def change(**options):
        model = build(lion_hf.LionVisionModel, dtype=torch.float64, **options)
        pixels = torch.randn(1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        shuffled = torch.cat([pixels[:, :, 8:], pixels[:, :, :8]], 2)
        return (model(shuffled).pooler_output - model(pixels).pooler_output).abs().max()

    assert change(mask_type="lit") < 1e-12
    assert change(mask_type="lit", pos_emb=True) > 1e-5
    assert change(mask_type="decay") > 1e-5
    assert change(mask_type="selective") > 1e-5


@pytest.mark.parametrize("change", [{"order": "normal"}, {"mask_type": "lit"}])
def test_a_built_model_stays_as_it_is_when_its_configuration_serves_for_another(change):
    config = vision_config("selective", order="s")
    model, pixels = lion_hf.LionVisionModel(config).eval(), images()
    before = model(pixels).last_hidden_state
    for name, value in change.items():
        setattr(config, name, value)
    lion_hf.LionVisionModel(config)
    assert torch.equal(model(pixels).last_hidden_state, before)


# ---------------------------------------------------------------------------------------- decay of the class token


def decay_gradients(model, pixels):
    """Return the gradient of the output with respect to the gate logits of every token in the first layer."""
    seen = []

    def keep(module, inputs, output):
        output.retain_grad()
        seen.append((inputs[0], output))

    mixer = model.layers[0].mixer
    hooks = [getattr(mixer, name).register_forward_hook(keep) for name in mixer.variant_weights]
    model(pixels).last_hidden_state.pow(2).sum().backward()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ORDERS)
def test_gates_of_all_patches_and_not_of_the_class_token_take_part(form, order):
    model = build(lion_hf.LionVisionModel, dtype=torch.float64, order=order, format=form)
    seen = decay_gradients(model, images(2, dtype=torch.float64))
    assert len(seen) == (2 if order == "s" else 1)
    for tokens, logits in seen:
        # Either the gate is not evaluated on the class token, or its value there has no effect.
        class_token = logits.grad[:, : logits.shape[1] - 16]
        assert tokens.shape[:2] == logits.shape[:2] and logits.shape[1] in (16, 17)
        assert (class_token == 0).all()
        # Every patch, also at the ends of the curve, is on a path from the class token to itself or to another patch.
        assert (logits.grad[:, -16:].abs().sum(-1) > 0).any(0).all()


def test_distance_to_the_class_token_counts_no_decay_of_the_class_token():
    """If the decay of every patch is 0, patch 1 reads only itself and the class token, whose own decay must not count.

    A class token that decayed would be hidden from it.
    """
    model = build(lion_hf.LionVisionModel, dtype=torch.float64, num_hidden_layers=1, format="attention")
    with torch.no_grad():
        gate = model.layers[0].mixer.decay_proj
        gate.weight.zero_()
        gate.bias.fill_(60.0)  # sigmoid(60) = 1: the decay of every patch is 0
    a = model(images(1, dtype=torch.float64), output_attentions=True).attentions[0][0]
    expected_zero = torch.ones(17, 17, dtype=torch.bool)
    expected_zero.fill_diagonal_(False)
    expected_zero[1, 0] = False  # from patch 1 to the class token, no other patch is passed
    assert (a[:, expected_zero] < 1e-12).all()
    assert (a[:, 1, 0] > 0.01).all() and (a.diagonal(dim1=1, dim2=2) > 0.01).all()


@pytest.mark.parametrize("order", ORDERS)
def test_lion_d_decays_the_class_token_as_any_other(order):
    model = build(lion_hf.LionVisionModel, "decay", torch.float64, order=order, num_hidden_layers=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "decay_logit" in name:
                p.fill_(-60.0)
    a = model(images(1, dtype=torch.float64), output_attentions=True).attentions[0][0]
    torch.testing.assert_close(a, torch.eye(17, dtype=a.dtype).expand_as(a), rtol=1e-4, atol=1e-12)


# ----------------------------------------------------------------------------------------------------- attentions


@pytest.mark.parametrize("form", ["attention", "auto"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_attentions_mix_the_values_and_normalised_ones_are_positive_rows_of_sum_1(mask_type, order, form):
    model = build(lion_hf.LionVisionModel, mask_type, torch.float64, order=order, format=form)
    pixels, values, mixed = images(2, 12, 20, dtype=torch.float64), {}, {}
    record_mixing(model, values, mixed)
    plain = model(pixels)
    of_operator = dict(mixed)
    outputs = model(pixels, output_attentions=True)
    torch.testing.assert_close(outputs.last_hidden_state, plain.last_hidden_state, rtol=1e-9, atol=1e-12)
    assert len(outputs.attentions) == 2 and plain.attentions is None
    for i, a in enumerate(outputs.attentions):
        assert a.shape == (2, 3, 16, 16)
        if model.config.normalize:
            sums = a.sum(-1)
            assert (a >= 0).all() and (sums <= 1).all() and (sums > 1 - 1e-4).all() and (sums < 1).any()
        mixed_again = (a @ values[i]).transpose(1, 2).flatten(2)
        torch.testing.assert_close(mixed_again, of_operator[i], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["rnn", "chunk"])
def test_attentions_from_a_form_without_matrix_are_a_clear_error(form):
    model = build(lion_hf.LionForImageClassification, format=form)
    message = f"output_attentions=True needs the attention matrix.*format='{form}'.*'attention' or 'auto'"
    with pytest.raises(ValueError, match=message):
        model(images(), output_attentions=True)


# ----------------------------------------------------------------------------------------------------- image sizes


@pytest.mark.parametrize("size", [(4, 4), (8, 20), (20, 8), (32, 32)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_without_position_table_any_divisible_size_is_taken(mask_type, order, size):
    model = build(lion_hf.LionForImageClassification, mask_type, torch.float64, order=order)
    pixels = images(2, *size, dtype=torch.float64)
    assert model.lion_vision(pixels).last_hidden_state.shape[1] == 1 + size[0] * size[1] // 16
    expected = model(pixels).logits
    for form in FORMS:
        model.config.format = form
        torch.testing.assert_close(model(pixels).logits, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pos_emb", [True, False])
def test_a_configured_image_size_need_not_be_square(pos_emb, order):
    model = build(lion_hf.LionForImageClassification, image_size=(8, 24), pos_emb=pos_emb, order=order)
    assert model(images(2, 8, 24)).logits.isfinite().all()
    if pos_emb:
        assert model.lion_vision.embeddings.position_embeddings.shape == (1, 13, HIDDEN)
        with pytest.raises(ValueError, match="24 x 8 pixels, but the position table is for 8 x 24"):
            model(images(2, 24, 8))


def test_a_position_table_of_another_size_is_interpolated_on_request():
    model = build(lion_hf.LionForImageClassification, pos_emb=True)
    larger = images(2, 24, 32)
    with pytest.raises(ValueError, match="24 x 32 pixels.*is for 16 x 16.*interpolate_pos_encoding=True"):
        model(larger)
    assert model(larger, interpolate_pos_encoding=True).logits.shape == (2, 5)
    same = images(2)
    assert torch.equal(model(same, interpolate_pos_encoding=True).logits, model(same).logits)
    # Bicubic weights sum to 1: a constant table stays constant, and one that grows along both axes still grows.
    embeddings = model.lion_vision.embeddings
    with torch.no_grad():
        embeddings.position_embeddings.fill_(0.5)
        embeddings.position_embeddings[:, 0] = -3.0
        table = embeddings._positions((6, 8), True)
        torch.testing.assert_close(table[:, 1:], torch.full((1, 48, HIDDEN), 0.5))
        assert (table[:, 0] == -3).all()
        rows, columns = torch.arange(4.0).repeat_interleave(4), torch.arange(4.0).repeat(4)
        embeddings.position_embeddings[:, 1:] = (10 * rows + columns)[None, :, None]
        grown = embeddings._positions((6, 8), True)[0, 1:, 0].view(6, 8)
    assert (grown.diff(dim=0) > 1).all() and (grown.diff(dim=1) > 0).all() and (grown.diff(dim=1) < 1).all()


def test_interpolation_is_ignored_without_a_table():
    model, pixels = build(lion_hf.LionVisionModel), images(1, 8, 24)
    assert torch.equal(model(pixels, interpolate_pos_encoding=True).pooler_output, model(pixels).pooler_output)


@pytest.mark.parametrize("head", HEADS, ids=lambda x: x.__name__)
@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 1, 16, 16), r"shape \(2, 1, 16, 16\).*3 channels.*convert\('RGB'\)"),
        ((2, 4, 16, 16), "3 channels"),
        ((3, 16, 16), r"shape \(3, 16, 16\); it must be \(batch, channels, height, width\)"),
        ((2, 16, 16, 3), "3 channels"),
        ((2, 3, 18, 16), "18 x 16 pixels, which patch_size 4 does not divide"),
        ((2, 3, 16, 3), "16 x 3 pixels"),
    ],
    ids=str,
)
def test_images_that_do_not_fit_are_refused_with_what_fits(head, shape, message):
    with pytest.raises(ValueError, match=message):
        build(head)(torch.randn(shape))


def test_missing_pixels_are_a_clear_error():
    for head in HEADS:
        with pytest.raises(ValueError, match="pixel_values is missing"):
            build(head)()


def test_one_channel_and_no_query_bias():
    model = build(lion_hf.LionForImageClassification, num_channels=1, qkv_bias=False)
    assert model(images(2, channels=1)).logits.isfinite().all()
    mixer = model.lion_vision.layers[0].mixer
    assert mixer.q_proj.bias is None and mixer.k_proj.bias is None and mixer.v_proj.bias is None
    assert mixer.o_proj.bias is not None


# ------------------------------------------------------------------------------------------ dropout and drop path


def test_drop_path_drops_whole_branches_in_training_and_keeps_the_expectation():
    path, branch = DropPath(0.3), torch.ones(4000, 2, 3)
    assert torch.equal(path.eval()(branch), branch)
    dropped = path.train()(branch)
    per_image = dropped.flatten(1)
    assert (per_image == per_image[:, :1]).all()
    kept = per_image[:, 0] != 0
    torch.testing.assert_close(per_image[kept], torch.full_like(per_image[kept], 1 / 0.7))
    assert abs(kept.float().mean() - 0.7) < 0.03 and abs(dropped.mean() - 1) < 0.04
    assert not torch.equal(path(branch), dropped)
    assert torch.equal(DropPath(0.0).train()(branch), branch)


@pytest.mark.parametrize(
    "depth, expected", [(1, [0.0]), (2, [0.0, 0.4]), (5, [0.0, 0.1, 0.2, 0.3, 0.4])], ids=["1", "2", "5"]
)
def test_drop_path_rates_grow_linearly_over_the_blocks(depth, expected):
    model = lion_hf.LionVisionModel(vision_config(num_hidden_layers=depth, drop_path_rate=0.4))
    rates = [m.rate for layer in model.layers for m in layer.modules() if isinstance(m, DropPath)]
    assert sorted({round(r, 9) for r in rates}) == pytest.approx(expected)
    assert rates == sorted(rates)


def test_drop_path_acts_on_both_branches_of_a_model_in_training_only():
    model, pixels = build(lion_hf.LionVisionModel, drop_path_rate=0.5), images(1).repeat(64, 1, 1, 1)
    plain = model(pixels).pooler_output
    torch.testing.assert_close(plain, plain[:1].expand_as(plain))
    model.train()
    outcomes = {tuple(row) for row in (model(pixels).pooler_output * 1e3).round().tolist()}
    assert len(outcomes) == 4, "the last block must be kept or dropped after the mixer and after the MLP"


@pytest.mark.parametrize("form", FORMS)
def test_attention_dropout_is_accepted_and_never_applied(form):
    plain = build(lion_hf.LionVisionModel, format=form)
    model = lion_hf.LionVisionModel(vision_config(format=form, attention_probs_dropout_prob=0.5)).train()
    model.load_state_dict(plain.state_dict())
    pixels = images()
    torch.testing.assert_close(model(pixels).last_hidden_state, plain(pixels).last_hidden_state)


@pytest.mark.parametrize("pos_emb", [True, False])
def test_hidden_dropout_acts_in_training_only_and_on_embeddings_with_positions_only(pos_emb):
    model, pixels = build(lion_hf.LionVisionModel, hidden_dropout_prob=0.4, pos_emb=pos_emb), images()
    assert torch.equal(model(pixels).pooler_output, model(pixels).pooler_output)
    model.train()
    assert not torch.equal(model(pixels).pooler_output, model(pixels).pooler_output)
    assert (model.embeddings(pixels) == 0).any() == pos_emb


# -------------------------------------------------------------------------------------------- saving and precision


@pytest.mark.parametrize("options", [{}, {"pos_emb": True, "cls_tok": True, "image_size": [8, 16]}], ids=["", "pos"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_model_survives_save_and_load(tmp_path, mask_type, order, options):
    model = build(lion_hf.LionForImageClassification, mask_type, order=order, **options)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_model(loaded, model, images(2, 8, 16) if options else images(2))
    bare = lion_hf.LionVisionModel.from_pretrained(tmp_path)
    assert_same_model(bare, model.lion_vision, images(2, 8, 16) if options else images(2))


def test_a_head_with_another_number_of_labels_is_initialised_anew(tmp_path):
    build(lion_hf.LionForImageClassification).save_pretrained(tmp_path)
    model = lion_hf.LionForImageClassification.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    assert model(images()).logits.shape == (3, 9)
    assert model.classifier.weight.std() > 0.005 and (model.classifier.bias == 0).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_bfloat16_load_keeps_every_decay_in_float32_and_runs_in_every_form(tmp_path, mask_type, order):
    model, pixels = build(lion_hf.LionForImageClassification, mask_type, order=order), images()
    model.save_pretrained(tmp_path)
    low = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    decays = decays_of(low)
    per_layer = {"lit": 0, "decay": 1, "selective": 2}.get(mask_type, len(decays) // (4 if order == "s" else 2))
    assert len(decays) in (2 * per_layer, 2 * per_layer * (2 if order == "s" else 1)) and bool(decays) == bool(
        variant_class(mask_type).float32_weights
    )
    for name, p in low.named_parameters():
        assert p.dtype == (torch.float32 if name in decays else torch.bfloat16), name
    expected = model(pixels).logits
    for form in (*FORMS, "auto"):
        low.config.format = form
        logits = low(pixels).logits
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - expected).abs().max() / expected.abs().max() < 0.05, form


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_changes_no_gradient(form, order):
    model = build(lion_hf.LionForImageClassification, format=form, order=order, drop_path_rate=0.3).train()
    pixels, gradients = images(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(1)
        model(pixels, labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=lambda m, name=name: f"{name}: {m}")


# -------------------------------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_every_parameter_is_initialised_when_nothing_is_loaded(tmp_path, mask_type, order):
    config = vision_config(mask_type, order=order, pos_emb=True)
    model = lion_hf.LionForImageClassification(config)
    torch.save({}, tmp_path / "pytorch_model.bin")
    config.save_pretrained(tmp_path)
    for fresh in (model, type(model)._from_config(config), type(model).from_pretrained(tmp_path)):
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


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("head", HEADS, ids=lambda x: x.__name__)
def test_a_text_configuration_is_refused_and_the_right_class_named(head):
    with pytest.raises(ValueError, match=f"{head.__name__} needs a LionVisionConfig.*LionConfig"):
        head(text_config())


def test_a_text_checkpoint_is_refused_by_an_image_model(tmp_path):
    lion_hf.LionModel(text_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"LionVisionConfig|model_type"):
        lion_hf.LionForImageClassification.from_pretrained(tmp_path)


def test_attn_implementation_is_refused_and_names_format(tmp_path):
    model = lion_hf.LionForImageClassification(vision_config())
    message = "attn_implementation is 'flash_attention_2'.*config.format"
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation("flash_attention_2")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        lion_hf.LionForImageClassification.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
