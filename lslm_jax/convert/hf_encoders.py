"""Encoders of Hugging Face: BERT, RoBERTa, DistilBERT, ModernBERT, each with its heads."""

from typing import Any

from lslm_jax.convert.hf_config import activation, modern_window, two_ropes
from lslm_jax.convert.hf_mapping import LAYER, Family, Part, Setting, Settings
from lslm_jax.errors import ConfigError

Modules = dict[str, str | Part]


def _bert_modules(prefix: str) -> Modules:
    layer = f"{prefix}encoder.layer.{LAYER}"
    return {
        "embed": f"{prefix}embeddings.word_embeddings.weight",
        "positions": f"{prefix}embeddings.position_embeddings.weight",
        "types": f"{prefix}embeddings.token_type_embeddings.weight",
        "embed_norm": f"{prefix}embeddings.LayerNorm",
        "blocks.attention.q": f"{layer}.attention.self.query",
        "blocks.attention.k": f"{layer}.attention.self.key",
        "blocks.attention.v": f"{layer}.attention.self.value",
        "blocks.attention.o": f"{layer}.attention.output.dense",
        "blocks.attention_norm": f"{layer}.attention.output.LayerNorm",
        "blocks.mlp.up": f"{layer}.intermediate.dense",
        "blocks.mlp.down": f"{layer}.output.dense",
        "blocks.mlp_norm": f"{layer}.output.LayerNorm",
    }


def _output(name: str) -> Modules:
    return {"top.head": f"{name}.weight", "top.bias": f"{name}.bias"}


def _heads(masked: Modules, pooled: Modules, tagging: Modules, qa: Modules) -> dict[str, Modules]:
    return {"masked": masked, "classification": pooled, "regression": pooled, "tagging": tagging, "qa": qa}


def _classes(name: str) -> dict[str, str]:
    kinds = {
        "masked": "MaskedLM",
        "classification": "SequenceClassification",
        "regression": "SequenceClassification",
        "tagging": "TokenClassification",
        "qa": "QuestionAnswering",
    }
    return {objective: f"{name}For{kind}" for objective, kind in kinds.items()}


_BERT_FIELDS: dict[str, str] = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "token_types": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
}
_POST_NORM = {
    "family": "encoder",
    "positions": "learned",
    "norm": "layernorm",
    "norm_place": "after",
    "embed_norm": True,
    "output_bias": True,
    "bias": True,
}
_ABSOLUTE = {"position_embedding_type": "absolute", "is_decoder": False, "tie_word_embeddings": True}

BERT = Family(
    model_type="bert",
    classes=_classes("Bert"),
    prefix="bert.",
    modules=_bert_modules("bert."),
    heads=_heads(
        {
            "top.transform.dense": "cls.predictions.transform.dense",
            "top.transform.norm": "cls.predictions.transform.LayerNorm",
            "output_bias": "cls.predictions.bias",
        },
        {"top.pooler.dense": "bert.pooler.dense", **_output("classifier")},
        _output("classifier"),
        _output("qa_outputs"),
    ),
    ignored=("*.position_ids", "cls.predictions.decoder.*", "cls.seq_relationship.*", "bert.pooler.*"),
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    fields=_BERT_FIELDS | {"max_length": "max_position_embeddings"},
    settings=(activation("hidden_act", "gelu"),),
    fixed=_POST_NORM,
    demands=_ABSOLUTE,
)


def _read_positions(theirs: Settings) -> dict[str, Any]:
    """RoBERTa counts positions from the one after the number of its padding token."""
    pad, rows = theirs["pad_token_id"], theirs["max_position_embeddings"]
    if pad is None or not 0 <= pad < rows - 1:
        raise ConfigError(f"pad_token_id={pad} must be from 0 to max_position_embeddings - 2 = {rows - 2}")
    if role := next((key for key in ("bos_token_id", "eos_token_id") if pad == theirs[key]), None):
        raise ConfigError(f"pad_token_id={pad} is the {role} too: transformers does not count the positions of such")
    return {"position_offset": pad + 1, "max_length": rows - pad - 1}


ROBERTA = Family(
    model_type="roberta",
    classes=_classes("Roberta"),
    prefix="roberta.",
    modules=_bert_modules("roberta."),
    heads=_heads(
        {
            "top.transform.dense": "lm_head.dense",
            "top.transform.norm": "lm_head.layer_norm",
            "output_bias": "lm_head.bias",
        },
        {"top.pooler.dense": "classifier.dense", **_output("classifier.out_proj")},
        _output("classifier"),
        _output("qa_outputs"),
    ),
    ignored=("*.position_ids", "lm_head.decoder.*", "roberta.pooler.*"),
    copies={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    fields=_BERT_FIELDS,
    settings=(
        activation("hidden_act", "gelu"),
        Setting(
            _read_positions,
            lambda model: {
                "pad_token_id": model.position_offset - 1,
                "max_position_embeddings": model.max_length + model.position_offset,
            },
            ("pad_token_id", "max_position_embeddings", "bos_token_id", "eos_token_id"),
        ),
    ),
    fixed=_POST_NORM,
    demands=_ABSOLUTE,
)

_DISTIL_LAYER = f"distilbert.transformer.layer.{LAYER}"
DISTILBERT = Family(
    model_type="distilbert",
    classes=_classes("DistilBert"),
    prefix="distilbert.",
    modules={
        "embed": "distilbert.embeddings.word_embeddings.weight",
        "positions": "distilbert.embeddings.position_embeddings.weight",
        "embed_norm": "distilbert.embeddings.LayerNorm",
        "blocks.attention.q": f"{_DISTIL_LAYER}.attention.q_lin",
        "blocks.attention.k": f"{_DISTIL_LAYER}.attention.k_lin",
        "blocks.attention.v": f"{_DISTIL_LAYER}.attention.v_lin",
        "blocks.attention.o": f"{_DISTIL_LAYER}.attention.out_lin",
        "blocks.attention_norm": f"{_DISTIL_LAYER}.sa_layer_norm",
        "blocks.mlp.up": f"{_DISTIL_LAYER}.ffn.lin1",
        "blocks.mlp.down": f"{_DISTIL_LAYER}.ffn.lin2",
        "blocks.mlp_norm": f"{_DISTIL_LAYER}.output_layer_norm",
    },
    heads=_heads(
        {
            "top.transform.dense": "vocab_transform",
            "top.transform.norm": "vocab_layer_norm",
            "output_bias": "vocab_projector.bias",
        },
        {"top.pooler.dense": "pre_classifier", **_output("classifier")},
        _output("classifier"),
        _output("qa_outputs"),
    ),
    ignored=("*.position_ids", "vocab_projector.weight"),
    copies={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    fields={
        "vocab_size": "vocab_size",
        "max_length": "max_position_embeddings",
        "d_model": "dim",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "d_ff": "hidden_dim",
        "dropout": "dropout",
    },
    settings=(activation("activation", "gelu"),),
    fixed=_POST_NORM | {"norm_eps": 1e-12, "head_activation": "relu"},
    demands={"tie_word_embeddings": True},
)


def _read_pool(theirs: Settings) -> dict[str, Any]:
    name = theirs["classifier_pooling"]
    if name not in ("cls", "mean"):
        raise ConfigError(f"classifier_pooling={name} is not among cls, mean")
    return {"pool": "first" if name == "cls" else "mean"}


_MODERN_LAYER = f"model.layers.{LAYER}"
_MODERN_TOP: Modules = {"top.pooler.dense": "head.dense", "top.pooler.norm": "head.norm", **_output("classifier")}
MODERNBERT = Family(
    model_type="modernbert",
    classes=_classes("ModernBert"),
    prefix="model.",
    modules={
        "embed": "model.embeddings.tok_embeddings.weight",
        "embed_norm": "model.embeddings.norm",
        "norm": "model.final_norm",
        "blocks.attention_norm": f"{_MODERN_LAYER}.attn_norm",
        "blocks.attention.q": Part(f"{_MODERN_LAYER}.attn.Wqkv", 0, 3),
        "blocks.attention.k": Part(f"{_MODERN_LAYER}.attn.Wqkv", 1, 3),
        "blocks.attention.v": Part(f"{_MODERN_LAYER}.attn.Wqkv", 2, 3),
        "blocks.attention.o": f"{_MODERN_LAYER}.attn.Wo",
        "blocks.mlp_norm": f"{_MODERN_LAYER}.mlp_norm",
        "blocks.mlp.gate": Part(f"{_MODERN_LAYER}.mlp.Wi", 0, 2),
        "blocks.mlp.up": Part(f"{_MODERN_LAYER}.mlp.Wi", 1, 2),
        "blocks.mlp.down": f"{_MODERN_LAYER}.mlp.Wo",
    },
    heads=_heads(
        {"top.transform.dense": "head.dense", "top.transform.norm": "head.norm", "output_bias": "decoder.bias"},
        _MODERN_TOP,
        _MODERN_TOP,
        _MODERN_TOP,
    ),
    ignored=("decoder.weight",),
    copies={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    fields={
        "vocab_size": "vocab_size",
        "max_length": "max_position_embeddings",
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "norm_eps": "norm_eps",
        "dropout": "mlp_dropout",
    },
    settings=(
        activation("hidden_activation", "gelu"),
        activation("classifier_activation", "gelu", "head_activation", ("gelu", "relu")),
        modern_window(),
        two_ropes("global_rope_theta", 160_000.0, "local_rope_theta", 10_000.0, scales_both=True),
        Setting(
            _read_pool,
            lambda model: {"classifier_pooling": {"first": "cls"}.get(model.pool, "mean")},
            ("classifier_pooling",),
        ),
    ),
    fixed={
        "family": "encoder",
        "positions": "rotary",
        "norm": "layernorm",
        "gated": True,
        "bias": False,
        "embed_norm": True,
        "first_norm": False,
        "output_bias": True,
        "head_norm": True,
    },
    demands={
        "attention_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
        "classifier_bias": False,
        "decoder_bias": True,
        "tie_word_embeddings": True,
    },
)
