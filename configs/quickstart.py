"""A small GPT learns Python from the source files of Python itself: the demonstration that needs nothing else.

python -m lslm_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

import pathlib
import sysconfig

from lslm_jax.config import (
    CheckpointConfig,
    CleanConfig,
    Config,
    DataConfig,
    EvalConfig,
    GenerateConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(files=_standard_library(), valid_fraction=0.05, seq_len=256),
        clean=CleanConfig(
            bad_utf8="skip", min_chars=200, max_chars=200_000
        ),  # some of Python's own tests are not UTF-8
        tokenizer=TokenizerConfig(model="bpe", vocab_size=4096, sample_bytes=10_000_000),
        model=ModelConfig(
            num_layers=4,
            d_model=192,
            num_heads=6,
            max_length=256,
            positions="rotary",
            norm="rmsnorm",
            activation="relu2",
            bias=False,
            qk_norm=True,
        ),
        train=TrainConfig(steps=900, batch_size=8),
        optimizer=OptimizerConfig(name="muon", learning_rate=5e-3, schedule="wsd", warmup_steps=50, final_ratio=0.0),
        checkpoint=CheckpointConfig(every=300),
        eval=EvalConfig(every=300),
        generate=GenerateConfig(
            prompts=("def main():\n", "import os\n", "class Stack:\n"), max_tokens=96, temperature=0.7, top_p=0.95
        ),
        log=LogConfig(every=10),
    )


def _standard_library() -> tuple[str, ...]:
    """Globs of the library's modules and packages, without what was installed beside them."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    packages = [path for path in sorted(root.iterdir()) if (path / "__init__.py").is_file()]
    return (f"{root}/*.py", *(f"{path}/**/*.py" for path in packages if path.name != "site-packages"))
