"""Evaluation over a finite set is exact: each document counts once, whatever the batch and the mesh."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest
from etils import epath

from lslm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TokenizerConfig, TrainConfig, validation
from lslm_jax.config.mesh_axes import mesh_axes
from lslm_jax.data import dataloader
from lslm_jax.data.prepare.prepare import prepare
from lslm_jax.data.shards import Shards
from lslm_jax.data.tokenizers.special_tokens import special_ids
from lslm_jax.evaluate import evaluators
from lslm_jax.evaluate.types import Setting
from lslm_jax.models import attention
from lslm_jax.models.build_model import build_model
from lslm_jax.parallel.sharding import make_mesh, shardings_of

SPECIAL = special_ids({"vocab_size": 259, "bos_id": 1, "eos_id": 2}, "decoder")
LENGTHS = [3, 50, 16, 0, 120, 7, 31, 64, 5, 90, 1, 12, 33]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    root = tmp_path_factory.mktemp("data")
    texts = ["".join(chr(97 + (i * 7 + j) % 26) for j in range(n)) for i, n in enumerate(LENGTHS)]
    (root / "valid.txt").write_text("\n".join(texts))
    (root / "train.txt").write_text("something else\n" * 20)
    config = Config(
        model=ModelConfig(num_layers=2, d_model=32, num_heads=4, max_length=32, vocab_size=259),
        data=DataConfig(
            files=(f"{root}/train.txt",),
            valid_files=(f"{root}/valid.txt",),
            document="line",
            seq_len=16,
            dir=f"{root}/data",
        ),
        tokenizer=TokenizerConfig(kind="bytes"),
        train=TrainConfig(batch_size=8),
    )
    config = validation.validate(config)
    prepare(config, epath.Path(config.data.dir), lambda line: None)
    return config


@pytest.fixture(scope="module")
def model(config):
    return jax.jit(lambda: build_model(config.model, jax.random.key(1)))()


def evaluate(config: Config, model) -> dict[str, float]:
    mesh = make_mesh(config, jax.devices()[: abs(math.prod(mesh_axes(config.mesh).values()))])
    with jax.set_mesh(mesh):
        data = dataloader.open_eval(config, epath.Path(config.data.dir), 259)
        setting = Setting(config, None, [], SPECIAL, attention.XLA, mesh)
        return evaluators.make(setting, data)(jax.device_put(model, shardings_of(model, mesh))).metrics


@pytest.fixture(scope="module")
def by_hand(config: Config, model) -> dict[str, float]:
    """One piece of one document at a time, in float64."""
    shards = Shards.open(epath.Path(config.data.dir) / "valid")
    forward = jax.jit(lambda tokens: model.logits(model(tokens)))
    nll, correct, count = 0.0, 0, 0
    for start, end in zip(shards.starts, shards.starts[1:], strict=False):
        ids = np.concatenate([[1], shards.take(np.arange(start, end)), [2]]).astype(np.int32)
        for first in range(0, len(ids) - 1, 16):
            tokens, targets = ids[first : first + 16], ids[first + 1 : first + 17]
            tokens = tokens[: len(targets)]
            padded = np.zeros(16, np.int32)
            padded[: len(tokens)] = tokens
            logits = np.asarray(forward(padded[None]), np.float64)[0, : len(tokens), :259]
            top = logits.max(-1)
            normaliser = top + np.log(np.exp(logits - top[:, None]).sum(-1))
            nll += (normaliser - logits[np.arange(len(targets)), targets]).sum()
            correct += (logits.argmax(-1) == targets).sum()
            count += len(targets)
    num_bytes = shards.num_tokens
    return {
        "loss": nll / count,
        "perplexity": math.exp(nll / count),
        "bits_per_byte": nll / math.log(2) / num_bytes,
        "accuracy": correct / count,
        "tokens": count,
    }


@pytest.mark.parametrize(
    ("packing", "batch_size", "mesh"),
    [
        ("pad", 8, (1, 1, 1)),
        ("bins", 8, (1, 1, 1)),
        ("bins", 3, (1, 1, 1)),
        ("bins", 64, (2, 2, 2)),
        pytest.param("bins", 8, (8, 1, 1), marks=pytest.mark.exhaustive),
    ],
)
def test_every_document_counts_once_whatever_the_packing_the_batch_and_the_mesh(
    config, model, by_hand, packing, batch_size, mesh
):
    data, fsdp, tensor = mesh
    config = replace(
        config,
        data=replace(config.data, packing=packing),
        train=replace(config.train, batch_size=batch_size),
        mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
    )
    assert by_hand["tokens"] == sum(LENGTHS) + np.count_nonzero(LENGTHS)  # each with its end; the empty one is dropped
    assert evaluate(config, model) == pytest.approx(by_hand, rel=2e-6)
