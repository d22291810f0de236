r"""Sentiment of film reviews (SST-2) from scratch: a tiny encoder that averages what it has read.

    python -m lslm_jax.main --config=configs/sentiment_from_scratch.py --workdir=runs/sentiment \
        --config.data.files=sst2/train.tsv.gz --config.data.valid_files=sst2/dev.tsv.gz

Columns `sentence` and `label` (0 negative, 1 positive), as GLUE has them. On the 6,920 whole sentences without their
phrases it reaches an accuracy of 0.805 on the 872 of dev at its last step, which is also its best there, in two minutes
on two cores. A logistic regression on words reaches 0.790 on them and naive Bayes 0.802.
"""

from lslm_jax.config import (
    CheckpointConfig,
    CleanConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
    TokenizerConfig,
    TrainConfig,
)


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
        tokenizer=TokenizerConfig(vocab_size=8000, model="unigram"),
        model=ModelConfig(
            family="encoder",
            num_layers=1,
            d_model=128,
            num_heads=4,
            d_ff=256,
            max_length=64,
            pool="mean",
            dropout=0.5,
        ),
        train=TrainConfig(steps=1000, batch_size=32, ema=0.99, label_smoothing=0.1),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=100, weight_decay=3.0),
        checkpoint=CheckpointConfig(every=100, best="eval/accuracy"),
        eval=EvalConfig(every=100),
    )
