"""Model configs of published architectures. Config files import this module before jax is loaded."""

from dataclasses import replace

from lslm_jax.config import ModelConfig

GPT2 = ModelConfig()
LLAMA = ModelConfig(
    positions="rotary",
    norm="rmsnorm",
    activation="silu",
    gated=True,
    bias=False,
    tie_embeddings=False,
    rope_theta=500_000.0,
    dtype="bfloat16",
)

gpt2_small = replace(GPT2, num_layers=12, d_model=768, num_heads=12)
"""GPT-2, 124M parameters (Radford et al. 2019)."""
gpt2_xl = replace(GPT2, num_layers=48, d_model=1600, num_heads=25)
"""GPT-2, 1.5B parameters."""
llama_1b = replace(
    LLAMA,
    num_layers=16,
    d_model=2048,
    num_heads=32,
    num_kv_heads=8,
    d_ff=8192,
    vocab_size=128_256,
    max_length=8192,
    tie_embeddings=True,
)
"""Llama 3.2, 1.2B parameters (Grattafiori et al. 2024), without its stretched rotary frequencies."""
llama_8b = replace(
    LLAMA,
    num_layers=32,
    d_model=4096,
    num_heads=32,
    num_kv_heads=8,
    d_ff=14_336,
    vocab_size=128_256,
    max_length=8192,
)
"""Llama 3, 8B parameters."""

mixtral_8x7b = replace(
    LLAMA,
    num_layers=32,
    d_model=4096,
    num_heads=32,
    num_kv_heads=8,
    d_ff=14_336,
    num_experts=8,
    vocab_size=32_000,
    max_length=32_768,
    rope_theta=1e6,
)
"""Mixtral 8x7B, 46.7B parameters, of which a token meets 12.9B (Jiang et al. 2024)."""

BERT = ModelConfig(
    family="encoder",
    norm_place="after",
    embed_norm=True,
    output_bias=True,
    norm_eps=1e-12,
    token_types=2,
    max_length=512,
    activation="gelu_exact",
    dropout=0.1,
    init="normal",
)
T5 = ModelConfig(
    family="encoder_decoder",
    positions="relative",
    norm="rmsnorm",
    norm_eps=1e-6,
    bias=False,
    attention_scale=1.0,
    head_dim=64,
    max_length=512,
    dropout=0.1,
    init="fan_in",
    vocab_size=32_128,
)

bert_base = replace(BERT, num_layers=12, d_model=768, num_heads=12)
"""BERT, 110M parameters (Devlin et al. 2019)."""
bert_small = replace(
    BERT, num_layers=4, d_model=256, num_heads=4, max_length=128, positions="rotary", norm_place="before", dropout=0.0
)
"""A small BERT for small budgets; `configs/bert_small_novels.py` has what rotary positions make of one."""
roberta_base = replace(bert_base, norm_eps=1e-5, token_types=1)
"""RoBERTa, 125M parameters (Liu et al. 2019)."""
modern_encoder_base = ModelConfig(
    family="encoder",
    num_layers=22,
    d_model=768,
    num_heads=12,
    d_ff=1152,
    max_length=8192,
    positions="rotary",
    embed_norm=True,
    activation="gelu_exact",
    gated=True,
    bias=False,
    rope_theta=160_000.0,
    window=65,
    layer_types=("full", "window", "window"),
    rope_local_theta=10_000.0,
    first_norm=False,
    output_bias=True,
    head_activation="gelu_exact",
    head_norm=True,
    dtype="bfloat16",
)
"""ModernBERT, 149M parameters (Warner et al. 2024)."""
transformer_base = ModelConfig(
    family="encoder_decoder",
    num_layers=6,
    d_model=512,
    num_heads=8,
    positions="sinusoidal",
    norm_place="after",
    embed_scale=True,
    activation="relu",
    dropout=0.1,
    init="fan_in",
)
"""The Transformer of 2017, base model (Vaswani et al. 2017)."""
t5_small = replace(T5, num_layers=6, d_model=512, num_heads=8, activation="relu", logit_scale=True)
"""T5 1.0, 60M parameters (Raffel et al. 2020)."""
t5_v1_1_small = replace(T5, num_layers=8, d_model=512, num_heads=6, d_ff=1024, gated=True, tie_embeddings=False)
"""T5 1.1, 77M parameters (Shazeer 2020 for its MLP)."""


def layer_types(config: ModelConfig, num_layers: int) -> list[str]:
    """Attention type of each layer of a stack: `full`, `window` or `no_rope`."""
    kinds = config.layer_types or ("window" if config.window else "full",)
    return [kinds[i % len(kinds)] for i in range(num_layers)]
