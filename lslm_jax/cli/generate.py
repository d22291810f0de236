"""What `generate` does with prompts: continues, translates, classifies or answers them, as the model was trained to."""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from etils import epath

from lslm_jax.cli import prompt_files
from lslm_jax.config import Config, GenerateConfig
from lslm_jax.data import dataloader, encode_examples
from lslm_jax.data.batch import Batch
from lslm_jax.data.chat import tokenize_chat
from lslm_jax.data.shards import Shards, ShardWriter
from lslm_jax.errors import ConfigError
from lslm_jax.evaluate import prediction_eval, predictions
from lslm_jax.evaluate.types import Setting
from lslm_jax.generate import decode
from lslm_jax.models.attention import XLA

Prompt = dict[str, Any]
Answer = dict[str, Any]

MASK = "[MASK]"
_LIKELIEST = 5  # tokens that are shown for a masked one
_SHOWN = ("text", "score", "fills", "answer", "begin", "end", "value", "tags", "label", "probabilities")


# Prompts.


def read_prompts(config: Config, flags: argparse.Namespace) -> list[Prompt]:
    """The prompts of the command line, then those of the file: `prompt`, and where it needs them `context`, `target`.

    A chat model's may be `messages`, with `tools` perhaps, instead.

    Raises:
      ConfigError: there is none, one is not text, or a context or messages are missing or not wanted.
      InputMissing, DataError: the file cannot be read or holds none, or not JSON lines with a `prompt` each.
    """
    if not (flags.prompt or flags.prompts):
        raise ConfigError("generate needs --prompt=TEXT or --prompts=FILE; on a terminal it asks for prompts")
    prompts: list[Prompt] = [{"prompt": text} for text in flags.prompt or []]
    if not all(prompt_files.is_text(prompt["prompt"]) for prompt in prompts):
        raise ConfigError("--prompt is not UTF-8")
    if flags.prompts:
        prompts += prompt_files.read(flags.prompts)
    if flags.context:
        context = prompt_files.read_bytes(flags.context, "context").decode(errors="replace")
        prompts = [{"context": context} | prompt for prompt in prompts]
    if not config.data.is_chat and any("messages" in prompt for prompt in prompts):
        raise ConfigError("this model continues texts: messages are for one that chats (--chat)")
    asks = config.task.objective == "qa" or (config.data.example == "qa" and not config.data.mixture)
    if asks and not all("context" in prompt for prompt in prompts):
        raise ConfigError("a question is answered from a context: add --context=FILE")
    if not asks and any("context" in prompt for prompt in prompts):
        raise ConfigError("this model does not answer questions: leave out the context")
    return prompts


# Answers.


def answer(setting: Setting, model: Any, prompts: Sequence[Prompt]) -> Iterator[Answer]:
    """Does with each prompt what the model was trained for; what is found, by name, the prompt with it.

    Raises:
      ConfigError: the model or the prompts do not allow it.
    """
    objective, size = setting.config.task.objective, setting.config.train.batch_size
    match objective:
        case "span_corruption":
            raise ConfigError(
                "a model of task.objective=span_corruption is for fine-tuning (train.init_from): it writes no text"
            )
        case "causal" | "seq2seq":
            respond = _write
        case "masked":
            respond = _fill
        case _:
            respond = _tell
    for first in range(0, len(prompts), size):
        part = prompts[first : first + size]
        for prompt, found in zip(part, respond(setting, model, part, first), strict=True):
            yield _with_extra({key: prompt[key] for key in ("prompt", "messages") if key in prompt} | found, prompt)


def _with_extra(found: Answer, prompt: Prompt) -> Answer:
    """An answer with the other fields of its prompt; one whose name the answer has itself is kept as `input_NAME`."""
    extra = {key: value for key, value in prompt.items() if key not in ("prompt", "messages", "tools", "context")}
    return {f"input_{key}" if key in (*found, "step") else key: value for key, value in extra.items()} | found


def spell(setting: Setting, answer: Answer) -> str:
    """An answer as a person reads it; after a continuation's prompt, but of a chat alone."""
    if setting.config.data.is_chat:
        return f"{answer['text']}\n"
    prompt, rest = answer["prompt"], {name: value for name, value in answer.items() if name in _SHOWN}
    if setting.config.task.objective == "causal":
        return f"{prompt}{rest['text']}\n"
    shown = [f"{name}: {_short(value)}" for name, value in rest.items()]
    return f"{prompt}\n  " + "\n  ".join(shown)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name} {_short(part)}" for name, part in value.items())
    if isinstance(value, list):
        return "  |  ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def sampler(setting: Setting) -> Callable[[Any], str]:
    """Answers the config's prompts, as one text for people to read."""
    prompts: list[Prompt] = [{"prompt": text} for text in setting.config.generate.prompts]
    shown = lambda found: f"{found['prompt']}\n" * setting.config.data.is_chat + spell(setting, found)
    return lambda model: "\n".join(f"--- {shown(found)}" for found in answer(setting, model, prompts))


def stream(setting: Setting, model: Any, prompt: Prompt) -> Iterator[str]:
    """One prompt's text as it is drawn; before a continuation the prompt itself, once it is known to fit the model."""
    [ids], suffix = _ids(setting, [prompt])
    texts = decode.stream(model, setting.words, ids, _manner(setting), setting.config.seed, suffix_ids=suffix)
    first = next(texts, "")
    if setting.config.task.objective == "causal" and not setting.config.data.is_chat:
        yield prompt["prompt"]
    yield first
    yield from texts


def _write(setting: Setting, model: Any, prompts: Sequence[Prompt], first: int) -> Iterator[Answer]:
    ids, suffix = _ids(setting, prompts)
    config = setting.config
    results = decode.generate(model, setting.words, ids, _manner(setting), config.seed, first, suffix)
    for result in results:
        found: Answer = {"text": result.text, "ended": result.ended, "tokens": result.num_tokens}
        yield found if result.score is None else found | {"score": result.score}


def _ids(setting: Setting, prompts: Sequence[Prompt]) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """What the model reads of each prompt, and what its decoder reads after it."""
    config = setting.config
    if setting.template is not None:
        talks = [_conversation(prompt) for prompt in prompts]
        origins = ["the prompt"] if len(talks) == 1 else [f"prompt {number}" for number in range(len(talks))]
        asked = zip(talks, origins, strict=True)
        return [tokenize_chat.prompt(talk, setting.template, setting.words, origin) for talk, origin in asked], ()
    if config.task.objective == "causal" or config.data.mixture:  # of a mixture, the prompts bring their prefix
        texts = [prompt["prompt"] for prompt in prompts]
    else:
        recipe = _recipe(setting)
        texts = [encode_examples.texts(_example(setting, prompt), recipe)[0] for prompt in prompts]
    between = config.task.objective == "seq2seq" and config.model.family == "decoder"
    return setting.words.encode_batch(texts), (setting.words.bos_id,) if between else ()


def _conversation(prompt: Prompt) -> Prompt:
    """Input of a chat template: messages and tools of a prompt, or the prompt as a message of the user."""
    if "messages" in prompt:
        return {key: prompt[key] for key in ("messages", "tools") if key in prompt}
    return {"messages": [{"role": "user", "content": prompt["prompt"]}]}


def _manner(setting: Setting) -> GenerateConfig:
    """How texts are written: in a chat, as its template begins and ends an answer."""
    if setting.template is None:
        return setting.config.generate
    return answering(setting.config.generate, tokenize_chat.ending(setting.template, setting.words))


def answering(settings: GenerateConfig, ending: tokenize_chat.Ending) -> GenerateConfig:
    """Settings by which a text ends where an answer does; what begins it is the template's business."""
    stop_ids = (*settings.stop_ids, *(id for id in ending.ids if id not in settings.stop_ids))
    return replace(settings, stop_ids=stop_ids, stop=(*settings.stop, *ending.texts), bos=False)


def _recipe(setting: Setting) -> encode_examples.Recipe:
    source = setting.source(setting.config.data.mixture[0].name if setting.config.data.mixture else "")
    numbers = {name: number for number, name in enumerate(setting.labels)}
    return encode_examples.Recipe(source, setting.config.task.objective, numbers)


def _example(setting: Setting, prompt: Prompt) -> encode_examples.Example:
    """A prompt as an example whose answer is not known."""
    text, some = prompt["prompt"], setting.labels[0] if setting.labels else 0.0
    match _recipe(setting).source.example:
        case "pair":
            return {"source": text, "target": ""}
        case "tags":
            return {"words": text.split(), "tags": [some] * len(text.split())}
        case "qa":
            return {"id": "", "question": text, "context": prompt["context"], "answers": []}
        case _:
            second = {"target": prompt["target"]} if "target" in prompt else {}
            return {"text": text, "label": some} | second


def _tell(setting: Setting, model: Any, prompts: Sequence[Prompt], first: int) -> Iterator[Answer]:
    """Predictions of a head for prompts, which go the way of held-out examples; texts and pairs of texts apart."""
    source = _recipe(setting).source
    if source.example != "label":
        yield from _predict(setting, model, prompts)
        return
    if source.target_key and not all("target" in prompt for prompt in prompts):
        raise ConfigError('this model reads pairs of texts: give prompts in a file, each with "prompt" and "target"')
    answers: dict[int, Answer] = {}
    for paired in (False, True):
        numbers = [i for i, prompt in enumerate(prompts) if ("target" in prompt) == paired]
        data = replace(setting.config.data, target_key=source.target_key or "target" * paired)
        alike = setting._replace(config=replace(setting.config, data=data)) if not data.mixture else setting
        found = _predict(alike, model, [prompts[i] for i in numbers]) if numbers else ()
        answers |= dict(zip(numbers, found, strict=True))
    yield from (answers[i] for i in range(len(prompts)))


def _predict(setting: Setting, model: Any, prompts: Sequence[Prompt]) -> Iterator[Answer]:
    """Predictions of a head for prompts that all have equally many texts."""
    found = [_example(setting, prompt) for prompt in prompts]
    with tempfile.TemporaryDirectory() as directory:
        part = _as_split(setting, found, epath.Path(directory))
        _, rows = prediction_eval.read(setting, part, model)
        match setting.config.task.objective:
            case "qa":
                for best in prediction_eval.find_answers(setting, part, rows, found, setting.answerable):
                    yield {"answer": best.text, "score": best.score, "begin": best.begin, "end": best.end}
            case "regression":
                yield from ({"value": value} for value in rows.scores_NPV[:, 0, 0].tolist())
            case "tagging":
                for example, tags in zip(found, prediction_eval.tags_of_words(rows), strict=True):
                    # Words beyond the row have no tag.
                    names = [setting.labels[tag] for tag in tags]
                    yield {"tags": [f"{word}/{name}" for word, name in zip(example["words"], names, strict=False)]}
            case _:
                for scores_V in rows.scores_NPV[:, 0]:
                    shares = dict(zip(setting.labels, _shares(setting, scores_V).tolist(), strict=True))
                    yield {"label": max(shares, key=shares.__getitem__), "probabilities": shares}


def _shares(setting: Setting, scores_V: np.ndarray) -> np.ndarray:
    """Probabilities of classes: together 1, or each by itself."""
    if setting.config.task.multi_label:
        return np.exp(-np.logaddexp(0.0, -scores_V))
    return predictions.softmax(scores_V)


def _as_split(setting: Setting, found: list[encode_examples.Example], directory: epath.Path) -> dataloader.EvalInput:
    recipe = _recipe(setting)
    fields, numbers = encode_examples.shape(recipe.source, recipe.objective)
    writer = ShardWriter(directory / "valid", setting.words.vocab_size, 1 << 26, fields, numbers)
    for i, [encoded] in enumerate(encode_examples.encode(found, recipe, setting.words)):
        writer.add(encoded.fields, 0, i + 1, encoded.numbers)
    writer.finish()
    rows = dataloader.make_rows(Shards.open(directory / "valid", name="the prompts"), setting.config, setting.special)
    return dataloader.EvalInput(rows, setting.config)


def _fill(setting: Setting, model: Any, prompts: Sequence[Prompt], first: int) -> Iterator[Answer]:
    """The likeliest tokens for each [MASK] of the prompts."""
    config, special = setting.config, setting.special
    predict = prediction_eval.predictor(config, XLA, setting.mesh)
    for prompt in prompts:
        parts = setting.words.encode_batch(prompt["prompt"].split(MASK))
        if len(parts) < 2:
            raise ConfigError(f"a masked model fills in {MASK}: put it into the prompt")
        ids = [special.bos_id]
        for part in parts:
            ids += [*part.tolist(), special.mask_id]
        ids[-1] = special.eos_id
        if len(ids) > config.model.max_length:
            raise ConfigError(f"the prompt has {len(ids)} tokens, model.max_length is {config.model.max_length}")
        tokens_BT = np.array([ids], np.int32)
        places_BP = np.flatnonzero(tokens_BT[0] == special.mask_id)[None].astype(np.int32)
        batch = Batch(tokens_BT, places_BP, np.ones(places_BP.shape, np.float32), places_BP=places_BP)
        _, rows = predict(model, batch)
        scores_PV = rows.scores_NPV[0, :, : setting.words.vocab_size]
        shares_PV = np.asarray(jax.nn.softmax(scores_PV, axis=-1))
        best_PN = np.argsort(-shares_PV, axis=-1)[:, :_LIKELIEST]
        yield {
            "fills": [
                {setting.words.piece(int(id)): float(shares_V[id]) for id in best_N}
                for shares_V, best_N in zip(shares_PV, best_PN, strict=True)
            ]
        }
