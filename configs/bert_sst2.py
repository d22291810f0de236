r"""Sentiment of film reviews (SST-2) by a small BERT that has read novels: fine-tuning under a new head.

    python -m lslm_jax.main --config=configs/bert_sst2.py --workdir=runs/bert_sst2 \
        --config.train.init_from=runs/bert_novels --config.tokenizer.path=runs/bert_novels/data/tokenizer.model \
        --config.data.files=sst2/train.tsv.gz --config.data.valid_files=sst2/dev.tsv.gz

Columns `sentence` and `label` (0 negative, 1 positive), as GLUE has them.
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
        data=DataConfig(
            example="label",
            files=("sst2/train.tsv.gz",),
            valid_files=("sst2/dev.tsv.gz",),
            text_key="sentence",
            labels=("negative", "positive"),
            seq_len=64,
            packing="pad",
        ),
        clean=CleanConfig(whitespace="collapse"),
        task=TaskConfig(objective="classification"),
        tokenizer=TokenizerConfig(path="runs/bert_novels/data/tokenizer.model"),
        model=replace(presets.bert_small, dropout=0.1),
        train=TrainConfig(steps=1000, batch_size=32, init_from="runs/bert_novels"),
        optimizer=OptimizerConfig(
            learning_rate=2e-4, b2=0.98, schedule="linear", warmup_steps=100, final_ratio=0.0, weight_decay=0.01
        ),
        checkpoint=CheckpointConfig(every=200, best="eval/accuracy"),
        eval=EvalConfig(every=200),
    )
