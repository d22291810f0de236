"""Decoders of Hugging Face: GPT-2, GPT-NeoX, and the many that are named like Llama."""

from typing import Any

from lslm_jax.convert.hf_config import (
    activation,
    layers_without_rope,
    optional,
    rope,
    two_ropes,
    used_window,
    window,
    windows,
)
from lslm_jax.convert.hf_mapping import EXPERT, LAYER, Family, Part, Setting, Settings
from lslm_jax.errors import ConfigError

_GPT2_LAYER = f"transformer.h.{LAYER}"
_NEOX_LAYER = f"gpt_neox.layers.{LAYER}"
_LLAMA_LAYER = f"model.layers.{LAYER}"

GPT2 = Family(
    model_type="gpt2",
    classes={"causal": "GPT2LMHeadModel"},
    prefix="transformer.",
    modules={
        "embed": "transformer.wte.weight",
        "positions": "transformer.wpe.weight",
        "norm": "transformer.ln_f",
        "head": "lm_head.weight",
        "blocks.attention_norm": f"{_GPT2_LAYER}.ln_1",
        "blocks.attention.q": Part(f"{_GPT2_LAYER}.attn.c_attn", 0, 3),
        "blocks.attention.k": Part(f"{_GPT2_LAYER}.attn.c_attn", 1, 3),
        "blocks.attention.v": Part(f"{_GPT2_LAYER}.attn.c_attn", 2, 3),
        "blocks.attention.o": f"{_GPT2_LAYER}.attn.c_proj",
        "blocks.mlp_norm": f"{_GPT2_LAYER}.ln_2",
        "blocks.mlp.up": f"{_GPT2_LAYER}.mlp.c_fc",
        "blocks.mlp.down": f"{_GPT2_LAYER}.mlp.c_proj",
    },
    ignored=("*.attn.bias", "*.attn.masked_bias"),
    transposed=False,
    fields={
        "vocab_size": "vocab_size",
        "max_length": "n_positions",
        "d_model": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
        "dropout": "resid_pdrop",
    },
    settings=(activation("activation_function", "gelu_new"), optional("d_ff", "n_inner")),
    fixed={"positions": "learned", "norm": "layernorm", "bias": True},
    demands={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
)

_FUSED = f"{_NEOX_LAYER}.attention.query_key_value"
GPT_NEOX = Family(
    model_type="gpt_neox",
    classes={"causal": "GPTNeoXForCausalLM"},
    prefix="gpt_neox.",
    modules={
        "embed": "gpt_neox.embed_in.weight",
        "norm": "gpt_neox.final_layer_norm",
        "head": "embed_out.weight",
        "blocks.attention_norm": f"{_NEOX_LAYER}.input_layernorm",
        "blocks.attention.q": Part(_FUSED, 0, 3, by_head=True),
        "blocks.attention.k": Part(_FUSED, 1, 3, by_head=True),
        "blocks.attention.v": Part(_FUSED, 2, 3, by_head=True),
        "blocks.attention.o": f"{_NEOX_LAYER}.attention.dense",
        "blocks.mlp_norm": f"{_NEOX_LAYER}.post_attention_layernorm",
        "blocks.mlp.up": f"{_NEOX_LAYER}.mlp.dense_h_to_4h",
        "blocks.mlp.down": f"{_NEOX_LAYER}.mlp.dense_4h_to_h",
    },
    ignored=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
    fields={
        "vocab_size": "vocab_size",
        "max_length": "max_position_embeddings",
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "norm_eps": "layer_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "parallel": "use_parallel_residual",
        "dropout": "hidden_dropout",
    },
    settings=(activation("hidden_act", "gelu"), rope(10_000.0, "rotary_emb_base", ("rotary_pct", 0.25))),
    fixed={"positions": "rotary", "norm": "layernorm", "bias": True},
    demands={"attention_bias": True},
)

_LLAMA_MODULES: dict[str, str | Part] = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm",
    "head": "lm_head.weight",
    "blocks.attention_norm": f"{_LLAMA_LAYER}.input_layernorm",
    "blocks.attention.q": f"{_LLAMA_LAYER}.self_attn.q_proj",
    "blocks.attention.k": f"{_LLAMA_LAYER}.self_attn.k_proj",
    "blocks.attention.v": f"{_LLAMA_LAYER}.self_attn.v_proj",
    "blocks.attention.o": f"{_LLAMA_LAYER}.self_attn.o_proj",
    "blocks.attention.q_norm": f"{_LLAMA_LAYER}.self_attn.q_norm",
    "blocks.attention.k_norm": f"{_LLAMA_LAYER}.self_attn.k_norm",
    "blocks.mlp_norm": f"{_LLAMA_LAYER}.post_attention_layernorm",
    "blocks.mlp.gate": f"{_LLAMA_LAYER}.mlp.gate_proj",
    "blocks.mlp.up": f"{_LLAMA_LAYER}.mlp.up_proj",
    "blocks.mlp.down": f"{_LLAMA_LAYER}.mlp.down_proj",
}
_MIXTRAL_MODULES = {name: place for name, place in _LLAMA_MODULES.items() if ".mlp." not in name} | {
    "blocks.mlp.router": f"{_LLAMA_LAYER}.block_sparse_moe.gate",
    "blocks.mlp.gate": f"{_LLAMA_LAYER}.block_sparse_moe.experts.{EXPERT}.w1",
    "blocks.mlp.down": f"{_LLAMA_LAYER}.block_sparse_moe.experts.{EXPERT}.w2",
    "blocks.mlp.up": f"{_LLAMA_LAYER}.block_sparse_moe.experts.{EXPERT}.w3",
}
_GEMMA_MODULES = _LLAMA_MODULES | {
    "blocks.attention_output_norm": f"{_LLAMA_LAYER}.post_attention_layernorm",
    "blocks.mlp_norm": f"{_LLAMA_LAYER}.pre_feedforward_layernorm",
    "blocks.mlp_output_norm": f"{_LLAMA_LAYER}.post_feedforward_layernorm",
}
_OLMO_MODULES = _LLAMA_MODULES | {
    "blocks.attention_norm": f"{_LLAMA_LAYER}.post_attention_layernorm",
    "blocks.mlp_norm": f"{_LLAMA_LAYER}.post_feedforward_layernorm",
}
_SILU = activation("hidden_act", "silu")


def _like_llama(
    model_type: str,
    name: str,
    *settings: Setting,
    modules: dict[str, str | Part] = _LLAMA_MODULES,
    act: Setting = _SILU,
    fixed: dict[str, Any] | None = None,
    demands: dict[str, Any] | None = None,
    fields: dict[str, str] | None = None,
) -> Family:
    """A family whose names and settings are Llama's, but for what is given."""
    return Family(
        model_type=model_type,
        classes={"causal": f"{name}ForCausalLM"},
        prefix="model.",
        modules=modules,
        ignored=("*.rotary_emb.inv_freq",),
        fields={
            "vocab_size": "vocab_size",
            "max_length": "max_position_embeddings",
            "d_model": "hidden_size",
            "num_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "d_ff": "intermediate_size",
            "norm_eps": "rms_norm_eps",
            "tie_embeddings": "tie_word_embeddings",
        }
        | (fields or {}),
        settings=(
            optional("num_kv_heads", "num_key_value_heads"),
            optional("head_dim", "head_dim"),
            act,
            *settings,
        ),
        fixed={"positions": "rotary", "norm": "rmsnorm", "gated": True, "bias": False} | (fixed or {}),
        demands={"attention_bias": False} if demands is None else demands,
    )


_NO_BIAS = {"attention_bias": False, "mlp_bias": False}
_GEMMA_SCALES = {"embed_scale": True, "norm_place": "both", "norm_offset": True}
_QUERY_SCALE = Setting(
    lambda theirs: {"attention_scale": _positive(theirs, "query_pre_attn_scalar") ** -0.5},
    lambda model: {"query_pre_attn_scalar": round((model.attention_scale or model.head_dim**-0.5) ** -2)},
    ("query_pre_attn_scalar",),
)
_SOFTCAPS = Setting(
    lambda theirs: {
        "attention_softcap": _positive(theirs, "attn_logit_softcapping"),
        "logit_softcap": _positive(theirs, "final_logit_softcapping"),
    },
    lambda model: {
        "attn_logit_softcapping": model.attention_softcap or None,
        "final_logit_softcapping": model.logit_softcap or None,
    },
    ("attn_logit_softcapping", "final_logit_softcapping"),
)


def _positive(theirs: Settings, key: str) -> float:
    """A positive number, or 0.0 for null."""
    value = theirs[key]
    if value is not None and not 0 < value < float("inf"):
        raise ConfigError(f"{key}={value} must be positive")
    return float(value or 0.0)


_GELU = activation("hidden_activation", "gelu_pytorch_tanh")

LLAMA = _like_llama("llama", "Llama", rope(10_000.0), demands=_NO_BIAS)
MIXTRAL = _like_llama(
    "mixtral",
    "Mixtral",
    rope(1_000_000.0),
    window(),
    modules=_MIXTRAL_MODULES,
    demands={"router_jitter_noise": 0.0},
    fields={
        "num_experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
        "norm_eps": "rms_norm_eps",
    },
)
MISTRAL = _like_llama("mistral", "Mistral", rope(10_000.0), window(), demands={})
QWEN2 = _like_llama("qwen2", "Qwen2", rope(10_000.0), used_window(), fixed={"qkv_bias": True}, demands={})
QWEN3 = _like_llama("qwen3", "Qwen3", rope(10_000.0), used_window(), fixed={"qk_norm": "head"})
SMOLLM3 = _like_llama(
    "smollm3",
    "SmolLM3",
    rope(2_000_000.0),
    layers_without_rope(),
    demands=_NO_BIAS | {"use_sliding_window": False},
)
OLMO2 = _like_llama(
    "olmo2", "Olmo2", rope(10_000.0), modules=_OLMO_MODULES, fixed={"norm_place": "output", "qk_norm": "all"}
)
GEMMA2 = _like_llama(
    "gemma2",
    "Gemma2",
    rope(10_000.0),
    windows(2, 1),
    _QUERY_SCALE,
    _SOFTCAPS,
    modules=_GEMMA_MODULES,
    act=_GELU,
    fixed=_GEMMA_SCALES,
)
GEMMA3 = _like_llama(
    "gemma3_text",
    "Gemma3",
    two_ropes("rope_theta", 1_000_000.0, "rope_local_base_freq", 10_000.0),
    windows(6, 5, "sliding_window_pattern"),
    _QUERY_SCALE,
    _SOFTCAPS,
    modules=_GEMMA_MODULES,
    act=_GELU,
    fixed=_GEMMA_SCALES | {"qk_norm": "head"},
    demands={"attention_bias": False, "use_bidirectional_attention": False},
)
