r"""Questions answered by a span of their context (SQuAD), by a small BERT that has read novels.

    python -m lslm_jax.main --config=configs/bert_squad.py --workdir=runs/bert_squad \
        --config.train.init_from=runs/bert_novels --config.tokenizer.path=runs/bert_novels/data/tokenizer.model \
        --config.data.files=squad/train-v1.1.json --config.data.valid_files=squad/dev-v1.1.json

Contexts longer than a row are read by overlapping windows. SQuAD 2.0, with questions that have no answer, is the same
with its files.

Measured on 2026-11-26 on two busy CPU cores, from the body of `bert_small_novels` and 4,370 questions of the training
set: 25 minutes; of 6,034 questions of the development set EM 6.0, F1 11.4. So small a body has not learnt to read:
`minilm_squad` begins with one that has.
"""

from dataclasses import replace

from lslm_jax.config import (
    CheckpointConfig,
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
            example="qa",
            files=("squad/train-v1.1.json",),
            valid_files=("squad/dev-v1.1.json",),
            seq_len=128,
            packing="pad",
        ),
        task=TaskConfig(objective="qa", stride=48),
        tokenizer=TokenizerConfig(path="runs/bert_novels/data/tokenizer.model"),
        model=replace(model_configs.bert_small, dropout=0.1),
        train=TrainConfig(steps=800, batch_size=16, init_from="runs/bert_novels"),
        optimizer=OptimizerConfig(
            learning_rate=3e-4, b2=0.98, schedule="linear", warmup_steps=100, final_ratio=0.0, weight_decay=0.01
        ),
        checkpoint=CheckpointConfig(every=400, best="eval/f1"),
        eval=EvalConfig(every=800),
    )
