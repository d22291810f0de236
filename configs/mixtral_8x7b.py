"""Mixtral 8x7B, its experts on different devices, four of them together; all else split over all devices.

    python -m lslm_jax.main --config=configs/mixtral_8x7b.py --workdir=runs/mixtral_8x7b

As it stands it trains on random tokens, to measure speed. To train on text, add
`--config.data.source=files --config.data.files=TEXT --config.data.valid_fraction=0.01 --config.model.vocab_size=0`.
"""

from dataclasses import replace

from lslm_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from lslm_jax.models import model_configs


def get_config() -> Config:
    return Config(
        model=replace(model_configs.mixtral_8x7b, remat="full"),
        data=DataConfig(source="synthetic", seq_len=4096),
        tokenizer=TokenizerConfig(vocab_size=32_000),
        train=TrainConfig(steps=500_000, batch_size=1024, balance_loss=0.02),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
        mesh=MeshConfig(preset="moe"),
    )
