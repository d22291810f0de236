r"""Sentiment of film reviews (SST-2) by a small BERT that has read novels: fine-tuning under a new head.

    python -m lslm_jax.main --config=configs/bert_sst2.py --workdir=runs/bert_sst2 \
        --config.train.init_from=runs/bert_novels --config.tokenizer.path=runs/bert_novels/data/tokenizer.model \
        --config.data.files=sst2/train.tsv.gz --config.data.valid_files=sst2/dev.tsv.gz

Columns `sentence` and `label` (0 negative, 1 positive), as GLUE has them. Measured on 2026-11-26 from the body of
`bert_small_novels`, on 6,920 whole sentences: 0.766 of the 872 of dev after 500 steps. Half an hour of novels is of
little use to lower-case film reviews: the bag of words of `sentiment_from_scratch` reaches 0.805, and MiniLM
(`minilm_sst2`) more.
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
from lslm_jax.models import model_configs


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
        model=replace(model_configs.bert_small, pool="mean", dropout=0.3),
        train=TrainConfig(steps=600, batch_size=32, ema=0.99, label_smoothing=0.1, init_from="runs/bert_novels"),
        optimizer=OptimizerConfig(
            learning_rate=2e-4, b2=0.98, schedule="linear", warmup_steps=100, final_ratio=0.0, weight_decay=0.01
        ),
        checkpoint=CheckpointConfig(every=100, best="eval/accuracy"),
        eval=EvalConfig(every=100),
    )
