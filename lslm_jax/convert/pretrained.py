"""Directories as Hugging Face has them: the model that one holds, its vocabulary, and how a run takes it up.

Nothing here needs jax before weights are read: a command that cannot work says so at once.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from etils import epath

from lslm_jax.config import Config, ModelConfig, loading
from lslm_jax.convert import generation, gguf, hf_decoders, hf_encoder_decoders, hf_encoders, hf_hub, safetensors_io
from lslm_jax.convert import peft_files as adapters
from lslm_jax.convert.hf_mapping import RUN_KEYS, Family, Unlike
from lslm_jax.convert.safetensors_io import Stored, same_bytes
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.errors import ConfigError, InputMissing, LslmError
from lslm_jax.runtime import atomic_io
from lslm_jax.runtime.progress import say

FAMILIES = (
    hf_decoders.GPT2,
    hf_decoders.LLAMA,
    hf_decoders.MISTRAL,
    hf_decoders.MIXTRAL,
    hf_decoders.QWEN2,
    hf_decoders.QWEN3,
    hf_decoders.GEMMA2,
    hf_decoders.GEMMA3,
    hf_decoders.SMOLLM3,
    hf_decoders.OLMO2,
    hf_decoders.GPT_NEOX,
    hf_encoders.BERT,
    hf_encoders.ROBERTA,
    hf_encoders.DISTILBERT,
    hf_encoders.MODERNBERT,
    hf_encoder_decoders.T5,
    hf_encoder_decoders.T5_GATED,
    hf_encoder_decoders.MARIAN,
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
    directory = atomic_io.place(hf_hub.local(directory))
    if adapters.is_adapter(directory):
        adapter = adapters.describe(directory)
        base = atomic_io.place(hf_hub.local(adapters.base_of(adapter)))
        if adapters.is_adapter(base):
            raise ConfigError(f"{directory} was trained on {base}, which is an adapter itself: merge that one first")
        source = describe(base)._replace(adapter=adapter)
        unties = source.model.tie_embeddings and adapters.unties(adapter, source.family)
        return _untied(source) if unties else source
    path = directory if _is_gguf(directory) else directory / "config.json"
    if not atomic_io.exists(path):
        raise InputMissing(f"{directory} holds no config.json: it is not a pretrained model")
    settings = gguf.settings(path) if _is_gguf(path) else atomic_io.read_json(path)
    kind = settings.get("model_type")
    candidates = [family for family in FAMILIES if family.model_type == kind]
    if not candidates:
        known = ", ".join(dict.fromkeys(family.model_type for family in FAMILIES))
        raise ConfigError(f"{path}: models of type {kind} are not supported, only {known}")
    problems: list[ConfigError] = []
    for family in candidates:
        try:
            with _well_formed():
                source = Pretrained(directory, family, _typed(Config(model=family.read(settings))).model, settings)
        except ConfigError as error:
            problems.append(error)
            continue
        return _untied(source) if _has_another_head(source) else source
    # The families of one model_type differ in a setting: where it fits one of them, another setting is at fault.
    problem = next((error for error in problems if not isinstance(error, Unlike)), problems[-1])
    raise ConfigError(f"{path}: {problem}") from problem


def _untied(source: Pretrained) -> Pretrained:
    """The same with an output layer of its own."""
    if source.model.family == "encoder" or source.family.modules.get("head") is None:
        raise ConfigError(f"{source.directory}: a {source.family.model_type} with an output layer of its own")
    return source._replace(model=replace(source.model, tie_embeddings=False))


def _has_another_head(source: Pretrained) -> bool:
    """True if the weights hold an output layer that differs from the embedding it is said to be; it counts then."""
    head, embed = source.family.modules.get("head"), source.family.modules["embed"]
    if not source.model.tie_embeddings or not isinstance(head, str) or not isinstance(embed, str):
        return False
    try:
        stored = _stored(source.directory)
    except LslmError:  # reported when weights are read
        return False
    prefix = source.family.prefix
    embedding = stored.get(embed) or stored.get(embed.removeprefix(prefix))
    if head not in stored or embedding is None or stored[head].shape != embedding.shape:
        return False
    if same_bytes(stored[head], embedding):
        return False
    say(f"{source.directory}: tie_word_embeddings is true, but {head} differs from {embed}: both are read")
    return True


def _is_gguf(path: epath.Path) -> bool:
    return path.suffix == ".gguf"


def _typed(config: Config) -> Config:
    """The config, once each of its settings is known to be of its type."""
    return loading.from_dict(loading.to_dict(config))


@contextlib.contextmanager
def _well_formed(where: str = "") -> Iterator[None]:
    """Says of what a stranger's setting of another type raises that it is one."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"{where}a setting is malformed ({type(error).__name__}: {error})") from error


def is_pretrained(directory: epath.Path) -> bool:
    """Whether a directory holds a Hugging Face model, and not a run of ours, which has a config.json too."""
    path = directory / "config.json"
    if _is_gguf(directory) or adapters.is_adapter(directory):
        return True
    return atomic_io.exists(path) and "model_type" in atomic_io.read_json(path)


def tensors(source: Pretrained) -> Mapping[str, Stored]:
    """Where the weights of a directory lie, by their names there; InputMissing or DataError where they do not."""
    found = _stored(source.directory)
    return adapters.applied(source.adapter, found, source.family) if source.adapter else found


def _stored(path: epath.Path) -> Mapping[str, Stored]:
    return gguf.tensors(path) if _is_gguf(path) else safetensors_io.open_directory(path)


def load(source: Pretrained, objective: str, abstract: Any, fresh: Any = None, names: Sequence[str] = ()) -> Any:
    """The weights of a directory: `weights.Loaded`, with the errors of `weights.load` and `safetensors`.

    Args:
      source: the directory.
      objective: task.objective.
      abstract: as in `weights.load`.
      fresh: as in `weights.load`.
      names: of the run's labels, in the order of its head's outputs; the directory's are put into this order.
    """
    from lslm_jax.convert import peft, state_dict

    stored = tensors(source)
    rows = label_rows(source, objective, names)
    if rows is not None:
        stored = state_dict.with_rows(stored, source.family, objective, rows, len(labels(source, objective)))
    loaded = state_dict.load(stored, source.family, source.model, objective, abstract, fresh)
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
_MOST_LABELS = 1 << 20
_UNNAMED = re.compile(r"LABEL_\d+")  # names that transformers gives
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
    if not trains:
        config = _with_head(config, source)
    if not reads:
        return config
    path = vocabulary(tokenizer_directory(source))
    tokenizer = replace(config.tokenizer, kind=_VOCABULARIES.get(path.name, "huggingface"), path=str(path))
    return replace(config, tokenizer=tokenizer)


def _with_head(config: Config, source: Pretrained) -> Config:
    """The config with the labels of the directory's head, unless it names its own, and the way these are judged."""
    objective, data = config.task.objective, config.data
    task = replace(config.task, multi_label=judges_apart(source, objective))
    names = labels(source, objective)
    named = names and not data.labels and not data.mixture and not all(map(_UNNAMED.fullmatch, names))
    return replace(config, task=task, data=replace(data, labels=names) if named else data)


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
        task = replace(config.task, objective=objective, multi_label=judges_apart(source, objective))
        if reads and objective in ("causal", "seq2seq"):
            words = load_tokenizer(epath.Path(config.tokenizer.path))
            config = replace(config, generate=generation.read(source.directory, source.settings, words))
        return _typed(replace(config, data=data, task=task))


def example_of(objective: str) -> Any:
    """What a model with such an objective was shown, as far as its directory tells."""
    return _EXAMPLES[objective] if objective in _EXAMPLES else "text"


def labels(source: Pretrained, objective: str) -> tuple[str, ...]:
    """Names of the classes or tags that its head tells apart, in the order of their numbers; () of other heads."""
    if objective not in ("classification", "tagging"):
        return ()
    path = source.directory / "config.json"
    named, count = source.settings.get("id2label"), source.settings.get("num_labels")
    if not named:  # transformers does not write down what its own default is
        count = 2 if count is None else count
        if type(count) is not int or not 0 < count < _MOST_LABELS:
            raise ConfigError(f"{path}: num_labels={count!r} must be a positive number")
        return tuple(f"LABEL_{i}" for i in range(count))
    try:
        numbered = {int(key): str(name) for key, name in named.items()}
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: id2label does not map numbers to names") from error
    if sorted(numbered) != list(range(len(numbered))):
        raise ConfigError(f"{path}: id2label must number its {len(numbered)} labels from 0 on")
    names = tuple(numbered[i] for i in range(len(numbered)))
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: id2label names one label twice")
    other = source.settings.get("label2id")
    if other and any(numbered.get(id, name) != name for name, id in other.items() if isinstance(id, int)):
        raise ConfigError(f"{path}: label2id contradicts id2label")
    return names


def label_rows(source: Pretrained, objective: str, names: Sequence[str]) -> list[int] | None:
    """The rows of the directory's head that stand for these labels, by name; None where they stand so already.

    Where a name is unknown to the head, it was made for other labels, which transformers numbers, too.
    """
    own = list(labels(source, objective))
    if not names or not own or list(names) == own or not set(names) <= set(own):
        return None
    return [own.index(name) for name in names]


def judges_apart(source: Pretrained, objective: str) -> bool:
    """True if its classes are judged each by itself, by a sigmoid, as pipelines of transformers do."""
    if objective != "classification":
        return False
    kind = source.settings.get("problem_type")
    if kind not in (None, "regression", "single_label_classification", "multi_label_classification"):
        raise ConfigError(f"{source.directory / 'config.json'}: problem_type={kind!r} is not supported")
    alone = len(labels(source, objective)) == 1
    if alone and kind == "single_label_classification":
        raise ConfigError(f"{source.directory / 'config.json'}: problem_type={kind} needs more than one label")
    return alone or kind == "multi_label_classification"


def tokenizer_directory(source: Pretrained) -> epath.Path:
    """The directory whose tokenizer is used: an adapter's own comes first."""
    if source.adapter and any((source.adapter.directory / name).is_file() for name in _VOCABULARIES):
        return source.adapter.directory
    return source.directory


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
