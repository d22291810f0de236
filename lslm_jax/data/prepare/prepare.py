"""Raw text -> cleaned documents -> vocabulary -> token shards, once.

    DIR/tokenizer.model                     (or tokenizer.json, bytes.json)
    DIR/chat_template.jinja                 of conversations
    DIR/train/  DIR/valid/  DIR/test/       shards; of a mixture DIR/NAME/train/ and so on
    DIR/manifest.json                       what was prepared from what, and how, and `labels`; written last

Until the manifest is there, unfinished.json holds the settings and inputs, and a killed run goes on after its last
whole shard: it reads, cleans and compares the documents before it again, but does not tokenise them.
"""

import collections
import contextlib
import hashlib
import importlib.metadata
import itertools
import os
import platform
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from lslm_jax import __version__
from lslm_jax.config import CleanConfig, Config, Source
from lslm_jax.data import encode_examples, label_names
from lslm_jax.data.chat import chat_template, tokenize_chat
from lslm_jax.data.encode_examples import Recipe
from lslm_jax.data.prepare import cleaning, data_manifest, directory_lock, held_out_split, worker_pool
from lslm_jax.data.readers import files, sources
from lslm_jax.data.readers.files import Split
from lslm_jax.data.shards import ShardWriter
from lslm_jax.data.tokenizers import train, unknown_tokens
from lslm_jax.errors import ConfigError, DataError, InputMissing, SaveError
from lslm_jax.runtime import atomic_io
from lslm_jax.runtime.progress import short

_MANIFEST = "manifest.json"
_UNFINISHED = "unfinished.json"
_LOG_SECONDS = 2.0
_SHOWN_NOTES = 3

Log = Callable[[str], None]


def prepare(config: Config, directory: epath.Path, log: Log, workers: int = 0) -> dict[str, Any]:
    """Prepares what `config.data` names, goes on with it, or finds it done.

    It may start processes, which import the main module anew: a script that calls this does so under
    `if __name__ == "__main__":`.

    Args:
      config: `data`, `task`, `clean` and `tokenizer` are read.
      directory: where the shards are or will be.
      log: told of progress about every two seconds.
      workers: processes. 0: as many as there are cores for this one.

    Returns:
      `documents`, `tokens` and `bytes` kept, `dropped` by reason, `vocab_size`, `shards`, the same figures for each of
      `splits`, whether all was there already (`skipped`), and `seconds`.

    Raises:
      ConfigError: impossible settings, or others than the directory was prepared with.
      InputMissing: there is nothing to read, or nothing to train on.
      DataError: a document or a file is bad, or an input is not what it was.
      SaveError: the directory cannot be written.
    """
    started = time.monotonic()
    if config.data.source == "synthetic" and not config.data.mixture:
        return _summary({"splits": {}, "dropped": {}, "tokenizer": {"vocab_size": 0}}, True, started)
    manifest = data_manifest.read(directory / _MANIFEST)
    if config.data.source == "shards" and not config.data.mixture:
        if not manifest:
            raise InputMissing(f"data.source=shards, but {directory} holds no prepared data (no {_MANIFEST})")
        return _summary(manifest, True, started)
    named = data_manifest.named_sources(config)
    if manifest:
        data_manifest.check(manifest, config, named, directory, finished=True)
        return _summary(manifest, True, started)
    _check_apart(named, directory)
    with atomic_io.saving(directory):
        directory.mkdir(parents=True, exist_ok=True)
    if not atomic_io.is_remote(directory) and not os.access(directory, os.W_OK):
        raise SaveError(f"{directory} is not writable by uid {os.getuid()}")
    with directory_lock.hold(directory, log):
        return _prepare(config, named, directory, log, workers or worker_pool.num_cores(), started)


def _prepare(
    config: Config, named: dict[str, Source], directory: epath.Path, log: Log, workers: int, started: float
) -> dict[str, Any]:
    """Prepares in a directory that is this process's alone, unless another one did while this one waited for it."""
    if manifest := data_manifest.read(directory / _MANIFEST):
        data_manifest.check(manifest, config, named, directory, finished=True)
        return _summary(manifest, True, started)
    record = _begin(config, named, directory, log)
    recipes = _recipes(record, config, named, directory)
    written = _write(config, recipes, directory, record["tokenizer"], log, workers)
    for name in data_manifest.changed_inputs(record):
        raise DataError(f"{name} was changed while it was read: remove {directory} and prepare again")
    manifest = record | written
    manifest["content_sha256"] = data_manifest.content_sha256(manifest | {"content_sha256": ""})
    atomic_io.write_json(directory / _MANIFEST, manifest)
    (directory / _UNFINISHED).unlink()
    summary = _summary(manifest, False, started)
    log(_outcome(summary, named))
    return summary


def _begin(config: Config, named: dict[str, Source], directory: epath.Path, log: Log) -> dict[str, Any]:
    """Puts on record what is about to be prepared, or checks that a killed run was about the same."""
    record = data_manifest.read(directory / _UNFINISHED)
    if any(any(directory.joinpath(*place).glob("tokens-*.bin")) for place in _places(named)):
        if not record:
            raise DataError(f"{directory} holds shards but no record of their origin: choose another data.dir")
        data_manifest.check(record, config, named, directory, finished=False)
        if "valid_fractions" not in record:  # documents may be held out and compared otherwise than they were then
            raise DataError(f"{directory} was begun by an earlier version: remove it, or finish it with that version")
        return record
    _survey(named, log)
    record = {
        "version": data_manifest.VERSION,
        "settings": data_manifest.settings(config, named),
        "given_tokenizer": data_manifest.given_sha256(config),
        "inputs": {name: sources.fingerprint(source) for name, source in named.items()},
    }
    record["source_labels"] = label_names.names(config, named)
    record["labels"] = label_names.merged(record["source_labels"])
    for line in label_names.describe(record["labels"]):
        log(f"prepare: {line}")
    recipes = _recipes(record, config, named, directory)
    record["valid_fractions"] = held_out_split.fractions(config, recipes)
    for line in held_out_split.describe(config, named):
        log(f"prepare: {line}")
    record |= _vocabulary(config, held_out_split.apply(recipes, record["valid_fractions"]), directory, log)
    atomic_io.write_json(directory / _UNFINISHED, record)
    return record


def _check_apart(named: dict[str, Source], directory: epath.Path) -> None:
    """Rejects input that covers the directory that is written to.

    Raises:
      ConfigError: a folder or glob would have this program's own files read as data.
    """
    for source in named.values():
        if pattern := files.covering(source, directory):
            raise ConfigError(
                f"data.files: {pattern} covers {directory}, which is written to: choose another --workdir, or name the "
                "files by a glob, as DIR/*.txt"
            )


def _survey(named: dict[str, Source], log: Log) -> None:
    """Checks the types of all files, and lists which are read as what."""
    for name, source in named.items():
        if source.source != "files":
            continue
        for split in _splits(source):
            if split != "valid" or source.valid_files:
                what = files.survey(source, split)
                log(f"prepare: {' '.join(filter(None, (name, split)))} files: {what or 'none'}")
        for warning in filter(None, (files.markup(source), files.quotation_marks(source))):
            log(f"prepare: {warning}")


def _recipes(
    record: dict[str, Any], config: Config, named: dict[str, Source], directory: epath.Path
) -> dict[str, Recipe]:
    """What is made of the examples of each source."""
    known = record["source_labels"] if "source_labels" in record else {name: [] for name in named}  # older: text only
    template = chat_template.load(record["chat"], directory) if "chat" in record else None
    recipes = {
        name: Recipe(source, config.task.objective, {label: i for i, label in enumerate(known[name])}, template)
        for name, source in named.items()
    }
    return held_out_split.apply(recipes, record.get("valid_fractions", {}))


# The vocabulary.


def _vocabulary(config: Config, recipes: dict[str, Recipe], directory: epath.Path, log: Log) -> dict[str, Any]:
    """Puts tokenizer and chat template into the directory; returns their file names there, its ids, and so on."""
    if config.data.is_chat:
        chat_template.require(config)  # before a vocabulary is trained
    tokenizer = train.choose(config, recipes, log)
    found: dict[str, Any] = {}
    if config.data.is_chat:
        template = chat_template.choose(config, tokenizer)
        tokenize_chat.ending(template, tokenizer)
        found["chat"] = chat_template.save(template, directory)
    return found | {"tokenizer": tokenizer.facts() | {"file": tokenizer.save(directory)}}


# The shards.


def _write(
    config: Config, recipes: dict[str, Recipe], directory: epath.Path, tokenizer: dict[str, Any], log: Log, workers: int
) -> dict[str, Any]:
    """Writes all shards; returns the manifest's account of them."""
    named = {name: recipe.source for name, recipe in recipes.items()}
    places, streams, keep_bad = _places(named), _streams(named), config.clean.bad_records == "skip"
    writers = {place: _writer(config, recipes, directory, tokenizer, place) for place in places}
    blocks = itertools.chain.from_iterable(
        worker_pool.blocks(i, sources.documents(named[name], split, config.data.max_documents, keep_bad))
        for i, (name, split) in enumerate(streams)
    )
    tasks = [
        worker_pool.Task(split, recipes[name], {to: writers[name, to].cursor for to in _splits(named[name])})
        for name, split in streams
    ]
    results = worker_pool.process(blocks, directory / tokenizer["file"], config.clean, tasks, workers)
    with contextlib.closing(results):  # whatever goes wrong here, the worker processes end
        counts = _fill(results, [name for name, _ in streams], writers, config.clean, log)
    for place in places:
        if not counts.kept[place]:
            _refuse_empty(place, recipes, counts)
    for line in [*counts.remarks(), *_unseparated(named, streams, counts)]:
        log(f"prepare: {line}")
    splits = {"/".join(filter(None, place)): _finish(writers[place], directory.joinpath(*place)) for place in places}
    return {"splits": splits, "dropped": dict(sorted(counts.dropped.items())), "versions": _versions()}


def _unseparated(named: dict[str, Source], streams: list[tuple[str, Split]], counts: "_Counts") -> Iterator[str]:
    """Warnings of sources in whose files the separator between documents does not occur."""
    for number, (name, split) in enumerate(streams):
        source = named[name]
        if source.separator and 0 < counts.read[number] <= sum(1 for _ in files.matching(source, split)):
            where = " ".join(filter(None, (name, split)))
            yield (
                f"warning: data.separator={source.separator} does not occur in the {where} files, each of which is one "
                "document"
            )


def _writer(
    config: Config,
    recipes: dict[str, Recipe],
    directory: epath.Path,
    tokenizer: dict[str, Any],
    place: tuple[str, Split],
) -> ShardWriter:
    name, split = place
    recipe, size = recipes[name], tokenizer["vocab_size"]
    if recipe.source.example == "tags" and len(recipe.labels) >= size:
        raise ConfigError(f"{len(recipe.labels)} tags are too many for a vocabulary of {size}")
    shape = encode_examples.shape(recipe.source, recipe.objective)
    keep = worker_pool.is_exempt(recipe, split)
    return ShardWriter(directory.joinpath(*place), size, config.data.shard_tokens, *shape, keep_examples=keep)


def _places(named: dict[str, Source]) -> list[tuple[str, Split]]:
    """What is written, by source and split; also the path below the directory."""
    return [(name, split) for name, source in named.items() for split in _splits(source)]


def _splits(source: Source) -> list[Split]:
    found: dict[Split, bool] = {
        "train": True,
        "valid": bool(source.valid_files or source.valid_split or source.valid_fraction),
        "test": bool(source.test_files or source.test_split),
    }
    return [split for split, is_there in found.items() if is_there]


def _streams(named: dict[str, Source]) -> list[tuple[str, Split]]:
    """What is read, in order. Held-out files come first: a document that is in them too is then not trained on."""
    test: list[tuple[str, Split]] = [(name, "test") for name, s in named.items() if s.test_files or s.test_split]
    valid: list[tuple[str, Split]] = [(name, "valid") for name, s in named.items() if s.valid_files or s.valid_split]
    return test + valid + [(name, "train") for name in named]


class _Counts:
    """Counts of what was kept where, and dropped why.

    Attributes:
      read: examples of each stream.
      kept: examples by source and split.
      dropped: examples by reason.
      held_out: duplicates that are trained on nowhere, since they are held out.
      tokens: written by this process.
    """

    def __init__(self) -> None:
        self.read: collections.Counter[int] = collections.Counter()
        self.kept: collections.Counter[tuple[str, Split]] = collections.Counter()
        self.dropped: collections.Counter[str] = collections.Counter()
        self.held_out = self.tokens = 0
        self._by_source: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self._unknown = 0
        self._notes: list[str] = []

    def drop(self, source: str, why: str, note: str) -> None:
        """Counts an example that is dropped."""
        self.dropped[why] += 1
        self._by_source[source][why] += 1
        if note and len(self._notes) < _SHOWN_NOTES:
            self._notes.append(note)

    def keep(self, place: tuple[str, Split], result: worker_pool.Result) -> None:
        """Counts an example that is kept."""
        self.kept[place] += 1
        self._unknown += result.unknown
        self.tokens += sum(len(ids) for one in result.encoded or () for ids in one.fields)

    def remarks(self) -> list[str]:
        """Lines on losses that a user should know of."""
        found = [f"a bad record was dropped: {note}" for note in self._notes]
        if (more := self.dropped["bad_record"] - len(self._notes)) > 0:
            found.append(f"{more:,} more bad record{'s were' if more > 1 else ' was'} dropped")
        for name, dropped in self._by_source.items():
            left = self.kept[name, "train"]
            if name and (lost := sum(dropped.values())) > left:
                found.append(
                    f"warning: source {name} keeps {left:,} and loses {lost:,} examples "
                    f"({encode_examples.counted(dropped)}); "
                    "its weight repeats those that are left"
                )
        if self._unknown:
            share = self._unknown / max(1, self.tokens)
            warning = "warning: the tokenizer does not fit the text: " if share >= unknown_tokens.MUCH else ""
            found.append(f"{warning}{100 * share:.2g} % of all tokens are unknown to the tokenizer")
        return found


class _Memory:
    """The documents seen before: held-out ones by all, training ones by their source, or by all of a mixture."""

    def __init__(self, config: CleanConfig):
        self._near, self._shared = config.deduplicate == "near", config.deduplicate_over == "mixture"
        self._off = config.deduplicate == "none"
        self.held_out = cleaning.Deduplicator(self._near)
        self._sources: dict[str, cleaning.Deduplicator] = {}

    def find(self, name: str, result: worker_pool.Result) -> tuple[str | None, bool]:
        """Why a document of a source is a duplicate, and whether of a held-out one; it is remembered."""
        if self._off:
            return None, False
        name = "" if self._shared else name
        own = self._sources.setdefault(name, cleaning.Deduplicator(self._near))
        training = result.split == "train"
        memories = [self.held_out, *([own] if training else self._sources.values())]
        found = [memory.find(result.digest, result.signature) for memory in memories]
        why = min(filter(None, found), default=None)  # "duplicate" comes before "near_duplicate"
        (own if training else self.held_out).add(result.digest, None if why else result.signature)
        return why, training and bool(found[0])


def _fill(
    results: Iterator[tuple[int, int, list[worker_pool.Result]]],
    names: list[str],
    writers: dict[tuple[str, Split], ShardWriter],
    config: CleanConfig,
    log: Log,
) -> _Counts:
    """Gives each document to its writer, unless it was seen before."""
    memory, counts = _Memory(config), _Counts()
    progress = _Progress(log)
    for stream, start, documents in results:
        for index, document in enumerate(documents, start):
            name = names[stream]
            why, is_held_out = (document.dropped, False) if document.dropped else memory.find(name, document)
            if why and not document.exempt:
                counts.drop(name, why, document.note)
                counts.held_out += is_held_out
                continue
            place = name, document.split
            counts.keep(place, document)
            made = document.encoded or []
            for number, (fields, numbers, num_bytes) in enumerate(made, 1):
                more = number < len(made)
                writers[place].add(fields, num_bytes, index + 1, numbers, document.example, more)
        counts.read[stream] += len(documents)
        progress.documents += len(documents)
        progress.tokens = counts.tokens
        progress.tell()
    return counts


class _Progress:
    """Tells how far the work is, every two seconds."""

    def __init__(self, log: Log):
        self._log = log
        self._started = self._told = time.monotonic()
        self.documents = self.tokens = 0

    def tell(self) -> None:
        now = time.monotonic()
        if now - self._told < _LOG_SECONDS:
            return
        self._told = now
        speed = self.tokens / (now - self._started)
        self._log(f"prepare: {self.documents:,} examples read, {short(self.tokens)} tokens, {short(speed)} tokens/s")


def _outcome(summary: dict[str, Any], named: dict[str, Source]) -> str:
    kept = ", ".join(
        f"{encode_examples.units(named.values(), split['documents'])} in {name}"
        for name, split in summary["splits"].items()
    )
    dropped = encode_examples.counted(summary["dropped"]) or "none"
    return f"prepare: done: {kept}; {short(summary['tokens'])} tokens; dropped: {dropped}"


def _finish(writer: ShardWriter, directory: epath.Path) -> dict[str, Any]:
    manifest = writer.finish()
    figures = {key: manifest[key] for key in ("documents", "tokens", "bytes")}
    digest = hashlib.sha256((directory / _MANIFEST).read_bytes()).hexdigest()
    return figures | {"shards": len(manifest["shards"]), "manifest_sha256": digest}


def _refuse_empty(place: tuple[str, Split], recipes: dict[str, Recipe], counts: _Counts) -> None:
    name, split = place
    if split == "train":
        raise InputMissing(encode_examples.nothing({name: recipes[name]}, counts.dropped, counts.held_out))
    lost = f"; dropped: {encode_examples.counted(counts.dropped) or 'none'}"
    if split == "test":
        raise InputMissing(f"nothing to test on: every test document is empty or was dropped{lost}")
    if recipes[name].source.valid_fraction:
        raise InputMissing(f"all that data.valid_fraction holds out was dropped{lost}; set a larger one, or 0")
    raise InputMissing(f"nothing to validate on: every held-out document is empty or was dropped{lost}")


def _versions() -> dict[str, str]:
    """Of what the result may depend on."""
    versions = {"lslm_jax": __version__, "python": platform.python_version(), "unicode": unicodedata.unidata_version}
    for package in ("numpy", "sentencepiece", "tokenizers", "datasketch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _summary(manifest: dict[str, Any], skipped: bool, started: float) -> dict[str, Any]:
    splits = manifest["splits"]
    totals = {key: sum(split[key] for split in splits.values()) for key in ("documents", "tokens", "bytes", "shards")}
    return totals | {
        "dropped": manifest.get("dropped", {}),
        "vocab_size": manifest["tokenizer"]["vocab_size"],
        "splits": splits,
        "skipped": skipped,
        "seconds": round(time.monotonic() - started, 3),
    }
