"""LION text encoder and its heads: BERT, post-norm, with attention replaced by LION (arXiv 2502.16249)."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..nn.encoder import run_blocks
from ..nn.mixer import TokenMixer
from ..ops.checks import is_binary, values_can_be_read
from ..ops.packing import first_tokens, packed_bounds, packed_positions, sequence_means
from .configuration_lion import LionConfig
from .lion_layers import LionLayer, LionPreTrainedMixin, mixing_options, sequence_classification_loss


logger = logging.get_logger(__name__)


class LionEmbeddings(nn.Module):
    """Word and token-type embeddings, learned positions if `config.pos_emb`, LayerNorm, dropout."""

    def __init__(self, config: LionConfig):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.position_embeddings = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if config.pos_emb else None
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        embeddings = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:  # one row, broadcast; tables are only ever read by calls, which offloading needs
            token_type_ids = torch.zeros(1, 1, dtype=torch.long, device=embeddings.device)
        embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        if self.position_embeddings is not None:
            embeddings = embeddings + self._positions(position_ids, embeddings)
        elif position_ids is not None and not torch.compiler.is_compiling() and not _are_counted(position_ids):
            logger.warning_once(
                "position_ids are ignored: this LION model has no position table (pos_emb=False), it tells positions "
                "by its decay."
            )
        return self.dropout(self.norm(embeddings))

    def _positions(self, position_ids: Tensor | None, embeddings: Tensor) -> Tensor:
        length, positions = embeddings.shape[1], self.config.max_position_embeddings
        if position_ids is None:
            if length > positions:
                raise ValueError(
                    f"The input has {length} tokens, but this model has a table of max_position_embeddings = "
                    f"{positions} positions. Truncate the input, or use a LION-D or LION-S model, "
                    "which take any length."
                )
            position_ids = torch.arange(length, device=embeddings.device)
        elif values_can_be_read(position_ids) and position_ids.numel() and int(position_ids.max()) >= positions:
            raise ValueError(
                f"position_ids reach {int(position_ids.max())}, but this model has a table of "
                f"max_position_embeddings = {positions} positions, counted from 0."
            )
        return self.position_embeddings(position_ids)


class LionPooler(nn.Module):
    """tanh(W x + b) of the first real token (token 0 unless the input is padded on the left), or of the mean of all
    real tokens, (batch, hidden).

    Of a packed row, that of every sequence, (sequences, hidden). Where no token is real, the first of all."""

    def __init__(self, config: LionConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        pooling: str = "first",
    ) -> Tensor:
        pool = {"first": self._first, "mean": self._mean}[pooling]
        if cu_seqlens is not None and int(cu_seqlens.diff().min()) == 0:
            raise ValueError(
                "A sequence of this packed row is empty and has no first token to pool. Leave empty sequences out, "
                "or build the model with add_pooling_layer=False."
            )
        return torch.tanh(self.dense(pool(hidden_states, key_mask, cu_seqlens)))

    @staticmethod
    def _first(hidden_states: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is not None:
            return hidden_states[0, first_tokens(cu_seqlens, key_mask).to(hidden_states.device)]
        if key_mask is None:
            return hidden_states[:, 0]
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        return hidden_states[rows, key_mask.int().argmax(1)]

    @staticmethod
    def _mean(hidden_states: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is not None:
            return sequence_means(hidden_states, cu_seqlens, key_mask)
        if key_mask is None:
            return hidden_states.mean(1)
        positions = torch.arange(key_mask.shape[1], device=key_mask.device)
        real = key_mask | (positions == key_mask.int().argmax(1, keepdim=True))  # the first of all where none is
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        sums = hidden_states.masked_fill(~real.unsqueeze(2), 0).sum(1, dtype=dtype)
        return (sums / real.sum(1, keepdim=True)).to(hidden_states.dtype)


class LionMLMHead(nn.Module):
    """LN(gelu(W x + b)), then the decoder, whose weight is tied to the word embeddings."""

    def __init__(self, config: LionConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.norm(self.act_fn(self.dense(hidden_states))))


@auto_docstring
class LionPreTrainedModel(LionPreTrainedMixin, PreTrainedModel):
    config: LionConfig
    base_model_prefix = "lion"
    _no_split_modules = ["LionEmbeddings", "LionLayer"]
    _can_record_outputs = {"hidden_states": LionLayer, "attentions": TokenMixer}


@auto_docstring(custom_intro="The bare LION text encoder, hidden states and a pooled text.")
class LionModel(LionPreTrainedModel):
    def __init__(self, config: LionConfig, add_pooling_layer: bool = True):
        r"""
        add_pooling_layer (`bool`, *optional*, defaults to `True`):
            Whether to add a tanh pooler on what `config.classifier_pooling` says.
        """
        super().__init__(config)
        self.embeddings = LionEmbeddings(config)
        self.layers = nn.ModuleList([LionLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = self.layers[-1].final_norm()
        self.pooler = LionPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | BaseModelOutputWithPooling:
        r"""
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            True or 1 for real tokens, False or 0 for padding. `(batch_size, 1, 1, sequence_length)` is accepted too,
            and one row for all, `(1, sequence_length)`.
            A mask over pairs of tokens or an additive mask raises ValueError: LION masks keys only.
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Rows of the position table, where the model has one; `(1, sequence_length)` is accepted too. In a batch of
            one row without attention_mask, positions that rise by 1 inside each text and fall to the next tell that
            the row holds several texts, as `DataCollatorWithFlattening` packs them, whatever number they start with;
            so do its `cu_seq_lens_q` and `seq_idx`, which take an attention_mask as well. No text reads another, and
            the pooler returns one vector for each.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds; both or neither were given.")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        batch, length = inputs.shape[:2]
        key_mask = _key_mask(attention_mask, batch, length)
        _check_positions(position_ids, batch, length)
        output_attentions = bool(kwargs.get("output_attentions", self.config.output_attentions))
        cu_seqlens = packed_bounds(
            batch, length, position_ids, attention_mask, kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
        )
        if cu_seqlens is not None:
            if self.embeddings.position_embeddings is None:
                position_ids = None  # they have told where the sequences begin
            elif position_ids is None:
                position_ids = packed_positions(cu_seqlens).to(inputs.device)
        # A masked token may be read all the same, such as those that expand a query; one of padding is not.
        pad = self.config.pad_token_id
        padding = None if input_ids is None or pad is None else input_ids == pad
        hidden_states = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        hidden_states = run_blocks(
            self.layers,
            hidden_states,
            key_mask,
            cu_seqlens=cu_seqlens,
            padding=padding,
            unpadding=False if padding is None and self.config.unpad is None else self.config.unpad,
            keep_shape=bool(kwargs.get("output_hidden_states", self.config.output_hidden_states)),
            training=self.training,
            output_attentions=output_attentions,
            **mixing_options(self.config),
        )
        hidden_states = hidden_states if self.norm is None else self.norm(hidden_states)
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(hidden_states, key_mask, cu_seqlens, self.config.classifier_pooling)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


def _are_counted(position_ids: Tensor) -> bool:
    """Whether positions are known to rise by 1 from token to token, as they do where nobody gives any."""
    return values_can_be_read(position_ids) and bool((position_ids.diff() == 1).all())


def _check_positions(position_ids: Tensor | None, batch: int, length: int) -> None:
    """Raises ValueError unless every token has one position, be it shared by all rows."""
    if position_ids is None:
        return
    if position_ids.shape[-1:] != (length,) or position_ids.shape[:-1] not in ((), (1,), (batch,)):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; it must be (batch, length) = ({batch}, {length}) as "
            f"the tokens, or (1, {length}) for all rows. "
            "Give every token one position, or leave position_ids out to count them."
        )


def _key_mask(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Boolean (batch, length), or None where nothing is masked. Raises ValueError for any other kind of mask."""
    if attention_mask is None:
        return None
    mask = attention_mask
    if mask.dim() == 4 and mask.shape[1:3] == (1, 1):
        mask = mask[:, 0, 0]
    if mask.dim() != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != length:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; LION masks keys only, so it must be "
            f"(batch, length) = ({batch}, {length}) or (batch, 1, 1, length), with 1 for real tokens and 0 for "
            "padding, or have one row for all."
        )
    if values_can_be_read(mask):
        if not is_binary(mask):
            raise ValueError(
                "attention_mask holds values other than 0 and 1; LION takes 1 for real tokens and 0 for padding, not "
                "an additive mask. Pass the tokenizer's attention_mask as it is."
            )
        if bool(mask.all()):
            return None
    mask = mask.to(torch.bool)
    return mask if mask.shape[0] == batch else mask.expand(batch, length)


@auto_docstring(custom_intro="LION with a masked language modelling head, whose decoder is tied to the embeddings.")
class LionForMaskedLM(LionPreTrainedModel):
    stated_loss_type = "ForMaskedLM"
    _tied_weights_keys = {"head.decoder.weight": "lion.embeddings.word_embeddings.weight"}

    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.lion = LionModel(config, add_pooling_layer=False)
        self.head = LionMLMHead(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.head.decoder

    def set_output_embeddings(self, new_embeddings):
        self.head.decoder = new_embeddings

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | MaskedLMOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Token ids to predict, -100 where nothing is predicted. The loss is their mean cross entropy, in float32.
        """
        outputs = self.lion(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def _classifier_dropout(config: LionConfig) -> nn.Dropout:
    rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    return nn.Dropout(rate)


@auto_docstring(custom_intro="LION with a linear layer on the pooled text: classification or regression.")
class LionForSequenceClassification(LionPreTrainedModel):
    stated_loss_type = "ForSequenceClassification"

    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.lion = LionModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | SequenceClassifierOutput:
        r"""
        labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
            Class indices (cross entropy), one float each (mean squared error, `num_labels` 1) or 0/1 floats per label
            (binary cross entropy). `config.problem_type` decides, or the shape and dtype of the first labels.
        """
        outputs = self.lion(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = sequence_classification_loss(self, logits, labels, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@auto_docstring(custom_intro="LION with a linear layer on every token, for named entities and the like.")
class LionForTokenClassification(LionPreTrainedModel):
    stated_loss_type = "ForTokenClassification"

    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.lion = LionModel(config, add_pooling_layer=False)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | TokenClassifierOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Class of every token, -100 where none counts.
        """
        outputs = self.lion(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@auto_docstring(custom_intro="LION with a linear layer that scores every token as start and end of an answer span.")
class LionForQuestionAnswering(LionPreTrainedModel):
    stated_loss_type = "ForQuestionAnswering"

    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.lion = LionModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | QuestionAnsweringModelOutput:
        r"""
        start_positions, end_positions (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            First and last token of the answer. The loss is the mean of both cross entropies, each over the real tokens
            of a row, so that its padding counts for nothing. One beyond the row is left out; one on padding raises
            ValueError (on the CPU, outside compiled graphs: an accelerator would have to be waited for).
            Trainer looks for these two by the name of the class: for a subclass of another name say
            `TrainingArguments(label_names=["start_positions", "end_positions"])`.
        """
        outputs = self.lion(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            key_mask = _key_mask(attention_mask, *start_logits.shape)
            for name, positions in (("start_positions", start_positions), ("end_positions", end_positions)):
                _check_answers(name, positions, key_mask)
            scores = (_real_scores(logits, key_mask) for logits in (start_logits, end_logits))
            loss = self.loss_function(*scores, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _check_answers(name: str, positions: Tensor, key_mask: Tensor | None) -> None:
    """Raises ValueError for a label that stands on padding, which no score could ever choose."""
    if key_mask is None or not values_can_be_read(positions):
        return
    positions = positions.flatten().clamp(min=0)  # as the loss does
    outside = positions >= key_mask.shape[1]
    masked = ~outside & ~key_mask.gather(1, positions.masked_fill(outside, 0)[:, None])[:, 0]
    if bool(masked.any()):
        row = int(masked.nonzero()[0])
        raise ValueError(
            f"{name}[{row}] is {int(positions[row])}, where attention_mask is 0; an answer must stand on real tokens. "
            "For no answer give the first real token, or a position beyond the row to leave the row out of the loss."
        )


def _real_scores(logits: Tensor, key_mask: Tensor | None) -> Tensor:
    """Logits (batch, length) whose softmax is 0 where `key_mask` is False."""
    return logits if key_mask is None else logits.masked_fill(~key_mask, torch.finfo(logits.dtype).min)


@auto_docstring(custom_intro="LION that scores each of several texts, for multiple choice.")
class LionForMultipleChoice(LionPreTrainedModel):
    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.lion = LionModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | MultipleChoiceModelOutput:
        r"""
        input_ids, attention_mask, token_type_ids, position_ids (`torch.Tensor`):
            As in the other heads, with a dimension more for the choices: `(batch_size, num_choices, sequence_length)`.
        inputs_embeds (`torch.Tensor` of shape `(batch_size, num_choices, sequence_length, hidden_size)`, *optional*):
            Embeddings in place of input_ids.
        labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Index of the right choice.
        """
        if input_ids is not None and input_ids.dim() != 3:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; multiple choice takes (batch, num_choices, length). "
                "Use unsqueeze(0) for a batch of one question."
            )
        batch, choices = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        flat = [
            _flat_choices(x, batch, choices)
            for x in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        ]
        outputs = self.lion(*flat, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(-1, choices)
        loss = None
        if labels is not None:
            loss = fixed_cross_entropy(logits, labels.to(logits.device), kwargs.get("num_items_in_batch"))
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def _flat_choices(x: Tensor | None, batch: int, choices: int) -> Tensor | None:
    """(batch, choices, ...), or with 1 in place of either, as rows of one batch. As they are: (1, length), and masks of
    such rows, (rows, 1, 1, length)."""
    if x is None or x.dim() < 3:
        return x
    if x.shape[:2] != (batch, choices):
        if x.dim() == 4:
            return x
        sizes = (n if size == 1 else size for n, size in zip((batch, choices), x.shape, strict=False))
        x = x.expand(*sizes, *x.shape[2:])
    return x.flatten(0, 1)


__all__ = [
    "LionForMaskedLM",
    "LionForMultipleChoice",
    "LionForQuestionAnswering",
    "LionForSequenceClassification",
    "LionForTokenClassification",
    "LionModel",
    "LionPreTrainedModel",
]
