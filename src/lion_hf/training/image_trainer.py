"""The Trainer of image classifiers: soft targets, a teacher, and averaged weights."""

import torch
from torch.nn import functional as F

from .distillation import Teacher
from .ema import Ema
from .errors import UserError
from .trainer import LionTrainer


class ImageTrainer(LionTrainer):
    """Trainer with soft targets, a teacher, and averaged weights, which are evaluated and saved too.

    Args:
        teacher: see `Teacher`.
        ema: see `Ema`.
        kwargs: as for `LionTrainer`.
    """

    def __init__(self, *args, teacher: Teacher | None = None, ema: Ema | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher, self.ema = teacher, ema
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by num_items_in_batch for every model
        if ema is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise UserError("--ema_decay does not work with FSDP or DeepSpeed, which shard the weights")
            self.add_callback(ema)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Return the cross entropy with the classes or the mixed "soft_labels", plus the teacher's part.

        Images labelled -100 do not count. In training this is the sum over the batch, divided by the number of images
        in an optimizer step.
        """
        labels = inputs["labels"]
        taught = self.hidden_teacher is not None and model.training
        outputs = model(pixel_values=inputs["pixel_values"], output_hidden_states=taught)
        logits = outputs.logits.float()
        if not model.training:
            loss = F.cross_entropy(logits, labels)
            return (loss, outputs) if return_outputs else loss
        targets, smoothing = inputs.get("soft_labels", labels), self.args.label_smoothing_factor
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        if self.teacher is not None:
            with self.accelerator.autocast():
                seen = self.teacher.logits(inputs["pixel_values"])
            losses = self.teacher.losses(losses, logits, seen)
        counted = labels != -100
        images = counted.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = (losses * counted).sum() / images.to(losses.device).clamp(min=1)
        if taught:
            loss = loss + self.hidden_teacher.loss(outputs.hidden_states, inputs, num_items_in_batch)
        loss = self.summed_over_devices(loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.ema is not None and self.ema.average is not None:
            with self.ema.in_place_of(self.model):
                metrics |= super().evaluate(*args, metric_key_prefix=f"{metric_key_prefix}_ema", **kwargs)
        return metrics

    def restore(self, checkpoint: str) -> None:
        super().restore(checkpoint)
        if self.ema is not None:
            self.ema.on_train_begin(self.args, self.state, self.control, self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and its average in the subfolder "ema". Checkpoints get it before their last file."""
        super().save_model(output_dir, _internal_call)
        if self.ema is not None and self.ema.average is not None and self.args.should_save:
            self.ema.save(output_dir or self.args.output_dir, self.processing_class)
