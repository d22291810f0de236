"""The One Billion Word benchmark from TFDS: the classic JAX language model, 8 layers of it.

python -m lslm_jax.main --config=configs/lm1b.py --workdir=runs/lm1b
"""

from lslm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    GenerateConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(source="tfds", tfds="lm1b", valid_split="test", seq_len=128),
        tokenizer=TokenizerConfig(model="unigram", vocab_size=30_000),
        model=ModelConfig(
            num_layers=8, d_model=512, num_heads=8, d_ff=2048, max_length=2048, activation="relu", dtype="bfloat16"
        ),
        train=TrainConfig(steps=500_000, batch_size=256),
        optimizer=OptimizerConfig(learning_rate=1.6e-3, schedule="rsqrt", b2=0.98, warmup_steps=1000),
        checkpoint=CheckpointConfig(every=10_000),
        eval=EvalConfig(every=10_000),
        generate=GenerateConfig(prompts=("I love to ",), max_tokens=40, temperature=0.6, top_k=20),
    )
