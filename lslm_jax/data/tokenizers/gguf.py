"""GGUF files of llama.cpp: how they are opened, and the vocabulary in one as a tokenizer.json."""

import functools
import json
from typing import Any

from etils import epath

from lslm_jax.data.tokenizers.base import SPACE_MARK
from lslm_jax.data.tokenizers.to_hf import BLANKS, DECODERS, added, frame, merges
from lslm_jax.errors import ConfigError, DataError
from lslm_jax.runtime import atomic_io

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # types of tokens
_LEAST_BYTES = 13  # of an entry: the length of its name, its type and a value
_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding"}
_PREFIX = "tokenizer.ggml."
_READ = ("model", "tokens", "token_type", "pre", "merges", "scores", "add_bos_token", "add_space_prefix")
# Roles of tokens that no text is framed by; eos stands behind each text that is trained on anyway.
_IRRELEVANT = ("add_eos_token", "add_sep_token", "token_type_count", "chat_template", "chat_templates")
# How a text is split before pairs of letters are merged; each splits as the models' own tokenizer.json does.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LETTERS: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _LETTERS | {"use_regex": False}]


_PARTS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_LETTERS],
    "smollm": [{"type": "Digits", "individual_digits": True}, _LETTERS],
    "llama-bpe": _split(_WORDS % "{1,3}"),
    "qwen2": _split(_WORDS % ""),
}


@functools.lru_cache(maxsize=1)
def open_file(path: epath.Path) -> tuple[dict[str, Any], list[Any]]:
    """Settings by name, and the tensors as the gguf package has them; kept, for reading a vocabulary takes seconds.

    Raises:
      ConfigError: the gguf package is missing, or the file is not on a disk.
      DataError: the file is not whole, or not GGUF.
    """
    if atomic_io.is_remote(path):
        raise ConfigError(f"{path} cannot be read from afar: copy the GGUF file to a disk")
    _check_counts(path)
    try:
        import gguf  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(f"reading {path} needs the gguf package: pip install gguf") from error
    try:
        reader = gguf.GGUFReader(path)  # pyright: ignore[reportAttributeAccessIssue]
        return {name: field.contents() for name, field in reader.fields.items()}, list(reader.tensors)
    except Exception as error:  # whatever it stumbles over
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path} is not a whole GGUF file: {reason}") from error


def _check_counts(path: epath.Path) -> None:
    """The reader builds a list of as many entries as the header announces, whatever the size of the file.

    Raises:
      DataError: the header announces more than the file can hold.
    """
    size = path.stat().length
    with path.open("rb") as stream:
        header = stream.read(24)
    if len(header) < 24 or header[:4] != b"GGUF":
        raise DataError(f"{path} is not a whole GGUF file: it has no header")
    tensors, entries = (int.from_bytes(header[at : at + 8], "little") for at in (8, 16))
    if (tensors + entries) * _LEAST_BYTES > size:
        raise DataError(f"{path} is not a whole GGUF file: it announces {tensors} tensors and {entries} entries")


def vocabulary(path: epath.Path) -> tuple[bytes, dict[str, int], dict[str, Any]]:
    """The tokenizer.json of a file's vocabulary, the ids of bos, eos and pad, and a tokenizer_config.json.

    Raises:
      ConfigError: it is of a kind, or splits text in a way, that is not known here.
      DataError: the file is not whole, or not GGUF.
    """
    settings, _ = open_file(path)
    kind, tokens = settings.get("tokenizer.ggml.model"), settings.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise ConfigError(f"vocabularies of kind {kind} are not supported, only gpt2 and llama")
    for key in (name.removeprefix(_PREFIX) for name in settings if name.startswith(_PREFIX)):
        if (
            key not in (*_READ, *_IRRELEVANT)
            and not key.endswith(("_token_id", "_token_ids"))
            and settings[_PREFIX + key]
        ):
            raise ConfigError(f"{_PREFIX}{key}={str(settings[_PREFIX + key])[:40]} is not supported")
    types = settings.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    ids = {role: settings.get(f"tokenizer.ggml.{name}_token_id") for role, name in _ROLES.items()}
    ids = {role: id for role, id in ids.items() if id is not None}
    for role, id in ids.items():
        if not 0 <= id < len(tokens):
            raise DataError(f"{path}: the id of {role}, {id}, is not below its {len(tokens)} tokens")
    begins = "bos" in ids and settings.get("tokenizer.ggml.add_bos_token", kind == "llama")
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types),
        "post_processor": frame({tokens[ids["bos"]]: ids["bos"]}, {}) if begins else None,
    }
    parts = _byte_level(settings) if kind == "gpt2" else _sentences(settings, tokens, types)
    names = {f"{role}_token": tokens[id] for role, id in ids.items()}
    template = settings.get("tokenizer.chat_template")
    kept = {"tokenizer_class": "PreTrainedTokenizerFast"} | names | ({"chat_template": template} if template else {})
    return json.dumps(content | parts).encode(), ids, kept


def _added(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    """Control tokens, which are special, and user-defined ones, which ordinary text spells too."""
    special = added({i: tokens[i] for i, kind in enumerate(types) if kind == _CONTROL})
    user = added({i: tokens[i] for i, kind in enumerate(types) if kind == _USER_DEFINED})
    return sorted([*special, *(token | {"special": False} for token in user)], key=lambda token: token["id"])


def _byte_level(settings: dict[str, Any]) -> dict[str, Any]:
    split = settings.get("tokenizer.ggml.pre", "gpt-2")
    if split not in _PARTS:
        raise ConfigError(f"text split as {split} is not supported, only {', '.join(_PARTS)}")
    pairs = [pair.split(" ", 1) for pair in settings.get("tokenizer.ggml.merges") or []]
    vocab = {token: i for i, token in enumerate(settings["tokenizer.ggml.tokens"])}
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PARTS[split]},
        "decoder": _LETTERS,
        "model": {"type": "BPE", "vocab": vocab, "merges": pairs, "ignore_merges": split == "llama-bpe"},
    }


def _sentences(settings: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """SentencePiece as Llama 2 has it: a blank before the text, bytes for what the vocabulary lacks."""
    scores = settings.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    apart = (_CONTROL, _USER_DEFINED, _BYTE)
    plain = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind not in apart}
    prefixed = settings.get("tokenizer.ggml.add_space_prefix", True)
    before = [{"type": "Prepend", "prepend": SPACE_MARK}] if prefixed else []
    first = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, BLANKS]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*DECODERS, *first]},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges(plain),
            "byte_fallback": True,
            "unk_token": tokens[settings.get("tokenizer.ggml.unknown_token_id", 0)],
            "fuse_unk": True,
        },
    }
