"""Operations of one instruction of a compiled program: matrix products in every compiler's form, and kernels."""

import re

import numpy as np

from lslm_jax.plan.hlo_parser import Instruction, Run


def flops(run: Run) -> float:
    """Of a matrix product, in whichever of the compiler's forms."""
    instruction = run.instruction
    if instruction.opcode in ("dot", "ragged-dot"):
        return _product(run, re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes))
    if instruction.opcode == "convolution":
        return _convolution(run)
    if instruction.opcode == "custom-call" and re.search(r"gemm|matmul", instruction.attributes):
        return _product(run, re.search(r'"lhs_contracting_dimensions":\[([\d",]*)\]', instruction.attributes))
    return 0.0


def _product(run: Run, contracted: re.Match | None) -> float:
    if contracted is None:
        return 0.0
    left = run.among[run.instruction.operands[0]].arrays[0].dims
    inner = np.prod([left[int(i)] for i in re.findall(r"\d+", contracted[1])])
    return 2.0 * float(np.prod(run.instruction.arrays[0].dims)) * float(inner)


def _convolution(run: Run) -> float:
    """TPUs know matrix products as convolutions, batches as their spatial dimensions: most of those fall on padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", run.instruction.attributes)
    if labels is None:
        return 0.0
    left, right = (run.among[name].arrays[0].dims for name in run.instruction.operands[:2])
    out = run.instruction.arrays[0].dims
    of = lambda part, label, dims: dims[labels[part].index(label)]
    total = 2.0 * of(3, "b", out) * of(3, "f", out) * of(2, "i", right)
    window = dict(
        re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", run.instruction.attributes) or "  ")[1])
    )
    for i, label in enumerate(sorted(filter(str.isdigit, labels[1]))):
        each = lambda key, default, i=i: window[key].split("x")[i] if key in window else default
        k = np.arange(of(2, label, right))[None]
        o = np.arange(of(3, label, out))[:, None]
        place = o * int(each("stride", "1")) + k * int(each("rhs_dilate", "1")) - int(each("pad", "0_0").split("_")[0])
        spread = int(each("lhs_dilate", "1"))
        inside = (place >= 0) & (place < (of(1, label, left) - 1) * spread + 1) & (place % spread == 0)
        total *= float(inside.sum())
    return total


_GROUPED = re.compile(r"ragged-dot|tgmm")  # XLA's kernel, and that of a weight's gradient


def grouped(run: Run) -> float:
    """Of a kernel that multiplies all rows [R, D] with one matrix [D, F] each, or makes those matrices' gradient."""
    instruction = run.instruction
    if instruction.opcode != "custom-call" or not _GROUPED.match(instruction.name):
        return 0.0
    arrays = [run.among[name].arrays[0] for name in instruction.operands]
    rows = [array.dims for array in arrays if len(array.dims) == 2]
    both = rows if len(rows) == 2 else rows + [array.dims for array in instruction.arrays if len(array.dims) == 2]
    return 2.0 * both[0][0] * both[0][1] * both[1][1] if rows else 0.0  # without rows it only lists the groups


def attention(run: Run) -> float:
    """Of an attention kernel over whole rows: two products forward, five backward."""
    instruction = run.instruction
    target = re.search(r'custom_call_target="(__cudnn\$fmha|tpu_custom_call)', instruction.attributes)
    if instruction.opcode != "custom-call" or target is None or _GROUPED.match(instruction.name):
        return 0.0
    read = [array.dims for name in instruction.operands for array in run.among[name].arrays if array.dtype == "bf16"]
    q, k = [dims for dims in read if len(dims) >= 3][:2]
    keys = k[-2] if target[1] == "tpu_custom_call" else k[1]  # cuDNN has [B, S, K, C], a TPU's kernel [..., K, S, C]
    return (10.0 if is_backward(instruction) else 4.0) * float(np.prod(q)) * keys


def is_backward(instruction: Instruction) -> bool:
    """Whether an attention kernel is that of the backward pass."""
    return re.search(r"dkv|bwd", instruction.name) is not None or "fmhaSoftmaxBackward" in instruction.attributes
