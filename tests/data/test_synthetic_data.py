"""Synthetic batches: functions of (seed, step) that look like real ones of every objective."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_data import CASES, VOCAB_SIZE, Case, config_of, write_all

from lslm_jax.data.dataloader import open_train


def synthetic(case, rows=None, token_types=2, **settings):
    config = config_of(case, **settings)
    config = replace(config, data=replace(config.data, source="synthetic"))
    config = replace(config, model=replace(config.model, token_types=token_types))
    return open_train(config, "nowhere", 100, rows)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("packing", ["bins", "pad"])
def test_it_has_the_parts_of_a_real_batch_and_is_a_function_of_seed_and_step(tmp_path, case, packing):
    write_all(tmp_path, case)
    real = open_train(config_of(case, packing), tmp_path, VOCAB_SIZE + 100).batch(0)
    rows = synthetic(case, packing=packing)
    batch = rows.batch(9)
    for got, want in zip(batch, real, strict=True):
        assert (got is None) == (want is None)
        assert got is None or (got.shape, got.dtype) == (want.shape, want.dtype)
    parts = [synthetic(case, share, packing=packing).batch(9) for share in np.split(np.arange(8), 4)]
    for part, again, got in zip(
        zip(*parts, strict=True), synthetic(case, packing=packing).batch(9), batch, strict=True
    ):
        np.testing.assert_array_equal(again, got)
        assert got is None or np.array_equal(np.concatenate(part), got)
    assert not np.array_equal(batch.tokens_BT, rows.batch(10).tokens_BT)
    assert not np.array_equal(batch.tokens_BT, synthetic(case, packing=packing, seed=4).batch(9).tokens_BT)
    for ids in (batch.tokens_BT, batch.source_BS):
        assert ids is None or (0 <= ids.min() and ids.max() < 100)
    assert (batch.segments_BT.max(axis=1) == rows.max_segments()).all() or case.objective == "span_corruption"
    if batch.source_BS is not None:
        assert batch.source_segments_BS.max() == batch.segments_BT.max() == rows.max_segments()
    assert batch.weights_BT.any()


@pytest.mark.parametrize("mask", [True, False])
def test_tokens_are_even_and_documents_cut_at_random(mask):
    rows = synthetic(Case("causal", "decoder"), seq_len=64, mask_documents=mask)
    batch = rows.batch(9)
    np.testing.assert_array_equal(batch.targets_BT[:, :-1], batch.tokens_BT[:, 1:])
    many = np.concatenate([rows.batch(step).tokens_BT for step in range(40)])
    np.testing.assert_allclose(np.bincount(many.reshape(-1), minlength=100) / many.size, 0.01, atol=0.004)
    if not mask:
        assert batch.segments_BT is None and batch.positions_BT is None and rows.max_segments() == 1
        return
    begins = batch.positions_BT == 0
    np.testing.assert_array_equal(batch.segments_BT, np.cumsum(begins, axis=1))
    np.testing.assert_array_equal(np.diff(batch.positions_BT, axis=1)[~begins[:, 1:]], 1)
    assert batch.segments_BT.max() == rows.max_segments() == 8
