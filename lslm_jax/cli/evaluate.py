"""The command `evaluate`: scores a checkpoint on held-out examples or on any files, and writes down what it found.

    WORKDIR/evaluations/STEP-NAME-DIGEST.json               settings, data, counts and metrics
    WORKDIR/evaluations/STEP-NAME-DIGEST-predictions.jsonl  one line per example, in input order
    WORKDIR/evaluations/STEP-NAME-DIGEST-*.txt              reports for people: translations, tables of classes

NAME is the split, or the first of the files; DIGEST depends on settings and data, so that evaluations never overwrite
each other.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from etils import epath
from jax.sharding import Mesh

from lslm_jax.checkpoint import run_consistency, run_dir
from lslm_jax.checkpoint.run_consistency import Run
from lslm_jax.config import Config, loading
from lslm_jax.data import dataloader, encode_examples
from lslm_jax.data.prepare import data_manifest, held_out_files
from lslm_jax.data.prepare.held_out_files import HeldOutFiles
from lslm_jax.errors import InputMissing
from lslm_jax.evaluate import evaluators
from lslm_jax.evaluate.types import Report
from lslm_jax.parallel import multihost
from lslm_jax.parallel.sharding import local_rows
from lslm_jax.runtime import atomic_io
from lslm_jax.runtime.progress import say
from lslm_jax.train.metrics_logging import json_values

_SPLITS = {"valid": "valid_files, _fraction or _split", "test": "test_files or _split"}  # keys that hold examples out
_DIGEST = 8  # characters of the digest in file names


class HeldOut(NamedTuple):
    """Examples that a run is evaluated on.

    Attributes:
      name: of the evaluation, for its files.
      described: what it is, for the record: the split, or the files, and documents that were dropped.
      data: rows by the name of their source.
      origins: places of the examples in their files, where known.
      digest: of the content.
    """

    name: str
    described: dict[str, Any]
    data: dict[str, dataloader.EvalInput]
    origins: list[str]
    digest: str


def with_all_batches(config: Config, flags: argparse.Namespace) -> Config:
    """The config that evaluates all examples, unless the command line itself sets a limit.

    Those of training are `eval.batches` and, for files, `data.max_documents`.
    """
    if "eval.batches" not in flags.settings:
        config = replace(config, eval=replace(config.eval, batches=0))
    if flags.files and "data.max_documents" not in flags.settings:
        config = replace(config, data=replace(config.data, max_documents=0))
    return config


@contextlib.contextmanager
def held_out(run: Run, flags: argparse.Namespace, mesh: Mesh) -> Iterator[HeldOut]:
    """The examples that the flags name, prepared in a temporary directory where they are files.

    Raises:
      InputMissing: there is no such split or file, or nothing in it.
      ConfigError, DataError: as `held_out_files.prepare_files`.
    """
    rows = local_rows(mesh, run.config.train.batch_size)
    if not flags.files:
        yield _split(run, flags.split or "valid", rows)
        return
    source = held_out_files.source_of(run.config, flags.source)
    if run.facts["tokenizer"].get("file") is None:
        raise InputMissing(f"{run.data_dir} holds no tokenizer: this run was trained on synthetic data")
    with tempfile.TemporaryDirectory(prefix="lslm-evaluate-") as directory:
        special = run.facts["special"]
        paths = run.facts, run.data_dir, epath.Path(directory)
        log = lambda line: say(f"evaluate: {line}")
        found = held_out_files.prepare_files(run.config, source, flags.files, *paths, special, rows, log)
        yield _described(found, flags)


def _described(found: HeldOutFiles, flags: argparse.Namespace) -> HeldOut:
    described: dict[str, Any] = {"files": list(flags.files)}
    if found.dropped:
        described["dropped"] = found.dropped
        say(f"evaluate: dropped: {encode_examples.counted(found.dropped)}")
    name = re.sub(r"[^\w.-]+", "_", epath.Path(flags.files[0]).name)[:60] or "files"
    return HeldOut(name, described, {found.source: found.data}, found.origins, found.sha256)


def _split(run: Run, split: str, rows: Any) -> HeldOut:
    for name in run.facts.get("splits", ()) if run.config.data.verify else ():
        if name.rpartition("/")[2] == split:
            data_manifest.verify_split(run.data_dir, run.facts, name)
    data = dataloader.open_eval(run.config, run.data_dir, run.config.model.vocab_size, rows, split)
    if not data:
        raise InputMissing(
            f"{run.data_dir} holds no {split} split: set data.{_SPLITS[split]} and prepare again, or evaluate on "
            "files: --files=FILE"
        )
    return HeldOut(split, {"split": split}, data, [], run.facts["sha256"])


def write_report(
    workdir: epath.Path, config: Config, step: int, what: HeldOut, report: Report, results: dict[str, Any], dtype: str
) -> dict[str, str]:
    """Writes the evaluation, its predictions and its reports; returns the paths by what they hold.

    They go to WORKDIR/evaluations, or to a temporary directory where that cannot be written.
    """
    if not multihost.is_primary():
        return {}
    directory = _writable(workdir / "evaluations")
    settings = loading.to_dict(config)
    identity = json.dumps([settings, step, what.described, what.digest, dtype], sort_keys=True)
    prefix = f"{step}-{what.name}-{hashlib.sha256(identity.encode()).hexdigest()[:_DIGEST]}"
    paths = {"evaluation": directory / f"{prefix}.json"}
    for name, text in report.files.items():
        atomic_io.write(directory / f"{prefix}-{name}", text.encode())
    if report.predictions:
        path = directory / f"{prefix}-predictions.jsonl"
        try:
            _write_lines(path, report, what)
            paths["predictions"] = path
        except InputMissing as error:  # of data that an older version prepared
            say(f"no predictions are written: {error}")
    record = results | {"dtype": dtype, "config": settings} | {name: str(path) for name, path in paths.items()}
    atomic_io.write_json(paths["evaluation"], record)
    return {name: str(path) for name, path in paths.items()}


def _write_lines(path: epath.Path, report: Report, what: HeldOut) -> None:
    assert report.predictions is not None
    file = atomic_io.WholeFile(path)
    for line in report.predictions():
        origin = {"origin": what.origins[line["example"]]} if what.origins else {}
        file.write(json.dumps(json_values(line | origin), ensure_ascii=False).encode() + b"\n")
    file.close()


def _writable(directory: epath.Path) -> epath.Path:
    """The directory, or a temporary one where it cannot be written, with a line that says so."""
    if atomic_io.is_remote(directory):
        return directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
    except OSError:
        pass
    found = epath.Path(tempfile.mkdtemp(prefix="lslm-evaluations-"))
    say(f"{directory} is not writable: the evaluation goes to {found}")
    return found


def evaluate(setting: Any, what: HeldOut, model: Any) -> tuple[Report, dict[str, Any]]:
    """The report of an evaluation, and its results as JSON values: `eval/...` and the baseline of gzip."""
    report = evaluators.make(setting, what.data, by_example=True)(model)
    results = {f"eval/{name}": value for name, value in (report.metrics | report.facts).items()}
    return report, json_values(results | evaluators.gzip_baseline(setting, what.data))


def data_of(run: Run, what: HeldOut) -> dict[str, Any]:
    """Description of the evaluated data, for the JSON result of the command."""
    own = run_dir.data_dir(run.config, run.workdir)
    return what.described | ({} if own == run.workdir / "data" else {"data_dir": str(own)})


def open_for_evaluation(config: Config, flags: argparse.Namespace) -> Run:
    """The run that the flags name, to be evaluated on all examples."""
    return run_consistency.open_run(with_all_batches(config, flags), flags)
