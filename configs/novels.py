r"""A Llama of 15M parameters on English novels, as JSON lines `{"id": ..., "text": ...}`.

python -m lslm_jax.main --config=configs/novels.py --workdir=runs/novels \
        --config.data.files=novels/train.jsonl.gz --config.data.valid_files=novels/valid.jsonl.gz
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
    TokenizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(files=("novels/train.jsonl.gz",), valid_files=("novels/valid.jsonl.gz",), seq_len=512),
        clean=CleanConfig(whitespace="trim", deduplicate="near"),
        tokenizer=TokenizerConfig(vocab_size=8192),
        model=ModelConfig(
            num_layers=8,
            d_model=384,
            num_heads=6,
            num_kv_heads=2,
            d_ff=1024,
            max_length=512,
            positions="rotary",
            norm="rmsnorm",
            activation="silu",
            gated=True,
            bias=False,
        ),
        train=TrainConfig(steps=5000, batch_size=32),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200),
        checkpoint=CheckpointConfig(every=500, best="eval/loss"),
        eval=EvalConfig(every=500),
        generate=GenerateConfig(prompts=("It was a dark and stormy night",), temperature=0.8, top_p=0.95),
    )
