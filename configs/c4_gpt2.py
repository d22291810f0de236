"""GPT-2 with 124M parameters on C4, English web text, from TFDS.

python -m lslm_jax.main --config=configs/c4_gpt2.py --workdir=runs/c4_gpt2 --config.data.data_dir=gs://BUCKET/tfds
"""

from dataclasses import replace

from lslm_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    GenerateConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)
from lslm_jax.models import model_configs


def get_config() -> Config:
    return Config(
        data=DataConfig(source="tfds", tfds="c4/en:3.0.1", valid_split="validation[:10000]", seq_len=1024),
        tokenizer=TokenizerConfig(vocab_size=32_768, sample_bytes=1_000_000_000),
        model=replace(model_configs.gpt2_small, dtype="bfloat16"),
        train=TrainConfig(steps=40_000, batch_size=512),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=1000),
        eval=EvalConfig(every=2000),
        generate=GenerateConfig(prompts=("The meaning of life is",), temperature=0.8, top_p=0.95),
    )
