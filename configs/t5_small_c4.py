"""T5 1.1, small, learns to fill in the spans that are missing from English web text (C4, through TFDS).

python -m lslm_jax.main --config=configs/t5_small_c4.py --workdir=runs/t5_c4

8 devices; C4 has to be prepared beforehand, see its page in the TFDS catalogue.
"""

from dataclasses import replace

from lslm_jax.config import Config, DataConfig, EvalConfig, OptimizerConfig, TaskConfig, TokenizerConfig, TrainConfig
from lslm_jax.models import model_configs


def get_config() -> Config:
    return Config(
        data=DataConfig(source="tfds", tfds="c4/en:3.0.1", valid_split="validation", seq_len=114, source_len=512),
        task=TaskConfig(objective="span_corruption"),
        tokenizer=TokenizerConfig(model="unigram", vocab_size=32_000),
        model=replace(model_configs.t5_v1_1_small, dtype="bfloat16"),
        train=TrainConfig(steps=500_000, batch_size=128, z_loss=1e-4),
        optimizer=OptimizerConfig(
            name="adafactor", learning_rate=1e-2, schedule="rsqrt", warmup_steps=10_000, weight_decay=0.0
        ),
        eval=EvalConfig(every=10_000, batches=100),
    )
