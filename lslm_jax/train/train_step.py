"""One step of training and one of evaluation, as pure functions of state and batch."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lslm_jax.config import Config
from lslm_jax.data.batch import Batch
from lslm_jax.models.attention import Backend
from lslm_jax.parallel.sharding import batch_sharding, constrain, platform
from lslm_jax.runtime.pytree import join
from lslm_jax.train import losses, optimizers
from lslm_jax.train.losses import Sums
from lslm_jax.train.train_state import State, divide, on_device

Metrics = dict[str, jax.Array]
LeavesStep = Callable[[list[jax.Array], Batch], tuple[list[jax.Array], Metrics]]

_TPU_LOGITS = 1 << 28  # 1 GiB of them at once, if not told otherwise

# By a part of jax's `device_kind`. GPUs have none: their latency-hiding scheduler is on as it is, double buffering of
# loops takes Llama 8B 2 GiB more on eight H200 (2 rows each), and what pipelined gathers take or save was never timed.
_OPTIONS: dict[str, dict[str, str | bool]] = {
    # Fast memory that one operation may use, KiB; XLA's 16 MiB are few. By the compiler's own estimate a step of Llama
    # 8B takes 14 % less on v5p:4x4x4 (8,192 tokens a chip), one of Llama 1B on v5e:4x4 4 % less. With 48 MiB it is
    # 16 %, but compiling takes three times as long; with 96 MiB v5e loses again.
    "TPU v5": {"xla_tpu_scoped_vmem_limit_kib": "32768"},
    # The compiler gives no estimate for it: this is what MaxText's recipes for dense models have.
    "TPU v6": {"xla_tpu_scoped_vmem_limit_kib": "98304"},
}


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation, backend: Backend
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step (state, batch) -> (state, metrics), to be jitted with its state donated.

    Metrics are float32 scalars: `loss` (nats a token), `grad_norm` before clipping, `learning_rate`, `tokens` that
    counted, and `skipped`, the number of steps in a row whose loss or gradient was not finite. Such a step changes
    nothing but `step` and `skipped`. Where there are experts, also those of `losses.routing_metrics`.
    """

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        found = accumulate_gradients(config, backend, *divide(config, state.model), batch, key_of(config, state.step))
        return apply_gradients(config, optimizer, state, *found)

    return train_step


def key_of(config: Config, step: jax.Array) -> jax.Array:
    """What a step draws at random depends on seed and step alone."""
    return jax.random.fold_in(jax.random.key(config.seed), step)


def apply_gradients(
    config: Config,
    optimizer: optax.GradientTransformation,
    state: State,
    grads: Any,
    sums: Sums,
    routing: losses.RoutingSums | None,
) -> tuple[State, Metrics]:
    """The next state, and the metrics of `make_train_step`, from what `accumulate_gradients` found of a batch."""
    trained, frozen = divide(config, state.model)
    scale = 1.0 / jnp.maximum(sums.weight, 1.0)
    grads = jax.tree.map(lambda g: g * scale, grads)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(sums.objective) & jnp.isfinite(norm)

    with jax.named_scope("optimizer"):
        before = on_device(state.optimizer)
        updates, moments = optimizer.update(grads, before, trained)
        moved = optax.apply_updates(trained, updates)
        trained, moments = _where(finite, (moved, moments), (trained, before))
    ema = state.ema
    if ema is not None:
        # A fixed decay would remember the random weights of step 0 for 1 / (1 - decay) steps; it rises to its value.
        count = state.step.astype(jnp.float32)
        decay = jnp.minimum(config.train.ema, (1 + count) / (10 + count))
        averaged, _ = divide(config, ema)
        moved = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, averaged, trained)
        ema = join(_where(finite, moved, averaged), frozen)
    skipped = jnp.where(finite, 0, state.skipped + 1)
    rate = optimizers.schedule(config.optimizer, config.train.steps)
    metrics = {
        "loss": sums.nll * scale,
        "grad_norm": norm,
        "learning_rate": jnp.asarray(rate(optimizers.updates_done(state.optimizer)), jnp.float32),
        "tokens": sums.weight,
        "skipped": skipped,
    } | ({} if routing is None else losses.routing_metrics(routing, sums.weight))
    return State(state.step + 1, join(trained, frozen), moments, ema, skipped), metrics


def lower(
    config: Config, optimizer: optax.GradientTransformation, backend: Backend, state: State, batch: Batch, mesh: Mesh
) -> jax.stages.Lowered:
    """The step for exactly these shapes and places, its state donated, to be compiled; on the mesh in use.

    What is compiled goes from the leaves of one state to those of the next, as `on_leaves` has it.

    Args:
      config: resolved.
      optimizer: of the run.
      backend: attention kernel.
      state: from `abstract_state`.
      batch: from `whole_batch`.
      mesh: of devices that are there, or not.
    """
    leaves, form = jax.tree.flatten(state)
    train_step = on_leaves(make_train_step(config, optimizer, backend), form)
    places = [leaf.sharding for leaf in leaves], NamedSharding(mesh, PartitionSpec())
    return jax.jit(train_step, donate_argnums=0, out_shardings=places).lower(leaves, batch)


def compile_for(
    mesh: Mesh, lowered: jax.stages.Lowered, options: dict[str, str | bool] | None = None
) -> jax.stages.Compiled:
    """Compiles with the options that do these devices good, and others.

    What the environment tells XLA holds, and what this version of XLA does not know is left out.
    """
    told = os.environ.get("XLA_FLAGS", "") + os.environ.get("LIBTPU_INIT_ARGS", "")
    kind = mesh.devices.flat[0].device_kind
    ours = next((chosen for name, chosen in _OPTIONS.items() if name in kind), {})
    ours = {name: value for name, value in ours.items() if name not in told}
    try:
        return lowered.compile(compiler_options=ours | (options or {}))
    except jax.errors.JaxRuntimeError as error:
        if not any(f"No such compile option: '{name}'" in str(error) for name in ours):
            raise
        return lowered.compile(compiler_options=options)


def on_leaves(step: Callable[[State, Batch], tuple[State, Metrics]], form: Any) -> LeavesStep:
    """A step between the leaves of states of that form.

    For every step to take modules apart and put them together again would keep the host for a millisecond.
    """

    def train_step(leaves: list[jax.Array], batch: Batch) -> tuple[list[jax.Array], Metrics]:
        state, metrics = step(form.unflatten(leaves), batch)
        return jax.tree.leaves(state), metrics

    return train_step


def whole_batch(config: Config, batch: Batch, mesh: Mesh) -> Batch:
    """Shapes, types and shardings of the global batch that some rows are part of."""

    def whole(x: Any) -> jax.ShapeDtypeStruct:
        shape = (config.train.batch_size, *x.shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=batch_sharding(mesh, shape))

    return jax.tree.map(whole, batch)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def accumulate_gradients(
    config: Config, backend: Backend, trained: Any, frozen: Any, batch: Batch, key: jax.Array
) -> tuple[Any, Sums, losses.RoutingSums | None]:
    """Gradient of the summed objective over a batch, and its sums, worked through in `train.accumulate` parts.

    The gradients of sums add up to exactly the gradient of the whole, whatever the parts weigh. They are those of the
    parameters that are trained: both halves of the model are from `state.divide`.
    """
    gradient = jax.grad(functools.partial(_objective, config, backend), has_aux=True)

    def gradient_and_sums(batch, key):
        grads, (sums, routing) = gradient(trained, frozen, batch, key)
        return grads, sums, routing

    parts = config.train.accumulate
    if parts == 1:
        return gradient_and_sums(batch, key)

    def body(carry, part):
        return jax.tree.map(jnp.add, carry, gradient_and_sums(*part)), None

    # Every parts-th row goes together, so that each device works on rows that it already holds.
    split = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), batch)
    split = jax.tree.map(lambda a: constrain(a, (None, "batch", "length")), split)
    parted = split, jax.random.split(key, parts)
    shapes = jax.eval_shape(gradient_and_sums, *jax.tree.map(lambda a: a[0], parted))
    zeros = jax.tree.map(jnp.zeros_like, trained), *jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes[1:])
    return jax.lax.scan(body, zeros, parted)[0]


def _objective(
    config: Config, backend: Backend, trained: Any, frozen: Any, batch: Batch, key: jax.Array
) -> tuple[jax.Array, tuple[Sums, losses.RoutingSums | None]]:
    model = join(trained, frozen)
    x_BPD, routing = model.features_and_routing(batch, backend=backend, key=key)
    with jax.named_scope("loss"):
        sums = _score(config, model, x_BPD, batch, _loss_settings(config))
        if routing is not None:
            routing = losses.routing(routing, batch.weights_BT)
            extra = config.train.balance_loss * routing.balance + config.train.router_z_loss * routing.router_z
            sums = sums._replace(objective=sums.objective + extra)
    return sums.objective, (sums, routing)


def make_eval_step(config: Config, backend: Backend) -> Callable[[Any, Batch], Sums]:
    """The step (model, batch) -> sums over its targets, with neither dropout, smoothing nor z-loss."""
    settings = _evaluation_settings(config)

    def eval_step(model: Any, batch: Batch) -> Sums:
        return _score(config, model, model.features(batch, backend=backend), batch, settings)

    return eval_step


def make_target_loss_step(config: Config, backend: Backend) -> Callable[[Any, Batch], tuple[Sums, jax.Array]]:
    """The step (model, batch) -> the sums of `make_eval_step`, and the NLL of each target, [B, P] float32, in nats.

    For objectives whose targets are tokens.
    """
    settings = _evaluation_settings(config)

    def target_loss_step(model: Any, batch: Batch) -> tuple[Sums, jax.Array]:
        w_VD, b_V = model.output()
        x_BPD = model.features(batch, backend=backend)
        return losses.cross_entropy_by_target(x_BPD, w_VD, batch.targets_BT, batch.weights_BT, settings, b_V)

    return target_loss_step


def make_predict_step(config: Config, backend: Backend) -> Callable[[Any, Batch], tuple[Sums, jax.Array]]:
    """The step (model, batch) -> the sums of `make_eval_step`, and the scores they come from: [B, P, V], float32.

    For outputs small enough to be looked at: a head's classes, tags, number or spans, or a few masked tokens.
    """
    settings = _evaluation_settings(config)

    def predict_step(model: Any, batch: Batch) -> tuple[Sums, jax.Array]:
        x_BPD = model.features(batch, backend=backend)
        w_VD, b_V = model.output()
        scores_BPV = jnp.einsum("bpd,vd->bpv", x_BPD, w_VD.astype(x_BPD.dtype), preferred_element_type=jnp.float32)
        scores_BPV = scores_BPV if b_V is None else scores_BPV + b_V[None, None]
        return _score(config, model, x_BPD, batch, settings), scores_BPV

    return predict_step


def make_rate_step(config: Config, backend: Backend) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """The step (model, batch) -> what each row's targets are worth, leaving out those of weight 0.

    That is the log-probability of all of them together, [B] in nats, float32, and whether each is the likeliest, bool
    [B].
    """
    settings = _evaluation_settings(config)

    def rate_step(model: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        w_VD, b_V = model.output()
        x_BPD = model.features(batch, backend=backend)
        nats_BP, likeliest_BP = losses.log_probabilities(x_BPD, w_VD, batch.targets_BT, settings, b_V)
        counts_BP = batch.weights_BT > 0
        return jnp.sum(jnp.where(counts_BP, nats_BP, 0.0), axis=1), jnp.all(likeliest_BP | ~counts_BP, axis=1)

    return rate_step


def _score(config: Config, model: Any, x_BPD: jax.Array, batch: Batch, settings: losses.Settings) -> Sums:
    w_VD, b_V = model.output()
    match config.task.objective:
        case "regression":
            return losses.squared_error(x_BPD, w_VD, batch.targets_BT, batch.weights_BT, b_V)
        case "qa":
            return losses.span(x_BPD, w_VD, batch.targets_BT, batch.weights_BT, batch.segments_BT, b_V)
        case _:
            return losses.cross_entropy(x_BPD, w_VD, batch.targets_BT, batch.weights_BT, settings, b_V)


def _evaluation_settings(config: Config) -> losses.Settings:
    return _loss_settings(config)._replace(z_loss=0.0, label_smoothing=0.0, narrow=False)


def usual_chunk(platform: str, vocab_size: int) -> int:
    """Tokens whose logits a device has at once, where `train.loss_chunk` does not say."""
    return {"cpu": 512, "tpu": min(8192, _TPU_LOGITS // max(vocab_size, 1))}.get(platform, 8192)


def _loss_settings(config: Config) -> losses.Settings:
    labelled = config.task.objective in ("classification", "tagging")
    vocab_size = config.model.num_labels if labelled else config.model.vocab_size
    return losses.Settings(
        vocab_size=vocab_size,
        chunk=config.train.loss_chunk or usual_chunk(platform(), vocab_size),
        narrow=config.train.loss_logits == "compute",
        softcap=config.model.logit_softcap,
        z_loss=config.train.z_loss,
        label_smoothing=config.train.label_smoothing,
        summed_first=config.train.accumulate == 1,
    )
