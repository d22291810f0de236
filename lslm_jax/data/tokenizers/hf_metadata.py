"""Files beside the vocabulary of a Hugging Face directory: special tokens, added tokens, settings; and vocab.txt."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from lslm_jax.data.tokenizers.base import WELL_KNOWN
from lslm_jax.errors import ConfigError, DataError
from lslm_jax.runtime import atomic_io

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
ENCODER_KEYS = {"bos": "cls_token", "eos": "sep_token"}  # that take the place of bos_token and eos_token
IDS = "special_ids.json"  # in prepared data: special tokens by id, where another file of the model named them
_MAP, _ADDED = "special_tokens_map.json", "added_tokens.json"
_MAX_ID = 1 << 24
# Keys of tokenizer_config.json that change ids, with the values by which they do nothing.
_INERT: dict[str, tuple[Any, ...]] = {
    "split_special_tokens": (False, None),
    "sp_model_kwargs": ({}, None),
    "from_slow": (False, None),
    "separate_vocabs": (False, None),
    "token_healing": (False, None),
}


class Beside(NamedTuple):
    """Content of the files beside a vocabulary.

    Attributes:
      named: special tokens by role (bos, eos, pad, mask), or their ids; "" for no bos.
      settings: tokenizer_config.json, with the roles and the chat template that other files give; {} if there is none.
      added: tokens with their ids, as the `added_tokens` of a tokenizer.json.
      model_type: of the config.json beside, or "".
    """

    named: dict[str, str | int]
    settings: dict[str, Any]
    added: list[dict[str, Any]]
    model_type: str


def read(directory: epath.Path) -> Beside:
    """Reads the files beside a vocabulary.

    Raises:
      ConfigError: a setting would change ids in a way that is not supported, or two files contradict each other.
      DataError: a file is malformed.
    """
    found = {name: _json(directory / name) for name in (CONFIG, _MAP, "config.json")}
    settings = dict(found[CONFIG])
    for key, values in _INERT.items():
        if key in settings and settings[key] not in values:
            raise ConfigError(f"{directory / CONFIG}: {key}={settings[key]!r} is not supported")
    if "added_tokens_decoder" not in settings:  # as in transformers, which then leaves the other file out
        _merge(settings, found[_MAP], directory)
    template = directory / TEMPLATE
    if template.is_file():
        try:
            settings["chat_template"] = template.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{template} is not UTF-8") from error
    model, added = found["config.json"], _added(settings, directory)
    if added and "added_tokens_decoder" not in settings:
        settings["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
        }
    return Beside(_named(settings, model, directory), settings, added, str(model.get("model_type") or ""))


def named_tokens(directory: epath.Path) -> dict[str, str | int]:
    """Special tokens by role, or their ids, as the files beside a vocabulary name them; "" for no bos."""
    return read(directory).named


def _json(path: epath.Path) -> dict[str, Any]:
    return atomic_io.read_json(path) if path.is_file() else {}


def _merge(settings: dict[str, Any], roles: Mapping[str, Any], directory: epath.Path) -> None:
    for key, token in roles.items():
        if key.endswith("_token") and settings.get(key) and _text(settings[key]) != _text(token):
            raise ConfigError(
                f"{directory / _MAP}: {key}={_text(token)!r} contradicts {_text(settings[key])!r} in {CONFIG}"
            )
        if settings.get(key) in (None, [], ()):
            settings[key] = token


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _named(settings: Mapping[str, Any], model: Mapping[str, Any], directory: epath.Path) -> dict[str, str | int]:
    named: dict[str, str | int] = {}
    for role in WELL_KNOWN:
        token = _text(settings.get(f"{role}_token"))
        if token is not None and not isinstance(token, str):
            raise DataError(f"{directory / CONFIG}: {role}_token is not text")
        if token:
            named[role] = token
    for role, other in ENCODER_KEYS.items():
        if role not in named and isinstance(token := _text(settings.get(other)), str):
            named[role] = token
    if "bos" not in named and settings.get("bos_token", "") is None:
        named["bos"] = ""
    # The text of an encoder-decoder begins with this, and not with the bos of its vocabulary.
    start = model.get("decoder_start_token_id") if model.get("is_encoder_decoder") else None
    ids = _json(directory / IDS) | ({} if start is None else {"bos": start})
    for role, id in ids.items():
        if type(id) is not int or not 0 <= id < _MAX_ID:
            raise DataError(f"{directory}: the id of {role}, {id!r}, is no token id")
    return named | ids


def _added(settings: Mapping[str, Any], directory: epath.Path) -> list[dict[str, Any]]:
    tokens: dict[int, dict[str, Any]] = {}
    roles = {str(_text(value)) for key, value in settings.items() if key.endswith("_token")}
    roles |= set(_more(settings))
    if "added_tokens_decoder" in settings:
        for id, token in (settings["added_tokens_decoder"] or {}).items():
            if not isinstance(token, dict) or not isinstance(token.get("content"), str):
                raise DataError(f"{directory / CONFIG}: added_tokens_decoder.{id} is no token")
            tokens[_id(id, directory / CONFIG)] = _token(**token)
    else:
        for text, id in _json(directory / _ADDED).items():
            special = text in roles
            tokens[_id(id, directory / _ADDED)] = _token(text, special=special, normalized=not special)
    return [{"id": id} | token for id, token in sorted(tokens.items())]


def _more(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens besides those with a role, and the setting that names them."""
    found: dict[str, str] = {}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or []
        found |= {str(_text(token)): key for token in (more.values() if isinstance(more, dict) else more)}
    return found


def _token(content: str, special: bool = False, normalized: bool = False, **flags: Any) -> dict[str, Any]:
    rest = {name: bool(flags.get(name, False)) for name in ("single_word", "lstrip", "rstrip")}
    return {"content": content} | rest | {"normalized": bool(normalized), "special": bool(special)}


def _id(value: Any, path: epath.Path) -> int:
    try:
        id = int(value)
    except (TypeError, ValueError):
        id = -1
    if not 0 <= id < _MAX_ID:
        raise DataError(f"{path}: {str(value)[:40]!r} is no token id")
    return id


def with_added(content: bytes, beside: Beside, path: epath.Path) -> bytes:
    """A tokenizer.json with the added tokens that the files beside it declare.

    Raises:
      ConfigError: a token has another id there than the tokenizer would give it, or none at all.
    """
    parts = json.loads(content)
    own = {token["content"]: token["id"] for token in parts.get("added_tokens") or ()}
    vocab = parts["model"].get("vocab") or {}
    known = dict(vocab) if isinstance(vocab, dict) else {piece[0]: id for id, piece in enumerate(vocab)}
    known |= own
    missing = [token for token in beside.added if token["content"] not in own]
    declared = {*known, *(token["content"] for token in beside.added)}
    for text, key in _more(beside.settings).items():
        if text not in declared:
            raise ConfigError(f"{path.parent / CONFIG}: {key} names {text!r}, which {path.name} lacks: add it there")
    if not missing:
        return content
    following = max(known.values(), default=-1) + 1
    for token in missing:
        expected = known.get(token["content"], following)
        following += expected == following
        if token["id"] != expected:
            raise ConfigError(
                f"{path.parent / CONFIG}: added_tokens_decoder gives {token['content']!r} the id {token['id']}, but "
                f"{path.name} gives it {expected}"
            )
    parts["added_tokens"] = sorted([*(parts.get("added_tokens") or ()), *missing], key=lambda token: token["id"])
    return json.dumps(parts, ensure_ascii=False).encode()


def from_word_pieces(path: epath.Path, tokenizers: Any) -> bytes:
    """The tokenizer.json of a vocab.txt (BERT): a piece a line, in lower case unless the file beside says otherwise."""
    settings = _json(path.parent / CONFIG)
    pieces = path.read_text().splitlines()
    lower = settings.get("do_lower_case", True)
    made = tokenizers.BertWordPieceTokenizer(
        {piece: id for id, piece in enumerate(pieces)},
        lowercase=lower,
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    return made.to_str().encode()
