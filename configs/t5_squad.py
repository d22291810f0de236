r"""Questions answered in words (SQuAD) by a small T5: `question: ... context: ...` in, the answer out.

python -m lslm_jax.main --config=configs/t5_squad.py --workdir=runs/t5_squad \
        --config.data.files=squad/train-v1.1.json --config.data.valid_files=squad/dev-v1.1.json

Measured on 2026-11-27 on two CPU cores, on the first 4,360 training questions, after 577 of the 2,000 steps (15
minutes, other work beside it): exact match 0.0, F1 4.5 on 256 of the development questions. From random weights so few
questions teach it no more than what answers look like: begin with trained ones (`--pretrained`).
"""

from dataclasses import replace

from lslm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    GenerateConfig,
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
            seq_len=32,
            source_len=384,
            packing="pad",
        ),
        task=TaskConfig(objective="seq2seq"),
        tokenizer=TokenizerConfig(model="unigram", vocab_size=8000),
        model=replace(
            model_configs.t5_small,
            num_layers=3,
            d_model=256,
            num_heads=4,
            d_ff=1024,
            max_length=384,
            vocab_size=0,
            dropout=0.1,
        ),
        train=TrainConfig(steps=2000, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="rsqrt", warmup_steps=200, weight_decay=0.01),
        checkpoint=CheckpointConfig(every=500),
        eval=EvalConfig(every=1000, batches=16),
        generate=GenerateConfig(max_tokens=32, temperature=0.0),
    )
