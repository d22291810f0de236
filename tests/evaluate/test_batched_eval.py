"""Batches are evaluated in order, with a few of them under way at a time however many there are."""

import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from lslm_jax.config import Config, TrainConfig
from lslm_jax.data.batch import Batch
from lslm_jax.evaluate import batched_eval
from lslm_jax.parallel.sharding import make_mesh


@pytest.mark.parametrize("count", [0, 1, 4, 50])
def test_each_batch_is_read_in_order_and_few_lie_on_the_devices(count):
    results, most = [], 0

    def batches():
        nonlocal most
        for number in range(count):
            most = max(most, sum(result() is not None for result in results))
            yield Batch(tokens_BT=np.full((8, 4), number), targets_BT=np.zeros((8, 4)), weights_BT=np.ones((8, 4)))

    def step(model, batch):
        result = jnp.sum(batch.tokens_BT) + model
        results.append(weakref.ref(result))
        return result

    found = batched_eval.run(step, 1, batches(), make_mesh(Config(train=TrainConfig(batch_size=8))))
    assert found == [32 * number + 1 for number in range(count)]
    assert most <= 5
