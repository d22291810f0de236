"""A vocabulary from text: SentencePiece, trained so that it loses nothing."""

import collections
import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from etils import epath

from lslm_jax.config import Config, TokenizerConfig
from lslm_jax.data import encode_examples
from lslm_jax.data.encode_examples import Recipe
from lslm_jax.data.prepare import cleaning, long_documents, worker_pool
from lslm_jax.data.readers import sources
from lslm_jax.data.readers.example_schema import RecordError
from lslm_jax.data.readers.sources import Document
from lslm_jax.data.tokenizers.base import SPACE_MARK, Tokenizer
from lslm_jax.data.tokenizers.bytes import Bytes
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.data.tokenizers.sentencepiece import SentencePiece, sentencepiece
from lslm_jax.errors import ConfigError, InputMissing

_SENTENCE_CHARS = 4096
_SAMPLE_SEED = 0
_GIVEN = {"huggingface": "tokenizer.json", "marian": "source.spm"}  # kinds that are not trained here


def choose(config: Config, recipes: Mapping[str, Recipe], log: Callable[[str], None]) -> Tokenizer:
    """The vocabulary that a config asks for: given, or trained on text of all sources.

    Args:
      config: `data`, `clean` and `tokenizer` are read.
      recipes: what is made of each source's examples; all texts that they give are drawn from, by the sources' weights.
      log: told that one is trained.

    Raises:
      ConfigError: settings that do not go together, or do not fit the text.
      InputMissing: there is no such file, or no text.
      DataError: the input is bad.
    """
    settings = config.tokenizer
    if settings.kind == "bytes":
        return Bytes()
    if settings.path:
        given = load_tokenizer(epath.Path(settings.path).expanduser())
        if given.kind != settings.kind:
            raise ConfigError(f"tokenizer.kind={settings.kind}, but {settings.path} is of kind {given.kind}")
        return given
    if settings.kind in _GIVEN:
        raise ConfigError(f"tokenizer.path is empty: kind={settings.kind} needs a {_GIVEN[settings.kind]}")
    size, most = settings.vocab_size, settings.sample_bytes / 1e6
    log(f"prepare: training a vocabulary of {size:,} on {most:,.1f} MB of text at most")
    made = train(_training_texts(config, recipes), settings)
    if made.vocab_size < size:
        log(f"prepare: the text supports {made.vocab_size:,} tokens, fewer than tokenizer.vocab_size={size:,}")
    return made


def _training_texts(config: Config, recipes: Mapping[str, Recipe]) -> Iterator[str]:
    dropped: collections.Counter[str] = collections.Counter()
    weights = {name: getattr(recipe.source, "weight", 1.0) for name, recipe in recipes.items()}
    whole = config.tokenizer.sample_bytes / sum(weights.values())
    texts = itertools.chain.from_iterable(
        _sample(config, recipe, int(weights[name] * whole), dropped) for name, recipe in recipes.items()
    )
    first = next(texts, None)
    if first is None:
        raise InputMissing(encode_examples.nothing(recipes, dropped))
    return itertools.chain([first], texts)


def _sample(config: Config, recipe: Recipe, num_bytes: int, dropped: collections.Counter[str]) -> Iterator[str]:
    keep_bad = config.clean.bad_records == "skip"

    def read(document: Document) -> Iterable[str]:
        texts, why = _texts(document, recipe, config)
        dropped.update([why] if why else [])
        return texts

    return sources.sample(recipe.source, num_bytes, _SAMPLE_SEED, read, config.data.max_documents, keep_bad)


def _texts(document: Document, recipe: Recipe, config: Config) -> tuple[Iterable[str], str | None]:
    """The texts of a document that is trained on; or none, and why it is not."""
    fraction = recipe.valid_fraction
    if worker_pool.is_long(document, recipe):
        assert isinstance(document.content, (str, bytes))
        text = long_documents.cleaned(document.content, config.clean, config.clean.bad_utf8, document.origin)
        if text is None:
            return [], "bad_utf8"
        held_out = worker_pool.is_held_out(document, text.digest, fraction)
        why = cleaning.length_reason(text.length, config.clean) or ("held out" if held_out else None)
        return ([], why) if why else (text.texts(), None)
    try:
        example = encode_examples.decode(document.content, recipe, config.clean.bad_utf8, document.origin)
    except RecordError:
        if config.clean.bad_records == "strict":
            raise
        return [], "bad_record"
    if example is None:
        return [], "bad_utf8"
    example = encode_examples.cleaned(example, recipe, config.clean)
    held_out = worker_pool.is_held_out(document, encode_examples.digest(example, recipe), fraction)
    why = encode_examples.reason(example, recipe, config.clean) or ("held out" if held_out else None)
    return ([], why) if why else (encode_examples.texts(example, recipe), None)


def train(texts: Iterable[str], config: TokenizerConfig) -> SentencePiece:
    """Trains a SentencePiece vocabulary that loses nothing.

    Nothing is normalised, no space is added or removed, and runs of spaces and of newlines may become pieces, as
    source code needs. The result depends on the texts and the settings alone.

    Args:
      texts: training documents, of any length.
      config: all but kind and path are read.

    Returns:
      The tokenizer: pad 0, bos 1, eos 2, unk 3.

    Raises:
      ConfigError: vocab_size does not fit the texts, or sentencepiece is not installed.
      InputMissing: there is no text.
    """
    return SentencePiece(_train((part for text in texts for part in _sentences(text)), config))


def _train(sentences: Iterator[str], config: TokenizerConfig) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type=config.model,
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,
            byte_fallback=config.byte_fallback,
            character_coverage=config.character_coverage,
            required_chars=SPACE_MARK,  # else rare spaces are spelt as the bytes of their mark, and read back as that
            user_defined_symbols=[symbol.replace(" ", SPACE_MARK) for symbol in config.user_symbols],
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * _SENTENCE_CHARS,
            train_extremely_large_corpus=config.sample_bytes > 1 << 30,
            num_threads=16,  # sums of scores depend on it, so it must not be the machine's number of cores
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), config) from error
    return model.getvalue()


def _training_error(message: str, config: TokenizerConfig) -> Exception:
    asked = f"tokenizer.vocab_size is {config.vocab_size}"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return ConfigError(f"{asked}, but the characters of the training text need at least {found[1]}")
    if "sentences_.empty()" in message:
        return InputMissing("there is no text to train a vocabulary on")
    return ConfigError(f"no vocabulary can be trained with these settings of tokenizer: {' '.join(message.split())}")


def _sentences(text: str) -> Iterator[str]:
    """A text in parts short enough for the trainer, cut after a newline or before a space where there is one."""
    for part in text.replace("\0", "").split(SPACE_MARK):
        start = 0
        while start < len(part):
            end = start + _SENTENCE_CHARS
            if end < len(part):
                end = part.rfind("\n", start, end) + 1 or part.rfind(" ", start + 1, end)
                end = end if end > start else start + _SENTENCE_CHARS
            yield part[start:end]
            start = end
