"""Directories as Hugging Face has them: the model that one holds, its vocabulary, and how a run takes it up.

Nothing here needs jax before weights are read: a command that cannot work says so at once.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from etils import epath

from lslm_jax import atomic, config_loading
from lslm_jax.config import Config, GenerateConfig, ModelConfig
from lslm_jax.convert import adapter as adapters
from lslm_jax.convert import decoders, encoders, gguf, hub, pairs, safetensors
from lslm_jax.convert.family import RUN_KEYS, Family
from lslm_jax.convert.safetensors import Stored
from lslm_jax.data import tokenizer as tokenizers
from lslm_jax.errors import ConfigError, InputMissing

FAMILIES = (
    decoders.GPT2,
    decoders.LLAMA,
    decoders.MISTRAL,
    decoders.MIXTRAL,
    decoders.QWEN2,
    decoders.QWEN3,
    decoders.GEMMA2,
    decoders.GEMMA3,
    decoders.SMOLLM3,
    decoders.OLMO2,
    decoders.GPT_NEOX,
    encoders.BERT,
    encoders.ROBERTA,
    encoders.DISTILBERT,
    encoders.MODERNBERT,
    pairs.T5,
    pairs.T5_GATED,
    pairs.MARIAN,
)


class Pretrained(NamedTuple):
    """A model in a directory.

    Attributes:
      directory: that holds config.json and weights, or a GGUF file.
      family: how its settings and weights are named.
      model: what config.json describes.
      settings: config.json itself.
      adapter: that was trained beside it, or None.
    """

    directory: epath.Path
    family: Family
    model: ModelConfig
    settings: dict[str, Any]
    adapter: adapters.Adapter | None = None


def describe(directory: epath.Path | str) -> Pretrained:
    """Reads a directory's config.json, or what a GGUF file says; of `hf://ORG/NAME` a copy of what the Hub has.

    An adapter is described by the model that it belongs to.

    Raises:
      InputMissing: there is none; and the errors of `hub.local`.
      ConfigError: it is of a family, or has a setting, that our blocks do not express exactly.
    """
    directory = atomic.place(hub.local(directory))
    if adapters.is_adapter(directory):
        adapter = adapters.describe(directory)
        return describe(adapters.base_of(adapter))._replace(adapter=adapter)
    path = directory if _is_gguf(directory) else directory / "config.json"
    if not atomic.exists(path):
        raise InputMissing(f"{directory} holds no config.json: it is not a pretrained model")
    settings = gguf.settings(path) if _is_gguf(path) else atomic.read_json(path)
    kind = settings.get("model_type")
    candidates = [family for family in FAMILIES if family.model_type == kind]
    if not candidates:
        known = ", ".join(dict.fromkeys(family.model_type for family in FAMILIES))
        raise ConfigError(f"{path}: models of type {kind} are not supported, only {known}")
    problems = []
    for family in candidates:
        try:
            with _well_formed():
                return Pretrained(directory, family, _typed(Config(model=family.read(settings))).model, settings)
        except ConfigError as error:
            problems.append(str(error))
    raise ConfigError(f"{path}: {problems[-1]}")


def _is_gguf(path: epath.Path) -> bool:
    return path.suffix == ".gguf"


def _typed(config: Config) -> Config:
    """The config, once each of its settings is known to be of its type."""
    return config_loading.from_dict(config_loading.to_dict(config))


@contextlib.contextmanager
def _well_formed(where: str = "") -> Iterator[None]:
    """Says of what a stranger's setting of another type raises that it is one."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{where}a setting is malformed ({type(error).__name__}: {error})") from error


def is_pretrained(directory: epath.Path) -> bool:
    """Whether a directory holds a Hugging Face model, and not a run of ours, which has a config.json too."""
    path = directory / "config.json"
    if _is_gguf(directory) or adapters.is_adapter(directory):
        return True
    return atomic.exists(path) and "model_type" in atomic.read_json(path)


def tensors(source: Pretrained) -> Mapping[str, Stored]:
    """Where the weights of a directory lie, by their names there; InputMissing or DataError where they do not."""
    path = source.directory
    found = gguf.tensors(path) if _is_gguf(path) else safetensors.open_directory(path)
    return {**found, **adapters.whole_tensors(source.adapter)} if source.adapter else found


def load(source: Pretrained, objective: str, abstract: Any, fresh: Any = None) -> Any:
    """The weights of a directory: `weights.Loaded`, with the errors of `weights.load` and `safetensors`."""
    from lslm_jax.convert import peft, weights

    loaded = weights.load(tensors(source), source.family, source.model, objective, abstract, fresh)
    if source.adapter is None:
        return loaded
    return loaded._replace(model=peft.apply(source.adapter, loaded.model, source.family, objective))


# How a run takes it up.

_VOCABULARIES = {
    "tokenizer.json": "huggingface",
    "vocab.txt": "huggingface",
    "spiece.model": "sentencepiece",
    "tokenizer.model": "sentencepiece",
    "source.spm": "marian",
}
_OBJECTIVES = {
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForMaskedLM": "masked",
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "tagging",
    "ForQuestionAnswering": "qa",
    "ForConditionalGeneration": "seq2seq",
    "MTModel": "seq2seq",
}
_EXAMPLES = {"classification": "label", "regression": "label", "tagging": "tags", "qa": "qa", "seq2seq": "pair"}


def configure(config: Config, source: Pretrained, *, reads: bool = True, trains: bool = False) -> Config:
    """A config whose model, vocabulary and first weights are those of a directory.

    Args:
      config: all else.
      source: the directory.
      reads: whether text will be read; else the vocabulary may be missing.
      trains: whether it will be trained: only then it has adapters of its own.

    Raises:
      InputMissing: there is no vocabulary that can be read.
    """
    model = replace(source.model, **{name: getattr(config.model, name) for name in RUN_KEYS})
    model = model if trains else replace(model, lora_rank=0)
    if config.model.pool != ModelConfig().pool:
        model = replace(model, pool=config.model.pool)
    weights = source.adapter.directory if source.adapter else source.directory
    config = replace(config, model=model, train=replace(config.train, init_from=str(weights)))
    if not reads:
        return config
    path = vocabulary(source.directory)
    tokenizer = replace(config.tokenizer, kind=_VOCABULARIES.get(path.name, "huggingface"), path=str(path))
    return replace(config, tokenizer=tokenizer)


def default_config(source: Pretrained, *, reads: bool = True) -> Config:
    """A config for what the directory's model was trained to do, and how its makers let it write.

    Args:
      source: the directory.
      reads: as in `configure`.

    Raises:
      InputMissing: there is no vocabulary that can be read.
      ConfigError: it does not say what it was trained to do, or a setting is malformed.
    """
    with _well_formed(f"{source.directory}: "):
        objective = task_of(source)
        config = configure(Config(), source, reads=reads)
        data = replace(
            config.data,
            source="synthetic",
            example=example_of(objective),
            labels=labels(source, objective),
            seq_len=min(config.data.seq_len, source.model.max_length),
        )
        task = replace(config.task, objective=objective)
        config = replace(config, generate=generation(source.directory)) if reads else config
        return _typed(replace(config, data=data, task=task))


def example_of(objective: str) -> Any:
    """What a model with such an objective was shown, as far as its directory tells."""
    return _EXAMPLES[objective] if objective in _EXAMPLES else "text"


def labels(source: Pretrained, objective: str) -> tuple[str, ...]:
    """Names of the classes or tags that its head tells apart, in the order of their numbers; () of other heads."""
    if objective not in ("classification", "tagging"):
        return ()
    with _well_formed(f"{source.directory}: "):
        named = source.settings.get("id2label")
        if not named:  # transformers does not write down what its own default is
            return tuple(f"LABEL_{i}" for i in range(int(source.settings.get("num_labels", 2))))
        return tuple(str(named[key]) for key in sorted(named, key=int))


def task_of(source: Pretrained) -> str:
    """The objective of ours that its class, as config.json names it, was trained on.

    Raises:
      ConfigError: it names none that we know.
    """
    names = source.settings.get("architectures") or []
    found = [objective for suffix, objective in _OBJECTIVES.items() for name in names if name.endswith(suffix)]
    if source.adapter and source.adapter.settings.get("task_type") in adapters.TASKS:
        found = [adapters.TASKS[source.adapter.settings["task_type"]]]
    if not found:
        named = ", ".join(map(str, names)) or "none"
        raise ConfigError(
            f"{source.directory} does not say what its model is for (architectures: {named}): add --config=FILE"
        )
    is_number = found[0] == "classification" and source.settings.get("problem_type") == "regression"
    return "regression" if is_number else found[0]


def vocabulary(directory: epath.Path) -> epath.Path:
    """The file of its vocabulary.

    Raises:
      InputMissing: there is none that can be read.
    """
    if _is_gguf(directory):
        return directory
    for name in _VOCABULARIES:
        if (directory / name).is_file():
            return directory / name
    raise InputMissing(f"{directory} holds no vocabulary: none of {', '.join(_VOCABULARIES)}")


def generation(directory: epath.Path) -> GenerateConfig:
    """How its makers let it write: generation_config.json, as far as we do the same."""
    path = directory / "generation_config.json"
    theirs = atomic.read_json(path) if path.is_file() else {}
    words = tokenizers.load(vocabulary(directory))
    ends = theirs.get("eos_token_id", words.eos_id)
    ends = [ends] if isinstance(ends, int) else ends or []
    ours = GenerateConfig(
        temperature=0.0,
        beams=max(int(theirs.get("num_beams") or 1), 1),
        bos=words.adds_bos,
        stop_ids=tuple(id for id in ends if id != words.eos_id),
        never_ids=tuple(ids[0] for ids in theirs.get("bad_words_ids") or () if len(ids) == 1),
    )
    if theirs.get("do_sample"):
        ours = replace(
            ours,
            temperature=float(theirs.get("temperature") or 1.0),
            top_k=int(theirs.get("top_k") or 0),
            top_p=float(theirs.get("top_p") or 1.0),
            min_p=float(theirs.get("min_p") or 0.0),
        )
    if ours.beams == 1:
        ours = replace(ours, repetition_penalty=float(theirs.get("repetition_penalty") or 1.0))
    return ours
