"""The token that stands for text outside a vocabulary."""

import json
from typing import Any

from lslm_jax.data.tokenizers.base import Tokenizer
from lslm_jax.data.tokenizers.sentencepiece import sentencepiece

MUCH = 0.01
"""Share of unknown tokens from which a vocabulary does not fit its text."""

_NAMES = ("<unk>", "[UNK]", "<UNK>", "<|unk|>")


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id of the unknown token; None for vocabularies that spell every text."""
    match tokenizer.kind:
        case "bytes":
            return None
        case "sentencepiece":
            processor = sentencepiece().SentencePieceProcessor(model_proto=tokenizer.content)
            return processor.unk_id() if processor.unk_id() >= 0 else None
        case "huggingface":
            return _of_huggingface(json.loads(tokenizer.content)["model"], tokenizer)
    return next((id for id in range(tokenizer.vocab_size) if tokenizer.piece(id) in _NAMES), None)


def _of_huggingface(model: dict[str, Any], tokenizer: Tokenizer) -> int | None:
    if isinstance(model.get("unk_id"), int):  # unigram
        return model["unk_id"]
    token = model.get("unk_token")
    if token is None:
        return None
    return next((id for id in range(tokenizer.vocab_size) if tokenizer.piece(id) == token), None)
