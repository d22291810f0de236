"""A vocabulary as Hugging Face's tokenizer.json, with the same ids.

But for texts that spell a special token, a byte (as <0x41>) or U+2581, which to Hugging Face are not text; and with
unigram models, where two ways to spell a text are equally likely, either may be taken.
"""

import json
from typing import Any

from lslm_jax.data.tokenizer import SPACE_MARK, Bytes, HuggingFace
from lslm_jax.data.tokenizer_base import Tokenizer
from lslm_jax.errors import ConfigError

_UNIGRAM, _BPE = 1, 2  # of SentencePiece's model types
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of its pieces' types


def convert(words: Tokenizer, family: str) -> dict[str, Any]:
    """The content of tokenizer.json, which frames a text as models of the family read it.

    Args:
      words: a vocabulary of any kind. One that came as a tokenizer.json stays what it is.
      family: model.family: a decoder reads bos before a text, an encoder bos and eos around it, of an
        encoder-decoder the encoder reads eos behind it.

    Raises:
      ConfigError: the vocabulary normalises text in a way that tokenizer.json cannot say, or a package is missing.
    """
    if isinstance(words, HuggingFace):
        return json.loads(words.content)
    model = _bytes_model(words) if isinstance(words, Bytes) else _sentencepiece_model(words)
    special = dict.fromkeys([words.pad_id, words.bos_id, words.eos_id, *model.pop("special")])
    named = [{"id": id, "content": words.piece(id)} for id in special]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    decoders = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    spaces = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [entry | flags for entry in sorted(named, key=lambda entry: entry["id"])],
        "normalizer": None if isinstance(words, Bytes) else blanks,
        "pre_tokenizer": None,
        "post_processor": _frame(words, family),
        "decoder": {"type": "Sequence", "decoders": decoders if isinstance(words, Bytes) else [spaces, *decoders]},
        "model": model,
    }


def roles(words: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer_config.json: which of its tokens begins a text, and so on."""
    ids = {"bos": words.bos_id, "eos": words.eos_id, "pad": words.pad_id, "mask": words.mask_id}
    named = {f"{role}_token": words.piece(id) for role, id in ids.items() if id is not None}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | named


def _frame(words: Tokenizer, family: str) -> dict[str, Any]:
    token = lambda id: {"SpecialToken": {"id": words.piece(id), "type_id": 0}}
    before = [] if family == "encoder_decoder" else [words.bos_id]
    after = [] if family == "decoder" else [words.eos_id]
    text = lambda name, type_id: {"Sequence": {"id": name, "type_id": type_id}}
    single = [*map(token, before), text("A", 0), *map(token, after)]
    used = {words.piece(id): {"id": words.piece(id), "ids": [id], "tokens": [words.piece(id)]} for id in before + after}
    pair = [*single, text("B", 1), *({"SpecialToken": {"id": words.piece(id), "type_id": 1}} for id in after)]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": used}


def _bytes_model(words: Bytes) -> dict[str, Any]:
    """Nothing but bytes: every character is unknown, and falls back to them."""
    pieces = {words.piece(id): id for id in range(3)}
    pieces |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    return {"type": "BPE", "vocab": pieces, "merges": [], "byte_fallback": True, "unk_token": None, "special": []}


def _sentencepiece_model(words: Tokenizer) -> dict[str, Any]:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ConfigError("exporting a SentencePiece vocabulary needs protobuf: pip install protobuf") from error
    proto = sentencepiece_model_pb2.ModelProto.FromString(words.content)  # type: ignore[attr-defined]
    spec = proto.normalizer_spec
    if spec.precompiled_charsmap or spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        raise ConfigError(
            "this SentencePiece vocabulary normalises text, which is not exported: train one with tokenizer.path empty"
        )
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    special = [i for i, piece in enumerate(proto.pieces) if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)
    fallback = proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == _UNIGRAM:
        model = {"type": "Unigram", "unk_id": unknown, "vocab": [list(piece) for piece in pieces]}
        return model | {"byte_fallback": fallback, "special": special}
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
    }


def merges(scores: dict[str, float]) -> list[list[str]]:
    """Every pair of pieces that makes a third, the one that is merged first in front.

    SentencePiece merges the neighbours whose union scores best; a byte written as <0x41> is no union.
    """
    found = [
        (-score, piece, cut)
        for piece, score in scores.items()
        if not (len(piece) == 6 and piece.startswith("<0x"))
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [[piece[:cut], piece[cut:]] for _, piece, cut in sorted(found)]
