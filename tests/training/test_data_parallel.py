"""Training with DataParallel, which splits each batch over the devices of one process."""

import pytest
import torch
from small_models import text_config
from torch import nn

import lion_hf


class Split(nn.Module):
    """DataParallel with two devices, which here are both the CPU."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        halves = ({k: v.chunk(2)[i] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()} for i in (0, 1))
        return joined([self.module(**half) for half in halves])


def joined(parts):
    """Join outputs along their first dimension; a scalar of each device becomes one entry of a vector."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat([x[None] if x.dim() == 0 else x for x in parts])
    if isinstance(parts[0], tuple):
        return tuple(joined(part) for part in zip(*parts, strict=True))
    return type(parts[0])(**{name: joined([part[name] for part in parts]) for name in parts[0]})


def step(folder, model, batch, devices, hidden_teacher, **options):
    """Return the loss that is logged, and the gradients, of one batch of an optimizer step of two."""
    from lion_hf.training.arguments import LionTrainingArguments
    from lion_hf.training.trainer import LionTrainer

    options = {"use_cpu": True, "eval_strategy": "no", "gradient_accumulation_steps": 2} | options
    arguments = LionTrainingArguments(output_dir=str(folder), **options)
    arguments._n_gpu = devices
    trainer = LionTrainer(model=model, args=arguments, hidden_teacher=hidden_teacher)
    trainer.current_gradient_accumulation_steps = 2
    items = trainer._get_num_items_in_batch([batch, batch], torch.device("cpu"))
    model.zero_grad()
    loss = trainer.training_step(Split(model) if devices == 2 else model, dict(batch), items)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("taught", [False, True])
def test_the_loss_and_its_gradients_are_those_of_one_device(tmp_path, sparse, averaged, smoothing, taught):
    from transformers import BertConfig, BertModel

    from lion_hf.training.hidden_teacher import HiddenStateTeacher

    options = {"sparse_prediction": sparse, "hidden_dropout_prob": 0.0}
    model = lion_hf.LionForMaskedLM(text_config("decay", **options))
    sizes = {name: getattr(model.config, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    heads = {"num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(**sizes, **heads)).save_pretrained(tmp_path / "bert")
    teacher = HiddenStateTeacher(str(tmp_path / "bert"), 2.0, torch.device("cpu")) if taught else None
    ids = torch.randint(5, 30, (4, 9))
    # 20 labels, unevenly on the two devices; an even number, since Trainer divides it without a rest
    labels = ids.masked_fill(torch.arange(36).view(4, 9) % 9 >= torch.tensor([[9], [8], [1], [2]]), -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    options = {"average_tokens_across_devices": averaged, "label_smoothing_factor": smoothing}
    (loss, gradients), (expected, exact) = (step(tmp_path, model, batch, n, teacher, **options) for n in (2, 1))
    torch.testing.assert_close(loss, expected)
    assert gradients.keys() == exact.keys()
    for name, gradient in exact.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)
