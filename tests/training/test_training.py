import pytest
import torch
from small_models import FORMS, VARIANTS, spread_decays, text_config, text_inputs, vision_config
from transformers import Trainer, TrainingArguments

import lion_hf


pytest.importorskip("accelerate")
ROWS, LENGTH = 16, 9


def text_rows(make_label):
    ids = torch.randint(1, 61, (ROWS, LENGTH))
    mask = torch.ones(ROWS, LENGTH).long()
    mask[::3, 6:] = 0
    ids = ids * mask
    return [
        {"input_ids": x, "attention_mask": m, **make_label(i, x)}
        for i, (x, m) in enumerate(zip(ids, mask, strict=True))
    ]


def masked_lm():
    def label(i, ids):
        labels = torch.full((LENGTH,), -100)
        count = [1, 6, 2, 5, 1, 1, 4, 3][i % 8]  # very different from batch to batch
        labels[:count] = ids[:count].clamp(min=1)
        return {"labels": labels}

    return lion_hf.LionForMaskedLM(text_config("selective")), text_rows(label)


def token_classification():
    def label(i, ids):
        labels = torch.arange(LENGTH) % 3
        labels[: [0, 7, 2, 8, 5, 1, 0, 6][i % 8]] = -100
        return {"labels": labels}

    return lion_hf.LionForTokenClassification(text_config("decay", num_labels=3)), text_rows(label)


def single_label():
    rows = text_rows(lambda i, _: {"labels": torch.tensor(i % 4)})
    return lion_hf.LionForSequenceClassification(text_config("lit", num_labels=4)), rows


def regression():
    targets = torch.randn(ROWS)
    rows = text_rows(lambda i, _: {"labels": targets[i]})
    return lion_hf.LionForSequenceClassification(text_config("selective", num_labels=1)), rows


def multi_label():
    targets = torch.randint(0, 2, (ROWS, 3)).float()
    rows = text_rows(lambda i, _: {"labels": targets[i]})
    return lion_hf.LionForSequenceClassification(text_config("decay", num_labels=3)), rows


def question_answering():
    rows = text_rows(lambda i, _: {"start_positions": torch.tensor(i % 4), "end_positions": torch.tensor(i % 4 + 1)})
    return lion_hf.LionForQuestionAnswering(text_config("selective")), rows


def multiple_choice():
    rows = text_rows(lambda i, _: {"labels": torch.tensor(i % 2)})
    for row in rows:
        for name in ("input_ids", "attention_mask"):
            row[name] = torch.stack([row[name], row[name].roll(1)])
    return lion_hf.LionForMultipleChoice(text_config("decay")), rows


def images(problem="single"):
    def make():
        pixels = torch.randn(ROWS, 3, 16, 16)
        labels = torch.arange(ROWS) % 5 if problem == "single" else torch.randint(0, 2, (ROWS, 5)).float()
        rows = [{"pixel_values": p, "labels": y} for p, y in zip(pixels, labels, strict=True)]
        return lion_hf.LionForImageClassification(vision_config("selective", order="s")), rows

    return make


TASKS = {
    "masked-lm": masked_lm,
    "token-classification": token_classification,
    "single-label": single_label,
    "regression": regression,
    "multi-label": multi_label,
    "question-answering": question_answering,
    "multiple-choice": multiple_choice,
    "images": images(),
    "images-multi-label": images("multi"),
}


def train(folder, make, batch_size, accumulation, optimizer):
    """Two optimizer steps; the losses that the Trainer reports and the weights after them."""
    torch.manual_seed(0)
    model, rows = make()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        learning_rate=0.05 if optimizer == "sgd" else 1e-3,
        lr_scheduler_type="constant",
        optim=optimizer,
        adam_epsilon=1e-3,  # where a gradient is rounding only (the bias before a softmax), so is the step
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=True,
        train_sampling_strategy="sequential",
    )
    trainer = Trainer(spread_decays(model), arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
def test_gradient_accumulation_changes_neither_loss_nor_weights(tmp_path, task, optimizer):
    whole_losses, whole = train(tmp_path, TASKS[task], 8, 1, optimizer)
    split_losses, split = train(tmp_path, TASKS[task], 4, 2, optimizer)
    assert len(whole_losses) == 2 and whole_losses[0] > 0
    assert split_losses == pytest.approx(whole_losses, rel=1e-6, abs=1e-6)
    for name, p in whole.items():
        assert (split[name] - p).abs().max() <= 1e-6, name


def test_the_first_reported_loss_is_the_loss_of_the_model(tmp_path):
    for task in ("masked-lm", "regression", "images-multi-label"):
        torch.manual_seed(0)
        model, rows = TASKS[task]()
        batch = {name: torch.stack([row[name] for row in rows[:8]]) for name in rows[0]}
        expected = spread_decays(model).train()(**batch).loss.item()
        for accumulation in (1, 2):
            losses, _ = train(tmp_path, TASKS[task], 8 // accumulation, accumulation, "sgd")
            assert losses[0] == pytest.approx(expected, rel=1e-5), task


@pytest.mark.parametrize("task", ["masked-lm", "regression", "images"])
def test_evaluation_reports_the_loss_of_the_model(tmp_path, task):
    model, rows = TASKS[task]()
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=ROWS, report_to="none", use_cpu=True, disable_tqdm=True
    )
    reported = Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    assert reported == pytest.approx(model.eval()(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_type", VARIANTS)
def test_a_tiny_text_model_overfits_one_batch(mask_type, form):
    model = lion_hf.LionForMaskedLM(text_config(mask_type, format=form)).train()
    inputs = text_inputs(4, 10)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    hidden = inputs["input_ids"].masked_fill(torch.rand(4, 10) < 0.3, 60)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = model(hidden, inputs["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize("order", ["normal", "s"])
@pytest.mark.parametrize("mask_type", VARIANTS)
def test_a_tiny_image_model_overfits_one_batch(mask_type, order):
    model = lion_hf.LionForImageClassification(vision_config(mask_type, order=order)).train()
    pixels, labels = torch.randn(8, 3, 16, 16), torch.randint(0, 5, (8,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize(
    "mask_type, order", [("decay", "normal"), ("decay", "s"), ("selective", "normal"), ("selective", "s")]
)
def test_decays_are_trained(mask_type, order):
    model = lion_hf.LionForImageClassification(vision_config(mask_type, order=order)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "decay_" in name}
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    model(torch.randn(8, 3, 16, 16), labels=torch.randint(0, 5, (8,))).loss.backward()
    optimizer.step()
    assert before and all((model.get_parameter(name) - p).abs().max() > 0 for name, p in before.items())


@pytest.mark.parametrize("mask_type", VARIANTS)
def test_a_model_that_the_trainer_saved_goes_on_where_it_stopped(tmp_path, mask_type):
    model, rows = TASKS["masked-lm"]()
    model = lion_hf.LionForMaskedLM(text_config(mask_type))

    def trainer_of(steps):
        arguments = TrainingArguments(
            str(tmp_path / str(steps)),
            per_device_train_batch_size=8,
            max_steps=steps,
            save_steps=2,
            lr_scheduler_type="constant",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        torch.manual_seed(0)
        return Trainer(lion_hf.LionForMaskedLM(model.config), arguments, train_dataset=rows)

    whole = trainer_of(4)
    whole.train()
    resumed = trainer_of(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "4" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for (name, a), b in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("task", ["single-label", "regression", "multi-label", "images-multi-label"])
def test_parts_of_a_batch_add_up_to_its_loss_even_where_one_is_empty(task):
    """A process that has no row left in the last batch of an epoch computes the loss of no rows."""
    model, rows = TASKS[task]()
    batch = {name: torch.stack([row[name] for row in rows[:8]]) for name in rows[0]}
    model.eval()
    whole = model(**batch).loss
    items = torch.tensor(batch["labels"].numel())
    parts = [{name: x[cut] for name, x in batch.items()} for cut in (slice(0, 5), slice(5, 8), slice(8, 8))]
    losses = [model(**part, num_items_in_batch=items).loss for part in parts]
    torch.testing.assert_close(sum(losses), whole)
    assert losses[2] == 0
    losses[2].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("mask_type", ["decay", "selective"])
def test_a_thousand_bf16_steps_from_saturated_gates_stay_finite(mask_type):
    """Length 2048, gates that keep everything or nothing: no NaN, and the model still learns."""
    model = lion_hf.LionForMaskedLM(text_config(mask_type, hidden_size=32, num_attention_heads=4, format="chunk"))
    saturated = torch.tensor([100.0, -100.0, 100.0, -100.0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "decay_logit" in name or "decay_proj.bias" in name:
                parameter.copy_(saturated)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    period = torch.randint(5, model.config.vocab_size, (7,))
    ids = period.repeat(2048 // 7 + 1)[None, :2048]
    losses = []
    for step in range(1000):
        shifted = ids.roll(step, 1)
        hidden = torch.rand(ids.shape) < 0.15
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=shifted.masked_fill(hidden, 4), labels=shifted.masked_fill(~hidden, -100)).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None), step
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(p.isfinite().all() for p in model.parameters()) and torch.tensor(losses).isfinite().all()
    assert sum(losses[-50:]) < 0.8 * sum(losses[:50])
