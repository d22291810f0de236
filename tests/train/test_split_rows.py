"""Training on rows whose positions are split over devices: the losses of one device, and no whole row on any."""

import functools
import math
import re

import jax
import numpy as np
import pytest
from test_train_step import FAMILIES, batch, batch_of, changed, distance, fresh_run, fresh_state, moments, placed

from lslm_jax.data.batch import Batch
from lslm_jax.models import attention
from lslm_jax.parallel.sharding import make_mesh, to_global
from lslm_jax.train import optimizers, train_step
from lslm_jax.train.train_state import abstract_state

DECODER = FAMILIES["decoder"]
CONFIGS = FAMILIES | {
    "grouped heads, windows": changed(
        model={"num_kv_heads": 2, "positions": "rotary", "window": 5, "layer_types": ("window", "full")}
    ),
    "relative, remat": changed(model={"positions": "relative", "remat": "save_attention"}, train={"accumulate": 2}),
    "dropout": changed(model={"dropout": 0.1}),
}
CONFIGS["grouped heads, windows, dropout, remat"] = changed(
    CONFIGS["grouped heads, windows"],
    model={"dropout": 0.1, "remat": "save_attention", "scan_layers": True},
    train={"accumulate": 2},
)
exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "meshes"),
    [
        ("decoder", [{"fsdp": 2, "context": 2}]),
        ("grouped heads, windows, dropout, remat", [{"context": 2, "tensor": 2}]),
        ("encoder_decoder", [{"context": 2}]),
        exhaustive("decoder", [{"context": 8}]),
        exhaustive("encoder", [{"data": 2, "context": 2}]),
        exhaustive("encoder", [{"context": 2}]),
        exhaustive("encoder_decoder", [{"data": 2, "context": 2}]),
        exhaustive("grouped heads, windows", [{"context": 2, "tensor": 2}]),
        exhaustive("relative, remat", [{"context": 2}]),
        exhaustive("dropout", [{"context": 2}]),
    ],
)
def test_twenty_steps_on_split_rows_give_the_losses_of_one_device(name, meshes):
    def trained(mesh):
        run = fresh_run(changed(CONFIGS[name], mesh={"data": 1} | mesh), math.prod(mesh.values()))
        losses = [run.step(batch_of(CONFIGS[name], i % 5))["loss"] for i in range(20)]
        return losses, moments(run.state)

    losses, gathered = trained({})
    for mesh in meshes:
        split_losses, split_gathered = trained(mesh)
        apart, of_moments = np.max(np.abs(np.subtract(split_losses, losses))), distance(split_gathered, gathered)
        print(f"{name} on {mesh}: losses differ by {apart:.1e}, moments by {of_moments:.1e}")
        assert apart < 1e-5 and of_moments < 1e-5
    assert losses[-1] < losses[0] - 0.5


def test_evaluation_of_split_rows_gives_the_sums_of_whole_ones():
    config, rows = changed(mesh={"data": 1, "context": 4}), batch()
    mesh, optimizer = make_mesh(config, jax.devices()[:4]), optimizers.make_optimizer(config.optimizer, 50)
    evaluate = jax.jit(train_step.make_eval_step(config, attention.XLA))
    rate = jax.jit(train_step.make_rate_step(config, attention.XLA))
    model = jax.tree.map(np.asarray, fresh_state().model)
    expected = evaluate(model, rows), rate(model, rows)[0]
    with jax.set_mesh(mesh):
        split_model, split_rows = placed(config, abstract_state(config, optimizer, mesh)).model, to_global(rows, mesh)
        found = evaluate(split_model, split_rows), rate(split_model, split_rows)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_no_device_sees_a_row_whole_but_for_its_keys_and_values():
    length, width, rows = 192, 40, 8  # no other sizes are 192, so that 192 x 192 could only be attention
    model = {"positions": "rotary", "d_model": width, "num_heads": 5, "num_kv_heads": 1, "d_ff": 48}
    config = changed(model=model, data={"seq_len": length}, train={"batch_size": rows}, mesh={"data": 1, "context": 4})
    mesh, optimizer = make_mesh(config, jax.devices()[:4]), optimizers.make_optimizer(config.optimizer, 50)
    ids_BT = np.ones((rows, length), np.int32)
    lines = Batch(ids_BT, ids_BT, np.ones((rows, length), np.float32), segments_BT=ids_BT)
    with jax.set_mesh(mesh):
        told = abstract_state(config, optimizer, mesh), train_step.whole_batch(config, lines, mesh)
        text = train_step.lower(config, optimizer, attention.XLA, *told, mesh).compile().as_text() or ""
    gathered = set(re.findall(r"(\w+\[[\d,]*\])\S* all-gather", text))
    assert f"f32[{rows},{length},1,8]" in gathered
    assert not re.search(rf"{length},{length}[\],]", text)
    assert not re.search(
        rf"\[2,[\d,]*\b{length}\b[\d,]*\]", text
    )  # nor does the backward pass keep them, of both layers
    assert not [shape for shape in gathered if str(length) in shape and str(width) in shape]
