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
from ..ops.checks import makes_graph, values_can_be_read
from ..ops.packing import first_tokens, packed_bounds, packed_positions, sequence_means
from .configuration_lion import LionConfig
from .lion_inputs import (
    are_counted,
    bool_key_mask,
    check_answers,
    check_positions,
    flat_choices,
    real_positions,
    real_scores,
    skipped_positions,
    table_size,
)
from .lion_layers import (
    LionLayer,
    LionPreTrainedMixin,
    encoder_norm,
    final_norm,
    mixing_options,
    sequence_classification_loss,
)


logger = logging.get_logger(__name__)


class LionEmbeddings(nn.Module):
    """Sum of word, token-type and (with `config.pos_emb`) position embeddings, then a norm and dropout."""

    def __init__(self, config: LionConfig):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        types = config.type_vocab_size
        self.token_type_embeddings = nn.Embedding(types, config.hidden_size) if types else None
        self.position_embeddings = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if config.pos_emb else None
        )
        self.norm = encoder_norm(config) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        embeddings = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.token_type_embeddings is not None:
            if token_type_ids is None:  # one row, broadcast; offloading requires that tables are called, not indexed
                token_type_ids = torch.zeros(1, 1, dtype=torch.long, device=embeddings.device)
            embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        if self.position_embeddings is not None:
            if position_ids is None and self.config.roberta_positions and input_ids is not None:
                position_ids = real_positions(input_ids, self.config.pad_token_id)
            embeddings = embeddings + self._positions(position_ids, embeddings)
        elif position_ids is not None and not torch.compiler.is_compiling() and not are_counted(position_ids):
            logger.warning_once(
                "position_ids are ignored: this model has no position table (pos_emb=False) and derives positions from "
                "its decay."
            )
        return self.dropout(embeddings if self.norm is None else self.norm(embeddings))

    def _positions(self, position_ids: Tensor | None, embeddings: Tensor) -> Tensor:
        length, skipped = embeddings.shape[1], skipped_positions(self.config)
        positions = self.config.max_position_embeddings - skipped
        if position_ids is None:
            if length > positions:
                raise ValueError(
                    f"The input has {length} tokens, but this model has a table of {table_size(self.config)} "
                    "positions. Truncate the input, or use a LION-D or LION-S model, which accept any length."
                )
            position_ids = torch.arange(length, device=embeddings.device)
        elif values_can_be_read(position_ids) and position_ids.numel() and int(position_ids.max()) >= positions:
            raise ValueError(
                f"position_ids reach {int(position_ids.max())}, but this model has a table of "
                f"{table_size(self.config)} positions, counted from 0."
            )
        return self.position_embeddings(position_ids + skipped if skipped else position_ids)


class LionTransform(nn.Module):
    """tanh(W x + b), or another `config.pooler_act`, followed by a LayerNorm with `config.pooler_norm`."""

    def __init__(self, config: LionConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.pooler_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.pooler_norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.act_fn(self.dense(x))
        return x if self.norm is None else self.norm(x)


def _token_transform(config: LionConfig) -> LionTransform | None:
    return LionTransform(config) if config.token_transform else None


class LionPooler(LionTransform):
    """`LionTransform` of the first real token, or of the mean of the real tokens: (batch, hidden).

    A packed row gives one vector for each sequence: (sequences, hidden). Without a real token, the very first counts.
    """

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
                "A sequence of this packed row is empty and has no first token to pool. Remove empty sequences, or "
                "build the model with add_pooling_layer=False."
            )
        return super().forward(pool(hidden_states, key_mask, cu_seqlens))

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
        real = key_mask | (positions == key_mask.int().argmax(1, keepdim=True))  # the very first if none is real
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        sums = hidden_states.masked_fill(~real.unsqueeze(2), 0).sum(1, dtype=dtype)
        return (sums / real.sum(1, keepdim=True)).to(hidden_states.dtype)


class LionMLMHead(nn.Module):
    """LayerNorm(gelu(W x + b)), then the decoder, whose weight is tied to the word embeddings."""

    def __init__(self, config: LionConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.norm(self.act_fn(self.dense(hidden_states))))


@auto_docstring(custom_intro="Base class of the LION text encoder and its heads.")
class LionPreTrainedModel(LionPreTrainedMixin, PreTrainedModel):
    config: LionConfig
    base_model_prefix = "lion"
    _no_split_modules = ["LionEmbeddings", "LionLayer"]
    _can_record_outputs = {"hidden_states": LionLayer, "attentions": TokenMixer}


@auto_docstring(custom_intro="The LION text encoder without a head: hidden states and a pooled vector for each text.")
class LionModel(LionPreTrainedModel):
    def __init__(self, config: LionConfig, add_pooling_layer: bool = True):
        r"""
        add_pooling_layer (`bool`, *optional*, defaults to `True`):
            Whether to add a pooler. It reads the token or mean that `config.classifier_pooling` selects.
        """
        super().__init__(config)
        self.embeddings = LionEmbeddings(config)
        self.layers = nn.ModuleList([LionLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = final_norm(config)
        self.pooler = LionPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self):
        """Return the word embeddings, a `torch.nn.Embedding`."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        """Replace the word embeddings."""
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
            True or 1 for real tokens, False or 0 for padding. `(batch_size, 1, 1, sequence_length)` and, for all rows,
            `(1, sequence_length)` are accepted too. A mask over pairs of tokens or an additive mask raises ValueError:
            LION masks keys only.
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Rows of the position table, if the model has one; `(1, sequence_length)` is accepted too. In a batch of one
            row without attention_mask, positions that rise by 1 inside each text and fall between texts mean that the
            row holds several packed texts, as made by `DataCollatorWithFlattening`. Its `cu_seq_lens_q` and `seq_idx`
            mean the same and can be combined with an attention_mask. No text reads another.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` (batch_size, sequence_length, hidden_size) and
            `pooler_output` (batch_size, hidden_size), or (texts, hidden_size) for packed texts. It is None without a
            pooling layer.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds; both or neither were given.")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        batch, length = inputs.shape[:2]
        key_mask = bool_key_mask(attention_mask, batch, length)
        check_positions(position_ids, batch, length)
        output_attentions = bool(kwargs.get("output_attentions", self.config.output_attentions))
        cu_seqlens = packed_bounds(
            batch, length, position_ids, attention_mask, kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
        )
        if cu_seqlens is not None:
            if self.embeddings.position_embeddings is None:
                position_ids = None  # only needed for the bounds of the sequences
            elif position_ids is None:
                position_ids = packed_positions(cu_seqlens).to(inputs.device)
        # Masked tokens that are not padding, such as those that expand a query, keep their outputs.
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


@auto_docstring(custom_intro="LION with a masked language modelling head. Its decoder is tied to the word embeddings.")
class LionForMaskedLM(LionPreTrainedModel):
    stated_loss_type = "ForMaskedLM"
    _tied_weights_keys = {"head.decoder.weight": "lion.embeddings.word_embeddings.weight"}

    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.lion = LionModel(config, add_pooling_layer=False)
        self.head = LionMLMHead(config)
        self.post_init()

    def get_output_embeddings(self):
        """Return the decoder, a `torch.nn.Linear` from hidden_size to vocab_size."""
        return self.head.decoder

    def set_output_embeddings(self, new_embeddings):
        """Replace the decoder."""
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
            Token ids to predict, or -100 for tokens that the loss ignores. The loss is the mean cross entropy over the
            others, in float32. It is NaN if there are none, as in Transformers, unless `num_items_in_batch` is given.

        Returns:
            `MaskedLMOutput`: `logits` (batch_size, sequence_length, vocab_size) and, with labels, `loss` (a scalar).
            With labels and `config.sparse_prediction`, `logits` are (predicted tokens, vocab_size): those of the tokens
            whose label is not `config.sparse_pred_ignore_index`, row by row.
        """
        outputs = self.lion(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        hidden_states = outputs.last_hidden_state
        if self.config.sparse_prediction and labels is not None:
            labels = labels.reshape(hidden_states.shape[:-1])
            predicted = labels != self.config.sparse_pred_ignore_index
            hidden_states, labels = hidden_states[predicted.to(hidden_states.device)], labels[predicted]
        logits = self.head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def _classifier_dropout(config: LionConfig) -> nn.Dropout:
    rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    return nn.Dropout(rate)


@auto_docstring(custom_intro="LION with a linear layer on the pooled text, for classification or regression.")
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
            (binary cross entropy). `config.problem_type` selects the loss. If it is None, `num_labels` and the dtype of
            the first labels do.

        Returns:
            `SequenceClassifierOutput`: `logits` (batch_size, num_labels), or (texts, num_labels) for packed texts, and,
            with labels, `loss` (a scalar).
        """
        outputs = self.lion(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = sequence_classification_loss(self, logits, labels, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@auto_docstring(custom_intro="LION with a linear layer on every token, for example for named entities.")
class LionForTokenClassification(LionPreTrainedModel):
    stated_loss_type = "ForTokenClassification"

    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.lion = LionModel(config, add_pooling_layer=False)
        self.transform = _token_transform(config)
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
            Class of every token, or -100 for tokens that the loss ignores.

        Returns:
            `TokenClassifierOutput`: `logits` (batch_size, sequence_length, num_labels) and, with labels, `loss` (a
            scalar).
        """
        outputs = self.lion(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        hidden_states = (
            outputs.last_hidden_state if self.transform is None else self.transform(outputs.last_hidden_state)
        )
        logits = self.classifier(self.dropout(hidden_states))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@auto_docstring(custom_intro="LION with a linear layer that scores every token as the start and the end of an answer.")
class LionForQuestionAnswering(LionPreTrainedModel):
    stated_loss_type = "ForQuestionAnswering"

    def __init__(self, config: LionConfig):
        super().__init__(config)
        self.lion = LionModel(config, add_pooling_layer=False)
        self.transform = _token_transform(config)
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
        start_positions (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            First token of the answer. Positions beyond the row are ignored; positions on padding raise ValueError
            (checked on a CPU, outside compiled graphs).
        end_positions (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Last token of the answer. The loss is the mean of both cross entropies, over the real tokens of a row.
            Trainer finds the two arguments by the name of the class: for a subclass with another name set
            `TrainingArguments(label_names=["start_positions", "end_positions"])`.

        Returns:
            `QuestionAnsweringModelOutput`: `start_logits` and `end_logits` (batch_size, sequence_length) and, with both
            labels, `loss` (a scalar).
        """
        outputs = self.lion(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        hidden_states = (
            outputs.last_hidden_state if self.transform is None else self.transform(outputs.last_hidden_state)
        )
        start_logits, end_logits = self.qa_outputs(hidden_states).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            key_mask = bool_key_mask(attention_mask, *start_logits.shape)
            for name, positions in (("start_positions", start_positions), ("end_positions", end_positions)):
                check_answers(name, positions, key_mask)
            scores = (real_scores(logits, key_mask) for logits in (start_logits, end_logits))
            loss = self.loss_function(*scores, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@auto_docstring(custom_intro="LION with a linear layer that scores each of several texts, for multiple choice.")
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
        input_ids (`torch.LongTensor` of shape `(batch_size, num_choices, sequence_length)`, *optional*):
            Token ids of every choice.
        attention_mask (`torch.Tensor` of shape `(batch_size, num_choices, sequence_length)`, *optional*):
            True or 1 for real tokens, False or 0 for padding.
        token_type_ids (`torch.LongTensor` of shape `(batch_size, num_choices, sequence_length)`, *optional*):
            Rows of the token-type table. All 0 by default.
        position_ids (`torch.LongTensor` of shape `(batch_size, num_choices, sequence_length)`, *optional*):
            Rows of the position table, if the model has one.
        inputs_embeds (`torch.Tensor` of shape `(batch_size, num_choices, sequence_length, hidden_size)`, *optional*):
            Embeddings in place of input_ids.
        labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Index of the right choice.

        Returns:
            `MultipleChoiceModelOutput`: `logits` (batch_size, num_choices) and, with labels, `loss` (a scalar).
        """
        if input_ids is not None and input_ids.dim() != 3:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; it must be (batch, num_choices, length). Use "
                "unsqueeze(0) for a batch of one question."
            )
        batch, choices = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        flat = [
            flat_choices(x, batch, choices)
            for x in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        ]
        outputs = self.lion(*flat, return_dict=True, **kwargs)
        pooled = outputs.pooler_output
        if not makes_graph() and len(pooled) != batch * choices:
            raise ValueError(
                f"The packed row holds {len(pooled)} texts, but multiple choice compares rows. Give each text its own "
                "row, with an attention_mask for its padding."
            )
        logits = self.classifier(self.dropout(pooled)).view(-1, choices)
        loss = None
        if labels is not None:
            loss = fixed_cross_entropy(logits, labels.to(logits.device), kwargs.get("num_items_in_batch"))
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "LionForMaskedLM",
    "LionForMultipleChoice",
    "LionForQuestionAnswering",
    "LionForSequenceClassification",
    "LionForTokenClassification",
    "LionModel",
    "LionPreTrainedModel",
]
