r"""GPT-2 124M fine-tuned on plain text.

    python -m lslm_jax.main --config=configs/gpt2_finetune.py --pretrained=DIR --workdir=runs/gpt2_finetune \
        --config.data.files=novels/train.jsonl.gz --config.data.valid_files=novels/valid.jsonl.gz

DIR holds openai-community/gpt2, or any other decoder. The files are those of configs/novels.py, or any text.
"""

from lslm_jax.config import (
    CheckpointConfig,
    CleanConfig,
    Config,
    DataConfig,
    EvalConfig,
    GenerateConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(files=("novels/train.jsonl.gz",), valid_files=("novels/valid.jsonl.gz",), seq_len=1024),
        clean=CleanConfig(whitespace="trim"),
        model=ModelConfig(dtype="bfloat16", dropout=0.1),
        train=TrainConfig(steps=1000, batch_size=16, accumulate=2),
        optimizer=OptimizerConfig(
            learning_rate=5e-5, b2=0.999, schedule="linear", warmup_steps=50, final_ratio=0.0, weight_decay=0.01
        ),
        checkpoint=CheckpointConfig(every=250, best="eval/loss"),
        eval=EvalConfig(every=250),
        generate=GenerateConfig(prompts=("It was a dark and stormy night",), temperature=0.8, top_p=0.95),
    )
