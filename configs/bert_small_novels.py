r"""A small BERT on English novels: half an hour on two cores for a body to fine-tune.

python -m lslm_jax.main --config=configs/bert_small_novels.py --workdir=runs/bert_novels \
        --config.data.files=novels/train.jsonl.gz --config.data.valid_files=novels/valid.jsonl.gz
"""

from dataclasses import replace

from lslm_jax.config import (
    CheckpointConfig,
    CleanConfig,
    Config,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    TaskConfig,
    TokenizerConfig,
    TrainConfig,
)
from lslm_jax.models import presets


def get_config() -> Config:
    return Config(
        data=DataConfig(files=("novels/train.jsonl.gz",), valid_files=("novels/valid.jsonl.gz",), seq_len=128),
        clean=CleanConfig(whitespace="collapse"),
        task=TaskConfig(objective="masked", whole_words=True),
        tokenizer=TokenizerConfig(vocab_size=8192),
        model=replace(presets.bert_base, num_layers=4, d_model=256, num_heads=4, max_length=128, norm_first=True),
        train=TrainConfig(steps=3000, batch_size=32),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, b2=0.98, schedule="linear", warmup_steps=200, final_ratio=0.0, weight_decay=0.01
        ),
        checkpoint=CheckpointConfig(every=500),
        eval=EvalConfig(every=500),
    )
