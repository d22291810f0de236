r"""A small Transformer translates English into German, from scratch, on the 29,000 captions of Multi30k.

    python -m lslm_jax.main --config=configs/transformer_multi30k.py --workdir=runs/multi30k \
        --config.data.files=multi30k/train.en.gz,multi30k/train.de.gz \
        --config.data.valid_files=multi30k/val.en.gz,multi30k/val.de.gz \
        --config.data.test_files=multi30k/test2016.en.gz,multi30k/test2016.de.gz

The files are data/task1/raw of github.com/multi30k/dataset. Then, on the test set,

    python -m lslm_jax.main evaluate --workdir=runs/multi30k --split=test --best

Measured on 2026-11-26 on two CPU cores of 145 GFLOP/s: 51 minutes with three evaluations by beam search; test2016 BLEU
35.5, chrF 59.1 (beam 4), BLEU 33.8, chrF 58.3 without beams (`--config.generate.beams=1`). On the validation set BLEU
was 27.6, 32.9 and 35.5 after 600, 1,200 and 1,800 steps.
"""

from lslm_jax.config import (
    CheckpointConfig,
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
            example="pair",
            files=("multi30k/train.en.gz", "multi30k/train.de.gz"),
            valid_files=("multi30k/val.en.gz", "multi30k/val.de.gz"),
            test_files=("multi30k/test2016.en.gz", "multi30k/test2016.de.gz"),
            document="line",
            seq_len=128,
            packing="bins",
        ),
        task=TaskConfig(objective="seq2seq"),
        tokenizer=TokenizerConfig(vocab_size=6000),
        model=ModelConfig(
            family="encoder_decoder",
            num_layers=3,
            d_model=256,
            num_heads=4,
            d_ff=1024,
            max_length=128,
            positions="sinusoidal",
            activation="relu",
            embed_scale=True,
            init="fan_in",
            norm_place="before",
            dropout=0.1,
        ),
        train=TrainConfig(steps=1800, batch_size=16, label_smoothing=0.1),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, b2=0.98, schedule="linear", warmup_steps=200, final_ratio=0.0, weight_decay=0.01
        ),
        checkpoint=CheckpointConfig(every=300, best="eval/bleu"),
        eval=EvalConfig(every=600),
        generate=GenerateConfig(
            prompts=("Two young men are playing football in the park.",), max_tokens=96, temperature=0.0, beams=4
        ),
    )
