"""What the benchmarks share: the models they measure, what the device can do at best, and how times are taken."""

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lslm_jax.config import Config, DataConfig, ModelConfig, TaskConfig, TokenizerConfig, TrainConfig, loading
from lslm_jax.config.validation import validate
from lslm_jax.errors import ConfigError
from lslm_jax.models import model_configs

Seconds = float


def _config(model: ModelConfig, batch_size: int, seq_len: int, objective: Any = "causal") -> Config:
    return Config(
        model=replace(model, vocab_size=model.vocab_size or 50_257, max_length=max(model.max_length, seq_len)),
        data=DataConfig(source="synthetic", seq_len=seq_len, mask_documents=objective != "causal"),
        task=TaskConfig(objective=objective),
        tokenizer=TokenizerConfig(vocab_size=model.vocab_size or 50_257),
        train=TrainConfig(steps=1000, batch_size=batch_size),
    )


_gpt2_small = replace(model_configs.gpt2_small, dtype="bfloat16")
_gpt2_xl = replace(model_configs.gpt2_xl, dtype="bfloat16", remat="save_attention")
_llama_1b = replace(model_configs.llama_1b, remat="save_attention")
_llama_8b = replace(model_configs.llama_8b, remat="save_attention")
_t5_base = replace(model_configs.t5_small, num_layers=12, d_model=768, num_heads=12, d_ff=3072)

MODELS = {
    # What the peers on a laptop are compared with: 5.3M parameters, float32.
    "tiny": _config(ModelConfig(num_layers=4, d_model=256, num_heads=8, vocab_size=8192), 8, 256),
    "gpt2_small": _config(_gpt2_small, 32, 1024),
    "gpt2_xl": _config(_gpt2_xl, 16, 1024),
    "llama_1b": _config(_llama_1b, 16, 2048),
    "llama_8b": _config(_llama_8b, 2, 8192),
    # Eight of its layers: what one device holds with all of its optimizer state.
    "llama_8b_part": _config(replace(_llama_8b, num_layers=8), 2, 8192),
    "bert_base": _config(replace(model_configs.bert_base, vocab_size=30_522, dtype="bfloat16"), 64, 512, "masked"),
    "t5_base": _config(replace(_t5_base, vocab_size=32_128, dtype="bfloat16"), 32, 512, "seq2seq"),
}


def add_model(flags: argparse.ArgumentParser) -> None:
    """Flags that name a model; any `--config.KEY=VALUE` changes it, as on the command line of the trainer."""
    flags.add_argument("--model", choices=MODELS, default="tiny")


def configured(flags: argparse.ArgumentParser) -> tuple[argparse.Namespace, Config]:
    """The parsed flags, and the config of the model as they change it."""
    args, rest = flags.parse_known_args()
    if strange := [flag for flag in rest if not flag.startswith("--config.")]:
        flags.error(f"unrecognized arguments: {' '.join(strange)}")
    settings = [setting.removeprefix("--config.").partition("=") for setting in rest]
    args.changes = {key: text for key, _, text in settings}
    try:
        return args, validate(loading.override(MODELS[args.model], list(args.changes.items())))
    except ConfigError as error:
        flags.error(str(error))


def about() -> dict[str, Any]:
    """The device and the versions that a figure holds for."""
    device = jax.devices()[0]
    return {"device": device.device_kind, "devices": jax.device_count(), "jax": jax.__version__}


def windows(step: Callable[[], Any], *, warm: int, count: int, length: int) -> list[Seconds]:
    """Seconds a step of each window of steps, awaited at its end alone."""
    for _ in range(warm):
        last = step()
    jax.block_until_ready(last)
    found = []
    for _ in range(count):
        begun = time.perf_counter()
        for _ in range(length):
            last = step()
        jax.block_until_ready(last)
        found.append((time.perf_counter() - begun) / length)
    return found


def busiest(step: Callable[[], Any], count: int, steps: int = 3) -> dict[str, Any]:
    """Milliseconds a step of a GPU's busiest kernels, those of one name together, and of all the others."""
    with tempfile.TemporaryDirectory() as directory:
        jax.block_until_ready(step())
        with jax.profiler.trace(directory):
            for _ in range(steps):
                last = step()
            jax.block_until_ready(last)
        paths = list(pathlib.Path(directory).rglob("*.xplane.pb"))
        planes = [plane for path in paths for plane in jax.profiler.ProfileData.from_file(str(path)).planes]
    spent: dict[str, float] = {}
    for plane in planes:
        for line in plane.lines if plane.name.startswith("/device:GPU") else ():
            for event in line.events if line.name.startswith("Stream") else ():
                spent[event.name] = spent.get(event.name, 0.0) + event.duration_ns / 1e6 / steps
    ordered = sorted(spent.items(), key=lambda pair: -pair[1])
    named = {name: round(each, 3) for name, each in ordered[:count]}
    return {"kernels_ms": named, "other_kernels_ms": round(sum(each for _, each in ordered[count:]), 3)}


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    """Median, least and most."""
    named = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in named.items()}


def matmul_rate(dtype: str) -> float:
    """FLOP/s of a large product of random matrices: what any model could reach at best, as the device is now."""
    size = 2048 if jax.devices()[0].platform == "cpu" else 8192
    a, b = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in range(2))
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / min(windows(lambda: product(a, b), warm=2, count=5, length=4))


def copy_rate() -> float:
    """Bytes/s read and written by a large copy."""
    size = 1 << (26 if jax.devices()[0].platform == "cpu" else 30)
    x = jnp.ones(size, jnp.float32)
    add = jax.jit(lambda x: x + 1.0)
    return 2 * x.nbytes / min(windows(lambda: add(x), warm=2, count=5, length=4))


def tell(result: dict[str, Any]) -> None:
    """One line of JSON."""
    print(json.dumps(result), flush=True)
