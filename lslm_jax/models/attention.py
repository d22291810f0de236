"""Attention as functions of arrays: one reference and two fused kernels that must agree with it.

Every back end computes causal attention within segments; `choose` picks the fastest one that does so for the case at
hand. Rows of padding (segment 0) attend among themselves and are never read.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lslm_jax.errors import ConfigError
from lslm_jax.sharding import resolve


class KeyValues(NamedTuple):
    """Keys and values of one layer seen so far (of all layers, with a leading L, outside the stack)."""

    k_BSKC: jax.Array
    v_BSKC: jax.Array


class Backend(NamedTuple):
    """A kernel and why it was chosen.

    Attributes:
      name: `xla`, `cudnn` or `splash`.
      reason: for the log.
      max_segments: most segments in any row; cudnn needs the number when it compiles, and 0 means no segments.
    """

    name: str
    reason: str
    max_segments: int = 0


XLA = Backend("xla", "the reference")

SAVED = "attention"  # under this name the outputs of kernels can be kept for the backward pass


def choose(
    name: str, *, platform: str, compute_capability: float, dtype: str, head_dim: int, length: int, max_segments: int
) -> Backend:
    """Picks the kernel for training on rows of `length` tokens with up to `max_segments` documents each (0: unmasked).

    Args:
      name: a back end, or `auto`.
      platform: `cpu`, `gpu` or `tpu`, of the devices that will run it.
      compute_capability: of an NVIDIA GPU (9.0 is Hopper), 0 elsewhere.

    Raises:
      ConfigError: the named back end cannot compute this case correctly.
    """
    obstacles = {
        "cudnn": _cudnn_obstacle(platform, compute_capability, dtype, head_dim, length, max_segments),
        "splash": _splash_obstacle(platform, head_dim, length),
        "xla": None,
    }
    if name == "auto":
        fused = {"gpu": "cudnn", "tpu": "splash"}.get(platform)
        if fused and obstacles[fused] is None:
            return Backend(fused, f"fused, on {platform}", max_segments)
        return Backend("xla", f"{fused}: {obstacles[fused]}" if fused else f"the only one on {platform}")
    if obstacles[name]:
        raise ConfigError(f"model.attention={name} cannot run here: {obstacles[name]}; use auto or xla")
    return Backend(name, "named in the config", max_segments)


def _cudnn_obstacle(
    platform: str, compute_capability: float, dtype: str, head_dim: int, length: int, max_segments: int
) -> str | None:
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, not {platform}"
    if compute_capability < 8.0:
        return f"it needs compute capability 8.0, not {compute_capability}"
    if dtype != "bfloat16":
        return f"it needs model.dtype=bfloat16, not {dtype}"
    if max_segments > 1 and compute_capability < 9.0:
        return f"packed rows need compute capability 9.0, not {compute_capability}"
    limit = 256 if compute_capability >= 9.0 else 128
    if head_dim % 8 or head_dim > limit:
        return f"it needs a head width that is a multiple of 8 up to {limit}, not {head_dim}"
    if length % 2:
        return f"it needs an even data.seq_len, not {length}"
    return None


def _splash_obstacle(platform: str, head_dim: int, length: int) -> str | None:
    if platform != "tpu":
        return f"it needs a TPU, not {platform}"
    if length % 128:
        return f"it needs data.seq_len to be a multiple of 128, not {length}"
    if head_dim % 64:
        return f"it needs a head width that is a multiple of 64, not {head_dim}"
    return None


def attend(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    *,
    segments_BT: jax.Array | None,
    window: int,
    backend: Backend,
) -> jax.Array:
    """Causal self-attention within segments and, with `window`, over the latest so many tokens: [B, T, H, C]."""
    match backend.name:
        case "cudnn":
            return _cudnn(q_BTHC, k_BTKC, v_BTKC, segments_BT, window, backend.max_segments)
        case "splash":
            return _splash(q_BTHC, k_BTKC, v_BTKC, segments_BT, window)
        case _:
            mask_BTS = causal_mask(q_BTHC.shape[1], segments_BT, window)
            return checkpoint_name(attend_masked(q_BTHC, k_BTKC, v_BTKC, mask_BTS), SAVED)


def is_kernel_output(primitive: Any, *avals: Any, **params: Any) -> bool:
    """Checkpoint policy that keeps what attention kernels return, softmax statistics too, so that none runs twice."""
    # JAX's cuDNN call does not name its statistics; without them its backward pass would run the forward one again.
    named = jax.checkpoint_policies.save_only_these_names(SAVED)
    return primitive.name == "dot_product_attention_fwd_wrapper" or named(primitive, *avals, **params)


def causal_mask(length: int, segments_BT: jax.Array | None, window: int) -> jax.Array:
    """Which key each query may see: [B, T, S], or [1, T, S] where there are no segments."""
    distance_TS = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    near_TS = (distance_TS >= 0) & (distance_TS < window) if window else distance_TS >= 0
    if segments_BT is None:
        return near_TS[None]
    return near_TS[None] & (segments_BT[:, :, None] == segments_BT[:, None, :])


def attend_masked(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """The reference: softmax(q k / sqrt(C)) v where the mask allows. Logits and softmax are float32.

    Each query must see at least one key. Query heads share key heads in groups, G = H / K, and the heads of a group
    are laid out as M = T * G queries: one product for all of them, and no copy of keys and values.
    """
    B, T, H, C = q_BTHC.shape
    K = k_BSKC.shape[2]
    q_BMKC = jnp.swapaxes((q_BTHC / math.sqrt(C)).reshape(B, T, K, H // K, C), 2, 3).reshape(B, -1, K, C)
    # Added, not selected: on CPUs the softmax and its gradient then take half the time.
    bias_BMS = jnp.repeat(jnp.where(mask_BTS, 0.0, -jnp.inf), H // K, axis=1)
    logits_BKMS = jnp.einsum("bmkc,bskc->bkms", q_BMKC, k_BSKC, preferred_element_type=jnp.float32)
    weights_BKMS = jax.nn.softmax(logits_BKMS + bias_BMS[:, None], axis=-1).astype(v_BSKC.dtype)
    out_BMKC = jnp.einsum("bkms,bskc->bmkc", weights_BKMS, v_BSKC)
    return jnp.swapaxes(out_BMKC.reshape(B, T, H // K, K, C), 2, 3).reshape(B, T, H, C)


def _cudnn(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    segments_BT: jax.Array | None,
    window: int,
    max_segments: int,
) -> jax.Array:
    """The fused attention of cuDNN; packed rows go in as segment lengths and offsets, never as a T x T mask."""
    # The public jax.nn.dot_product_attention has no offsets, without which cuDNN cannot tell packed documents apart.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    lengths = offsets = None
    mask_type = MaskType.CAUSAL
    # The only document of a row begins it, and causality hides the padding behind it.
    if segments_BT is not None and max_segments > 1:
        mask_type = MaskType.PADDING_CAUSAL
        lengths, offsets = segment_bounds(segments_BT, max_segments)
        if jax.__version_info__ < (0, 12):
            # There, offsets of keys are scaled by the number of query heads: grouped ones would be misread silently.
            groups = q_BTHC.shape[2] // k_BTKC.shape[2]
            k_BTKC, v_BTKC = (jnp.repeat(x, groups, axis=2) for x in (k_BTKC, v_BTKC))
    out_BTHC: Any = dot_product_attention(
        q_BTHC,
        k_BTKC,
        v_BTKC,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=1.0 / math.sqrt(q_BTHC.shape[-1]),
        mask_type=mask_type,
        sliding_window_length=window or None,
    )
    return out_BTHC


def segment_bounds(segments_BT: jax.Array, max_segments: int) -> tuple[jax.Array, jax.Array]:
    """Length [B, M] and first token [B, M + 1] of each segment of each row, -1 where a row has fewer than M.

    Segments are numbered from 1 in the order they lie, as data/packing.py does. Padding (0) lies behind them and is
    given as one segment more, M = max_segments + 1: the kernel leaves tokens that belong to none uninitialised.
    """
    number_M = jnp.append(jnp.arange(1, max_segments + 1), 0)
    length_BM = jnp.sum(segments_BT[:, None, :] == number_M[None, :, None], axis=-1, dtype=jnp.int32)
    start_BM = jnp.cumsum(length_BM, axis=1) - length_BM
    present_BM = length_BM > 0
    offsets_BM = jnp.pad(jnp.where(present_BM, start_BM, -1), ((0, 0), (0, 1)), constant_values=-1)
    return jnp.where(present_BM, length_BM, -1), offsets_BM


def _splash(
    q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, segments_BT: jax.Array | None, window: int
) -> jax.Array:
    """Splash attention, the fused TPU kernel, run on each device's own rows and heads."""
    q_spec = resolve(("batch", "length", "heads", "head_dim"))
    kv_spec = resolve(("batch", "length", "kv_heads", "head_dim"))
    run = functools.partial(_splash_shard, window=window)
    if segments_BT is None:
        sharded = jax.shard_map(run, in_specs=(q_spec, kv_spec, kv_spec), out_specs=q_spec, check_vma=False)
        return sharded(q_BTHC, k_BTKC, v_BTKC)
    specs = (q_spec, kv_spec, kv_spec, resolve(("batch", "length")))
    return jax.shard_map(run, in_specs=specs, out_specs=q_spec, check_vma=False)(q_BTHC, k_BTKC, v_BTKC, segments_BT)


def _splash_shard(
    q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, segments_BT: jax.Array | None = None, *, window: int
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, T, H, C = q_BTHC.shape
    one = masks.LocalMask((T, T), (window - 1, 0), 0) if window else masks.CausalMask((T, T))
    block = math.gcd(T, 512)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    kernel = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([one] * H),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        residual_checkpoint_name=SAVED,
    )
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHC * (1.0 / math.sqrt(C)), k_BTKC, v_BTKC))
    out_BHTC: Any
    if segments_BT is None:
        out_BHTC = jax.vmap(kernel)(q, k, v)
    else:
        out_BHTC = jax.vmap(kernel)(q, k, v, segment_ids=kernels.SegmentIds(segments_BT, segments_BT))
    return jnp.swapaxes(out_BHTC, 1, 2)
