r"""Llama 3, 8B parameters, fine-tuned by low-rank adapters on plain text: 0.5 % of the weights are trained.

    python -m lslm_jax.main --config=configs/llama3_8b_lora.py --pretrained=DIR --workdir=runs/llama3_lora \
        --config.data.files=texts/ --config.data.valid_fraction=0.01

DIR holds meta-llama/Meta-Llama-3-8B, or another model of the kind. Weights are float32 and split over all devices: 8 of
16 GB hold them. `export --adapter` writes what was trained in PEFT's format, 168 MB.
"""

from dataclasses import replace

from lslm_jax.config import CheckpointConfig, Config, DataConfig, EvalConfig, MeshConfig, OptimizerConfig, TrainConfig
from lslm_jax.models import model_configs


def get_config() -> Config:
    return Config(
        data=DataConfig(files=("texts/",), valid_fraction=0.01, seq_len=2048),
        model=replace(model_configs.llama_8b, lora_rank=16, lora_alpha=32.0, remat="full"),
        train=TrainConfig(steps=1000, batch_size=32),
        optimizer=OptimizerConfig(learning_rate=2e-4, weight_decay=0.0, warmup_steps=50),
        mesh=MeshConfig(preset="fsdp"),
        checkpoint=CheckpointConfig(every=500, keep=1),
        eval=EvalConfig(every=500),
    )
