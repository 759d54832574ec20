"""What a linearised model is trained for, and how it is measured."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..convert.warm_start import hidden_state_distillation_loss
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
    """Return the distance of the student's hidden states and, for sentence encoders, embeddings to the source's.

    Args:
        pair: source and student.
        batch: inputs of both models.
        pooling: how the sentence encoder pools, see `embeddings`; None if the source is none.
    """
    with torch.no_grad():
        target = states(pair.teacher, batch)
    hidden = states(pair.student, batch)
    mask = batch["attention_mask"]
    loss = hidden_state_distillation_loss(hidden[1:], target[1:], mask).mean()
    if pooling is None:
        return loss
    return loss + embedding_loss(embeddings(hidden[-1], mask, pooling), embeddings(target[-1], mask, pooling))


def states(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    """Return the hidden states of an encoder: embeddings, then the output of each layer."""
    return model.base_model(**batch, output_hidden_states=True).hidden_states


@torch.no_grad()
def measure(pair: Pair, batches: Iterable[Batch], pooling: str | None) -> dict[str, object]:
    """Compare source and student on texts.

    Returns:
        "layers": relative squared error of the attention of each linear layer on the source's inputs; "hidden": that
        of all hidden states, end to end; "cosine": mean cosine of the last hidden states of real tokens; and for
        sentence encoders "embedding_cosine" and "spearman": the mean cosine of the embeddings, and the rank correlation
        of source and student in the cosines of all pairs of texts.
    """
    layers, hidden, cosine, texts, ours, theirs = [], 0.0, 0.0, 0, [], []
    for batch in batches:
        with LayerErrors(pair) as comparison:
            target = states(pair.teacher, batch)
        layers.append([comparison.errors[i] for i in pair.layers])
        outputs, mask = states(pair.student, batch), batch["attention_mask"]
        hidden += hidden_state_distillation_loss(outputs[1:], target[1:], mask).sum().item()
        alike = F.cosine_similarity(outputs[-1], target[-1], dim=-1)
        cosine += ((alike * mask).sum(1) / mask.sum(1)).sum().item()
        texts += len(mask)
        if pooling is not None:
            ours.append(embeddings(outputs[-1], mask, pooling))
            theirs.append(embeddings(target[-1], mask, pooling))
    errors = torch.tensor(layers).mean(0).tolist()
    found = {"layers": dict(zip(map(str, pair.layers), errors, strict=True))}
    found |= {"hidden": hidden / texts, "cosine": cosine / texts}
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
