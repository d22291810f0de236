"""What `import` does: reads a pretrained model onto the mesh, compares it, makes a run directory of it."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from lslm_jax.checkpoint import checkpoint, provenance
from lslm_jax.checkpoint.checkpoint import Checkpoints
from lslm_jax.config import Config, DataConfig, loading, validation
from lslm_jax.convert import hf_reference, parity, pretrained, state_dict
from lslm_jax.convert.parity import Comparison
from lslm_jax.convert.pretrained import Pretrained
from lslm_jax.data.prepare import data_manifest
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.errors import ConfigError
from lslm_jax.models.build_model import build_model
from lslm_jax.runtime import atomic_io
from lslm_jax.runtime.pytree import flatten
from lslm_jax.train.train_state import State, abstract_model, num_parameters

_PREPARED = {"data.source": "shards"}  # what the manifest says it was prepared with: nothing but a vocabulary


def settle(config: Config, source: Pretrained) -> Config:
    """The config of a run that has a model and no data, with the labels that the model's head tells apart."""
    objective, given = config.task.objective, config.data
    says = given.source != "synthetic" and not given.mixture
    labels = given.labels or pretrained.labels(source, objective)
    data = DataConfig(
        source="shards",
        example=given.example if says else pretrained.example_of(objective),
        prefix=given.prefix,
        labels=labels,
        seq_len=given.seq_len,
        source_len=given.source_len,
    )
    return replace(config, data=data)


def with_labels(config: Config) -> Config:
    """The config with as many labels as it names."""
    if config.task.objective not in ("classification", "tagging"):
        return config
    return replace(config, model=validation.resolve_labels(config.model, len(config.data.labels)))


def read(source: Pretrained, config: Config, mesh: Mesh) -> tuple[Any, dict[str, Any]]:
    """Reads the weights onto the mesh; a head that the directory lacks is made from the seed.

    Returns:
      `weights.Loaded`, and what there is to tell: `model_type`, `objective`, `parameters`, `files`, `bytes` of these,
      `dtype` of the weights in them, names that were `skipped` knowingly, and parameters that are `fresh`.

    Raises:
      DataError, InputMissing: as `pretrained.load`.
    """
    tensors = pretrained.tensors(source)
    # What is compared must not be rounded on the way; weights are float32 whatever the model runs in.
    exact = replace(config, model=replace(config.model, dtype="float32"))
    abstract = abstract_model(exact, mesh)
    lacking = state_dict.lacking_heads(tensors, source.family, source.model, config.task.objective, abstract)
    fresh = _make(lacking, config, abstract) if lacking else None
    loaded = pretrained.load(source, config.task.objective, abstract, fresh)
    paths = sorted({tensor.path for tensor in tensors.values()})
    summary = {
        "model_type": source.family.model_type,
        "objective": config.task.objective,
        "parameters": num_parameters(loaded.model),
        "files": [path.name for path in paths],
        "bytes": sum(path.stat().length for path in paths),
        "dtype": ", ".join(sorted({str(tensor.dtype) for tensor in tensors.values()})),
        "skipped": sorted(loaded.skipped),
        "fresh": loaded.fresh,
    }
    return loaded, summary


def _make(names: list[str], config: Config, abstract: Any) -> dict[str, jax.Array]:
    """These parameters of a random model; what is not asked for is not made."""
    shardings = {name: leaf.sharding for name, leaf in flatten(abstract).items() if name in names}

    def make() -> dict[str, jax.Array]:
        made = flatten(build_model(config.model, jax.random.key(config.seed), config.task.objective))
        return {name: made[name] for name in names}

    return jax.jit(make, out_shardings=shardings)()


def compare(loaded: Any, source: Pretrained, config: Config, file: str | None, tolerance: float) -> Comparison:
    """Compares what was read with a file, or with transformers.

    Raises:
      ConfigError: transformers is not installed.
      InputMissing, DataError: the file, or the directory, cannot be read.
    """
    objective = config.task.objective
    if file:
        reference = parity.read_reference(atomic_io.place(file), config.model)
    else:
        reference = hf_reference.read(source, objective, parity.sample_rows(source, config.seed))
    return parity.compare(loaded.model, objective, reference, tolerance, heads=not loaded.fresh)


def verdict(source: Pretrained, found: Comparison, tolerance: float) -> str:
    """What went wrong, in a line."""
    by = "" if found.max_difference is None else f" by {found.max_difference:.2g}"
    what = f"{'logits' if by else 'hidden states'} differ{by} from those of {found.name} (tolerance {tolerance:g})"
    if found.parts_at:
        where = f"they first part at {found.parts_at} (by {found.layers[found.parts_at]:.2g}, relative)"
    else:
        where = "they first part at the output layer" if found.layers else "of hidden states it does not tell"
    return f"{source.directory}: {what}; {where}"


def require_free(workdir: epath.Path) -> None:
    """Refuses a directory that holds a run, or data prepared for one.

    Raises:
      ConfigError: it does.
    """
    manifest = workdir / "data" / "manifest.json"
    has_data = manifest.exists() and atomic_io.read_json(manifest).get("settings") != _PREPARED
    if has_data or (workdir / "metrics.jsonl").exists() or checkpoint.list_steps(workdir / "checkpoints"):
        raise ConfigError(f"{workdir} holds a run already: choose another --workdir")


def write(workdir: epath.Path, model: Any, config: Config, facts: dict[str, Any], mesh: Mesh) -> None:
    """Makes a run of a model, which stands at step 0; its checkpoint comes last, without which it is none.

    Args:
      workdir: that is free.
      model: with its weights.
      config: resolved.
      facts: of the vocabulary and the labels, as a manifest has them.
      mesh: where the model lies.

    Raises:
      SaveError: the directory cannot be written.
    """
    data_dir = workdir / "data"
    words = load_tokenizer(epath.Path(config.tokenizer.path))
    with atomic_io.saving(data_dir):
        data_dir.mkdir(parents=True, exist_ok=True)
    manifest = {
        "version": data_manifest.VERSION,
        "settings": _PREPARED,
        "given_tokenizer": data_manifest.given_sha256(config),
        "inputs": {},
        "labels": facts["labels"],
        "tokenizer": words.facts() | {"file": words.save(data_dir)},
        "splits": {},
        "dropped": {},
    }
    atomic_io.write_json(data_dir / "manifest.json", manifest)
    atomic_io.write(workdir / "config.json", loading.to_json(config).encode())
    made_by = provenance.make(config, words.sha256, data_manifest.content_sha256(manifest), mesh)
    checkpoints = Checkpoints(workdir, config.checkpoint, made_by)
    zero = jnp.zeros((), jnp.int32)
    checkpoints.save(State(step=zero, model=model, optimizer=None, ema=None, skipped=zero))
    checkpoints.close()
