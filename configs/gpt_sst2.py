r"""Sentiment by a small GPT, text to text: it reads a sentence and continues with the word for its class.

    python -m lslm_jax.main --config=configs/gpt_sst2.py --workdir=runs/gpt_sst2 \
        --config.data.files=sst2/train.tsv.gz --config.data.valid_files=sst2/dev.tsv.gz

Columns `sentence` and `label` (0 negative, 1 positive), as GLUE has them.

Measured on 2026-11-27 on one busy CPU core, on 6,920 sentences without their phrases: 0.766 of dev after 500 steps, in
ten minutes; after that it learns them by heart (`checkpoint.best` keeps the former).
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
            seq_len=80,
            packing="bins",
        ),
        clean=CleanConfig(whitespace="collapse"),
        task=TaskConfig(objective="seq2seq"),
        tokenizer=TokenizerConfig(vocab_size=4096, model="unigram"),
        model=ModelConfig(num_layers=2, d_model=128, num_heads=4, max_length=80, dropout=0.3),
        train=TrainConfig(steps=1500, batch_size=32, ema=0.99),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100),
        checkpoint=CheckpointConfig(every=250, best="eval/accuracy"),
        eval=EvalConfig(every=250),
        generate=GenerateConfig(prompts=("a gorgeous , witty , seductive movie .",), max_tokens=8, temperature=0.0),
    )
