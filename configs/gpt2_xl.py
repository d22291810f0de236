"""GPT-2 with 1.5B parameters.

    python -m lslm_jax.main --config=configs/gpt2_xl.py --workdir=runs/gpt2_xl

As it stands it trains on random tokens, to measure speed. To train on text, add
`--config.data.source=files --config.data.files=TEXT --config.data.valid_fraction=0.01 --config.model.vocab_size=0`.
"""

from dataclasses import replace

from lslm_jax.config import Config, DataConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from lslm_jax.models import model_configs


def get_config() -> Config:
    return Config(
        model=replace(model_configs.gpt2_xl, vocab_size=50_257, dtype="bfloat16", remat="save_attention"),
        data=DataConfig(source="synthetic", seq_len=1024),
        tokenizer=TokenizerConfig(vocab_size=50_257),
        train=TrainConfig(steps=300_000, batch_size=512, accumulate=16),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=2000),
    )
