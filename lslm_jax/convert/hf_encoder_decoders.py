"""Encoder-decoders of Hugging Face: T5, T5 1.1 (Flan-T5), and Marian's translators."""

from typing import Any

from lslm_jax.config import ModelConfig
from lslm_jax.convert.hf_config import activation
from lslm_jax.convert.hf_mapping import LAYER, Family, Part, Setting, Settings
from lslm_jax.errors import ConfigError

Modules = dict[str, str | Part]


def _t5_stack(stack: str, gated: bool) -> Modules:
    layer = f"{stack}.block.{LAYER}.layer"
    mlp = f"{layer}.{2 if stack == 'decoder' else 1}"
    ours = f"{stack}.blocks"
    modules: Modules = {
        f"{stack}.norm": f"{stack}.final_layer_norm",
        f"{stack}.distances": f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        f"{ours}.attention_norm": f"{layer}.0.layer_norm",
        f"{ours}.mlp_norm": f"{mlp}.layer_norm",
        f"{ours}.mlp.up": f"{mlp}.DenseReluDense.{'wi_1' if gated else 'wi'}",
        f"{ours}.mlp.down": f"{mlp}.DenseReluDense.wo",
    }
    modules |= {f"{ours}.attention.{name}": f"{layer}.0.SelfAttention.{name}" for name in "qkvo"}
    if gated:
        modules[f"{ours}.mlp.gate"] = f"{mlp}.DenseReluDense.wi_0"
    if stack == "decoder":
        modules[f"{ours}.cross_norm"] = f"{layer}.1.layer_norm"
        modules |= {f"{ours}.cross.{name}": f"{layer}.1.EncDecAttention.{name}" for name in "qkvo"}
    return modules


_NO_LIMIT = 1 << 20  # tokens; relative positions reach as far as memory does


def _read_decoder_layers(theirs: Settings) -> dict[str, Any]:
    layers = theirs["num_decoder_layers"]
    if layers is not None and not 0 < layers <= 10_000:
        raise ConfigError(f"num_decoder_layers={layers} must be from 1 to 10,000")
    return {"num_decoder_layers": layers or theirs["num_layers"]}


def _read_tied(theirs: Settings) -> dict[str, Any]:
    """Scale of the hidden state that the output layer reads, where it is the embedding.

    Files of transformers 5 have `tie_word_embeddings` true always, and the truth in `scale_decoder_outputs`.
    """
    tied = theirs.get("tie_word_embeddings") is not False
    scaled = theirs.get("scale_decoder_outputs", tied)
    return {"tie_embeddings": tied and scaled, "logit_scale": scaled}


def _write_tied(model: ModelConfig) -> dict[str, Any]:
    return {"tie_word_embeddings": model.tie_embeddings, "scale_decoder_outputs": model.logit_scale}


def _same_mlp(gated: bool) -> Setting:
    """Settings that transformers 5 derives from feed_forward_proj and writes as well."""
    derived = {"dense_act_fn": "gelu_new" if gated else "relu", "is_gated_act": gated}

    def read(theirs: Settings) -> dict[str, Any]:
        for name, value in derived.items():
            if theirs.get(name, value) != value:
                kind = theirs["feed_forward_proj"]
                raise ConfigError(f"t5 with {name}={theirs[name]!r} beside feed_forward_proj={kind} is not supported")
        return {}

    return Setting(read, lambda model: {}, tuple(derived))


def _read_distances(theirs: Settings) -> dict[str, Any]:
    """Relative positions: an encoder has two buckets for each of the nearest distances, one for each direction."""
    buckets, farthest = theirs["relative_attention_num_buckets"], theirs["relative_attention_max_distance"]
    if buckets < 4 or farthest <= buckets // 2:
        raise ConfigError(
            f"relative_attention_num_buckets={buckets} must be at least 4, relative_attention_max_distance={farthest} "
            f"above {buckets // 2}, half of it"
        )
    return {"relative_buckets": buckets, "relative_distance": farthest}


_DISTANCES = Setting(
    _read_distances,
    lambda model: {
        "relative_attention_num_buckets": model.relative_buckets,
        "relative_attention_max_distance": model.relative_distance,
    },
    ("relative_attention_num_buckets", "relative_attention_max_distance"),
)


def _t5(*, gated: bool) -> Family:
    projection = "gated-gelu" if gated else "relu"
    return Family(
        model_type="t5",
        classes={"seq2seq": "T5ForConditionalGeneration", "span_corruption": "T5ForConditionalGeneration"},
        prefix="",
        modules={
            "embed": "shared.weight",
            "head": "lm_head.weight",
            **_t5_stack("encoder", gated),
            **_t5_stack("decoder", gated),
        },
        ignored=("*.embed_tokens.weight", "*.EncDecAttention.relative_attention_bias.*"),
        copies={"*.embed_tokens.weight": "shared.weight"},
        stand_ins={"lm_head.weight": "shared.weight"},
        fields={
            "vocab_size": "vocab_size",
            "d_model": "d_model",
            "head_dim": "d_kv",
            "d_ff": "d_ff",
            "num_layers": "num_layers",
            "num_heads": "num_heads",
            "norm_eps": "layer_norm_epsilon",
            "dropout": "dropout_rate",
        },
        settings=(
            Setting(
                _read_decoder_layers,
                lambda model: {"num_decoder_layers": model.num_decoder_layers},
                ("num_decoder_layers", "num_layers"),
            ),
            _same_mlp(gated),
            _DISTANCES,
            Setting(_read_tied, _write_tied, ("tie_word_embeddings", "scale_decoder_outputs")),
        ),
        fixed={
            "family": "encoder_decoder",
            "positions": "relative",
            "max_length": _NO_LIMIT,
            "norm": "rmsnorm",
            "bias": False,
            "attention_scale": 1.0,
            "gated": gated,
            "activation": "gelu" if gated else "relu",
        },
        demands={"feed_forward_proj": projection},
    )


T5 = _t5(gated=False)
T5_GATED = _t5(gated=True)


def _marian_stack(stack: str) -> Modules:
    layer, ours = f"model.{stack}.layers.{LAYER}", f"{stack}.blocks"
    modules: Modules = {
        f"{ours}.attention_norm": f"{layer}.self_attn_layer_norm",
        f"{ours}.mlp.up": f"{layer}.fc1",
        f"{ours}.mlp.down": f"{layer}.fc2",
        f"{ours}.mlp_norm": f"{layer}.final_layer_norm",
    }
    projections = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    modules |= {f"{ours}.attention.{a}": f"{layer}.self_attn.{b}" for a, b in projections.items()}
    if stack == "decoder":
        modules[f"{ours}.cross_norm"] = f"{layer}.encoder_attn_layer_norm"
        modules |= {f"{ours}.cross.{a}": f"{layer}.encoder_attn.{b}" for a, b in projections.items()}
    return modules


_SAME = {
    "decoder_attention_heads": "encoder_attention_heads",
    "decoder_ffn_dim": "encoder_ffn_dim",
    "decoder_vocab_size": "vocab_size",
}


def _read_marian(theirs: Settings) -> dict[str, Any]:
    for name, other in _SAME.items():
        if theirs[name] != theirs[other] and not (name == "decoder_vocab_size" and theirs[name] is None):
            raise ConfigError(f"marian with {name}={theirs[name]} and {other}={theirs[other]} is not supported")
    return {}


def _write_marian(model: ModelConfig) -> dict[str, Any]:
    return {"decoder_attention_heads": model.num_heads, "decoder_ffn_dim": model.d_ff}


MARIAN = Family(
    model_type="marian",
    classes={"seq2seq": "MarianMTModel"},
    prefix="model.",
    modules={
        "embed": "model.shared.weight",
        "output_bias": "final_logits_bias",
        **_marian_stack("encoder"),
        **_marian_stack("decoder"),
    },
    rows=("final_logits_bias",),
    ignored=("model.*.embed_tokens.weight", "model.*.embed_positions.weight", "lm_head.weight"),
    copies={"model.*.embed_tokens.weight": "model.shared.weight", "lm_head.weight": "model.shared.weight"},
    fields={
        "vocab_size": "vocab_size",
        "max_length": "max_position_embeddings",
        "d_model": "d_model",
        "num_layers": "encoder_layers",
        "num_decoder_layers": "decoder_layers",
        "num_heads": "encoder_attention_heads",
        "d_ff": "encoder_ffn_dim",
        "embed_scale": "scale_embedding",
        "dropout": "dropout",
    },
    settings=(
        activation("activation_function", "gelu"),
        Setting(_read_marian, _write_marian, (*_SAME, *_SAME.values())),
    ),
    fixed={
        "family": "encoder_decoder",
        "positions": "sinusoidal",
        "norm": "layernorm",
        "norm_place": "after",
        "output_bias": True,
        "bias": True,
    },
    demands={
        "static_position_embeddings": True,
        "normalize_before": False,
        "normalize_embedding": False,
        "add_final_layer_norm": False,
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
    },
)
