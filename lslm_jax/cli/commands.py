"""What each verb of the command line does: opens the rooms, puts them together, returns the JSON that it ends with."""

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from lslm_jax.checkpoint import checkpoint, integrity, metadata, provenance, rewind, run_consistency, run_dir, run_lock
from lslm_jax.checkpoint.periodic_export import Exports
from lslm_jax.checkpoint.run_consistency import Run
from lslm_jax.cli import evaluate as evaluate_command
from lslm_jax.cli import generate as respond
from lslm_jax.cli import import_pretrained, interactive
from lslm_jax.cli.evaluate import HeldOut, open_for_evaluation
from lslm_jax.cli.plan import plan as plan
from lslm_jax.config import Config, loading
from lslm_jax.convert import pretrained
from lslm_jax.convert.export import Exporter, family_of, obstacle
from lslm_jax.convert.export import export as write_pretrained
from lslm_jax.convert.export import export_adapter as write_adapter
from lslm_jax.data import dataloader, skipped_batches
from lslm_jax.data.chat import chat_template, tokenize_chat
from lslm_jax.data.prepare import data_manifest
from lslm_jax.data.prepare.prepare import prepare as prepare_data
from lslm_jax.data.shards import Shards
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.errors import ConfigError, DataError, InputMissing
from lslm_jax.evaluate import evaluators, lm_eval_harness
from lslm_jax.evaluate.types import Setting, choose_backend
from lslm_jax.models import weight_quantization
from lslm_jax.models.attention import Backend
from lslm_jax.parallel import multihost
from lslm_jax.parallel.sharding import local_rows, make_mesh, use
from lslm_jax.resilience import data_ledger, deterministic_step, loss_spikes
from lslm_jax.runtime import atomic_io, lazy_imports
from lslm_jax.runtime.progress import say
from lslm_jax.train import run_length
from lslm_jax.train.loop import train as train_loop
from lslm_jax.train.metrics_logging import json_values
from lslm_jax.train.restore_or_init import check_tokenizer, find_start
from lslm_jax.train.train_state import abstract_model

_TOLERANCE = 1e-3  # of logits and hidden states, where a model is compared with its origin


def prepare(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """`prepare`: raw text to shards; returns what `data.prepare` counts."""
    data_dir = run_dir.data_dir(config, run_dir.workdir(flags.workdir))
    return _prepare(config, data_dir) | run_length.of_prepared(config, data_dir)


def _prepare(config: Config, data_dir: epath.Path) -> dict[str, Any]:
    """What the primary prepares; the other processes find it there."""
    return multihost.primary_first("prepare", lambda: prepare_data(config, data_dir, say))


def train(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """`train`: prepares what is missing, trains from wherever the run stands, evaluates; returns the run's summary."""
    mesh = make_mesh(config)  # before anything slow: it may be refused
    deterministic_step.check(config, mesh)
    workdir = run_dir.workdir(flags.workdir)
    finished = multihost.by_primary("result", lambda: run_dir.read_result(workdir))
    goes_back = multihost.by_primary("back", lambda: rewind.is_pending(workdir, config.train.resume_from))
    asked = run_length.resolve_prepared(config, run_dir.data_dir(config, workdir))
    if asked and finished["step"] >= asked.train.steps and not goes_back:
        multihost.by_primary("settings", lambda: _compare_with_finished(asked, workdir, finished))
        say(f"{workdir} is complete: all {asked.train.steps} steps are done (raise train.steps to go on)")
        return finished

    if config.train.init_from and not checkpoint.list_steps(workdir / "checkpoints"):
        # Before anything slow: there may be none, or one of another tokenizer.
        check_tokenizer(config, find_start(config.train.init_from))
    if config.checkpoint.export_every:
        family_of(config.model, config.task.objective)  # before anything slow: there may be none
    elif line := obstacle(config.model, config.task.objective):
        say(line)
    with contextlib.ExitStack() as stack:
        multihost.by_primary("lock", lambda: stack.enter_context(run_lock.hold(workdir)))
        run_consistency.check_shared(workdir)
        while True:
            try:
                return _train(config, workdir, mesh)
            except loss_spikes.Spike as spike:  # without its frames, which hold the state
                go_round = functools.partial(loss_spikes.go_round, workdir, config, spike.with_traceback(None))
                say(multihost.by_primary("spike", go_round))


def _compare_with_finished(config: Config, workdir: epath.Path, finished: dict[str, Any]) -> None:
    """Compares settings, tokenizer and data with those of a complete run; its result is that of no others.

    Raises:
      CheckpointRefused, ConfigError, DataError: as `run_consistency.check_finished`.
    """
    changed = run_consistency.check_finished(config, workdir, finished, run_dir.data_dir(config, workdir))
    if changed:
        say(f"settings changed since {workdir}: {', '.join(changed)}")


def _train(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Does it in a directory that is this run's alone."""
    data_dir = run_dir.data_dir(config, workdir)
    if multihost.is_primary():
        for directory in (workdir, workdir / "samples"):
            atomic_io.remove_leftovers(directory)
    _prepare(config, data_dir)
    if config.data.verify:
        multihost.on_each("verify", lambda: data_manifest.verify(data_dir), data_manifest.place(data_dir))
    config, facts = run_dir.by_data(config, data_dir)
    provenance.check_data(facts)
    with use(mesh, config.mesh):
        where = config, data_dir, config.model.vocab_size, local_rows(mesh, config.train.batch_size)
        data, held_out = dataloader.open_train(*where), dataloader.open_eval(*where)
        config = run_length.resolve(config, data)
        if multihost.is_primary():
            atomic_io.write(workdir / "config.json", loading.to_json(config).encode())
        if length := run_length.describe(config, data):
            say(length)
        for remark in data.remarks():
            say(remark)
        if config.checkpoint.best and not held_out:
            raise ConfigError("checkpoint.best needs held-out documents: set data.valid_files, _fraction or _split")
        setting = _setting(config, facts, data_dir, mesh, [data, *held_out.values()])
        exporter = _exporter(setting) if config.checkpoint.export_every else None
        multihost.by_primary("detours", lambda: loss_spikes.settle(workdir))
        left_out = skipped_batches.read(workdir)
        saved = workdir / "checkpoints"
        multihost.by_primary("back", lambda: rewind.go_back(workdir, config.train.resume_from, say))
        whole = multihost.by_primary("checkpoints", lambda: integrity.settle(saved, say))
        if whole is not None:
            before = metadata.read(saved / str(whole))
            data.offset = provenance.continued_rows(before, whole, config.train.batch_size, left_out)
            if change := provenance.batch_size_change(before, config, data, whole, left_out):
                say(change)
        hashes = facts["tokenizer"]["sha256"], facts["sha256"]
        made_by = provenance.make(config, *hashes, mesh, left_out, facts=facts, row_offset=data.offset)
        summary = train_loop(
            _labelled(config, facts),
            workdir,
            mesh,
            data,
            setting.backend,
            checkpoint.Checkpoints(workdir, config.checkpoint, made_by, whole),
            evaluate=evaluators.make(setting, held_out) if held_out else None,
            sample=respond.sampler(setting) if config.generate.prompts and setting.words else None,
            exports=Exports(workdir, config.checkpoint, exporter) if exporter else None,
        )
        summary = json_values(summary | evaluators.gzip_baseline(setting, held_out))
    if multihost.is_primary():
        run_dir.write_result(workdir, summary)
    return summary


def _labelled(config: Config, facts: dict[str, Any]) -> Config:
    """The config with the labels of its data, by whose names a pretrained head is put in order."""
    if config.task.objective not in ("classification", "tagging"):
        return config
    return replace(config, data=replace(config.data, labels=tuple(facts["labels"])))


def audit(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """`audit`: what a run read, over all its starts, compared with what seed and data say."""
    workdir = run_dir.workdir(flags.workdir, reads=True)
    data_dir = run_dir.data_dir(config, workdir)
    run_consistency.check_files(workdir, config)
    config, _ = run_dir.by_data(config, data_dir)
    data = dataloader.open_train(config, data_dir, config.model.vocab_size)
    audited = data_ledger.audit(workdir, data, config.train.batch_size)
    saved = integrity.list_steps(workdir / "checkpoints")
    if saved and audited["steps"] < saved[-1]:  # the ledger is synced before a checkpoint is saved
        raise DataError(
            f"{workdir}/ledger ends at step {audited['steps']}, but there is a checkpoint of step {saved[-1]}"
        )
    return audited


def evaluate(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """`evaluate`: a checkpoint's metrics on all held-out examples, or on files; writes WORKDIR/evaluations."""
    if flags.harness is not None:
        return _evaluate_by_harness(config, flags)
    mesh = make_mesh(config)
    run = _open_untrained(config, flags) if flags.pretrained else open_for_evaluation(config, flags)
    config = run.config
    with use(mesh, config.mesh), evaluate_command.held_out(run, flags, mesh) as what:
        model, step = _load_model(config, flags, mesh, run.step, run.facts)
        setting = _setting(config, run.facts, run.data_dir, mesh, list(what.data.values()))
        report, results = evaluate_command.evaluate(setting, what, model)
        results = {"step": step} | evaluate_command.data_of(run, what) | results
        dtype = flags.dtype or config.model.dtype
        return results | evaluate_command.write_report(run.workdir, config, step, what, report, results, dtype)


def _open_untrained(config: Config, flags: argparse.Namespace) -> Run:
    """A pretrained model with data of one's own, prepared in WORKDIR, as a run that stands at step 0."""
    workdir = run_dir.workdir(flags.workdir)
    config = evaluate_command.with_all_batches(config, flags)
    data_dir = run_dir.data_dir(config, workdir)
    _prepare(config, data_dir)
    config, facts = run_dir.by_data(config, data_dir)
    return Run(workdir, data_dir, config, facts, 0)


def _evaluate_by_harness(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """A checkpoint's, or a pretrained model's, metrics on tasks of lm-eval; no data of the run's own are read."""
    asked = lm_eval_harness.asked(flags.harness, flags.harness_path, flags.fewshot, flags.limit)
    lm_eval_harness.check(config)
    mesh = _mesh_without_batch(config)
    config, facts, data_dir, at = _model_alone(config, flags)
    kernel = "xla" if config.model.attention == "xla" else "auto"  # not all lengths suit the one that training uses
    config = replace(config, model=replace(config.model, attention=kernel))
    with use(mesh, config.mesh):
        setting = _setting(config, facts, data_dir, mesh)
        _require_words(setting, data_dir)

        def backend_of(length: int) -> Backend:
            data = replace(config.data, seq_len=length, mask_documents=False)
            return choose_backend(replace(config, data=data), mesh, ())

        model, step = _load_model(config, flags, mesh, at, facts)
        report = lm_eval_harness.evaluate(setting, model, asked, backend_of)
    results = {f"harness/{name}": value for name, value in (report.metrics | report.facts).items()}
    results = json_values({"step": step, **results})
    if not flags.workdir:
        return results
    what = HeldOut("lm_eval", {"tasks": list(asked.tasks), "fewshot": asked.fewshot, "limit": asked.limit}, {}, [], "")
    workdir, dtype = atomic_io.place(flags.workdir), flags.dtype or config.model.dtype
    return results | evaluate_command.write_report(workdir, config, step, what, report, results, dtype)


def generate(config: Config, flags: argparse.Namespace) -> None:
    """`generate`: does with each prompt what the model was trained for; the text of a single one is streamed.

    On a terminal, without a prompt, it reads prompts line by line.
    """
    asks = not (flags.prompt or flags.prompts) and sys.stdin.isatty() and jax.process_count() == 1
    prompts = respond.read_prompts(config, interactive.with_prompt(flags, "?") if asks else flags)
    mesh = _mesh_without_batch(config)
    config, facts, data_dir, at = _model_alone(config, flags)
    with use(mesh, config.mesh):
        setting = _setting(config, facts, data_dir, mesh)
        _require_words(setting, data_dir)
        # Of a model that was imported, nothing is known of what it was trained on.
        if config.task.objective == "qa" and not flags.pretrained and (data_dir / "train").exists():
            starts_N = Shards.open(data_dir / "train").numbers[:, 0]
            setting = setting._replace(answerable=bool((starts_N >= 0).all()))
        model, step = _load_model(config, flags, mesh, at, facts)
        show = lambda found: _json_line(found | {"step": step}) if flags.json else respond.spell(setting, found)
        if asks:
            interactive.run(setting, model, flags, show)
            return
        writes = config.task.objective in ("causal", "seq2seq")
        if writes and len(prompts) == 1 and not flags.json:
            for text in respond.stream(setting, model, prompts[0]):
                print(text, end="", flush=True)
            print()
            return
        for found in respond.answer(setting, model, prompts):
            print(show(found))


def _json_line(values: dict[str, Any]) -> str:
    """JSON for a person and for programs: letters as they are, unless stdout cannot spell one."""
    text = json.dumps(json_values(values), ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:  # another encoding, or half a surrogate pair that a field holds
        return json.dumps(json_values(values))
    return text


def export(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """`export`: a checkpoint as a Hugging Face directory; returns what `convert.export` says of it."""
    if not flags.to:
        raise ConfigError("export needs --to=DIR, where to write")
    if flags.dtype in weight_quantization.KINDS:
        raise ConfigError(f"export writes no {flags.dtype}: --dtype=float32, bfloat16 or float16")
    mesh = _mesh_without_batch(config)
    workdir, data_dir, config, facts, at = run_consistency.open_run(config, flags)
    with use(mesh, config.mesh):
        setting = _setting(config, facts, data_dir, mesh)
        _require_words(setting, data_dir)
        model, step = _load_model(config, flags, mesh, at, facts)
        metrics = run_dir.read_result(workdir)
        measured = metrics if metrics.get("step") == step else {}
        to = atomic_io.place(flags.to)
        if flags.adapter:
            return {"step": step} | write_adapter(to, model, config)
        return {"step": step} | write_pretrained(to, model, _exporter(setting, flags.dtype or "float32"), measured)


def _exporter(setting: Setting, dtype: str = "float32") -> Exporter:
    """What writes models of a run, which end their text where they were taught to end an answer."""
    config = setting.config
    if setting.template is not None:
        ending = tokenize_chat.ending(setting.template, setting.words)
        config = replace(config, generate=respond.answering(config.generate, ending))
    return Exporter(config, setting.words, setting.labels, dtype, setting.template)


def import_(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """`import`: reads a pretrained model whole, compares it where that is asked, keeps it as a run with --workdir.

    Raises:
      DataError: it says something else than its origin; the JSON that tells how much is printed all the same.
    """
    tolerance = _TOLERANCE if flags.tolerance is None else flags.tolerance
    if not tolerance > 0:
        raise ConfigError(f"--tolerance must be positive, got {tolerance}")
    mesh, source = _mesh_without_batch(config), pretrained.describe(flags.pretrained)
    workdir = run_dir.workdir(flags.workdir) if flags.workdir else None
    if workdir:
        import_pretrained.require_free(workdir)
    config = import_pretrained.settle(config, source)
    config, facts = run_dir.by_tokenizer(config) if workdir else (import_pretrained.with_labels(config), {})
    with use(mesh, config.mesh):
        loaded, summary = import_pretrained.read(source, config, mesh)
        if flags.check or flags.reference:
            found = import_pretrained.compare(loaded, source, config, flags.reference, tolerance)
            say(found.table())
            summary["check"] = json_values(found._asdict()) | {"layers": json_values(found.layers)}
            if not found.holds(tolerance):
                print(json.dumps(json_values(summary)))
                raise DataError(import_pretrained.verdict(source, found, tolerance))
        if workdir:
            import_pretrained.write(workdir, loaded.model, config, facts, mesh)
    return json_values(summary)


def _mesh_without_batch(config: Config) -> Mesh:
    """The mesh of a command for which train.batch_size, and whether it divides over the devices, is nothing."""
    return make_mesh(replace(config, train=replace(config.train, batch_size=0)))  # which all divide


def _require_words(setting: Setting, data_dir: epath.Path) -> None:
    if setting.words is None:
        raise InputMissing(f"{data_dir} holds no tokenizer: this run was trained on synthetic data")


def _model_alone(config: Config, flags: argparse.Namespace) -> tuple[Config, dict[str, Any], epath.Path, int]:
    """Config, facts, directory of the tokenizer and step of a run or a pretrained model that reads no examples."""
    if flags.pretrained:
        return *run_dir.by_tokenizer(config), epath.Path(config.tokenizer.path).parent, 0
    run = run_consistency.open_run(config, flags)
    return run.config, run.facts, run.data_dir, run.step


def _setting(
    config: Config, facts: dict[str, Any], data_dir: epath.Path, mesh: Mesh, inputs: Sequence[Any] = ()
) -> Setting:
    """What evaluators and answers to prompts work with; the kernel is right for the rows of all inputs."""
    file = facts["tokenizer"].get("file")
    words = load_tokenizer(data_dir / file) if file else None
    if words is not None and words.sha256 != facts["tokenizer"]["sha256"]:
        raise DataError(f"{data_dir / file} was altered: its sha256 is not the one in {data_dir}/manifest.json")
    backend = choose_backend(config, mesh, inputs)
    setting = Setting(config, words, facts["labels"], facts["special"], backend, mesh)
    return setting._replace(template=chat_template.of_run(config, facts, data_dir, words))


def _load_model(
    config: Config, flags: argparse.Namespace, mesh: Mesh, step: int, facts: dict[str, Any]
) -> tuple[Any, int]:
    """The weights of the checkpoint of a step, or of the pretrained model that the flags name, and the step.

    `facts` is the data manifest of the command: it is compared with that of the checkpoint (`identity.check_inputs`),
    and its labels give the rows of a pretrained head their order.
    """
    if flags.dtype in weight_quantization.KINDS:
        lazy_imports.import_qwix()  # before anything slow: it may be missing
        model, step = _read_model(config, flags, abstract_model(config, mesh, config.model.activations), step, facts)
        return weight_quantization.quantize(model, flags.dtype), step
    dtype = None if flags.verb == "export" else flags.dtype
    return _read_model(config, flags, abstract_model(config, mesh, dtype), step, facts)


def _read_model(
    config: Config, flags: argparse.Namespace, abstract: Any, step: int, facts: dict[str, Any]
) -> tuple[Any, int]:
    """The weights that the flags name, for the places and in the types of `abstract`, and their step."""
    if flags.pretrained:
        source = pretrained.describe(flags.pretrained)
        return pretrained.load(source, config.task.objective, abstract, names=facts["labels"]).model, step
    directory = run_dir.workdir(flags.workdir, reads=True) / "checkpoints"

    def load(step: int) -> Any:
        provenance.check_inputs(directory / str(step), config, facts)
        return checkpoint.load_model(directory, abstract, step)

    if flags.step is None and not flags.best:  # a training run may delete the latest one meanwhile
        return checkpoint.load_latest(directory, load)
    return load(step), step
