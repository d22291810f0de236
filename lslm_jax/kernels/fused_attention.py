"""The two fused attention kernels, cuDNN's on GPUs and splash on TPUs, called so that they agree with the reference.

Where padding has nothing to attend to, a kernel may return anything finite for it, but never NaN, and whatever it
returns has no gradient.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lslm_jax.parallel.sharding import resolve

SAVED = "attention"  # under this name the outputs of kernels can be kept for the backward pass


def is_kernel_output(primitive: Any, *avals: Any, **params: Any) -> bool:
    """Checkpoint policy that keeps what attention kernels return, softmax statistics too, so that none runs twice."""
    # JAX's cuDNN call does not name its statistics; without them its backward pass would run the forward one again.
    named = jax.checkpoint_policies.save_only_these_names(SAVED)
    return primitive.name == "dot_product_attention_fwd_wrapper" or named(primitive, *avals, **params)


def cudnn(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segments_BT: jax.Array | None,
    source_segments_BS: jax.Array | None,
    *,
    causal: bool,
    window: int,
    scale: float,
    max_segments: int,
) -> jax.Array:
    """The fused attention of cuDNN; packed rows go in as segment lengths and offsets, never as a T x S mask.

    `source_segments_BS` are those of the keys; None where segments_BT are theirs as well. A window is causal.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if 0 < len(mesh.manual_axes) < len(mesh.axis_names):  # a stage of a pipeline: there the compiler cannot split this
        again = functools.partial(cudnn, causal=causal, window=window, scale=scale, max_segments=max_segments)
        place = lambda x, *names: resolve(("batch", None, *names), x.shape, mesh)
        q_spec, kv_spec = place(q_BTHC, "heads", "head_dim"), place(k_BSKC, "kv_heads", "head_dim")
        specs = (q_spec, kv_spec, kv_spec, *[resolve(("batch",), q_BTHC.shape[:1], mesh)] * 2)
        each = jax.shard_map(again, in_specs=specs, out_specs=q_spec, check_vma=False)
        return each(q_BTHC, k_BSKC, v_BSKC, segments_BT, source_segments_BS)

    # The public jax.nn.dot_product_attention has no offsets, without which cuDNN cannot tell packed documents apart.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    def attend(q_BTHC, k_BSKC, v_BSKC, mask_type, bounds=(None, None, None, None)) -> jax.Array:
        q_lengths, kv_lengths, q_offsets, kv_offsets = bounds
        if q_offsets is not None and jax.__version_info__ < (0, 12):
            # There, offsets of keys are scaled by the number of query heads: grouped ones would be misread silently.
            groups = q_BTHC.shape[2] // k_BSKC.shape[2]
            k_BSKC, v_BSKC = (jnp.repeat(x, groups, axis=2) for x in (k_BSKC, v_BSKC))
        out_BTHC: Any = dot_product_attention(
            q_BTHC,
            k_BSKC,
            v_BSKC,
            q_seqlen=q_lengths,
            kv_seqlen=kv_lengths,
            q_offsets=q_offsets,
            kv_offsets=kv_offsets,
            scale=scale,
            mask_type=mask_type,
            sliding_window_length=window or None,
        )
        return out_BTHC

    # The only document of a row begins it, and causality hides the padding behind it.
    if segments_BT is None or (causal and max_segments <= 1):
        return attend(q_BTHC, k_BSKC, v_BSKC, MaskType.CAUSAL if causal else MaskType.NO_MASK)
    if causal:
        lengths_BM, offsets_BM = segment_bounds(segments_BT, max_segments)
        bounds = (lengths_BM, lengths_BM, offsets_BM, offsets_BM)
        return attend(q_BTHC, k_BSKC, v_BSKC, MaskType.PADDING_CAUSAL, bounds)
    if source_segments_BS is None:
        source_segments_BS = segments_BT
    # Padding belongs to no segment here: the kernel leaves its output and its gradients uninitialised.
    q_BTHC, k_BSKC, v_BSKC = (
        _without_padding(x, segments)
        for x, segments in ((q_BTHC, segments_BT), (k_BSKC, source_segments_BS), (v_BSKC, source_segments_BS))
    )
    bounds = pair_bounds(segments_BT, source_segments_BS, max_segments)
    return _without_padding(attend(q_BTHC, k_BSKC, v_BSKC, MaskType.PADDING, bounds), segments_BT)


def _without_padding(x_BTHC: jax.Array, segments_BT: jax.Array) -> jax.Array:
    return jnp.where(segments_BT[:, :, None, None] > 0, x_BTHC, 0)


def segment_bounds(segments_BT: jax.Array, max_segments: int) -> tuple[jax.Array, jax.Array]:
    """Length [B, M] and first token [B, M + 1] of each segment of each row, -1 where a row has fewer than M.

    Segments are numbered from 1 in the order they lie, as data/packing.py does. Padding (0) lies behind them and is
    given as one segment more, M = max_segments + 1: the kernel leaves tokens that belong to none uninitialised.
    """
    # 1 .. M, then 0, worked out: a concatenation that ends in a fused sum does not compile for GPUs (jaxlib 0.10.2).
    length_BM = _lengths(segments_BT, jnp.arange(1, max_segments + 2) % (max_segments + 1))
    present_BM = length_BM > 0
    return jnp.where(present_BM, length_BM, -1), _offsets(length_BM, present_BM)


def pair_bounds(
    segments_BT: jax.Array, source_segments_BS: jax.Array, max_segments: int
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Lengths of queries' and keys' segments, [B, M] each, and their first tokens, [B, M + 1]; padding is in none.

    With one segment a row, which begins it: lengths [B], at least 1 for the kernel's sake, and None.
    """
    number_M = jnp.arange(1, max(max_segments, 1) + 1)
    length_BM, source_length_BM = (_lengths(segments, number_M) for segments in (segments_BT, source_segments_BS))
    if max_segments <= 1:
        return jnp.maximum(length_BM[:, 0], 1), jnp.maximum(source_length_BM[:, 0], 1), None, None
    # The kernel matches them by their order among those present.
    present_BM = (length_BM > 0) | (source_length_BM > 0)
    return (
        jnp.where(present_BM, length_BM, -1),
        jnp.where(present_BM, source_length_BM, -1),
        _offsets(length_BM, present_BM),
        _offsets(source_length_BM, present_BM),
    )


def _lengths(segments_BT: jax.Array, number_M: jax.Array) -> jax.Array:
    return jnp.sum(segments_BT[:, None, :] == number_M[None, :, None], axis=-1, dtype=jnp.int32)


def _offsets(length_BM: jax.Array, present_BM: jax.Array) -> jax.Array:
    start_BM = jnp.cumsum(length_BM, axis=1) - length_BM
    return jnp.pad(jnp.where(present_BM, start_BM, -1), ((0, 0), (0, 1)), constant_values=-1)


def splash(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segments_BT: jax.Array | None,
    source_segments_BS: jax.Array | None,
    *,
    causal: bool,
    window: int,
    scale: float,
) -> jax.Array:
    """Splash attention, the fused TPU kernel, run on each device's own rows and heads."""
    q_spec = resolve(("batch", "length", "heads", "head_dim"))
    kv_spec = resolve(("batch", "length", "kv_heads", "head_dim"))
    segments = ()
    if segments_BT is not None:
        segments = (segments_BT, segments_BT if source_segments_BS is None else source_segments_BS)
    specs = (q_spec, kv_spec, kv_spec, *[resolve(("batch", "length"))] * len(segments))

    def run(q_BTHC, k_BSKC, v_BSKC, *segments):
        kernel = splash_kernel(q_BTHC.shape[1], k_BSKC.shape[1], causal, window)
        return run_splash(kernel, q_BTHC, k_BSKC, v_BSKC, segments)

    sharded = jax.shard_map(run, in_specs=specs, out_specs=q_spec, check_vma=False)
    return sharded(q_BTHC * scale, k_BSKC, v_BSKC, *segments)


def splash_kernel(
    length: int, source_length: int, causal: bool, window: int, devices: int = 1, places_T: np.ndarray | None = None
) -> Any:
    """The kernel of one mask, the same for all heads.

    Args:
      length: of queries, T.
      source_length: of keys, S.
      causal: whether a query sees only what is before it.
      window: how far it sees, 0: all the way.
      devices: over which queries are split, in one stretch or two each.
      places_T: the place of each query in the row, where it sees not all. None: 0..T-1.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = length, source_length
    mask: Any
    if window:
        mask = masks.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    if places_T is not None:
        mask.q_sequence = places_T
    block, source_block = math.gcd(length // (2 * devices if devices > 1 else 1), 512), math.gcd(source_length, 512)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=source_block,
        block_kv_compute=source_block,
        block_q_dkv=block,
        block_kv_dkv=source_block,
        block_kv_dkv_compute=source_block,
        use_fused_bwd_kernel=True,
    )
    return kernels.make_splash_mha(
        mask=masks.MultiHeadMask([mask]),
        head_shards=1,
        q_seq_shards=devices,
        block_sizes=sizes,
        residual_checkpoint_name=SAVED,
    )


def run_splash(
    kernel: Any, q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, segments: Sequence[jax.Array]
) -> jax.Array:
    """What the kernel says of one device's rows and heads: [B, T, H, C]. Segments of queries and keys, or none."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHC, k_BSKC, v_BSKC))
    out_BHTC: Any
    if segments:
        out_BHTC = jax.vmap(kernel)(q, k, v, segment_ids=kernels.SegmentIds(*segments))
    else:
        out_BHTC = jax.vmap(kernel)(q, k, v)
    return jnp.swapaxes(out_BHTC, 1, 2)
