"""One small model, its train step compiled once for each mesh that a test asks for."""

import functools
from dataclasses import replace

from lslm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TokenizerConfig, TrainConfig
from lslm_jax.config.validation import validate
from lslm_jax.plan.compile_step import compile_step, resolve
from lslm_jax.plan.topology import parse

LAYERS = 3
CONFIG = Config(
    model=ModelConfig(
        num_layers=LAYERS, d_model=64, num_heads=8, vocab_size=512, max_length=32, tie_embeddings=False, bias=False
    ),
    data=DataConfig(source="synthetic", seq_len=32),
    tokenizer=TokenizerConfig(vocab_size=512),
    train=TrainConfig(batch_size=16, steps=1000),
    mesh=MeshConfig(data=1, fsdp=-1),
)


CPU = parse("cpu:8")


def compiled(model=CONFIG.model, **mesh):
    """compiled(fsdp=8): the step on eight simulated CPU devices."""
    return _compiled(MeshConfig(**({"data": 1} | mesh)), model)


@functools.cache
def _compiled(mesh, model):
    return compile_step(resolve(validate(replace(CONFIG, mesh=mesh, model=model))), CPU)
