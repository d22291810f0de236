r"""SmolLM2-135M learns to answer: full fine-tuning on conversations, by the chat template that comes with it.

    python -m lslm_jax.main --config=configs/smollm2_sft.py --pretrained=DIR --workdir=runs/smollm2_sft \
        --config.data.files=chat/train.jsonl --config.data.valid_files=chat/valid.jsonl
    python -m lslm_jax.main generate --workdir=runs/smollm2_sft --prompt="Name a colour."

DIR holds HuggingFaceTB/SmolLM2-135M-Instruct, or any other decoder. Each line of the files is a conversation,
`{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}`. For a model without a chat
template of its own, as SmolLM2-135M itself, name one, such as --config.data.chat_template=configs/chat.jinja.
"""

from lslm_jax.config import (
    CheckpointConfig,
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
        data=DataConfig(
            example="chat",
            files=("chat/train.jsonl",),
            valid_files=("chat/valid.jsonl",),
            text_key="messages",
            seq_len=1024,
            packing="bins",
        ),
        model=ModelConfig(dtype="bfloat16", remat="dots"),
        train=TrainConfig(steps=2000, batch_size=32, accumulate=4),
        optimizer=OptimizerConfig(
            learning_rate=3e-5, schedule="cosine", warmup_steps=100, final_ratio=0.1, weight_decay=0.0
        ),
        checkpoint=CheckpointConfig(every=500, best="eval/loss"),
        eval=EvalConfig(every=500),
        generate=GenerateConfig(prompts=("What is the capital of France?",), max_tokens=128, temperature=0.0),
    )
