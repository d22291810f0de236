"""Reads a tokenizer of any kind from its file.

Ids never include special ones unless a caller adds them, and no text can spell one: text is data.
"""

import json

from etils import epath

from lslm_jax.data.tokenizers import gguf, hf_classes, marian
from lslm_jax.data.tokenizers.base import Tokenizer, is_panic, tokenizers, without_panic_text
from lslm_jax.data.tokenizers.bytes import BYTES_FILE, BYTES_LAYOUT, Bytes
from lslm_jax.data.tokenizers.hf_metadata import CONFIG, from_word_pieces, with_added
from lslm_jax.data.tokenizers.hf_metadata import read as read_beside
from lslm_jax.data.tokenizers.huggingface import HuggingFace
from lslm_jax.data.tokenizers.sentencepiece import SentencePiece
from lslm_jax.errors import ConfigError, DataError, InputMissing
from lslm_jax.runtime import atomic_io

_WORD_PIECES = "vocab.txt"
_FORMATS = {".json": "tokenizer.json", ".txt": "vocab.txt of word pieces", ".gguf": "GGUF file with a vocabulary"}


def load_tokenizer(path: epath.Path | str) -> Tokenizer:
    """Reads a tokenizer.

    Args:
      path: a SentencePiece .model, a Hugging Face tokenizer.json, BERT's vocab.txt, a GGUF file, Marian's source.spm
        with its target.spm and vocab.json beside it, or what `Tokenizer.save` wrote.

    Raises:
      InputMissing: there is no such file.
      DataError: it is not a tokenizer.
      ConfigError: it has no token to begin or end a text, or a package is missing.
    """
    path = epath.Path(path).expanduser()
    if not path.is_file():
        raise InputMissing(f"tokenizer {path} does not exist")
    if not path.stat().length:
        raise DataError(f"tokenizer {path} is empty")
    if path.name == BYTES_FILE:
        if atomic_io.read_json(path) != BYTES_LAYOUT:
            raise DataError(f"{path} defines other bytes than this program's")
        return Bytes()
    try:
        with without_panic_text():
            return _read(path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except InputMissing:
        raise
    except DataError as error:
        raise error if str(path.parent) in str(error) else DataError(f"{path} {error}") from error
    except BaseException as error:  # what the two libraries raise on a bad file is Exception itself, or RuntimeError
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise DataError(f"{path} is not a {_FORMATS.get(path.suffix, 'SentencePiece model')}") from error


def _read(path: epath.Path) -> Tokenizer:
    if path.name in (marian.SOURCE, marian.FILE):
        return marian.Marian(marian.from_directory(path.parent) if path.name == marian.SOURCE else path.read_bytes())
    if path.suffix == ".gguf":
        return HuggingFace(*gguf.vocabulary(path))
    beside = read_beside(path.parent)
    if path.suffix == ".json" or path.name == _WORD_PIECES:
        content = path.read_bytes() if path.suffix == ".json" else from_word_pieces(path, tokenizers())
        if path.suffix == ".json":
            hf_classes.check(beside.settings, beside.model_type, json.loads(content), path.parent / CONFIG)
        return HuggingFace(with_added(content, beside, path), beside.named, beside.settings)
    return SentencePiece(path.read_bytes(), beside)
