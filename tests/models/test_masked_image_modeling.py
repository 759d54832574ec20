import pytest
import torch
from small_models import ALL_VARIANTS, FORMS, spread_decays, vision_config
from torch.nn import functional as F
from transformers import AutoModelForMaskedImageModeling, Trainer, TrainingArguments

import lion_hf


ORDERS = ("normal", "s")
PATCH = 4


def build(mask_type="selective", dtype=torch.float32, **options):
    model = lion_hf.LionForMaskedImageModeling(vision_config(mask_type, **options)).to(dtype)
    return spread_decays(model).eval()


def images(batch=3, height=16, width=16, dtype=torch.float32):
    """Return pixels and a mask with a different number of patches in each image."""
    patches = (height // PATCH) * (width // PATCH)
    share = torch.linspace(0.2, 0.8, batch)[:, None]
    return torch.randn(batch, 3, height, width, dtype=dtype), torch.rand(batch, patches) < share


def in_pixels(mask, height, width):
    """Expand (batch, patches) to (batch, 1, height, width)."""
    grid = mask.view(-1, 1, height // PATCH, width // PATCH)
    return grid.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)


# ----------------------------------------------------------------------------------------------- outputs and the loss


@pytest.mark.parametrize("size", [(16, 16), (12, 20)], ids=["square", "wide"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_loss_is_the_mean_absolute_error_over_masked_pixels(mask_type, order, size):
    model, (pixels, mask) = build(mask_type, order=order), images(3, *size)
    outputs = model(pixels, bool_masked_pos=mask)
    assert outputs.reconstruction.shape == pixels.shape
    wrong = (outputs.reconstruction - pixels)[in_pixels(mask, *size).expand_as(pixels)]
    torch.testing.assert_close(outputs.loss, wrong.abs().mean())


def test_each_token_paints_the_patch_that_it_stands_for():
    model, (pixels, mask) = build(order="s"), images(2, 12, 20)
    tokens = model.lion_vision(pixels, bool_masked_pos=mask).last_hidden_state[:, 1:]
    convolution = model.decoder[0]
    painted = tokens @ convolution.weight.flatten(1).T + convolution.bias  # (batch, patches, 3 * 4 * 4)
    expected = F.fold(painted.transpose(1, 2), (12, 20), kernel_size=PATCH, stride=PATCH)
    torch.testing.assert_close(model(pixels, mask).reconstruction, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_masked_is_not_seen_and_what_is_not_masked_is(order):
    model, (pixels, mask) = build(order=order), images()
    hidden = in_pixels(mask, 16, 16)
    seen = model(pixels, mask).reconstruction
    unseen = model(torch.where(hidden, torch.randn_like(pixels), pixels), mask).reconstruction
    assert torch.equal(seen, unseen)
    other = model(torch.where(hidden, pixels, torch.randn_like(pixels)), mask).reconstruction
    assert (seen - other).abs().max() > 1e-4


def test_without_a_mask_the_whole_image_is_painted_and_there_is_no_loss():
    model, (pixels, mask) = build(), images()
    outputs = model(pixels)
    assert outputs.loss is None
    assert torch.equal(outputs.reconstruction, model(pixels, torch.zeros_like(mask)).reconstruction)


def test_an_empty_mask_costs_nothing_and_gives_finite_gradients():
    model, (pixels, mask) = build(), images()
    loss = model(pixels, torch.zeros_like(mask)).loss
    loss.backward()
    assert loss == 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_mask_may_be_a_grid_and_hold_numbers():
    model, (pixels, mask) = build(), images(3, 12, 20)
    expected = model(pixels, mask)
    for same in (mask.view(3, 3, 5), mask.long(), mask.float()):
        actual = model(pixels, same)
        assert torch.equal(actual.loss, expected.loss)
        assert torch.equal(actual.reconstruction, expected.reconstruction)


def test_tuples_hold_the_values_of_the_output_class():
    model, (pixels, mask) = build(), images()
    named = model(pixels, mask, output_hidden_states=True, output_attentions=True)
    loss, reconstruction, hidden_states, attentions = model(
        pixels, mask, output_hidden_states=True, output_attentions=True, return_dict=False
    )
    assert torch.equal(loss, named.loss) and torch.equal(reconstruction, named.reconstruction)
    assert len(hidden_states) == 3 and len(attentions) == 2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_forms_agree_in_loss_and_every_gradient(mask_type, order):
    model = build(mask_type, torch.float64, order=order)
    pixels, mask = images(2, 12, 20, torch.float64)
    results = []
    for form in FORMS:
        model.config.format = form
        model.zero_grad()
        loss = model(pixels, mask).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_position_table_is_interpolated_on_request():
    model, (pixels, mask) = build(pos_emb=True), images(2, 12, 20)
    assert model(pixels, mask, interpolate_pos_encoding=True).loss.isfinite()
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        model(pixels, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_a_loss_in_float32(dtype):
    model, (pixels, mask) = build(), images()
    expected = model(pixels, mask).loss
    loss = model.to(dtype)(pixels, mask).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)


# ----------------------------------------------------------------------------------------------------------- training


def train(folder, batch_size, accumulation):
    """Train two steps on images that also have class labels. Return the reported losses and the final weights."""
    torch.manual_seed(0)
    model = build("decay")
    pixels = torch.randn(16, 3, 16, 16)
    # the same number of patches in each image, as mask generators do
    mask = torch.stack([torch.randperm(16) < 6 for _ in range(16)])
    rows = [{"pixel_values": x, "bool_masked_pos": m, "labels": 1} for x, m in zip(pixels, mask, strict=True)]
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=16,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["bool_masked_pos"],
        train_sampling_strategy="sequential",
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated, expected = trainer.evaluate()["eval_loss"], model.eval()(pixels, mask).loss.item()
    assert evaluated == pytest.approx(expected, rel=1e-5)
    return losses, model.state_dict()


def test_gradient_accumulation_changes_neither_loss_nor_weights(tmp_path):
    pytest.importorskip("accelerate")
    whole_losses, whole = train(tmp_path, 8, 1)
    split_losses, split = train(tmp_path, 4, 2)
    assert len(whole_losses) == 2 and split_losses == pytest.approx(whole_losses, rel=1e-6)
    for name, p in whole.items():
        assert (split[name] - p).abs().max() <= 1e-6, name


@pytest.mark.parametrize("mask_type, order", [("lit", "normal"), ("decay", "normal"), ("selective", "s")])
def test_a_tiny_model_learns_to_paint_what_its_neighbours_tell(mask_type, order):
    """Each image has one colour, so the visible patches determine the masked ones."""
    model = lion_hf.LionForMaskedImageModeling(vision_config(mask_type, order=order))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        pixels = torch.randn(16, 3, 1, 1).expand(-1, -1, 16, 16)
        loss = model(pixels, torch.rand(16, 16) < 0.5).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.4  # predicting the mean colour has a loss of 0.8


# -------------------------------------------------------------------------------------------- weights, configurations


@pytest.mark.parametrize("head", [lion_hf.LionVisionModel, lion_hf.LionForImageClassification, lion_hf.LionBackbone])
def test_only_this_head_has_a_mask_token(head):
    assert any("mask_token" in name for name in build().state_dict())
    model = head(vision_config())
    assert not any("mask_token" in name for name in model.state_dict())
    encoder = getattr(model, "lion_vision", model)
    with pytest.raises(ValueError, match=r"no mask token. Use LionForMaskedImageModeling"):
        encoder(torch.randn(1, 3, 16, 16), bool_masked_pos=torch.zeros(1, 16))


@pytest.mark.parametrize("shape", [(2, 15), (1, 16), (2, 17), (2, 3, 5)], ids=str)
def test_a_mask_that_does_not_fit_is_refused_with_what_fits(shape):
    with pytest.raises(ValueError, match=r"bool_masked_pos has shape .* \(batch, patches\) = \(2, 16\)"):
        build()(torch.randn(2, 3, 16, 16), torch.zeros(shape))


def test_a_checkpoint_survives_save_and_load_and_goes_on_as_a_classifier(tmp_path):
    model, (pixels, mask) = build(order="s", pos_emb=True), images()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedImageModeling.from_pretrained(tmp_path).eval()
    assert type(loaded) is lion_hf.LionForMaskedImageModeling
    torch.testing.assert_close(loaded(pixels, mask).reconstruction, model(pixels, mask).reconstruction)
    classifier, info = lion_hf.LionForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    for name, p in classifier.lion_vision.state_dict().items():
        assert torch.equal(p, model.lion_vision.state_dict()[name]), name


def test_what_a_classifier_lacks_is_initialised(tmp_path):
    lion_hf.LionForImageClassification(vision_config()).save_pretrained(tmp_path)
    model = lion_hf.LionForMaskedImageModeling.from_pretrained(tmp_path)
    for p in (model.lion_vision.embeddings.mask_token, model.decoder[0].weight):
        assert p.isfinite().all() and abs(p.std() / 0.02 - 1) < 4 / p.numel() ** 0.5
    assert (model.decoder[0].bias == 0).all()


def test_encoder_stride_is_the_patch_size_and_nothing_else():
    """Training scripts for masked images read and set this option."""
    config = vision_config()
    assert config.encoder_stride == 4 and "encoder_stride" not in config.to_dict()
    config.update({"patch_size": 8, "encoder_stride": 8})
    assert vision_config(encoder_stride=4).encoder_stride == 4
    for wrong in (lambda: vision_config(encoder_stride=16), lambda: config.update({"encoder_stride": 4})):
        with pytest.raises(ValueError, match=r"encoder_stride is \d+, but patch_size is \d+"):
            wrong()


def test_a_mask_of_another_grid_is_refused_and_values_count_as_yes_or_no():
    model = lion_hf.LionForMaskedImageModeling(vision_config("decay")).eval()
    side = model.config.patch_size
    pixels = torch.randn(1, model.config.num_channels, 2 * side, 4 * side)
    mask = torch.tensor([[1, 0, 0, 1, 0, 1, 0, 0]])
    loss = model(pixels, bool_masked_pos=mask).loss
    torch.testing.assert_close(model(pixels, bool_masked_pos=-3 * mask.view(1, 2, 4)).loss, loss)
    with pytest.raises(ValueError, match="rows, columns"):
        model(pixels, bool_masked_pos=mask.view(1, 4, 2))


@pytest.mark.parametrize("order", ["normal", "s"])
def test_a_batch_without_images_has_the_loss_zero(order):
    model = build(order=order)
    outputs = model(torch.randn(0, 3, 16, 16), torch.zeros(0, 16))
    assert outputs.reconstruction.shape == (0, 3, 16, 16) and outputs.loss == 0
    outputs.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_pixels_are_shuffled_as_pytorch_does():
    x = torch.randn(2, 48, 3, 5)
    found = lion_hf.models.modeling_lion_vision.LionPixelShuffle(4)(x)
    assert torch.equal(found, torch.nn.functional.pixel_shuffle(x, 4))
