"""Llama 3 with 8B parameters, its state split over all devices.

    python -m lslm_jax.main --config=configs/llama_8b.py --workdir=runs/llama_8b

As it stands it trains on random tokens, to measure speed. To train on text, add
`--config.data.source=files --config.data.files=TEXT --config.data.valid_fraction=0.01 --config.model.vocab_size=0`.
"""

from dataclasses import replace

from lslm_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from lslm_jax.models import model_configs


def get_config() -> Config:
    return Config(
        model=replace(model_configs.llama_8b, remat="full"),
        data=DataConfig(source="synthetic", seq_len=8192),
        tokenizer=TokenizerConfig(vocab_size=128_000),
        train=TrainConfig(steps=500_000, batch_size=512),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
        mesh=MeshConfig(preset="fsdp"),
    )
