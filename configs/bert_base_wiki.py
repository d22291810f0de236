"""BERT, base size, on the English Wikipedia (wiki40b, through TFDS): masked language modelling on packed documents.

python -m lslm_jax.main --config=configs/bert_base_wiki.py --workdir=runs/bert_wiki

8 devices; TFDS downloads and prepares wiki40b/en by itself.
"""

from dataclasses import replace

from lslm_jax.config import Config, DataConfig, EvalConfig, OptimizerConfig, TaskConfig, TokenizerConfig, TrainConfig
from lslm_jax.models import model_configs


def get_config() -> Config:
    return Config(
        data=DataConfig(source="tfds", tfds="wiki40b/en", valid_split="validation", seq_len=512),
        task=TaskConfig(objective="masked", whole_words=True),
        tokenizer=TokenizerConfig(vocab_size=30_000),
        model=replace(model_configs.bert_base, dropout=0.1, dtype="bfloat16"),
        train=TrainConfig(steps=500_000, batch_size=256),
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            b2=0.999,
            eps=1e-6,
            schedule="linear",
            warmup_steps=10_000,
            final_ratio=0.0,
            weight_decay=0.01,
        ),
        eval=EvalConfig(every=10_000),
    )
