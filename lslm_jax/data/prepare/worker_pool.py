"""Raw documents -> cleaned, hashed and tokenised ones: on every core, in order, in bounded memory.

Workers are started afresh (threads of jax or tensorflow make forking unsafe) and import neither of the two. What comes
out does not depend on how many there are.
"""

import collections
import contextlib
import itertools
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Generator, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Literal, NamedTuple

import numpy as np
from etils import epath

from lslm_jax.config import CleanConfig
from lslm_jax.data import encode_examples
from lslm_jax.data.encode_examples import Encoded, Example, Recipe
from lslm_jax.data.prepare import cleaning, long_documents
from lslm_jax.data.readers.example_schema import RecordError
from lslm_jax.data.readers.files import Split
from lslm_jax.data.readers.sources import Document
from lslm_jax.data.tokenizers import unknown_tokens
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.errors import LslmError

_BLOCK_CHARS = 1 << 20
_BLOCK_DOCUMENTS = 4096


class Task(NamedTuple):
    """How one stream of documents is treated.

    Attributes:
      split: where its documents belong.
      recipe: what is made of them; its source's `valid_fraction` is the share that belongs to `valid` instead.
      done: per split, raw documents that need no ids, since an earlier process wrote them.
    """

    split: Split
    recipe: Recipe
    done: dict[Split, int]


class Block(NamedTuple):
    """Consecutive documents of a stream: which stream, the raw index of the first, and they themselves."""

    stream: int
    start: int
    documents: list[Document]


class Result(NamedTuple):
    """What became of one document.

    Attributes:
      dropped: why it is left out.
      split: where it belongs.
      digest, signature: what tells others equal or near to it.
      exempt: whether it is kept even so, as each example is that something is measured on.
      encoded: its tokens, as one example or several; None where they were written before.
      example: as it was read, where that is kept.
      unknown: how many of its tokens stand for what the vocabulary does not hold.
      note: the message of a bad record.
    """

    dropped: str | None = None
    split: Split = "train"
    digest: bytes = b""
    signature: np.ndarray | None = None
    exempt: bool = False
    encoded: list[Encoded] | None = None
    example: Example | None = None
    unknown: int = 0
    note: str = ""


def blocks(stream: int, documents: Iterable[Document]) -> Iterator[Block]:
    """Documents of a stream, grouped so that a block is worth sending to another process."""
    block: list[Document] = []
    size = start = 0
    for document in documents:
        block.append(document)
        size += encode_examples.size(document.content)
        if size >= _BLOCK_CHARS or len(block) >= _BLOCK_DOCUMENTS:
            yield Block(stream, start, block)
            start, size, block = start + len(block), 0, []
    if block:
        yield Block(stream, start, block)


def is_held_out(document: Document, digest: bytes, valid_fraction: float) -> bool:
    """Whether a document of the training source belongs to validation: by its place, or by its content's digest."""
    return cleaning.is_valid(digest, valid_fraction) if document.held_out is None else document.held_out


class Worker:
    """Does everything that can be done to a document without knowing the others."""

    def __init__(self, tokenizer: epath.Path, config: CleanConfig, tasks: list[Task]):
        """Loads the tokenizer; `tasks` has one entry a stream."""
        self._tokenizer = load_tokenizer(tokenizer)
        self._unknown_id = unknown_tokens.unknown_id(self._tokenizer)
        self._config = config
        self._tasks = tasks

    def __call__(self, block: Block) -> list[Result]:
        """Results of the block's documents, in order."""
        task = self._tasks[block.stream]
        results: list[Result] = []
        new: list[tuple[int, Example]] = []
        for i, document in enumerate(block.documents):
            if is_long(document, task.recipe):
                results.append(self._work_in_parts(document, block.start + i, task))
                block.documents[i] = document._replace(content="")  # the largest part of the memory in use
                continue
            result, example = self._judge(document, task)
            results.append(result)
            if example is not None and (self._is_new(result, block.start + i, task) or self._may_fail(task)):
                new.append((i, example))
        for (i, _), encoded in zip(new, self._encode([one for _, one in new], task.recipe), strict=True):
            if isinstance(encoded, str):
                results[i] = Result("bad_record", note=encoded)
            elif self._is_new(results[i], block.start + i, task):
                results[i] = results[i]._replace(encoded=encoded, unknown=self._count_unknown(encoded, task.recipe))
        return results

    @staticmethod
    def _is_new(result: Result, index: int, task: Task) -> bool:
        return not result.dropped and index >= task.done[result.split]

    def _may_fail(self, task: Task) -> bool:
        """True if examples are encoded even if an earlier process wrote them, to find those that cannot be."""
        return task.recipe.source.example == "chat" and self._config.bad_records == "skip"

    def _policy(self, task: Task) -> Literal["strict", "replace", "skip"]:
        policy = self._config.bad_utf8
        return "replace" if policy == "skip" and is_exempt(task.recipe, task.split) else policy

    def _judge(self, document: Document, task: Task) -> tuple[Result, Example | None]:
        """The result of a document, still without tokens, and the cleaned example unless that is dropped."""
        recipe = task.recipe
        try:
            raw = encode_examples.decode(document.content, recipe, self._policy(task), document.origin)
        except RecordError as error:
            if self._config.bad_records == "strict":
                raise
            return Result("bad_record", note=str(error)), None
        if raw is None:
            return Result("bad_utf8"), None
        example = encode_examples.cleaned(raw, recipe, self._config)
        digest = encode_examples.digest(example, recipe)
        split = self._split(document, digest, task)
        exempt = is_exempt(recipe, split)
        dropped = encode_examples.reason(example, recipe, self._config)
        if dropped and (not exempt or dropped == "no_label"):
            return Result(dropped), None
        signature = encode_examples.signature(example, recipe) if self._config.deduplicate == "near" else None
        return Result(None, split, digest, signature, exempt, None, raw if exempt else None), example

    def _split(self, document: Document, digest: bytes, task: Task) -> Split:
        held_out = task.split == "train" and is_held_out(document, digest, task.recipe.valid_fraction)
        return "valid" if held_out else task.split

    def _work_in_parts(self, document: Document, index: int, task: Task) -> Result:
        """The result of a document too large to be cleaned and tokenized at once."""
        assert isinstance(document.content, (str, bytes))
        text = long_documents.cleaned(document.content, self._config, self._policy(task), document.origin)
        if text is None:
            return Result("bad_utf8")
        if dropped := cleaning.length_reason(text.length, self._config):
            return Result(dropped)
        signature = cleaning.signature_of_parts(text.texts()) if self._config.deduplicate == "near" else None
        result = Result(None, self._split(document, text.digest, task), text.digest, signature)
        if not self._is_new(result, index, task):
            return result
        encoded = [Encoded([long_documents.encode(text.texts(), self._tokenizer)], (), text.num_bytes)]
        return result._replace(encoded=encoded, unknown=self._count_unknown(encoded, task.recipe))

    def _encode(self, found: list[Example], recipe: Recipe) -> list[list[Encoded] | str]:
        """The tokens of each example, or why it has none."""
        if recipe.source.example != "chat" or self._config.bad_records == "strict":
            return [*encode_examples.encode(found, recipe, self._tokenizer)]
        return [self._encode_one(example, recipe) for example in found]

    def _encode_one(self, example: Example, recipe: Recipe) -> list[Encoded] | str:
        try:
            return encode_examples.encode([example], recipe, self._tokenizer)[0]
        except RecordError as error:
            return str(error)

    def _count_unknown(self, encoded: list[Encoded], recipe: Recipe) -> int:
        if self._unknown_id is None:
            return 0
        fields = (ids for one in encoded for ids in encode_examples.text_fields(one, recipe))
        return sum(int(np.count_nonzero(ids == self._unknown_id)) for ids in fields)


def is_long(document: Document, recipe: Recipe) -> bool:
    """True if a document is treated in parts."""
    content = document.content
    if recipe.source.example != "text" or not isinstance(content, (str, bytes)):
        return False
    return len(content) >= long_documents.LONG


def is_exempt(recipe: Recipe, split: Split) -> bool:
    """Whether each example is kept, and kept as it was read: those held out, of kinds scored by more than loss."""
    return split != "train" and recipe.source.example not in ("text", "chat")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process(
    blocks: Iterator[Block], tokenizer: epath.Path, config: CleanConfig, tasks: list[Task], workers: int
) -> Generator[tuple[int, int, list[Result]], None, None]:
    """Stream, raw index of the first document, and results of each block, in the order of the blocks.

    Args:
      blocks: of all streams.
      tokenizer: file to load it from.
      config: how documents are cleaned.
      tasks: one for each stream.
      workers: processes; with 1, or where there is but one block, the work is done in this one.

    Raises:
      DataError: a document is undecodable and `clean.bad_utf8` is strict, or a bad record and so is `bad_records`.
      LslmError: a process was killed.
    """
    first = collections.deque(itertools.islice(blocks, 2))
    is_short = len(first) < 2
    blocks = _after_first(first, blocks)
    if workers == 1 or is_short:
        worker = Worker(tokenizer, config, tasks)
        for block in blocks:
            yield block.stream, block.start, worker(block)
        return
    with contextlib.ExitStack() as stack:
        start = lambda: stack.enter_context(contextlib.closing(_Process(tokenizer, config, tasks)))
        yield from _in_order([start() for _ in range(workers)], blocks)


def _after_first(first: collections.deque[Block], rest: Iterator[Block]) -> Iterator[Block]:
    """All blocks, none of which is kept here once it was passed on: one may hold a book of 100 MB."""
    while first:
        yield first.popleft()
    yield from rest


def _in_order(pool: list["_Process"], blocks: Iterator[Block]) -> Iterator[tuple[int, int, list[Result]]]:
    """Deals the blocks out in turn, so many ahead that a process that is done finds its next one waiting."""
    ahead = 2 * len(pool)
    pending: collections.deque[tuple[int, int, _Process]] = collections.deque()
    for block, worker in zip(itertools.chain(blocks, [None] * ahead), itertools.cycle(pool)):
        if block:
            worker.send(block)
            pending.append((block.stream, block.start, worker))
        if pending and (not block or len(pending) == ahead):
            stream, start, oldest = pending.popleft()
            yield stream, start, oldest.receive()


class _Process:
    """A process that works on blocks, in order.

    It has a pipe of its own. With a queue that several write to, as in concurrent.futures, one that is killed while it
    writes leaves the others, and the reader, waiting for ever.
    """

    def __init__(self, *arguments: object):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, block: Block) -> None:
        with _told_if_killed():
            # Not `send`: the buffer it leaves in an error's traceback crashes the garbage collector of Python 3.12.1.
            self._pipe.send_bytes(bytes(ForkingPickler.dumps(block)))

    def receive(self) -> list[Result]:
        with _told_if_killed():
            result = self._pipe.recv()
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.terminate()
        self._process.join()
        self._pipe.close()


@contextlib.contextmanager
def _told_if_killed() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise LslmError("a process of prepare was killed, perhaps for want of memory; run again to go on") from error


def _serve(pipe: Connection, tokenizer: epath.Path, config: CleanConfig, tasks: list[Task]) -> None:
    """What a process does: results in the order of the blocks, or the exception that one of them raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to deal with
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    blocks: queue.SimpleQueue[Block] = queue.SimpleQueue()
    threading.Thread(target=_take, args=(pipe, blocks), daemon=True).start()
    try:
        worker = Worker(tokenizer, config, tasks)
        while True:
            pipe.send(worker(blocks.get()))
    except Exception as error:
        error.add_note(traceback.format_exc())
        pipe.send(error)
        threading.Event().wait()  # the parent stops this process once it has read what came before


def _take(pipe: Connection, blocks: queue.SimpleQueue) -> None:
    """Takes blocks as they come, for the parent must not wait to send while a result waits to be read.

    A process that can take no more ends: its parent was killed and cannot stop it, or there is no memory for a block.
    """
    try:
        while True:
            blocks.put(pipe.recv())
    finally:
        os._exit(1)
