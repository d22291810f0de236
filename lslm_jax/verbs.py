"""What each verb of the command line does: opens the rooms, puts them together, returns the JSON that it ends with."""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from lslm_jax import atomic, config_checks, config_loading
from lslm_jax.config import Config
from lslm_jax.data import pipeline, tokenizer
from lslm_jax.data.prepare import prepare as prepare_data
from lslm_jax.errors import ConfigError, DataError, InputMissing, SaveError
from lslm_jax.evaluate import metrics, tasks
from lslm_jax.generate import decode
from lslm_jax.models import attention
from lslm_jax.models.attention import Backend
from lslm_jax.observe import json_values
from lslm_jax.progress import say
from lslm_jax.sharding import make_mesh
from lslm_jax.train import checkpoint, identity
from lslm_jax.train.loop import train as train_loop
from lslm_jax.train.state import abstract_model

GZIP_LIMIT = 1 << 26  # bytes of held-out text above which the comparison with gzip is left out: it takes seconds


def prepare(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """`prepare`: raw text to shards; returns what `data.prepare` counts."""
    return prepare_data(config, _data_dir(config, _workdir(flags)), say)


def train(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """`train`: prepares what is missing, trains from wherever the run stands, evaluates; returns the run's summary."""
    mesh = make_mesh(config)  # before anything slow: it may be refused
    workdir = _workdir(flags)
    result = workdir / "result.json"
    finished = json.loads(result.read_text()) if result.exists() else {"step": 0}
    if finished["step"] >= config.train.steps:
        say(f"{workdir} is complete: all {config.train.steps} steps are done (raise train.steps to go on)")
        return finished

    data_dir = _data_dir(config, workdir)
    prepare_data(config, data_dir, say)
    config, facts = _resolve(config, data_dir)
    atomic.write(workdir / "config.json", config_loading.to_json(config).encode())
    with jax.set_mesh(mesh):
        hosts = jax.process_index(), jax.process_count()
        data = pipeline.open_train(config, data_dir, config.model.vocab_size, *hosts)
        held_out = pipeline.open_eval(config, data_dir, config.model.vocab_size, *hosts)
        if config.checkpoint.best and not held_out:
            raise ConfigError("checkpoint.best needs held-out documents: set data.valid_files, _fraction or _split")
        backend = _backend(config, mesh, [data, *held_out.values()])
        made_by = identity.make(config, facts["tokenizer"]["sha256"], facts["sha256"], mesh)
        summary = train_loop(
            config,
            workdir,
            mesh,
            data,
            backend,
            checkpoint.Checkpoints(workdir, config.checkpoint, made_by),
            evaluate=tasks.language_modelling(config, held_out, backend, mesh) if held_out else None,
            sample=_sampler(config, data_dir) if config.generate.prompts else None,
        )
    summary = json_values(summary | _gzip_baseline(held_out, data_dir))
    atomic.write(result, json.dumps(summary).encode() + b"\n")
    return summary


def evaluate(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """`evaluate`: a checkpoint's metrics on all held-out documents."""
    mesh = make_mesh(config)
    workdir = _workdir(flags)
    data_dir = _data_dir(config, workdir)
    config, _ = _resolve(config, data_dir)
    with jax.set_mesh(mesh):
        held_out = pipeline.open_eval(
            config, data_dir, config.model.vocab_size, jax.process_index(), jax.process_count()
        )
        if not held_out:
            raise InputMissing(f"{data_dir} holds no validation documents: set data.valid_files, _fraction or _split")
        model, step = _load_model(config, flags, mesh)
        evaluator = tasks.language_modelling(config, held_out, _backend(config, mesh, list(held_out.values())), mesh)
        results = {f"eval/{name}": value for name, value in evaluator(model)}
    return json_values({"step": step, **results, **_gzip_baseline(held_out, data_dir)})


def generate(config: Config, flags: argparse.Namespace) -> dict[str, Any] | None:
    """`generate`: continues prompts on stdout, streaming a single one; with --json, a JSON line for each."""
    prompts = _prompts(flags)
    mesh = make_mesh(replace(config, train=replace(config.train, batch_size=len(jax.devices()), accumulate=1)))
    data_dir = _data_dir(config, _workdir(flags))
    config, _ = _resolve(config, data_dir)
    words = _tokenizer(data_dir)
    with jax.set_mesh(mesh):
        model, step = _load_model(config, flags, mesh)
        if flags.json or len(prompts) > 1:
            _print_all(config, model, words, prompts, step, flags.json)
        else:
            _stream(config, model, words, prompts[0])
    return None


def _workdir(flags: argparse.Namespace) -> epath.Path:
    """The run directory, made if it is missing.

    Raises:
      SaveError: it cannot be written.
    """
    workdir = epath.Path(flags.workdir).expanduser().absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"cannot create {workdir}: {error.strerror}") from error
    if workdir.as_uri().startswith("file:") and not os.access(workdir, os.W_OK):
        raise SaveError(f"cannot write in {workdir}: permission denied for user id {os.getuid()}")
    return workdir


def _data_dir(config: Config, workdir: epath.Path) -> epath.Path:
    return epath.Path(config.data.dir).expanduser().absolute() if config.data.dir else workdir / "data"


def _resolve(config: Config, data_dir: epath.Path) -> tuple[Config, dict[str, Any]]:
    """The config with the vocabulary of the prepared data, and that data's manifest with its sha256."""
    if config.data.source == "synthetic" and not config.data.mixture:
        facts = {"tokenizer": {"vocab_size": config.tokenizer.vocab_size, "sha256": ""}, "sha256": ""}
    else:
        path = data_dir / "manifest.json"
        if not path.exists():
            raise InputMissing(f"{data_dir} holds no prepared data (no manifest.json): run prepare or train first")
        facts = atomic.read_json(path)
        # Of the content alone: the same shards may lie elsewhere.
        contents = {name: split["manifest_sha256"] for name, split in facts["splits"].items()}
        facts["sha256"] = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    model = config_checks.resolve_vocabulary(config.model, facts["tokenizer"]["vocab_size"])
    return replace(config, model=model), facts


def _tokenizer(data_dir: epath.Path) -> tokenizer.Tokenizer:
    path = data_dir / "manifest.json"
    if not path.exists():
        raise InputMissing(
            f"{data_dir} holds no tokenizer: this run was trained on synthetic data or its data are gone"
        )
    return tokenizer.load(data_dir / atomic.read_json(path)["tokenizer"]["file"])


def _backend(config: Config, mesh: Mesh, inputs: Sequence[Any]) -> Backend:
    """The attention kernel for the rows of these inputs on this mesh."""
    device = mesh.devices.flat[0]
    gpu = device.platform == "gpu"
    segmented = config.data.mask_documents
    # Counting the documents of every row takes a while, and only cuDNN asks.
    max_segments = max(data.max_segments() for data in inputs) if gpu and segmented else int(segmented)
    return attention.choose(
        config.model.attention,
        platform=device.platform,
        compute_capability=float(device.compute_capability) if gpu else 0.0,
        dtype=config.model.dtype,
        head_dim=config.model.head_dim,
        length=config.data.seq_len,
        max_segments=max_segments,
    )


def _load_model(config: Config, flags: argparse.Namespace, mesh: Mesh) -> tuple[Any, int]:
    """The weights of the checkpoint that the flags name, and its step."""
    directory = _workdir(flags) / "checkpoints"
    if flags.step is not None:
        step = flags.step
        if step not in (steps := checkpoint.list_steps(directory)):
            raise InputMissing(f"no checkpoint of step {step} in {directory}; there are {steps}")
    elif flags.best:
        if not config.checkpoint.best:
            raise ConfigError("--best needs checkpoint.best, the metric to go by")
        step = checkpoint.best_step(directory, config.checkpoint.best)
    else:
        step = checkpoint.latest_step(directory)
    return checkpoint.load_model(directory, abstract_model(config, mesh), step), step


def _gzip_baseline(held_out: Mapping[str, pipeline.EvalInput], data_dir: epath.Path) -> dict[str, float]:
    """What gzip makes of the same held-out text, where it is small enough to ask."""
    if not held_out or sum(part.num_bytes() for part in held_out.values()) > GZIP_LIMIT:
        return {}
    words = _tokenizer(data_dir)
    texts = (words.decode(ids) for part in held_out.values() for ids in part.documents())
    return {"gzip_bits_per_byte": metrics.gzip_bits_per_byte(texts)}


def _prompts(flags: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then those of the file.

    Raises:
      ConfigError: there is none, or one is not text.
      InputMissing, DataError: the file cannot be read or holds none, or not JSON lines with a `prompt` each.
    """
    if not (flags.prompt or flags.prompts):
        raise ConfigError("generate needs --prompt=TEXT or --prompts=FILE")
    prompts = list(flags.prompt or [])
    if not all(map(_is_text, prompts)):
        raise ConfigError("--prompt is not UTF-8")
    return prompts + (list(_read_prompts(epath.Path(flags.prompts))) if flags.prompts else [])


def _read_prompts(path: epath.Path) -> Iterator[str]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputMissing(f"cannot read prompts file {path}: {error.strerror or error}") from error
    if not any(map(bytes.strip, lines)):
        raise InputMissing(f"prompts file {path} is empty")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{path}:{number} is not a JSON object with a "prompt"') from error
        if not _is_text(prompt):
            raise DataError(f'{path}:{number}: "prompt" is not text: {json.dumps(prompt)}')
        yield prompt


def _is_text(prompt: Any) -> bool:
    """Whether it is a string that UTF-8 can spell, which has no half surrogate pairs."""
    return isinstance(prompt, str) and not any("\ud800" <= char <= "\udfff" for char in prompt)


def _sampler(config: Config, data_dir: epath.Path) -> Callable[[Any], str]:
    """Continues the config's prompts, as one text for people to read."""
    words = _tokenizer(data_dir)
    prompts = config.generate.prompts

    def sample(model: Any) -> str:
        results = decode.generate(model, words, [words.encode(p) for p in prompts], config.generate, config.seed)
        return "\n".join(f"--- {p}{result.text}" for p, result in zip(prompts, results, strict=True)) + "\n"

    return sample


def _print_all(
    config: Config, model: Any, words: tokenizer.Tokenizer, prompts: Sequence[str], step: int, as_json: bool
) -> None:
    """Prints the continuations of all prompts, a batch at a time."""
    for first in range(0, len(prompts), config.train.batch_size):
        part = prompts[first : first + config.train.batch_size]
        ids = [words.encode(prompt) for prompt in part]
        for prompt, result in zip(
            part, decode.generate(model, words, ids, config.generate, config.seed, first), strict=True
        ):
            fields = {"prompt": prompt, "text": result.text, "ended": result.ended, "tokens": result.num_tokens}
            print(json.dumps(fields | {"step": step}) if as_json else f"{prompt}{result.text}\n")


def _stream(config: Config, model: Any, words: tokenizer.Tokenizer, prompt: str) -> None:
    """Prints a prompt and its continuation as it is drawn."""
    texts = decode.stream(model, words, words.encode(prompt), config.generate, config.seed)
    print(prompt, end=next(texts, ""), flush=True)  # not before the prompt is known to fit the model
    for text in texts:
        print(text, end="", flush=True)
    print()
