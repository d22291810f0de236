"""Special ids are the tokenizer's own where it has them, and lie behind its vocabulary where it has not."""

import pytest

from lslm_jax.data.tokenizers.special_tokens import special_ids

OLD = {"kind": "bytes", "vocab_size": 259, "pad_id": 0, "bos_id": 1, "eos_id": 2}
BERT = {"vocab_size": 100, "bos_id": 7, "eos_id": 8, "mask_id": 9, "sentinel_ids": []}
T5 = {"vocab_size": 100, "bos_id": 1, "eos_id": 1, "mask_id": None, "sentinel_ids": [99, 98, 97]}


@pytest.mark.parametrize("tokenizer", [OLD, OLD | {"mask_id": None, "sentinel_ids": []}])
def test_what_a_vocabulary_lacks_lies_behind_it(tokenizer):
    assert special_ids(tokenizer, "decoder")[:5] == (1, 2, None, (), 259)
    assert special_ids(tokenizer, "encoder")[:5] == (1, 2, 259, (), 260)
    assert special_ids(tokenizer, "encoder_decoder")[:5] == (1, 2, None, tuple(range(259, 359)), 359)


def test_what_a_vocabulary_has_costs_no_id():
    assert special_ids(BERT, "encoder")[:5] == (7, 8, 9, (), 100)
    assert special_ids(T5, "encoder_decoder")[:5] == (1, 1, None, (99, 98, 97), 100)
    assert special_ids(T5, "encoder")[:5] == (1, 1, 100, (99, 98, 97), 101)


def test_pairs_have_as_many_separators_as_the_tokenizer_puts_between_them():
    assert special_ids(BERT, "encoder").separators == 1, "manifests of before lack it"
    assert special_ids(BERT | {"separators": 2}, "encoder").separators == 2
