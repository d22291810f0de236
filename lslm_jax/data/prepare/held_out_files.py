"""Files that a trained model is evaluated on, prepared on the fly with the tokenizer, labels and template of its run.

Nothing is deduplicated: each example counts as often as it is there. Documents that the cleaning of the run drops are
counted by reason.
"""

import collections
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from etils import epath

from lslm_jax.config import Config, MixtureSource, Source
from lslm_jax.data import dataloader, encode_examples
from lslm_jax.data.chat import chat_template
from lslm_jax.data.encode_examples import Recipe
from lslm_jax.data.prepare import worker_pool
from lslm_jax.data.readers import files, sources
from lslm_jax.data.readers.sources import Document
from lslm_jax.data.shards import Shards, ShardWriter
from lslm_jax.data.tokenizers.special_tokens import Special
from lslm_jax.errors import ConfigError, InputMissing

_SPLIT: files.Split = "valid"
_MAX_ORIGINS = 1 << 20  # of which the places in their files are kept in memory


class HeldOutFiles(NamedTuple):
    """Prepared files.

    Attributes:
      source: name of the source of a mixture that they are examples of; "" for the only one.
      data: their rows.
      origins: FILE or FILE:LINE of each example; empty where they are too many.
      dropped: documents by reason.
      sha256: of the prepared content.
    """

    source: str
    data: dataloader.EvalInput
    origins: list[str]
    dropped: dict[str, int]
    sha256: str


def source_of(config: Config, name: str | None) -> Source:
    """The source whose format files have: the only one, or the one of a mixture with this name.

    Raises:
      ConfigError: there is no such source, or it is not clear which is meant.
    """
    mixture = {source.name: source for source in config.data.mixture}
    if not mixture:
        if name:
            raise ConfigError(f"--source={name}: this run has one source, not a mixture")
        return config.data
    if name is None and len(mixture) == 1:
        name = next(iter(mixture))
    if name not in mixture:
        start = f"--source={name} names no source" if name else "--files needs --source=NAME"
        raise ConfigError(f"{start} of the mixture that this run was trained on: it has {', '.join(mixture)}")
    return mixture[name]


def prepare_files(
    config: Config,
    source: Source,
    patterns: Sequence[str],
    manifest: Mapping[str, Any],
    data_dir: epath.Path,
    directory: epath.Path,
    special: Special,
    batch_rows: Any,
    log: Callable[[str], None],
) -> HeldOutFiles:
    """Tokenizes files and opens them as rows.

    Args:
      config: resolved, of the run.
      source: from `source_of`; tells the kind of example and its fields.
      patterns: files, directories or globs.
      manifest: of the data that the run was trained on.
      data_dir: where these lie, with tokenizer and template.
      directory: empty, to write to.
      special: ids of the model.
      batch_rows: of this process, from `sharding.local_rows`.
      log: prints which files are read as what.

    Raises:
      InputMissing: a pattern matches no file, or there is no example to evaluate on.
      DataError: an example is bad; the label of one is unknown, say.
    """
    patterns = tuple(itertools.chain.from_iterable(map(_split, patterns)))
    name = source.name if isinstance(source, MixtureSource) else ""
    known = manifest["source_labels"][name] if "source_labels" in manifest else manifest.get("labels", [])
    source = replace(source, source="files", files=patterns, valid_files=patterns, test_files=(), valid_fraction=0.0)
    template = chat_template.load(manifest["chat"], data_dir) if "chat" in manifest else None
    recipe = Recipe(source, config.task.objective, {label: i for i, label in enumerate(known)}, template)
    tokenizer = data_dir / manifest["tokenizer"]["file"]
    shape = encode_examples.shape(source, config.task.objective)
    keep = worker_pool.is_exempt(recipe, _SPLIT)
    writer = ShardWriter(
        directory / _SPLIT, manifest["tokenizer"]["vocab_size"], config.data.shard_tokens, *shape, keep_examples=keep
    )
    try:
        log(f"files: {files.survey(source, _SPLIT)}")
        if warning := files.quotation_marks(source):
            log(warning)
        origins, dropped = _write(config, recipe, tokenizer, writer)
    except (ConfigError, InputMissing) as error:
        raise type(error)(str(error).replace("data.valid_files", "--files")) from error
    finished = writer.finish()
    if not finished["documents"]:
        raise InputMissing(
            f"nothing to evaluate on in {' '.join(patterns)}; dropped: {encode_examples.counted(dropped) or 'none'}"
        )
    whole_words = tokenizer if config.task.whole_words else None
    rows = dataloader.make_rows(Shards.open(directory / _SPLIT, name=" ".join(patterns)), config, special, whole_words)
    digest = "".join(entry["sha256"] for entry in (*finished["shards"], *finished["index"]))
    return HeldOutFiles(name, dataloader.EvalInput(rows, config, batch_rows), origins, dict(dropped), digest)


def _split(pattern: str) -> list[str]:
    """The patterns that one flag names: it alone where there is such a file, else those between its commas."""
    if "," not in pattern or epath.Path(pattern).expanduser().exists():
        return [pattern]
    return [part.strip() for part in pattern.split(",") if part.strip()]


def _write(
    config: Config, recipe: Recipe, tokenizer: epath.Path, writer: ShardWriter
) -> tuple[list[str], collections.Counter[str]]:
    """Adds all examples; returns where each one stands, and the documents that were dropped, by reason."""
    dropped: collections.Counter[str] = collections.Counter()
    read: list[str] = []
    origins: list[str] = []

    def documents() -> Iterator[Document]:
        keep_bad = config.clean.bad_records == "skip"
        for document in sources.documents(recipe.source, _SPLIT, config.data.max_documents, keep_bad):
            if len(read) <= _MAX_ORIGINS:
                read.append(document.origin)
            yield document

    task = worker_pool.Task(_SPLIT, recipe, {_SPLIT: 0})
    clean, blocks = replace(config.clean, deduplicate="none"), worker_pool.blocks(0, documents())
    for _, start, results in worker_pool.process(blocks, tokenizer, clean, [task], worker_pool.num_cores()):
        for index, result in enumerate(results, start):
            if result.dropped:
                dropped[result.dropped] += 1
                continue
            made = result.encoded or []
            for number, (fields, numbers, num_bytes) in enumerate(made, 1):
                writer.add(fields, num_bytes, index + 1, numbers, result.example, number < len(made))
                if len(read) <= _MAX_ORIGINS:
                    origins.append(read[index])
    return (origins if len(read) <= _MAX_ORIGINS else []), dropped
