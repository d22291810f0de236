"""What each verb of the command line does: opens the rooms, puts them together, returns the JSON that it ends with."""

import argparse
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from lslm_jax import atomic, config_checks, config_loading, respond
from lslm_jax.config import Config
from lslm_jax.convert import pretrained
from lslm_jax.convert.export import export as write_pretrained
from lslm_jax.data import chat, pipeline, templates, tokenizer
from lslm_jax.data.prepare import prepare as prepare_data
from lslm_jax.data.shards import Shards
from lslm_jax.data.special import special_ids
from lslm_jax.data.templates import Template
from lslm_jax.errors import ConfigError, InputMissing, SaveError
from lslm_jax.evaluate import metrics, tasks
from lslm_jax.evaluate.evaluator import Setting
from lslm_jax.models import attention
from lslm_jax.models.attention import Backend
from lslm_jax.observe import json_values
from lslm_jax.progress import say
from lslm_jax.sharding import make_mesh
from lslm_jax.train import checkpoint, identity
from lslm_jax.train.loop import train as train_loop
from lslm_jax.train.state import abstract_model

_KEYS = {"valid": "valid_files, _fraction or _split", "test": "test_files or _split"}  # that hold examples out
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
        where = config, data_dir, config.model.vocab_size, jax.process_index(), jax.process_count()
        data, held_out = pipeline.open_train(*where), pipeline.open_eval(*where)
        for remark in data.remarks():
            say(remark)
        if config.checkpoint.best and not held_out:
            raise ConfigError("checkpoint.best needs held-out documents: set data.valid_files, _fraction or _split")
        setting = _setting(config, facts, data_dir, mesh, [data, *held_out.values()])
        made_by = identity.make(config, facts["tokenizer"]["sha256"], facts["sha256"], mesh)
        summary = train_loop(
            config,
            workdir,
            mesh,
            data,
            setting.backend,
            checkpoint.Checkpoints(workdir, config.checkpoint, made_by),
            evaluate=tasks.make(setting, held_out) if held_out else None,
            sample=respond.sampler(setting) if config.generate.prompts and setting.words else None,
        )
        summary = json_values(summary | _gzip_baseline(setting, held_out))
    atomic.write(result, json.dumps(summary).encode() + b"\n")
    return summary


def evaluate(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """`evaluate`: a checkpoint's metrics on all held-out examples; what it wrote goes to WORKDIR/samples."""
    mesh = make_mesh(config)
    workdir = _workdir(flags)
    data_dir = _data_dir(config, workdir)
    if flags.pretrained:
        prepare_data(config, data_dir, say)
    config, facts = _resolve(config, data_dir)
    with jax.set_mesh(mesh):
        where = config, data_dir, config.model.vocab_size, jax.process_index(), jax.process_count()
        held_out = pipeline.open_eval(*where, flags.split)
        if not held_out:
            raise InputMissing(f"{data_dir} holds no {flags.split} split: set data.{_KEYS[flags.split]}, prepare again")
        model, step = _load_model(config, flags, mesh)
        setting = _setting(config, facts, data_dir, mesh, list(held_out.values()))
        report = tasks.make(setting, held_out)(model)
        baseline = _gzip_baseline(setting, held_out)
    for name, text in report.files.items():
        (workdir / "samples").mkdir(exist_ok=True)
        atomic.write(workdir / "samples" / f"{step}-{flags.split}-{name}", text.encode())
    results = {f"eval/{name}": value for name, value in (report.metrics | report.facts).items()}
    return json_values({"step": step, **results, **baseline})


def generate(config: Config, flags: argparse.Namespace) -> None:
    """`generate`: does with each prompt what the model was trained for; the text of a single one is streamed."""
    prompts = respond.read_prompts(config, flags)
    mesh = _mesh_without_batch(config)
    data_dir = epath.Path() if flags.pretrained else _data_dir(config, _workdir(flags))
    config, facts = _resolve_pretrained(config) if flags.pretrained else _resolve(config, data_dir)
    with jax.set_mesh(mesh):
        setting = _setting(config, facts, data_dir, mesh)
        _require_words(setting, data_dir)
        if config.task.objective == "qa" and not flags.pretrained:
            starts_N = Shards.open(data_dir / "train").numbers[:, 0]
            setting = setting._replace(answerable=bool((starts_N >= 0).all()))
        model, step = _load_model(config, flags, mesh)
        writes = config.task.objective in ("causal", "seq2seq")
        if writes and len(prompts) == 1 and not flags.json:
            for text in respond.stream(setting, model, prompts[0]):
                print(text, end="", flush=True)
            print()
            return
        for found in respond.answer(setting, model, prompts):
            print(json.dumps(json_values(found | {"step": step})) if flags.json else respond.spell(setting, found))


def export(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """`export`: a checkpoint as a Hugging Face directory; returns what `convert.export` says of it."""
    if not flags.to:
        raise ConfigError("export needs --to=DIR, where to write")
    mesh = _mesh_without_batch(config)
    workdir = _workdir(flags)
    data_dir = _data_dir(config, workdir)
    config, facts = _resolve(config, data_dir)
    with jax.set_mesh(mesh):
        setting = _setting(config, facts, data_dir, mesh)
        _require_words(setting, data_dir)
        model, step = _load_model(config, flags, mesh)
        result = workdir / "result.json"
        metrics = json.loads(result.read_text()) if result.exists() else {}
        measured = metrics if metrics.get("step") == step else {}
        to = epath.Path(flags.to).expanduser().absolute()
        if setting.template is not None:
            ending = chat.ending(setting.template, setting.words)
            config = replace(config, generate=respond.answering(config.generate, ending))
        written = write_pretrained(
            to, model, config, setting.words, setting.labels, flags.dtype, measured, setting.template
        )
        return {"step": step} | written


def _mesh_without_batch(config: Config) -> Mesh:
    """The mesh of a command for which train.batch_size, and whether it divides over the devices, is nothing."""
    return make_mesh(replace(config, train=replace(config.train, batch_size=len(jax.devices()), accumulate=1)))


def _require_words(setting: Setting, data_dir: epath.Path) -> None:
    if setting.words is None:
        raise InputMissing(f"{data_dir} holds no tokenizer: this run was trained on synthetic data")


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


def _resolve_pretrained(config: Config) -> tuple[Config, dict[str, Any]]:
    """A config with the vocabulary and labels that it names itself, and what a manifest would say of them."""
    path = epath.Path(config.tokenizer.path)
    facts = {"tokenizer": tokenizer.load(path).facts() | {"file": str(path)}, "labels": list(config.data.labels)}
    return _with_vocabulary(config, facts)


def _resolve(config: Config, data_dir: epath.Path) -> tuple[Config, dict[str, Any]]:
    """The config with the vocabulary and labels of the prepared data, and that data's manifest with its sha256."""
    if config.data.source == "synthetic" and not config.data.mixture:
        size = config.tokenizer.vocab_size
        facts = {
            "tokenizer": {"vocab_size": size, "sha256": "", "bos_id": 0, "eos_id": 0},
            "sha256": "",
            "labels": ["0", "1"],
        }
    else:
        path = data_dir / "manifest.json"
        if not path.exists():
            raise InputMissing(f"{data_dir} holds no prepared data (no manifest.json): run prepare or train first")
        facts = atomic.read_json(path)
        # Of the content alone: the same shards may lie elsewhere.
        contents = {name: split["manifest_sha256"] for name, split in facts["splits"].items()}
        if "chat" in facts:
            contents["chat_template"] = facts["chat"]["sha256"]
        facts["sha256"] = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    facts.setdefault("labels", [])  # written by earlier versions
    return _with_vocabulary(config, facts)


def _with_vocabulary(config: Config, facts: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    special = special_ids(facts["tokenizer"], config.model.family, config.model.vocab_size)
    model = config_checks.resolve_vocabulary(config.model, special.size)
    if config.task.objective in ("classification", "tagging"):
        model = config_checks.resolve_labels(model, len(facts["labels"]))
    return replace(config, model=model), facts | {"special": special}


def _setting(
    config: Config, facts: dict[str, Any], data_dir: epath.Path, mesh: Mesh, inputs: Sequence[Any] = ()
) -> Setting:
    """What evaluators and answers to prompts work with; the kernel is right for the rows of all inputs."""
    file = facts["tokenizer"].get("file")
    words = tokenizer.load(data_dir / file) if file else None
    backend = _backend(config, mesh, inputs)
    setting = Setting(config, words, facts["labels"], facts["special"], backend, mesh)
    return setting._replace(template=_template(config, facts, data_dir, words))


def _template(config: Config, facts: dict[str, Any], data_dir: epath.Path, words: Any) -> Template | None:
    """The chat template of prepared data, or that of the vocabulary, as of now; None where nobody chats."""
    if not config.data.is_chat or words is None:
        return None
    if "chat" in facts:
        return templates.load(facts["chat"], data_dir, today=True)
    return templates.choose(config, words)


def _backend(config: Config, mesh: Mesh, inputs: Sequence[Any]) -> Backend:
    """The attention kernel for the rows of these inputs on this mesh."""
    device = mesh.devices.flat[0]
    gpu = device.platform == "gpu"
    segmented = config.data.mask_documents or config.task.objective != "causal"
    # Counting the documents of every row takes a while, and only cuDNN asks.
    max_segments = max((data.max_segments() for data in inputs), default=1) if gpu and segmented else int(segmented)
    return attention.choose(
        config.model.attention,
        platform=device.platform,
        compute_capability=float(device.compute_capability) if gpu else 0.0,
        dtype=config.model.dtype,
        head_dim=config.model.head_dim,
        length=config.data.seq_len,
        max_segments=max_segments,
        source_length=config.data.source_len,
        extra=attention.demands(config.model),
    )


def _load_model(config: Config, flags: argparse.Namespace, mesh: Mesh) -> tuple[Any, int]:
    """The weights of the checkpoint, or of the pretrained model, that the flags name, and its step."""
    if flags.pretrained:
        source = pretrained.describe(flags.pretrained)
        return pretrained.load(source, config.task.objective, abstract_model(config, mesh)).model, 0
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


def _gzip_baseline(setting: Setting, held_out: Mapping[str, pipeline.EvalInput]) -> dict[str, float]:
    """What gzip makes of the same held-out text, where bits a byte are counted and it is small enough to ask."""
    if setting.config.task.objective != "causal" or setting.config.data.is_chat or not held_out:
        return {}
    if sum(part.num_bytes() for part in held_out.values()) > GZIP_LIMIT:
        return {}
    texts = (setting.words.decode(ids) for part in held_out.values() for ids in part.documents())
    return {"gzip_bits_per_byte": metrics.gzip_bits_per_byte(texts)}
