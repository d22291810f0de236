"""Every shipped config: sound, buildable, and able to take one shrunken step."""

import math
import pathlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from lslm_jax.config import DataConfig, loading, validation
from lslm_jax.data import dataloader
from lslm_jax.models import attention
from lslm_jax.models.build_model import build_model
from lslm_jax.parallel.sharding import make_mesh, to_global
from lslm_jax.train.optimizers import make_optimizer
from lslm_jax.train.train_state import abstract_state, init_state
from lslm_jax.train.train_step import make_train_step

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))
# One for each family; compiling a step costs 3 to 10 seconds. tests/test_applications.py trains for each objective.
COMPILED = ("quickstart",)  # on several devices; tests/test_applications.py trains every family


def choices(config):
    """Among how many things a model without knowledge guesses."""
    match config.task.objective:
        case "classification":
            return config.model.num_labels
        case "qa":
            return config.data.seq_len
        case _:
            return config.model.vocab_size


def resolved(config):
    """The config with a vocabulary, and two labels where it has any."""
    model = validation.resolve_vocabulary(config.model, config.tokenizer.vocab_size)
    return replace(config, model=validation.resolve_labels(model, 2))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_sound_survives_json_and_says_its_command(path):
    config = validation.validate(loading.load(str(path)))
    assert loading.from_dict(loading.to_dict(config)) == config
    text = path.read_text()
    assert f"python -m lslm_jax.main --config=configs/{path.name}" in text
    if not config.tokenizer.path and "--pretrained" not in text:  # a vocabulary of its own, all of which is of use
        assert config.model.vocab_size <= 1.01 * config.tokenizer.vocab_size


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_builds_its_model(path):
    config = validation.validate(loading.load(str(path)))
    model = resolved(config).model
    shapes = jax.eval_shape(lambda: build_model(model, jax.random.key(0), config.task.objective))
    assert shapes.embed.shape[0] >= model.vocab_size


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem not in COMPILED], ids=lambda path: path.stem)
def test_a_train_step_of_a_config_shrunk_by_smoke_traces_and_keeps_the_shapes_of_the_state(path, tmp_path):
    config, batch = shrunk(path, tmp_path)
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        state = abstract_state(config, optimizer, mesh)
        next_state, metrics = jax.eval_shape(make_train_step(config, optimizer, attention.XLA), state, batch)
    assert shapes(next_state) == shapes(state)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem in COMPILED else pytest.mark.exhaustive) for path in CONFIGS],
    ids=lambda path: path.stem,
)
def test_a_config_shrunk_by_smoke_takes_a_step(path, tmp_path):
    config, batch = shrunk(path, tmp_path)
    mesh = make_mesh(config, None if path.stem in COMPILED else jax.devices()[:1])
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        step = jax.jit(make_train_step(config, optimizer, attention.XLA))
        state, metrics = step(init_state(config, optimizer, mesh), to_global(batch, mesh))
    assert int(state.step) == 1
    spread = 0.5 if config.model.init == "fan_in" else 0.0  # logits of variance one cost half a nat
    assert abs(float(metrics["loss"]) - math.log(choices(config)) - spread) < 0.5


def shrunk(path, directory):
    """The config made small by `smoke`, on synthetic data, and its first batch."""
    config = loading.load(f"{path}:smoke")
    none = DataConfig()
    held_out = {
        key: getattr(none, key) for key in ("valid_files", "valid_fraction", "valid_split", "test_files", "test_split")
    }
    data = replace(config.data, source="synthetic", mixture=(), **held_out)
    config = resolved(validation.validate(replace(config, data=data)))
    return config, dataloader.open_train(config, directory, config.model.vocab_size).batch(0)


def shapes(tree):
    return [(jax.tree_util.keystr(path), leaf.shape, leaf.dtype) for path, leaf in jax.tree.leaves_with_path(tree)]
