"""The Transformer of 2017, base size, translates English into German (WMT 2014, through TFDS).

python -m lslm_jax.main --config=configs/transformer_wmt.py --workdir=runs/wmt

8 devices; TFDS downloads and prepares wmt14_translate/de-en by itself (1.6 GB).
"""

from lslm_jax.config import (
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
            source="tfds",
            example="pair",
            tfds="wmt14_translate/de-en",
            text_key="en",
            target_key="de",
            valid_split="validation",
            test_split="test",
            seq_len=256,
            packing="bins",
        ),
        task=TaskConfig(objective="seq2seq"),
        tokenizer=TokenizerConfig(vocab_size=32_000),
        model=model_configs.transformer_base,
        train=TrainConfig(steps=100_000, batch_size=128, label_smoothing=0.1),
        optimizer=OptimizerConfig(
            name="adam", learning_rate=7e-4, b2=0.98, eps=1e-9, schedule="rsqrt", warmup_steps=4000, clip=0.0
        ),
        eval=EvalConfig(every=5000),
        generate=GenerateConfig(
            prompts=("The cat sat on the mat.",), max_tokens=128, temperature=0.0, beams=4, length_penalty=0.6
        ),
    )
