"""The settings of a run: dataclasses that config files import."""

from lslm_jax.config.schema import (
    ROLES,
    CheckpointConfig,
    CleanConfig,
    Config,
    DataConfig,
    EvalConfig,
    GenerateConfig,
    LogConfig,
    MeshConfig,
    MixtureSource,
    ModelConfig,
    OptimizerConfig,
    Source,
    TaskConfig,
    TokenizerConfig,
    TrainConfig,
)

__all__ = [
    "ROLES",
    "CheckpointConfig",
    "CleanConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "GenerateConfig",
    "LogConfig",
    "MeshConfig",
    "MixtureSource",
    "ModelConfig",
    "OptimizerConfig",
    "Source",
    "TaskConfig",
    "TokenizerConfig",
    "TrainConfig",
]
