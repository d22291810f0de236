"""Questions on contexts: SQuAD's own JSON files (v1.1, v2.0), and the flat records that others make of them.

An example is {"id", "question", "context", "answers": [{"text", "start"}]}; it has no answers where the question cannot
be answered. Places are in characters.
"""

import json
import os
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from lslm_jax.data.readers import formats
from lslm_jax.data.readers.example_schema import RecordError
from lslm_jax.data.readers.record_files import guarded
from lslm_jax.errors import DataError


def read(path: epath.Path, stream: IO[bytes], keep_bad: bool = False) -> Iterator[tuple[Any, str]]:
    """The questions of a SQuAD file, in its order, and where each stands.

    Args:
      path: the file, for messages.
      stream: its content.
      keep_bad: yield questions that are not as SQuAD has them as `BadRecord` rather than raise.

    Raises:
      DataError: it is not such a file.
    """
    try:
        content = json.loads(formats.whole(path, stream).decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    origin = os.fspath(path)
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    origin = f"{path}: question {question['id']}"
                    make = lambda question=question, paragraph=paragraph, at=origin: _checked(question, paragraph, at)
                    yield guarded(make, origin, keep_bad)
    except (KeyError, TypeError) as error:
        raise DataError(f"{origin}: {_explain(error)}") from error


def _checked(question: dict[str, Any], paragraph: dict[str, Any], origin: str) -> dict[str, Any]:
    try:
        return _example(question, paragraph["context"], origin)
    except (KeyError, TypeError) as error:
        raise RecordError(f"{origin}: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    what = f"no {error}" if isinstance(error, KeyError) else "a value of the wrong kind"
    return f"not as SQuAD has it: {what} ({_LAYOUT})"


_LAYOUT = "data, paragraphs, context, qas, id, question, answers, text, answer_start"


def _example(question: dict[str, Any], context: str, origin: str) -> dict[str, Any]:
    impossible = "is_impossible" in question and question["is_impossible"]
    answers = [] if impossible else question["answers"]
    record = {"id": question["id"], "question": question["question"], "context": context, "answers": answers}
    if not isinstance(context, str) or not isinstance(record["question"], str):
        raise TypeError
    return flat(record, origin)


def flat(record: dict[str, Any], origin: str) -> dict[str, Any]:
    """An example of a flat record, whose answers are a list of texts with places, or texts and places apart.

    Args:
      record: `id` (None, or none: its origin stands in), `question`, `context` and `answers`.
      origin: where it was read.

    Raises:
      RecordError: its answers are neither.
    """
    answers = record["answers"]
    try:
        if isinstance(answers, dict):
            answers = [
                {"text": text, "start": int(start)}
                for text, start in zip(answers["text"], answers["answer_start"], strict=True)
            ]
        else:
            answers = [{"text": answer["text"], "start": int(answer[_start(answer)])} for answer in answers]
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # a start of 1e999 is infinite
        shown = json.dumps(record["answers"], default=str)[:60]
        raise RecordError(f"{origin}: answers want text and answer_start, got {shown}") from error
    if not all(isinstance(answer["text"], (str, bytes)) for answer in answers):
        raise RecordError(f"{origin}: an answer is not text")
    id = origin if record.get("id") is None else record["id"]
    id = id if isinstance(id, bytes) else str(id)
    return {"id": id, "question": record["question"], "context": record["context"], "answers": answers}


def _start(answer: dict[str, Any]) -> str:
    return "start" if "start" in answer else "answer_start"
