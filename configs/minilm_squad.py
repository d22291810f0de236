r"""Questions answered by a span of their context (SQuAD), by MiniLM, a small BERT distilled from a large one.

    python -m lslm_jax.main --config=configs/minilm_squad.py --pretrained=DIR --workdir=runs/minilm_squad \
        --config.data.files=squad/train-v1.1.json --config.data.valid_files=squad/dev-v1.1.json

DIR holds sentence-transformers/all-MiniLM-L6-v2, or any other BERT, RoBERTa, DistilBERT or ModernBERT. Contexts longer
than a row are read by overlapping windows.

Measured on 2026-11-27 on two busy CPU cores with `--config.train.steps=400`, on 4,360 questions of 12 articles: exact
match 44.8, F1 57.3 on 6,034 questions of 30 others, in an hour. A small body of our own (configs/bert_squad.py) had 6.0
and 11.4. From there, 60 steps over 1,160 questions of SQuAD 2.0: exact match 50.6, F1 51.2 on 247, of which 123 have no
answer, and 87 % of those were given none.
"""

from lslm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(
            example="qa",
            files=("squad/train-v1.1.json",),
            valid_files=("squad/dev-v1.1.json",),
            seq_len=192,
            packing="pad",
        ),
        task=TaskConfig(objective="qa", stride=64),
        model=ModelConfig(family="encoder"),
        train=TrainConfig(steps=600, batch_size=16),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, b2=0.98, schedule="linear", warmup_steps=60, final_ratio=0.0, weight_decay=0.01
        ),
        checkpoint=CheckpointConfig(every=300),
        eval=EvalConfig(every=600),
    )
