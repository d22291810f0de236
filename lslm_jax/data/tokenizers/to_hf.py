"""A vocabulary as Hugging Face's tokenizer.json, with the same ids.

But for texts that spell a special token, a byte (as <0x41>) or U+2581, which to Hugging Face are not text; and with
unigram models, where two ways to spell a text are equally likely, either may be taken.
"""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from lslm_jax.data.tokenizers import hf_classes
from lslm_jax.data.tokenizers.base import BYTE_PIECE, SPACE_MARK, Tokenizer
from lslm_jax.data.tokenizers.bytes import Bytes
from lslm_jax.data.tokenizers.hf_metadata import CONFIG
from lslm_jax.data.tokenizers.huggingface import HuggingFace
from lslm_jax.errors import ConfigError

_UNIGRAM, _BPE = 1, 2  # of SentencePiece's model types
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of its pieces' types


def files(words: Tokenizer, family: str, model_type: str, max_length: int) -> dict[str, bytes]:
    """The files of a tokenizer, by name, as a directory of Hugging Face has them.

    Args:
      words: of any kind but Marian's. One that came from such a directory is given back as it was.
      family: model.family.
      model_type: of the exported model.
      max_length: of the exported model, in tokens.

    Raises:
      ConfigError: a package is missing.
    """
    own = settings_of(words, family, model_type, max_length)
    settings = _spell(own)
    if words.kind == "sentencepiece" and changes_text(words):
        name = "spiece.model" if model_type == "t5" else "tokenizer.model"
        return {name: words.content, CONFIG: settings}
    content = convert(words, family)
    hf_classes.report(hf_classes.class_of(own, model_type, content), content, epath.Path("tokenizer.json"))
    return {"tokenizer.json": _spell(content), CONFIG: settings}


def _spell(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def convert(words: Tokenizer, family: str) -> dict[str, Any]:
    """The content of tokenizer.json, which frames a text as models of the family read it.

    Args:
      words: a vocabulary of any kind. One that came as a tokenizer.json is given back as it was, frame and all.
      family: model.family: a decoder reads bos before a text, an encoder bos and eos around it, of an
        encoder-decoder the encoder reads eos behind it.

    Raises:
      ConfigError: the vocabulary normalises text in a way that tokenizer.json cannot say, or a package is missing.
    """
    before = {} if family == "encoder_decoder" else {words.piece(words.bos_id): words.bos_id}
    after = {} if family == "decoder" else {words.piece(words.eos_id): words.eos_id}
    if isinstance(words, HuggingFace):
        return json.loads(words.content)
    model = _bytes_model(words) if isinstance(words, Bytes) else _sentencepiece_model(words)
    user = model.pop("user") if "user" in model else []
    special = sorted({words.pad_id, words.bos_id, words.eos_id, *model.pop("special")} - set(user))
    is_bytes = isinstance(words, Bytes)
    tokens = added({id: words.piece(id) for id in special})
    tokens += [token | {"special": False, "normalized": True} for token in added({id: words.piece(id) for id in user})]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(tokens, key=lambda token: token["id"]),
        "normalizer": None if is_bytes else BLANKS,
        "pre_tokenizer": None,
        "post_processor": frame(before, after),
        "decoder": {"type": "Sequence", "decoders": DECODERS[is_bytes:]},
        "model": model,
    }


def settings_of(words: Tokenizer, family: str, model_type: str, max_length: int) -> dict[str, Any]:
    """The content of tokenizer_config.json: roles of tokens, and the inputs that the model reads.

    Args:
      words: a tokenizer; the settings that it came with are kept.
      family: model.family.
      model_type: of the exported model.
      max_length: of the exported model, in tokens.
    """
    if "tokenizer_class" in words.settings:
        return dict(words.settings)
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | words.roles()
    if family == "encoder":
        # transformers takes cls and sep for what frames a text, and leaves token types out unless they are named.
        inputs = ["input_ids", *(["token_type_ids"] if model_type == "bert" else []), "attention_mask"]
        own |= {"cls_token": own["bos_token"], "sep_token": own["eos_token"], "model_input_names": inputs}
        if unknown := _unknown(words):
            own["unk_token"] = unknown
    return own | {"model_max_length": max_length} | dict(words.settings)


def _unknown(words: Tokenizer) -> str | None:
    if isinstance(words, HuggingFace):
        return json.loads(words.content)["model"].get("unk_token")
    return None if isinstance(words, Bytes) else words.piece(_unknown_id(words))


# Parts of a tokenizer.json. Those of SentencePiece write a blank as U+2581, and what the vocabulary lacks in bytes.

BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
DECODERS: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


def added(tokens: Mapping[int, str]) -> list[dict[str, Any]]:
    """Special tokens, by id."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": id, "content": token} | flags for id, token in tokens.items()]


def frame(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, Any]:
    """Puts tokens, with their ids, before a text or the first of a pair, and behind each."""
    token = lambda name, type_id=0: {"SpecialToken": {"id": name, "type_id": type_id}}
    text = lambda name, type_id: {"Sequence": {"id": name, "type_id": type_id}}
    single = [*map(token, before), text("A", 0), *map(token, after)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, text("B", 1), *(token(name, 1) for name in after)],
        "special_tokens": {
            name: {"id": name, "ids": [id], "tokens": [name]} for name, id in {**before, **after}.items()
        },
    }


def _bytes_model(words: Bytes) -> dict[str, Any]:
    """Nothing but bytes: every character is unknown, and falls back to them."""
    pieces = {words.piece(id): id for id in range(3)}
    pieces |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    return {"type": "BPE", "vocab": pieces, "merges": [], "byte_fallback": True, "unk_token": None, "special": []}


def _proto(words: Tokenizer) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ConfigError("exporting a SentencePiece vocabulary needs protobuf: pip install protobuf") from error
    return sentencepiece_model_pb2.ModelProto.FromString(words.content)  # type: ignore[attr-defined]


def changes_text(words: Tokenizer) -> bool:
    """True if a SentencePiece model normalises text, or has tokens beside it: then no tokenizer.json says the same."""
    spec = _proto(words).normalizer_spec
    added = bool(words.settings.get("added_tokens_decoder"))
    return bool(spec.precompiled_charsmap or spec.add_dummy_prefix or spec.remove_extra_whitespaces or added)


def _unknown_id(words: Tokenizer) -> int:
    return next(i for i, piece in enumerate(_proto(words).pieces) if piece.type == _UNKNOWN)


def _sentencepiece_model(words: Tokenizer) -> dict[str, Any]:
    proto = _proto(words)
    if changes_text(words):
        raise ConfigError("this SentencePiece vocabulary normalises text, which no tokenizer.json does the same way")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    special = [i for i, piece in enumerate(proto.pieces) if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
    named = {words.mask_id, *words.sentinel_ids}
    user = [i for i in special if proto.pieces[i].type == _USER_DEFINED and i not in named]
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)
    fallback = proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == _UNIGRAM:
        model = {"type": "Unigram", "unk_id": unknown, "vocab": [list(piece) for piece in pieces]}
        return model | {"byte_fallback": fallback, "special": special, "user": user}
    if proto.trainer_spec.model_type != _BPE:
        raise ConfigError("only SentencePiece vocabularies of type unigram or bpe are exported")
    return {
        "type": "BPE",
        "vocab": {piece: id for id, (piece, _) in enumerate(pieces)},
        "merges": merges({piece: score for i, (piece, score) in enumerate(pieces) if i not in special}),
        "byte_fallback": fallback,
        "unk_token": pieces[unknown][0],
        "fuse_unk": True,
        "special": special,
        "user": user,
    }


def merges(scores: dict[str, float]) -> list[list[str]]:
    """Every pair of pieces that makes a third, the one that is merged first in front.

    SentencePiece merges the neighbours whose union scores best; a byte written as <0x41> is no union.
    """
    found = [
        (-score, piece, cut)
        for piece, score in scores.items()
        if not BYTE_PIECE.fullmatch(piece)
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [[piece[:cut], piece[cut:]] for _, piece, cut in sorted(found)]
