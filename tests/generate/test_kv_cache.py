from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import LLAMA, all_logits

from lslm_jax.config import Config, MeshConfig
from lslm_jax.generate import kv_cache as caches
from lslm_jax.parallel.sharding import make_mesh


def test_a_cache_costs_what_it_says():
    cache = caches.create(LLAMA, 3, 10)
    assert caches.num_bytes(LLAMA, 3, 10) == sum(a.nbytes for a in jax.tree.leaves(cache))
    assert len(cache) == LLAMA.num_layers and cache[0].k_BSKC.shape == (3, 10, 2, 8)


def test_a_cache_has_the_layers_that_write():
    config = replace(LLAMA, family="encoder_decoder", num_decoder_layers=3)
    assert len(caches.create(config, 1, 1)) == 3
    assert caches.num_bytes(config, 1, 1) == 3 * caches.num_bytes(LLAMA, 1, 1) / LLAMA.num_layers


def test_a_longer_cache_keeps_what_it_held():
    cache = jax.jit(lambda: caches.extend(jax.tree.map(jnp.ones_like, caches.create(LLAMA, 2, 4)), 3))()
    for a in map(np.asarray, jax.tree.leaves(cache)):
        np.testing.assert_array_equal(a[:, :4], 1)
        np.testing.assert_array_equal(a[:, 4:], 0)
        assert a.shape[1] == 7


def test_rows_lie_over_the_data_axes_and_heads_over_the_tensor_axis():
    mesh = make_mesh(Config(mesh=MeshConfig(data=2, fsdp=2, tensor=2)))
    with jax.set_mesh(mesh):
        many, one = (jax.jit(lambda rows=rows: caches.create(LLAMA, rows, 10))()[0].k_BSKC for rows in (4, 1))
    assert many.sharding.shard_shape(many.shape) == (1, 10, 1, 8)
    assert one.sharding.shard_shape(one.shape) == (1, 10, 1, 8)


def test_reading_with_a_cache_gives_the_logits_of_reading_at_once(decoder):
    tokens_BT = np.random.default_rng(1).integers(3, 259, (2, 24), np.int32)
    expected_BTV = all_logits(decoder, tokens_BT)
    model, cache = jax.jit(lambda model: (model.unstacked(), caches.create(model.config, 2, 24)))(decoder)

    @jax.jit
    def read(model, tokens_BT, cache, index):
        positions_BT = index + jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        mask_BTS = positions_BT[:, :, None] >= jnp.arange(24)[None, None]
        x_BTD, cache = model.with_cache(tokens_BT, positions_BT, cache, index, mask_BTS)
        return model.logits(x_BTD), cache

    logits_BTV, cache = read(model, tokens_BT[:, :9], cache, 0)
    parts = [logits_BTV]
    for t in range(9, 24):
        logits_B1V, cache = read(model, tokens_BT[:, t : t + 1], cache, t)
        parts.append(logits_B1V)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected_BTV, atol=1e-5, rtol=1e-5)
