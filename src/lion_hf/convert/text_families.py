"""Text encoders whose weights LION takes."""

from typing import Any

from transformers import PreTrainedConfig

from ..models.modeling_lion import (
    LionForMaskedLM,
    LionForMultipleChoice,
    LionForQuestionAnswering,
    LionForSequenceClassification,
    LionForTokenClassification,
    LionModel,
)
from .families import Family, Names, require_encoder, taken
from .names import TEXT_NAMES


_HEADS = {
    "Model": LionModel,
    "ForMaskedLM": LionForMaskedLM,
    "ForPreTraining": LionForMaskedLM,
    "ForSequenceClassification": LionForSequenceClassification,
    "ForTokenClassification": LionForTokenClassification,
    "ForQuestionAnswering": LionForQuestionAnswering,
    "ForMultipleChoice": LionForMultipleChoice,
}


def _classes(prefix: str, without: tuple[str, ...] = ("ForPreTraining",)) -> dict[str, type]:
    return {f"{prefix}{head}": kind for head, kind in _HEADS.items() if head not in without}


# ------------------------------------------------------------------------------------------------------------- BERT

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")
_OF_TEXT = ("vocab_size", "max_position_embeddings", "tie_word_embeddings")
_SHARED = (
    "hidden_act", "initializer_range", "id2label", "label2id", "problem_type", "pad_token_id", "bos_token_id",
    "eos_token_id",
)  # fmt: skip
_BERT_NAMES = {old.removeprefix("bert."): new for old, new in TEXT_NAMES.items() if old.startswith("bert.")}
_BERT_NAMES["embeddings.position_ids"] = None
_BERT_HEAD = {
    "cls.predictions.transform.dense.": "head.dense.",
    "cls.predictions.transform.LayerNorm.": "head.norm.",
    "cls.predictions.bias": "head.decoder.bias",  # the model adds the decoder's, which comes after it
    "cls.predictions.decoder.": "head.decoder.",
    "cls.seq_relationship.": None,
}
_CLASSIFIER = {"classifier.": "classifier."}
_PLAIN_HEADS = {
    LionForSequenceClassification: _CLASSIFIER,
    LionForTokenClassification: _CLASSIFIER,
    LionForMultipleChoice: _CLASSIFIER,
    LionForQuestionAnswering: {"qa_outputs.": "qa_outputs."},
}


def _bert_options(config: PreTrainedConfig) -> dict[str, Any]:
    require_encoder(config)
    return taken(config, *_SIZES, *_OF_TEXT, "type_vocab_size")


def _bert_shared(config: PreTrainedConfig) -> dict[str, Any]:
    return taken(config, *_SHARED, "hidden_dropout_prob", "classifier_dropout")


BERT = Family(
    label="BERT",
    kind="text",
    classes=_classes("Bert", without=()),
    options=_bert_options,
    shared=_bert_shared,
    names=_BERT_NAMES,
    heads={LionForMaskedLM: _BERT_HEAD, **_PLAIN_HEADS},
)


def _ernie_options(config: PreTrainedConfig) -> dict[str, Any]:
    if config.use_task_id:
        raise ValueError("the source has use_task_id=True: LION has no table of task types. Choose an ERNIE without.")
    return _bert_options(config)


ERNIE = Family(
    label="ERNIE",
    kind="text",
    classes=_classes("Ernie", without=()),
    options=_ernie_options,
    shared=_bert_shared,
    names=_BERT_NAMES,
    heads=BERT.heads,
)

# ---------------------------------------------------------------------------------------------------------- RoBERTa

_ROBERTA_HEAD = {
    "lm_head.dense.": "head.dense.",
    "lm_head.layer_norm.": "head.norm.",
    "lm_head.bias": "head.decoder.bias",
    "lm_head.decoder.": "head.decoder.",
}
_DENSE_CLASSIFIER = {"classifier.dense.": "lion.pooler.dense.", "classifier.out_proj.": "classifier."}
_ROBERTA_HEADS = {
    **_PLAIN_HEADS,
    LionForMaskedLM: _ROBERTA_HEAD,
    LionForSequenceClassification: _DENSE_CLASSIFIER,
}


def _roberta_options(config: PreTrainedConfig) -> dict[str, Any]:
    return _bert_options(config) | {"roberta_positions": True} | taken(config, "pad_token_id")


def _roberta_shared(config: PreTrainedConfig) -> dict[str, Any]:
    shared = _bert_shared(config)
    del shared["pad_token_id"]
    return shared


def _require_gelu(config: PreTrainedConfig, model_class: type) -> None:
    if model_class is LionForMaskedLM and config.hidden_act != "gelu":
        raise ValueError(
            f"the source has hidden_act={config.hidden_act!r}, but its masked language modelling head always uses "
            "gelu, and LION's uses hidden_act. Give model_class=LionModel for the encoder alone."
        )


def _roberta(label: str, prefix: str, **changes: Any) -> Family:
    parts = {
        "options": _roberta_options,
        "shared": _roberta_shared,
        "names": _BERT_NAMES,
        "heads": _ROBERTA_HEADS,
        "require_head": _require_gelu,
    }
    return Family(label=label, kind="text", classes=_classes(prefix), **(parts | changes))


def _prelayernorm_options(config: PreTrainedConfig) -> dict[str, Any]:
    return _roberta_options(config) | {"norm_position": "pre"}


_PRELAYERNORM_NAMES = {
    "encoder.layer.{}.attention.LayerNorm.": "lion.layers.{}.mixer_norm.",
    "encoder.layer.{}.intermediate.LayerNorm.": "lion.layers.{}.mlp_norm.",
    "LayerNorm.": "lion.norm.",
    **_BERT_NAMES,
}

# ----------------------------------------------------------------------------------------------------------- ELECTRA

_ELECTRA_HEAD = {
    "generator_predictions.dense.": "head.dense.",
    "generator_predictions.LayerNorm.": "head.norm.",
    "generator_lm_head.": "head.decoder.",
}


def _electra_options(config: PreTrainedConfig) -> dict[str, Any]:
    if config.embedding_size != config.hidden_size:
        raise ValueError(
            f"the source has embedding_size={config.embedding_size} and hidden_size={config.hidden_size}: it projects "
            "embeddings after their LayerNorm, which LION does not. Choose an ELECTRA with equal sizes, such as base "
            "or large."
        )
    return _bert_options(config) | {"pooler_act": "gelu"}


def _require_electra_head(config: PreTrainedConfig, model_class: type) -> None:
    _require_gelu(config, model_class)
    if model_class is LionForMultipleChoice and (
        config.summary_type != "first" or not config.summary_use_proj or config.summary_activation != "gelu"
    ):
        raise ValueError(
            "the source pools with other summary options than summary_type='first', summary_activation='gelu'. Give "
            "model_class=LionModel for the encoder alone."
        )


ELECTRA = Family(
    label="ELECTRA",
    kind="text",
    classes=_classes("Electra"),
    options=_electra_options,
    shared=_bert_shared,
    names=_BERT_NAMES,
    heads={
        **_PLAIN_HEADS,
        LionForMaskedLM: _ELECTRA_HEAD,
        LionForSequenceClassification: _DENSE_CLASSIFIER,
        LionForMultipleChoice: {"sequence_summary.summary.": "lion.pooler.dense.", **_CLASSIFIER},
    },
    require_head=_require_electra_head,
)

# -------------------------------------------------------------------------------------------------------- DistilBERT

_DISTILBERT_NAMES = {
    "embeddings.LayerNorm.": "lion.embeddings.norm.",
    "embeddings.position_ids": None,
    "embeddings.": "lion.embeddings.",
    "transformer.layer.{}.attention.q_lin.": "lion.layers.{}.mixer.q_proj.",
    "transformer.layer.{}.attention.k_lin.": "lion.layers.{}.mixer.k_proj.",
    "transformer.layer.{}.attention.v_lin.": "lion.layers.{}.mixer.v_proj.",
    "transformer.layer.{}.attention.out_lin.": "lion.layers.{}.mixer.o_proj.",
    "transformer.layer.{}.sa_layer_norm.": "lion.layers.{}.mixer_norm.",
    "transformer.layer.{}.ffn.lin1.": "lion.layers.{}.mlp.up_proj.",
    "transformer.layer.{}.ffn.lin2.": "lion.layers.{}.mlp.down_proj.",
    "transformer.layer.{}.output_layer_norm.": "lion.layers.{}.mlp_norm.",
}
_DISTILBERT_CLASSIFIER = {"pre_classifier.": "lion.pooler.dense.", **_CLASSIFIER}


def _distilbert_options(config: PreTrainedConfig) -> dict[str, Any]:
    sizes = taken(
        config,
        *_OF_TEXT,
        hidden_size="dim",
        num_hidden_layers="n_layers",
        num_attention_heads="n_heads",
        intermediate_size="hidden_dim",
    )
    return sizes | {"layer_norm_eps": 1e-12, "type_vocab_size": 0, "pooler_act": "relu"}


def _distilbert_shared(config: PreTrainedConfig) -> dict[str, Any]:
    names = [name for name in _SHARED if name != "hidden_act"]
    return taken(
        config, *names, hidden_act="activation", hidden_dropout_prob="dropout", classifier_dropout="seq_classif_dropout"
    )


DISTILBERT = Family(
    label="DistilBERT",
    kind="text",
    classes=_classes("DistilBert"),
    options=_distilbert_options,
    shared=_distilbert_shared,
    names=_DISTILBERT_NAMES,
    heads={
        **_PLAIN_HEADS,
        LionForMaskedLM: {
            "vocab_transform.": "head.dense.",
            "vocab_layer_norm.": "head.norm.",
            "vocab_projector.": "head.decoder.",
        },
        LionForSequenceClassification: _DISTILBERT_CLASSIFIER,
        LionForMultipleChoice: _DISTILBERT_CLASSIFIER,
    },
)

# ---------------------------------------------------------------------------------------------- ModernBERT and Ettin

_MODERN_NAMES = {
    "embeddings.tok_embeddings.": "lion.embeddings.word_embeddings.",
    "embeddings.norm.": "lion.embeddings.norm.",
    "layers.{}.attn_norm.": "lion.layers.{}.mixer_norm.",
    "layers.{}.attn.Wqkv.": tuple(f"lion.layers.{{}}.mixer.{x}_proj." for x in "qkv"),
    "layers.{}.attn.Wo.": "lion.layers.{}.mixer.o_proj.",
    "layers.{}.mlp_norm.": "lion.layers.{}.mlp_norm.",
    "layers.{}.mlp.Wi.": ("lion.layers.{}.mlp.up_proj.", "lion.layers.{}.mlp.gate_proj."),
    "layers.{}.mlp.Wo.": "lion.layers.{}.mlp.down_proj.",
    "final_norm.": "lion.norm.",
}


def _local_layers(config: PreTrainedConfig) -> list[int]:
    return [i for i, kind in enumerate(config.layer_types) if kind == "sliding_attention"]


def _modern_options(config: PreTrainedConfig) -> dict[str, Any]:
    other = set(config.layer_types) - {"full_attention", "sliding_attention"}
    if other:
        raise ValueError(f"the source has layer_types {sorted(other)}; LION has full_attention and sliding_attention.")
    sizes = taken(
        config,
        *(name for name in (*_SIZES, *_OF_TEXT) if name != "layer_norm_eps"),
        layer_norm_eps="norm_eps",
        pooler_act="classifier_activation",
        local_window="local_attention",
    )
    return sizes | {
        "type_vocab_size": 0,
        "norm_position": "pre",
        "mlp_type": "glu",
        "use_bias": config.attention_bias or config.mlp_bias or config.norm_bias,
        "first_norm": False,
        "pooler_norm": True,
        "token_transform": True,
        "rope_parameters": {kind: dict(rope) for kind, rope in config.rope_parameters.items()},
    }


def _modern_shared(config: PreTrainedConfig) -> dict[str, Any]:
    names = [name for name in _SHARED if name != "hidden_act"]
    pooling = {"cls": "first", "mean": "mean"}[config.classifier_pooling]
    shared = taken(
        config, *names, "classifier_dropout", hidden_act="hidden_activation", hidden_dropout_prob="mlp_dropout"
    )
    return shared | {"classifier_pooling": pooling}


def _require_modern_head(config: PreTrainedConfig, model_class: type) -> None:
    if model_class is LionForMaskedLM and config.classifier_activation != config.hidden_activation:
        raise ValueError(
            f"the source has classifier_activation={config.classifier_activation!r} and "
            f"hidden_activation={config.hidden_activation!r}; LION's masked language modelling head uses that of the "
            "encoder. Give model_class=LionModel for the encoder alone."
        )


def _modern_head(transform: str) -> Names:
    return {"head.": transform, **_CLASSIFIER}


MODERNBERT = Family(
    label="ModernBERT",
    kind="text",
    classes=_classes("ModernBert"),
    options=_modern_options,
    shared=_modern_shared,
    names=_MODERN_NAMES,
    heads={
        LionForMaskedLM: {"head.": "head.", "decoder.": "head.decoder."},
        LionForSequenceClassification: _modern_head("lion.pooler."),
        LionForMultipleChoice: _modern_head("lion.pooler."),
        LionForTokenClassification: _modern_head("transform."),
        LionForQuestionAnswering: {"head.": "transform.", "classifier.": "qa_outputs."},
    },
    local_layers=_local_layers,
    require_head=_require_modern_head,
)

# ------------------------------------------------------------------------------------------------------- nomic-embed

_NOMIC_NAMES = {
    "embeddings.LayerNorm.": "lion.embeddings.norm.",
    "embeddings.": "lion.embeddings.",
    "layers.{}.self_attn.": "lion.layers.{}.mixer.",
    "layers.{}.post_attention_layernorm.": "lion.layers.{}.mixer_norm.",
    "layers.{}.mlp.gate_proj.": "lion.layers.{}.mlp.up_proj.",  # the source's gate is activated, as up_proj is here
    "layers.{}.mlp.up_proj.": "lion.layers.{}.mlp.gate_proj.",
    "layers.{}.mlp.down_proj.": "lion.layers.{}.mlp.down_proj.",
    "layers.{}.post_mlp_layernorm.": "lion.layers.{}.mlp_norm.",
    "pooler.": "lion.pooler.",
}


def _nomic_options(config: PreTrainedConfig) -> dict[str, Any]:
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(f"the source has head_dim={config.head_dim}; it must be hidden_size / num_attention_heads.")
    return _bert_options(config) | {"mlp_type": "glu", "rope_parameters": dict(config.rope_parameters)}


NOMIC = Family(
    label="nomic-embed",
    kind="text",
    classes=_classes("NomicBert", without=("ForPreTraining", "ForQuestionAnswering", "ForMultipleChoice")),
    options=_nomic_options,
    shared=_bert_shared,
    names=_NOMIC_NAMES,
    heads={
        **_PLAIN_HEADS,
        LionForMaskedLM: {"cls.predictions.transform.layer_norm.": "head.norm.", **_BERT_HEAD},
    },
)

# By model_type.
TEXT_FAMILIES = {
    "bert": BERT,
    "roberta": _roberta("RoBERTa", "Roberta"),
    "xlm-roberta": _roberta("XLM-RoBERTa", "XLMRoberta"),
    "camembert": _roberta("CamemBERT", "Camembert"),
    "data2vec-text": _roberta("Data2Vec", "Data2VecText"),
    "roberta-prelayernorm": _roberta(
        "RoBERTa-PreLayerNorm", "RobertaPreLayerNorm", options=_prelayernorm_options, names=_PRELAYERNORM_NAMES
    ),
    "distilbert": DISTILBERT,
    "electra": ELECTRA,
    "ernie": ERNIE,
    "modernbert": MODERNBERT,
    "nomic_bert": NOMIC,
}
