"""How a run begins: where it stood, from weights that were trained before, or from random ones."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh

from lslm_jax.checkpoint import metadata
from lslm_jax.checkpoint.checkpoint import Checkpoints, latest_step, list_steps
from lslm_jax.checkpoint.integrity import has_manifest
from lslm_jax.config import Config
from lslm_jax.convert import hf_hub, pretrained
from lslm_jax.convert.hf_mapping import differences
from lslm_jax.data.tokenizers.bytes import Bytes
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.errors import CheckpointRefused, DataError, InputMissing
from lslm_jax.runtime import atomic_io
from lslm_jax.runtime.pytree import flatten
from lslm_jax.train.train_state import State, abstract_state, init_state, not_finite


def begin(
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    checkpoints: Checkpoints,
    log: Callable[[str], None],
) -> State:
    """The state that training goes on from.

    The ways a run can begin, in this order:

    1. From its own latest checkpoint: everything, bit for bit.
    2. From the latest weights of another run, or those of a Hugging Face model (`train.init_from`), as far as they fit:
       a body under a new head, say. Step and optimizer start anew.
    3. From random weights.

    Raises:
      CheckpointRefused: a checkpoint does not fit this run or cannot be read.
      DataError: the weights to start from are not all finite, be it in a row that no token uses.
    """
    step = checkpoints.latest_step()
    if step is not None:
        state = checkpoints.restore(step, abstract_state(config, optimizer, mesh), log)
        log(f"resumed from step {step}")
        return state
    state = init_state(config, optimizer, mesh)
    if config.train.init_from:
        start = find_start(config.train.init_from)
        if start.is_pretrained:
            model = _load_pretrained(start.path, config, checkpoints.identity["tokenizer_sha256"], state.model, log)
        else:
            model = checkpoints.load_fitting(start.path, state.model, log, start.step)
        if bad := not_finite(flatten(model)):
            raise DataError(f"{start.path}: {bad[0]} holds values that are not finite ({len(bad)} arrays do)")
        ema = None if state.ema is None else jax.tree.map(jnp.copy, model)
        state = state._replace(model=model, ema=ema)
    return state


class Start(NamedTuple):
    """Weights that a fresh run starts from.

    Attributes:
      path: a Hugging Face model, or the `checkpoints` directory of a run.
      is_pretrained: which of the two.
      step: of the checkpoint; None for the latest.
    """

    path: epath.Path
    is_pretrained: bool
    step: int | None = None


def find_start(init_from: str) -> Start:
    """The weights that `train.init_from` names: a Hugging Face model, a run, or its RUN/checkpoints/N.

    Raises:
      InputMissing: there is no such directory, or it holds neither.
      CheckpointRefused: the run has no checkpoint.
      ConfigError: the model is of a kind that is not supported.
    """
    path = atomic_io.place(hf_hub.local(init_from))
    if atomic_io.exists(path / "checkpoints"):
        latest_step(path / "checkpoints")
        return Start(path / "checkpoints", False)
    if atomic_io.exists(path) and pretrained.is_pretrained(path):
        pretrained.describe(path)
        return Start(path, True)
    if path.name.isdigit() and has_manifest(path):
        return Start(path.parent, False, int(path.name))
    if path.name == "checkpoints" and atomic_io.exists(path):
        latest_step(path)
        return Start(path, False)
    if not atomic_io.exists(path):
        near, steps = atomic_io.similar(path), list_steps(path.parent) if path.name.isdigit() else []
        hint = f"; there are {steps}" if steps else f"; did you mean {near}?" if near else ""
        raise InputMissing(f"train.init_from={init_from} does not exist{hint}")
    raise InputMissing(
        f"train.init_from={init_from} is neither a run (checkpoints/), nor a checkpoint of one (RUN/checkpoints/N), "
        "nor a Hugging Face model (config.json with model_type)"
    )


def check_tokenizer(config: Config, start: Start) -> None:
    """Compares the tokenizer that a config names with that of weights to start from, before data are prepared.

    One that is to be trained on the data is compared when there is one.

    Raises:
      CheckpointRefused: it is another one.
      DataError: the file of the config is no tokenizer.
    """
    path = epath.Path(config.tokenizer.path).expanduser()
    is_given = config.tokenizer.kind == "bytes" or (config.tokenizer.path and path.is_file())
    if not is_given or (config.data.source in ("shards", "synthetic") and not config.data.mixture):
        return
    own = Bytes() if config.tokenizer.kind == "bytes" else load_tokenizer(path)
    if start.is_pretrained:
        directory, theirs = start.path, _sha256_of_pretrained(pretrained.describe(start.path))
    else:
        directory = start.path / str(latest_step(start.path) if start.step is None else start.step)
        theirs = metadata.read(directory)["tokenizer_sha256"]
    if theirs != own.sha256:
        has = "has another vocabulary" if start.is_pretrained else "was made with another tokenizer"
        raise CheckpointRefused(
            f"{directory} {has} ({theirs[:12]}, now {own.sha256[:12]}): its embeddings mean other tokens; set "
            "tokenizer.path to its own"
        )


def _sha256_of_pretrained(source: Any) -> str:
    return load_tokenizer(pretrained.vocabulary(pretrained.tokenizer_directory(source))).sha256


def _load_pretrained(
    directory: epath.Path, config: Config, tokenizer_sha256: str, model: Any, log: Callable[[str], None]
) -> Any:
    """A model with the weights of a Hugging Face directory; what it lacks of a head stays as it is."""
    source = pretrained.describe(directory)
    theirs = _sha256_of_pretrained(source)
    if theirs != tokenizer_sha256:
        raise CheckpointRefused(
            f"{directory} has another vocabulary ({theirs[:12]}, now {tokenizer_sha256[:12]}): its embeddings mean "
            f"other tokens; set tokenizer.path to its own"
        )
    if unlike := differences(config.model, source.model):
        raise CheckpointRefused(f"{directory} has {unlike[0]}, unlike this run")
    loaded = pretrained.load(source, config.task.objective, model, model, config.data.labels)
    log(f"started from the weights of {directory}" + f"; fresh: {', '.join(loaded.fresh)}" * bool(loaded.fresh))
    return loaded.model
