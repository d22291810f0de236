"""GGUF files of llama.cpp: how they are opened, and the vocabulary in one as a tokenizer.json."""

import json
from typing import Any

from etils import epath

from lslm_jax.data.tokenizer_json import merges
from lslm_jax.errors import ConfigError, DataError

_CONTROL, _BYTE = 3, 6  # types of tokens
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


def open_file(path: epath.Path) -> tuple[dict[str, Any], list[Any]]:
    """Settings by name, and the tensors as the gguf package has them.

    Raises:
      ConfigError: the gguf package is missing.
      DataError: the file is not whole, or not GGUF.
    """
    try:
        import gguf  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(f"reading {path} needs the gguf package: pip install gguf") from error
    try:
        reader = gguf.GGUFReader(path)
        return {name: field.contents() for name, field in reader.fields.items()}, list(reader.tensors)
    except Exception as error:  # whatever it stumbles over
        raise DataError(
            f"{path} is not a whole GGUF file: {str(error).splitlines()[:1] or type(error).__name__}"
        ) from error


def vocabulary(path: epath.Path) -> tuple[bytes, dict[str, int]]:
    """The tokenizer.json of a file's vocabulary, and the ids of bos, eos and pad.

    Raises:
      ConfigError: it is of a kind, or splits text in a way, that is not known here.
    """
    settings, _ = open_file(path)
    kind, tokens = settings.get("tokenizer.ggml.model"), settings.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise ConfigError(f"{path} has a vocabulary of kind {kind}, and only gpt2 and llama are supported")
    types = settings.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    ids = {role: settings.get(f"tokenizer.ggml.{name}_token_id") for role, name in _ROLES.items()}
    special = [i for i, kind in enumerate(types) if kind == _CONTROL]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i]} | flags for i in special],
        "post_processor": None if ids["bos"] is None or not _adds_bos(settings, kind) else _frame(tokens, ids["bos"]),
    }
    parts = _byte_level(settings, path) if kind == "gpt2" else _sentences(settings, tokens, types)
    return json.dumps(content | parts).encode(), {role: id for role, id in ids.items() if id is not None}


_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _adds_bos(settings: dict[str, Any], kind: str) -> bool:
    return bool(settings.get("tokenizer.ggml.add_bos_token", kind == "llama"))


def _frame(tokens: list[str], bos_id: int) -> dict[str, Any]:
    bos = tokens[bos_id]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = lambda name, type_id: {"Sequence": {"id": name, "type_id": type_id}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text("A", 0)],
        "pair": [first, text("A", 0), text("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _byte_level(settings: dict[str, Any], path: epath.Path) -> dict[str, Any]:
    split = settings.get("tokenizer.ggml.pre", "gpt-2")
    if split not in _PARTS:
        raise ConfigError(f"{path} splits text as {split}, and only {', '.join(_PARTS)} are supported")
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
    plain = {
        token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind not in (_CONTROL, _BYTE)
    }
    blank = {"type": "Prepend", "prepend": "\u2581"}
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    before = [blank] if settings.get("tokenizer.ggml.add_space_prefix", True) else []
    spaces = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    first = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if before else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, blanks]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *first]},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges(plain),
            "byte_fallback": True,
            "unk_token": tokens[settings.get("tokenizer.ggml.unknown_token_id", 0)],
            "fuse_unk": True,
        },
    }
