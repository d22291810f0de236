"""What each verb of the command line does: opens the rooms, puts them together, returns the JSON that it ends with."""

import argparse
import contextlib
import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from etils import epath
from jax.sharding import Mesh

from lslm_jax import adopt, atomic, config_loading, distributed, imports, resolving, respond
from lslm_jax.config import Config
from lslm_jax.convert import pretrained
from lslm_jax.convert.export import Exporter, family_of, obstacle
from lslm_jax.convert.export import export as write_pretrained
from lslm_jax.convert.export import export_adapter as write_adapter
from lslm_jax.data import chat, detours, pipeline, records, templates, tokenizer
from lslm_jax.data.prepare import prepare as prepare_data
from lslm_jax.data.shards import Shards
from lslm_jax.errors import ConfigError, DataError, InputMissing, SaveError
from lslm_jax.evaluate import harness, tasks
from lslm_jax.evaluate.evaluator import Report, Setting, choose_backend
from lslm_jax.models import quantized
from lslm_jax.models.attention import Backend
from lslm_jax.observe import json_values
from lslm_jax.plan.verb import plan as plan
from lslm_jax.progress import say
from lslm_jax.sharding import local_rows, make_mesh, use
from lslm_jax.train import checkpoint, identity, ledger, lock, manifest, metadata, reproducible, rewind, spikes
from lslm_jax.train.exports import Exports
from lslm_jax.train.loop import train as train_loop
from lslm_jax.train.state import abstract_model

_KEYS = {"valid": "valid_files, _fraction or _split", "test": "test_files or _split"}  # that hold examples out


def prepare(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """`prepare`: raw text to shards; returns what `data.prepare` counts."""
    return _prepare(config, resolving.data_dir(config, resolving.workdir(flags.workdir)))


def _prepare(config: Config, data_dir: epath.Path) -> dict[str, Any]:
    """What the primary prepares; the other processes find it there."""
    return distributed.primary_first("prepare", lambda: prepare_data(config, data_dir, say))


def train(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """`train`: prepares what is missing, trains from wherever the run stands, evaluates; returns the run's summary."""
    mesh = make_mesh(config)  # before anything slow: it may be refused
    reproducible.check(config, mesh)
    workdir = resolving.workdir(flags.workdir)
    finished = distributed.by_primary("result", lambda: resolving.read_result(workdir))
    goes_back = distributed.by_primary("back", lambda: rewind.is_pending(workdir, config.train.resume_from))
    if finished["step"] >= config.train.steps and not goes_back:
        distributed.by_primary("settings", lambda: _compare_with_finished(config, workdir))
        say(f"{workdir} is complete: all {config.train.steps} steps are done (raise train.steps to go on)")
        return finished

    if config.checkpoint.export_every:
        family_of(config.model, config.task.objective)  # before anything slow: there may be none
    elif line := obstacle(config.model, config.task.objective):
        say(line)
    with contextlib.ExitStack() as stack:
        distributed.by_primary("lock", lambda: stack.enter_context(lock.hold(workdir)))
        while True:
            try:
                return _train(config, workdir, mesh)
            except spikes.Spike as spike:  # without its frames, which hold the state
                go_round = functools.partial(spikes.go_round, workdir, config, spike.with_traceback(None))
                say(distributed.by_primary("spike", go_round))


def _compare_with_finished(config: Config, workdir: epath.Path) -> None:
    """Nobody is to take for done what was never trained: settings of a complete run are compared as those of others.

    Raises:
      CheckpointRefused: a setting that the weights or the order of the data depend on is another one.
    """
    with contextlib.suppress(InputMissing, FileNotFoundError):  # of a run that is done, what is left may be little
        config, _ = resolving.by_data(config, resolving.data_dir(config, workdir))
        made_with = atomic.read_json(workdir / "config.json")
        identity.check_settings(workdir, made_with, config_loading.to_dict(config), say)


def _train(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Does it in a directory that is this run's alone."""
    data_dir = resolving.data_dir(config, workdir)
    if distributed.is_primary():
        for directory in (workdir, workdir / "samples"):
            atomic.remove_leftovers(directory)
    _prepare(config, data_dir)
    if config.data.verify:
        distributed.on_each("verify", lambda: records.verify(data_dir), records.place(data_dir))
    config, facts = resolving.by_data(config, data_dir)
    identity.check_data(facts)
    if distributed.is_primary():
        atomic.write(workdir / "config.json", config_loading.to_json(config).encode())
    with use(mesh, config.mesh):
        where = config, data_dir, config.model.vocab_size, local_rows(mesh, config.train.batch_size)
        data, held_out = pipeline.open_train(*where), pipeline.open_eval(*where)
        for remark in data.remarks():
            say(remark)
        if config.checkpoint.best and not held_out:
            raise ConfigError("checkpoint.best needs held-out documents: set data.valid_files, _fraction or _split")
        setting = _setting(config, facts, data_dir, mesh, [data, *held_out.values()])
        exporter = _exporter(setting) if config.checkpoint.export_every else None
        distributed.by_primary("detours", lambda: spikes.settle(workdir))
        left_out = detours.read(workdir)
        saved = workdir / "checkpoints"
        distributed.by_primary("back", lambda: rewind.go_back(workdir, config.train.resume_from, say))
        whole = distributed.by_primary("checkpoints", lambda: manifest.settle(saved, say))
        if whole is not None:
            before = metadata.read(saved / str(whole))
            data.offset = identity.continued_rows(before, whole, config.train.batch_size, left_out)
            if change := identity.batch_size_change(before, config, data, whole, left_out):
                say(change)
        hashes = facts["tokenizer"]["sha256"], facts["sha256"]
        made_by = identity.make(config, *hashes, mesh, left_out, facts=facts, row_offset=data.offset)
        summary = train_loop(
            _labelled(config, facts),
            workdir,
            mesh,
            data,
            setting.backend,
            checkpoint.Checkpoints(workdir, config.checkpoint, made_by, whole),
            evaluate=tasks.make(setting, held_out) if held_out else None,
            sample=respond.sampler(setting) if config.generate.prompts and setting.words else None,
            exports=Exports(workdir, config.checkpoint, exporter) if exporter else None,
        )
        summary = json_values(summary | tasks.gzip_baseline(setting, held_out))
    if distributed.is_primary():
        atomic.write(workdir / "result.json", json.dumps(summary).encode() + b"\n")
    return summary


def _labelled(config: Config, facts: dict[str, Any]) -> Config:
    """The config with the labels of its data, by whose names a pretrained head is put in order."""
    if config.task.objective not in ("classification", "tagging"):
        return config
    return replace(config, data=replace(config.data, labels=tuple(facts["labels"])))


def audit(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """`audit`: what a run read, over all its starts, compared with what seed and data say."""
    workdir = resolving.workdir(flags.workdir, reads=True)
    data_dir = resolving.data_dir(config, workdir)
    config, _ = resolving.by_data(config, data_dir)
    data = pipeline.open_train(config, data_dir, config.model.vocab_size)
    return ledger.audit(workdir, data, config.train.batch_size)


def evaluate(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """`evaluate`: a checkpoint's metrics on all held-out examples; what it wrote goes to WORKDIR/samples."""
    if flags.harness is not None:
        return _evaluate_by_harness(config, flags)
    if unused := [name for name in ("harness_path", "fewshot", "limit") if getattr(flags, name) is not None]:
        raise ConfigError(f"--{unused[0]} is for tasks of lm-eval: add --harness=TASKS")
    mesh = make_mesh(config)
    workdir = resolving.workdir(flags.workdir, reads=not flags.pretrained)
    data_dir = resolving.data_dir(config, workdir)
    if flags.pretrained:
        _prepare(config, data_dir)
    config, facts = resolving.by_data(config, data_dir)
    with use(mesh, config.mesh):
        where = config, data_dir, config.model.vocab_size, local_rows(mesh, config.train.batch_size)
        held_out = pipeline.open_eval(*where, flags.split)
        if not held_out:
            raise InputMissing(f"{data_dir} holds no {flags.split} split: set data.{_KEYS[flags.split]}, prepare again")
        model, step = _load_model(config, flags, mesh, facts)
        setting = _setting(config, facts, data_dir, mesh, list(held_out.values()))
        report = tasks.make(setting, held_out)(model)
        baseline = tasks.gzip_baseline(setting, held_out)
    _write_samples(workdir, f"{step}-{flags.split}", report)
    results = {f"eval/{name}": value for name, value in (report.metrics | report.facts).items()}
    return json_values({"step": step, **results, **baseline})


def _write_samples(workdir: epath.Path, prefix: str, report: Report) -> None:
    for name, text in report.files.items() if distributed.is_primary() else ():
        path = workdir / "samples" / f"{prefix}-{name}"
        try:
            with atomic.saving(path):
                path.parent.mkdir(exist_ok=True)
            atomic.write(path, text.encode())
        except SaveError as error:  # of a run that is only read, on a disk that may be read-only
            say(f"{error}; the metrics do not depend on it")


def _evaluate_by_harness(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """A checkpoint's, or a pretrained model's, metrics on tasks of lm-eval; no data of the run's own are read."""
    asked = harness.asked(flags.harness, flags.harness_path, flags.fewshot, flags.limit)
    harness.check(config)
    mesh = _mesh_without_batch(config)
    config, facts, data_dir = _model_alone(config, flags)
    kernel = "xla" if config.model.attention == "xla" else "auto"  # not all lengths suit the one that training uses
    config = replace(config, model=replace(config.model, attention=kernel))
    with use(mesh, config.mesh):
        setting = _setting(config, facts, data_dir, mesh)
        _require_words(setting, data_dir)

        def backend_of(length: int) -> Backend:
            data = replace(config.data, seq_len=length, mask_documents=False)
            return choose_backend(replace(config, data=data), mesh, ())

        model, step = _load_model(config, flags, mesh, facts)
        report = harness.evaluate(setting, model, asked, backend_of)
    if flags.workdir:
        _write_samples(resolving.workdir(flags.workdir, reads=True), str(step), report)
    results = {f"harness/{name}": value for name, value in (report.metrics | report.facts).items()}
    return json_values({"step": step, **results})


def generate(config: Config, flags: argparse.Namespace) -> None:
    """`generate`: does with each prompt what the model was trained for; the text of a single one is streamed."""
    prompts = respond.read_prompts(config, flags)
    mesh = _mesh_without_batch(config)
    config, facts, data_dir = _model_alone(config, flags)
    with use(mesh, config.mesh):
        setting = _setting(config, facts, data_dir, mesh)
        _require_words(setting, data_dir)
        # Of a model that was imported, nothing is known of what it was trained on.
        if config.task.objective == "qa" and not flags.pretrained and (data_dir / "train").exists():
            starts_N = Shards.open(data_dir / "train").numbers[:, 0]
            setting = setting._replace(answerable=bool((starts_N >= 0).all()))
        model, step = _load_model(config, flags, mesh, facts)
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
    if flags.dtype in quantized.KINDS:
        raise ConfigError(f"export writes no {flags.dtype}: --dtype=float32, bfloat16 or float16")
    mesh = _mesh_without_batch(config)
    workdir = resolving.workdir(flags.workdir, reads=True)
    data_dir = resolving.data_dir(config, workdir)
    config, facts = resolving.by_data(config, data_dir)
    with use(mesh, config.mesh):
        setting = _setting(config, facts, data_dir, mesh)
        _require_words(setting, data_dir)
        model, step = _load_model(config, flags, mesh, facts)
        metrics = resolving.read_result(workdir)
        measured = metrics if metrics.get("step") == step else {}
        to = atomic.place(flags.to)
        if flags.adapter:
            return {"step": step} | write_adapter(to, model, config)
        return {"step": step} | write_pretrained(to, model, _exporter(setting, flags.dtype or "float32"), measured)


def _exporter(setting: Setting, dtype: str = "float32") -> Exporter:
    """What writes models of a run, which end their text where they were taught to end an answer."""
    config = setting.config
    if setting.template is not None:
        ending = chat.ending(setting.template, setting.words)
        config = replace(config, generate=respond.answering(config.generate, ending))
    return Exporter(config, setting.words, setting.labels, dtype, setting.template)


def import_(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """`import`: reads a pretrained model whole, compares it where that is asked, keeps it as a run with --workdir.

    Raises:
      DataError: it says something else than its origin; the JSON that tells how much is printed all the same.
    """
    if not flags.tolerance > 0:
        raise ConfigError(f"--tolerance must be positive, got {flags.tolerance}")
    mesh, source = _mesh_without_batch(config), pretrained.describe(flags.pretrained)
    workdir = resolving.workdir(flags.workdir) if flags.workdir else None
    if workdir:
        adopt.require_free(workdir)
    config = adopt.settle(config, source)
    config, facts = resolving.by_tokenizer(config) if workdir else (adopt.with_labels(config), {})
    with use(mesh, config.mesh):
        loaded, summary = adopt.read(source, config, mesh)
        if flags.check or flags.reference:
            found = adopt.compare(loaded, source, config, flags.reference, flags.tolerance)
            say(found.table())
            summary["check"] = json_values(found._asdict()) | {"layers": json_values(found.layers)}
            if not found.holds(flags.tolerance):
                print(json.dumps(json_values(summary)))
                raise DataError(adopt.verdict(source, found, flags.tolerance))
        if workdir:
            adopt.write(workdir, loaded.model, config, facts, mesh)
    return json_values(summary)


def _mesh_without_batch(config: Config) -> Mesh:
    """The mesh of a command for which train.batch_size, and whether it divides over the devices, is nothing."""
    return make_mesh(replace(config, train=replace(config.train, batch_size=0)))  # which all divide


def _require_words(setting: Setting, data_dir: epath.Path) -> None:
    if setting.words is None:
        raise InputMissing(f"{data_dir} holds no tokenizer: this run was trained on synthetic data")


def _model_alone(config: Config, flags: argparse.Namespace) -> tuple[Config, dict[str, Any], epath.Path]:
    """A run's, or a pretrained model's, config and facts, for commands that read no examples; where its files are."""
    if flags.pretrained:
        return *resolving.by_tokenizer(config), epath.Path(config.tokenizer.path).parent
    data_dir = resolving.data_dir(config, resolving.workdir(flags.workdir, reads=True))
    return *resolving.by_data(config, data_dir), data_dir


def _setting(
    config: Config, facts: dict[str, Any], data_dir: epath.Path, mesh: Mesh, inputs: Sequence[Any] = ()
) -> Setting:
    """What evaluators and answers to prompts work with; the kernel is right for the rows of all inputs."""
    file = facts["tokenizer"].get("file")
    words = tokenizer.load(data_dir / file) if file else None
    if words is not None and words.sha256 != facts["tokenizer"]["sha256"]:
        raise DataError(f"{data_dir / file} was altered: its sha256 is not the one in {data_dir}/manifest.json")
    backend = choose_backend(config, mesh, inputs)
    setting = Setting(config, words, facts["labels"], facts["special"], backend, mesh)
    return setting._replace(template=templates.of_run(config, facts, data_dir, words))


def _load_model(
    config: Config, flags: argparse.Namespace, mesh: Mesh, facts: dict[str, Any] | None = None
) -> tuple[Any, int]:
    """The weights of the checkpoint, or of the pretrained model, that the flags name, and its step.

    `facts` is the data manifest that the command uses: compared with that of a checkpoint (`identity.check_inputs`);
    its labels give the rows of a pretrained head their order.
    """
    if flags.dtype in quantized.KINDS:
        imports.import_qwix()  # before anything slow: it may be missing
        model, step = _read_model(config, flags, abstract_model(config, mesh, config.model.activations), facts)
        return quantized.quantize(model, flags.dtype), step
    dtype = None if flags.verb == "export" else flags.dtype
    return _read_model(config, flags, abstract_model(config, mesh, dtype), facts)


def _read_model(
    config: Config, flags: argparse.Namespace, abstract: Any, facts: dict[str, Any] | None
) -> tuple[Any, int]:
    """The weights that the flags name, for the places and in the types of `abstract`, and their step."""
    if flags.pretrained:
        source = pretrained.describe(flags.pretrained)
        names = facts["labels"] if facts else ()
        return pretrained.load(source, config.task.objective, abstract, names=names).model, 0
    directory = resolving.workdir(flags.workdir, reads=True) / "checkpoints"

    def load(step: int) -> Any:
        identity.check_inputs(directory / str(step), config, facts)
        return checkpoint.load_model(directory, abstract, step)

    if flags.step is not None:
        step = flags.step
        if step not in (steps := checkpoint.list_steps(directory)):
            raise InputMissing(f"no checkpoint of step {step} in {directory}; there are {steps}")
    elif flags.best:
        if not config.checkpoint.best:
            raise ConfigError("--best needs checkpoint.best, the metric to go by")
        step = checkpoint.best_step(directory, config.checkpoint.best)
    else:
        return checkpoint.load_latest(directory, load)
    return load(step), step
