"""Ids that are no text: those that begin and end one, the mask, and T5's sentinels."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from lslm_jax.config import Config, validation

_NUM_SENTINELS = 100


class Special(NamedTuple):
    """The special ids of a model.

    Attributes:
      bos_id: begins a text; BERT's [CLS].
      eos_id: ends one; BERT's [SEP].
      mask_id: stands for a token to be guessed. None where neither the vocabulary nor the family has one.
      sentinel_ids: stand for spans to be guessed, in the order of their use; () where there are none.
      size: ids that the model needs to know.
      separators: eos tokens between the two texts of a pair (RoBERTa has 2).
    """

    bos_id: int
    eos_id: int
    mask_id: int | None
    sentinel_ids: tuple[int, ...]
    size: int
    separators: int = 1


def special_ids(tokenizer: Mapping[str, Any], family: str, limit: int = 0) -> Special:
    """The special ids of a model that reads what a tokenizer wrote.

    The tokenizer's own come first. What it lacks and the family needs lies behind its vocabulary: a mask for an
    encoder, 100 sentinels for an encoder-decoder, unless its vocabulary ends before: it was not trained with them.

    Args:
      tokenizer: the entry of that name in the manifest of prepared data; older ones tell of no mask and no sentinels.
      family: model.family.
      limit: model.vocab_size where it is given; 0: none.
    """
    size = tokenizer["vocab_size"]
    mask_id = tokenizer["mask_id"] if "mask_id" in tokenizer else None
    sentinel_ids = tuple(tokenizer["sentinel_ids"]) if "sentinel_ids" in tokenizer else ()
    if family == "encoder" and mask_id is None:
        mask_id = size
    if family == "encoder_decoder" and not sentinel_ids and (not limit or limit >= size + _NUM_SENTINELS):
        sentinel_ids = tuple(range(size, size + _NUM_SENTINELS))
    ids = (tokenizer["bos_id"], tokenizer["eos_id"], -1 if mask_id is None else mask_id, *sentinel_ids)
    special = Special(tokenizer["bos_id"], tokenizer["eos_id"], mask_id, sentinel_ids, max(size, 1 + max(ids)))
    return special._replace(separators=tokenizer["separators"] if "separators" in tokenizer else 1)


def resolve(config: Config, facts: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """A config with the vocabulary and labels of its data, whose manifest `facts` are; these with their `special`.

    Raises:
      ConfigError: the config names fewer.
    """
    special = special_ids(facts["tokenizer"], config.model.family, config.model.vocab_size)
    model = validation.resolve_vocabulary(config.model, special.size)
    if config.task.objective in ("classification", "tagging"):
        model = validation.resolve_labels(model, len(facts["labels"]))
    return replace(config, model=model), facts | {"special": special}
