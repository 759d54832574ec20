"""What a linearised model is trained for, and how it is measured."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..convert.warm_start import hidden_state_distillation_loss
from ..models.modeling_lion_vision import LionForImageClassification, LionVisionPreTrainedModel
from .models import Pair


Batch = dict[str, Tensor]


def relative_error(output: Tensor, target: Tensor, real: Tensor | None) -> Tensor:
    """Return the squared distance of two outputs (batch, length, dim), summed over real tokens, over that of the target
    to 0.

    Args:
        output: of the layer that learns.
        target: of the source's layer.
        real: (batch, length), True for real tokens; None if all are.
    """
    dtype = torch.promote_types(output.dtype, torch.float32)
    squares = torch.stack([(output - target).to(dtype).square().sum(-1), target.to(dtype).square().sum(-1)])
    if real is not None:
        squares = squares.masked_fill(~real, 0)
    error, size = squares.sum((1, 2))
    return error / size.clamp(min=torch.finfo(dtype).tiny)


class LayerErrors:
    """Compares the attention of each linear layer with the source's, on the source's inputs.

    One run of the source gives inputs and targets of all layers. Within this context, a run of the teacher calls the
    student's layers; `errors` then holds the relative squared error of each. Outputs are those of the mixers, before
    the residual connection.

    Args:
        pair: source and student.
        backward: whether to compute gradients. They are computed layer by layer during the run of the teacher, so that
            memory is needed for one layer at a time.
    """

    def __init__(self, pair: Pair, backward: bool = False):
        self.pair, self.backward = pair, backward
        self.errors: dict[int, Tensor] = {}

    def __enter__(self) -> "LayerErrors":
        layers = self.pair.teacher.base_model.layers
        self._handles = [
            layers[i].mixer.register_forward_hook(self._hook(i), with_kwargs=True) for i in self.pair.layers
        ]
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: int) -> Callable:
        mixer = self.pair.student.base_model.layers[layer].mixer

        def compare(module: nn.Module, inputs: tuple, options: dict, target: Tensor) -> None:
            options = options | {"output_attentions": False}
            mask = inputs[1] if len(inputs) > 1 else options.get("key_mask")
            target = target[0] if isinstance(target, tuple) else target
            with torch.set_grad_enabled(self.backward):
                mixed = mixer(*(x.detach() if torch.is_tensor(x) else x for x in inputs), **options)
                error = relative_error(mixed, target.detach(), None if mask is None else mask.bool())
                if self.backward:
                    error.backward()
            self.errors[layer] = error.detach()

        return compare


def embeddings(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Return one vector per text, (batch, dim), of length 1: the first token or the mean of the real tokens.

    Args:
        hidden: last hidden states, (batch, length, dim).
        mask: (batch, length), 1 for real tokens.
        pooling: "first" or "mean".
    """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if pooling == "first":
        pooled = hidden[:, 0]
    else:
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    return F.normalize(pooled, dim=-1)


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - cosine, plus the mean squared error of the cosines between the texts of the batch.

    Args:
        student: (batch, dim), of length 1.
        teacher: the source's, of the same shape.
    """
    cosine = (student * teacher).sum(-1)
    between = (student @ student.T - teacher @ teacher.T).square()
    texts = len(student)
    return (1 - cosine).mean() + between.sum() / max(texts * (texts - 1), 1)


def end_loss(pair: Pair, batch: Batch, pooling: str | None) -> Tensor:
    """Return the distance of the student's hidden states to the source's, and for sentence encoders also of its
    embeddings, for image classifiers of its classes.

    Args:
        pair: source and student.
        batch: inputs of both models.
        pooling: how the sentence encoder pools, see `embeddings`; None if the source is none.
    """
    with torch.no_grad():
        target, classes = states_and_logits(pair.teacher, batch)
    hidden, logits = states_and_logits(pair.student, batch)
    mask = batch.get("attention_mask")
    loss = hidden_state_distillation_loss(hidden[1:], target[1:], mask).mean()
    if classes is not None:
        loss = loss + class_loss(logits, classes)
    if pooling is None:
        return loss
    return loss + embedding_loss(embeddings(hidden[-1], mask, pooling), embeddings(target[-1], mask, pooling))


def class_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean Kullback-Leibler divergence of the student's class probabilities from the source's, in nats.

    Args:
        student: logits, (batch, classes).
        teacher: the source's, of the same shape.
    """
    student, teacher = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in (student, teacher))
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def states(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    """Return the hidden states of an encoder: embeddings, then the output of each layer, the last after all norms."""
    return states_and_logits(model, batch)[0]


def states_and_logits(model: PreTrainedModel, batch: Batch) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Return the hidden states of an encoder, and the logits if it is an image classifier with one class per image."""
    config = model.config
    one_class = getattr(config, "problem_type", None) in (None, "single_label_classification") and config.num_labels > 1
    classifies = isinstance(model, LionForImageClassification) and one_class
    outputs = (model if classifies else model.base_model)(**batch, output_hidden_states=True)
    hidden = outputs.hidden_states
    if isinstance(model, LionVisionPreTrainedModel) and model.base_model.norm is not None:
        hidden = (*hidden[:-1], model.base_model.norm(hidden[-1]))
    return hidden, outputs.logits if classifies else None


@torch.no_grad()
def measure(pair: Pair, batches: Iterable[Batch], pooling: str | None) -> dict[str, object]:
    """Compare source and student on texts or images.

    Returns:
        "layers": relative squared error of the attention of each linear layer on the source's inputs; "hidden": that
        of all hidden states, end to end; "cosine": mean cosine of the last hidden states of real tokens; for sentence
        encoders "embedding_cosine" and "spearman": the mean cosine of the embeddings, and the rank correlation of
        source and student in the cosines of all pairs of texts; and for image classifiers "agreement": the share of
        images to which both give the same class.
    """
    layers, hidden, cosine, texts, agreement, ours, theirs = [], 0.0, 0.0, 0, 0, [], []
    for batch in batches:
        with LayerErrors(pair) as comparison:
            target, classes = states_and_logits(pair.teacher, batch)
        layers.append([comparison.errors[i] for i in pair.layers])
        outputs, logits = states_and_logits(pair.student, batch)
        mask = batch.get("attention_mask")
        hidden += hidden_state_distillation_loss(outputs[1:], target[1:], mask).sum().item()
        alike = F.cosine_similarity(outputs[-1], target[-1], dim=-1)
        mask = torch.ones_like(alike) if mask is None else mask
        cosine += ((alike * mask).sum(1) / mask.sum(1)).sum().item()
        texts += len(mask)
        if classes is not None:
            agreement += (logits.argmax(-1) == classes.argmax(-1)).sum().item()
        if pooling is not None:
            ours.append(embeddings(outputs[-1], mask, pooling))
            theirs.append(embeddings(target[-1], mask, pooling))
    errors = torch.tensor(layers).mean(0).tolist()
    found = {"layers": dict(zip(map(str, pair.layers), errors, strict=True))}
    found |= {"hidden": hidden / texts, "cosine": cosine / texts}
    if classes is not None:
        found["agreement"] = agreement / texts
    if pooling is not None:
        ours, theirs = torch.cat(ours), torch.cat(theirs)
        found["embedding_cosine"] = (ours * theirs).sum(-1).mean().item()
        found["spearman"] = spearman(*(pair_cosines(x) for x in (ours, theirs))) if texts > 2 else None
    return found


def pair_cosines(vectors: Tensor) -> Tensor:
    """Return the products of all pairs of different rows, (pairs,)."""
    first, second = torch.triu_indices(len(vectors), len(vectors), 1)
    return (vectors @ vectors.T)[first, second]


def spearman(x: Tensor, y: Tensor) -> float:
    """Return the rank correlation of two vectors, with the mean rank for equal values."""
    ranks = []
    for values in (x, y):
        _, place, count = values.double().unique(return_inverse=True, return_counts=True)
        ends = count.cumsum(0).double()
        rank = (ends - (count - 1) / 2)[place]
        ranks.append(F.normalize(rank - rank.mean(), dim=0))
    return float(ranks[0] @ ranks[1])
