"""Standard evaluation: tasks of EleutherAI's lm-eval (its package, data and metrics), answered by a model of ours.

Texts become tokens, contexts are cut and likelihoods counted as by lm-eval's own `hf` model, so that figures compare
with published ones. One thing differs: a text that spells a special token is text.
"""

import difflib
import fnmatch
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from etils import epath

from lslm_jax.config import Config, GenerateConfig
from lslm_jax.errors import ConfigError, DataError, InputMissing
from lslm_jax.evaluate import loglikelihood
from lslm_jax.evaluate.loglikelihood import BackendOf, Text
from lslm_jax.evaluate.types import Report, Setting
from lslm_jax.generate import decode
from lslm_jax.runtime.progress import Progress

_MAX_TOKENS = 256  # written where a task does not say how many, as lm-eval has it
_DRAWING = {"top_k": int, "top_p": float, "min_p": float}  # settings of theirs that ours share


class Asked(NamedTuple):
    """What to evaluate.

    Attributes:
      tasks: names of tasks, groups or tags, or patterns of them.
      path: directory of more tasks, as .yaml files; or None.
      fewshot: examples shown before each question; None: as many as the task says.
      limit: at most so many examples of each task; None: all.
    """

    tasks: Sequence[str]
    path: str | None = None
    fewshot: int | None = None
    limit: int | None = None


def asked(tasks: str, path: str | None, fewshot: int | None, limit: int | None) -> Asked:
    """What the flags of the command line ask for, `tasks` with commas between their names.

    Raises:
      ConfigError: no task is named, or a number makes no sense.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("--harness names no task: write --harness=TASK,TASK")
    if fewshot is not None and fewshot < 0:
        raise ConfigError(f"--fewshot={fewshot} must not be negative")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit={limit} must be positive")
    return Asked(names, path, fewshot, limit)


def check(config: Config) -> None:
    """Raises a ConfigError where a config's model cannot be asked, or lm-eval is not installed."""
    if config.model.family != "decoder" or config.task.objective != "causal":
        found = f"model.family={config.model.family}, task.objective={config.task.objective}"
        raise ConfigError(f"--harness asks decoders that continue texts (task.objective=causal), not {found}")
    _package()


def evaluate(setting: Setting, model: Any, wanted: Asked, backend_of: BackendOf) -> Report:
    """What lm-eval finds: metrics by `TASK/METRIC`, with a filter's name behind a comma; a file for each task.

    Each line of a file is a document with what was asked of the model, what it said, and its scores.

    Args:
      setting: of a model that `check` lets pass.
      model: a Decoder, on the mesh set by `jax.set_mesh`.
      wanted: from `asked`.
      backend_of: attention kernels.

    Raises:
      ConfigError: there is no such task, or it is not for this model.
      InputMissing: a task's data cannot be had.
    """
    lm_eval = _package()
    manager, names = _choose(wanted)
    found = lm_eval.simple_evaluate(
        model=_adapter(_Subject(setting, model, backend_of)),
        tasks=names,
        num_fewshot=wanted.fewshot,
        limit=wanted.limit,
        task_manager=manager,
    )
    metrics = {
        f"{task}/{name.removesuffix(',none')}": float(value)
        for task, scores in found["results"].items()
        for name, value in scores.items()
        if "," in name and isinstance(value, int | float)
    }
    files = {f"harness-{task}.jsonl": _lines(samples) for task, samples in found["samples"].items()}
    return Report(metrics, files, {"lm_eval": lm_eval.__version__})


def _package() -> Any:
    try:
        import lm_eval  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(f"--harness needs lm-eval ({error.name} is missing): pip install lm-eval") from error
    return lm_eval


def _lines(samples: Sequence[Any]) -> str:
    from lm_eval.utils import handle_non_serializable  # type: ignore[import-not-found]

    return "".join(f"{json.dumps(one, default=handle_non_serializable, ensure_ascii=False)}\n" for one in samples)


# Tasks.


def _choose(wanted: Asked) -> tuple[Any, list[str]]:
    """The tasks that are asked for, and what loads them: the directory alone where that has them all.

    To look through the thousands that come with lm-eval takes ten seconds.
    """
    if wanted.path:
        if not epath.Path(wanted.path).is_dir():
            raise InputMissing(f"--harness_path={wanted.path} is not a directory")
        own = _tasks(wanted.path, False)
        found = [_matching(own.all_subtasks, pattern) for pattern in wanted.tasks]
        if all(found):
            return own, list(dict.fromkeys(name for names in found for name in names))
    every, names = _tasks(wanted.path, True), []
    for pattern in wanted.tasks:
        matches = _matching(every.all_tasks, pattern)
        if not matches:
            near = difflib.get_close_matches(pattern, every.all_tasks, n=1)
            raise ConfigError(f"lm-eval has no task {pattern}" + (f"; did you mean {near[0]}?" if near else ""))
        names += matches
    return every, list(dict.fromkeys(names))


def _matching(known: Sequence[str], pattern: str) -> list[str]:
    return [pattern] if pattern in known else fnmatch.filter(known, pattern)


def _tasks(path: str | None, include_defaults: bool) -> Any:
    """Tasks of a directory, or also lm-eval's own; what may go wrong with one that is loaded is told in a line."""
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    class Tasks(TaskManager):
        def load(self, names: Any) -> Any:
            try:
                loaded = super().load(names)
            except Exception as error:  # whatever a task's own code raises, and the libraries that fetch its data
                reason = next(iter(str(error).splitlines()), "")
                raise InputMissing(
                    f"lm-eval cannot load {', '.join(names)}: {type(error).__name__}: {reason}"
                ) from error
            for name, task in loaded["tasks"].items():
                _check_task(name, task)
            return loaded

    return Tasks(include_path=path, include_defaults=include_defaults)


def _check_task(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(f"task {name} runs code that the model writes, which is not done here")
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"task {name} shows more than text, which models here cannot read")


# The model as lm-eval sees it.


def _adapter(subject: "_Subject") -> Any:
    from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found]

    class Model(TemplateLM):
        eot_token_id, prefix_token_id = subject.words.eos_id, subject.words.prefix_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return subject.encode(string, add_special_tokens)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return subject.rate([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return subject.roll([request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return subject.write([request.args for request in requests])

    return Model()


class _Subject:
    """A model that is asked, and the vocabulary that it reads."""

    def __init__(self, setting: Setting, model: Any, backend_of: BackendOf):
        self.words, self._model, self._setting, self._backend_of = setting.words, model, setting, backend_of
        self._longest = setting.config.model.max_length

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Ids of a text, with bos before it if so said, or None is said and models like this one read it."""
        words = self.words
        begin = words.piece(words.prefix_id)
        if bos is None and text.startswith(begin):  # as templates of chats do
            return [words.prefix_id, *words.encode(text.removeprefix(begin)).tolist()]
        begins = self._setting.config.generate.bos if bos is None else bos
        return [*([words.bos_id] if begins else []), *words.encode(text).tolist()]

    def rate(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-probabilities of continuations of contexts, which lose their beginning where they are too long."""
        for context, continuation in requests:
            if not (context and continuation):
                raise DataError("a task asks how likely a text without tokens is")
            if len(continuation) > self._longest:
                raise DataError(
                    f"a task asks for the likelihood of {len(continuation)} tokens at once, "
                    f"and the model reads at most {self._longest}"
                )
        texts = [Text((context + more)[-self._longest - 1 :], len(more)) for context, more in requests]
        return loglikelihood.rate(self._setting, self._model, texts, self._backend_of)

    def roll(self, texts: Sequence[str]) -> list[float]:
        """Log-probabilities of whole texts, each token once, in windows as long as the model reads."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore[import-not-found]

        windows = [
            [*map(make_disjoint_window, get_rolling_token_windows(ids, self.words.prefix_id, self._longest, 1))]
            for ids in map(self.encode, texts)
        ]
        rated = iter(self.rate([window for each in windows for window in each]))
        return [sum(next(rated)[0] for _ in each) for each in windows]

    def write(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """What the model writes after each context, with the settings of each; those of like settings together."""
        groups: dict[str, list[int]] = {}
        for i, (_, wanted) in enumerate(requests):
            groups.setdefault(json.dumps(wanted, sort_keys=True), []).append(i)
        written = [""] * len(requests)
        for group in groups.values():
            settings = _settings(self._setting.config.generate, requests[group[0]][1])
            texts = self._write([requests[i][0] for i in group], settings, group[0])
            for i, text in zip(group, texts, strict=True):
                written[i] = text
        return written

    def _write(self, contexts: Sequence[str], settings: GenerateConfig, first: int) -> list[str]:
        room = self._longest - settings.max_tokens
        if room < 1:
            raise ConfigError(f"a task has {settings.max_tokens} tokens written, and the model reads {self._longest}")
        prompts = [self.encode(context)[-room:] for context in contexts]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        written, config, done = [""] * len(prompts), self._setting.config, 0
        with Progress(len(order)) as progress:
            while done < len(order):
                size = loglikelihood.rows(config, len(prompts[order[done]]) + settings.max_tokens)
                part = order[done : done + size]
                # The last batch is filled up: another size would compile another program.
                full = [prompts[i] for i in part + part[-1:] * (size - len(part))]
                results = decode.generate(self._model, self.words, full, settings, config.seed, first + done)
                for i, result in zip(part, results, strict=False):
                    written[i] = _cut(self.words.decode(result.ids), settings.stop)
                done += len(part)
                progress.update(done)
        return written


def _settings(ours: GenerateConfig, wanted: dict[str, Any]) -> GenerateConfig:
    """A task's settings of generation; what it leaves open is as it is for this model.

    Raises:
      ConfigError: it sets what we have not.
    """
    from lm_eval.models.utils import normalize_gen_kwargs  # type: ignore[import-not-found]

    theirs: dict[str, Any] = dict(normalize_gen_kwargs(wanted, _MAX_TOKENS))
    draws, temperature = theirs.pop("do_sample"), float(theirs.pop("temperature", 1.0))
    stop = tuple(text for text in theirs.pop("until") if text)
    ours = replace(ours, max_tokens=theirs.pop("max_gen_toks"), stop=stop, bos=False, prompts=())
    ours = replace(ours, beams=int(theirs.pop("num_beams", ours.beams)))
    ours = replace(ours, repetition_penalty=float(theirs.pop("repetition_penalty", ours.repetition_penalty)))
    drawing = {name: kind(theirs.pop(name)) for name, kind in _DRAWING.items() if name in theirs}
    if theirs:
        raise ConfigError(f"a task asks for generation with {', '.join(theirs)}, which is not known here")
    if draws:
        return replace(ours, temperature=temperature, **drawing)
    return replace(ours, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)


def _cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of some strings, looked for in turn."""
    for end in stop:
        text = text.split(end)[0]
    return text
