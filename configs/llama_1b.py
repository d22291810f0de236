"""Llama 3.2 with 1.2B parameters.

    python -m lslm_jax.main --config=configs/llama_1b.py --workdir=runs/llama_1b

As it stands it trains on random tokens, to measure speed. To train on text, add
`--config.data.source=files --config.data.files=TEXT --config.data.valid_fraction=0.01 --config.model.vocab_size=0`.
"""

from dataclasses import replace

from lslm_jax.config import Config, DataConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from lslm_jax.models import model_configs


def get_config() -> Config:
    return Config(
        model=replace(model_configs.llama_1b, remat="save_attention"),
        data=DataConfig(source="synthetic", seq_len=2048),
        tokenizer=TokenizerConfig(vocab_size=128_000),
        train=TrainConfig(steps=100_000, batch_size=256, accumulate=8),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
    )
