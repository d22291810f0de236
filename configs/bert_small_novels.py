r"""A small BERT on English novels: half an hour on two cores for a body to fine-tune.

python -m lslm_jax.main --config=configs/bert_small_novels.py --workdir=runs/bert_novels \
        --config.data.files=novels/train.jsonl.gz --config.data.valid_files=novels/valid.jsonl.gz

Measured on 2026-11-26 on two CPU cores of 145 GFLOP/s: 25 minutes; of masked tokens (whole words) it tells 28.6 %, at a
loss of 4.67. After 400, 800 and 1,200 steps: 21.4, 25.4 and 27.6 %, loss 5.48, 5.01 and 4.80. With learned positions
and dropout, as in BERT, it had come to 11.6 %, loss 6.33, after 1,200 steps.
"""

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
from lslm_jax.models import model_configs


def get_config() -> Config:
    return Config(
        data=DataConfig(files=("novels/train.jsonl.gz",), valid_files=("novels/valid.jsonl.gz",), seq_len=128),
        clean=CleanConfig(whitespace="collapse"),
        task=TaskConfig(objective="masked", whole_words=True),
        tokenizer=TokenizerConfig(vocab_size=8192),
        model=model_configs.bert_small,
        train=TrainConfig(steps=1600, batch_size=16),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, b2=0.98, schedule="linear", warmup_steps=100, final_ratio=0.0, weight_decay=0.01
        ),
        checkpoint=CheckpointConfig(every=400),
        eval=EvalConfig(every=400),
    )
