"""How a run begins: where it stood, from weights that were trained before, or from random ones."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh

from lslm_jax.config import Config
from lslm_jax.convert import hub, pretrained
from lslm_jax.convert.family import differences
from lslm_jax.data import tokenizer as tokenizers
from lslm_jax.errors import CheckpointRefused, DataError
from lslm_jax.train.checkpoint import Checkpoints
from lslm_jax.train.state import State, abstract_state, init_state, not_finite
from lslm_jax.trees import flatten


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
        source = hub.local(config.train.init_from)
        if pretrained.is_pretrained(source):
            model = _load_pretrained(source, config, checkpoints.identity["tokenizer_sha256"], state.model, log)
        else:
            model = checkpoints.load_fitting(source / "checkpoints", state.model, log)
        if bad := not_finite(flatten(model)):
            raise DataError(f"{source}: {bad[0]} holds values that are not finite ({len(bad)} arrays do)")
        ema = None if state.ema is None else jax.tree.map(jnp.copy, model)
        state = state._replace(model=model, ema=ema)
    return state


def _load_pretrained(
    directory: epath.Path, config: Config, tokenizer_sha256: str, model: Any, log: Callable[[str], None]
) -> Any:
    """A model with the weights of a Hugging Face directory; what it lacks of a head stays as it is."""
    source = pretrained.describe(directory)
    theirs = tokenizers.load(pretrained.vocabulary(pretrained.tokenizer_directory(source))).sha256
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
