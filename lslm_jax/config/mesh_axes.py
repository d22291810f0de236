"""Sizes of the mesh's axes, as far as a config says them: presets, slices, what they must divide."""

from collections.abc import Iterator

from lslm_jax.config import Config, MeshConfig

MESH_AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")
"""Axes of the mesh, from those that talk least, over the slowest links, to those that talk most."""

_PRESETS = {
    "ddp": {"data": -1},
    "fsdp": {"fsdp": -1},
    "tp": {"tensor": -1},
    "fsdp_tp": {"fsdp": -1, "tensor": 4},
    "fsdp_context": {"fsdp": -1, "context": 4},
    "moe": {"fsdp": -1, "expert": 4},
}


def mesh_axes(mesh: MeshConfig) -> dict[str, int]:
    """Devices of each axis within a slice; an axis that is said to be -1 takes the rest instead of the preset's."""
    said = {name: getattr(mesh, name) for name in MESH_AXES}
    sizes = {name: size or _PRESETS[mesh.preset].get(name, 1) for name, size in said.items()}
    if -1 in said.values():
        sizes = {name: 1 if size == -1 and not said[name] else size for name, size in sizes.items()}
    return sizes


def slices(mesh: MeshConfig) -> dict[str, int]:
    """Slices that each axis spans."""
    return {name: getattr(mesh, f"dcn_{name}", 1) for name in MESH_AXES}


def problems(config: Config) -> Iterator[str]:
    """What is wrong with the mesh, told without devices; the sizes of the model are filled in."""
    mesh, model = config.mesh, config.model
    axes = mesh_axes(mesh)
    if sum(size == -1 for size in axes.values()) > 1:
        yield "only one mesh axis may be -1"
    yield from (
        f"mesh.{name} must be positive, -1 or 0, got {size}" for name, size in axes.items() if size < 1 and size != -1
    )
    yield from (f"mesh.dcn_{name} must be positive, got {size}" for name, size in slices(mesh).items() if size < 1)
    split = [
        ("model.num_heads", model.num_heads, "tensor"),
        ("model.num_kv_heads", model.num_kv_heads, "tensor"),
        ("model.d_ff", model.d_ff, "tensor"),
        ("model.d_model", model.d_model, "fsdp"),
        ("model.num_experts", model.num_experts, "expert"),
        ("data.seq_len", config.data.seq_len, "context"),
        ("data.source_len", config.data.source_len, "context"),
    ]
    for key, size, axis in split:
        over = axes[axis] * slices(mesh)[axis]
        if over > 0 and size % over:
            yield f"{key}={size} is not divisible by mesh.{axis}={over}: use {multiples(size, over)}"
    over, length = axes["context"] * slices(mesh)["context"], config.data.seq_len
    if over > 1 and model.family != "encoder" and length % (2 * over):
        yield (
            f"data.seq_len={length} is not divisible by 2 * mesh.context={2 * over}, the chunks that balance causal "
            f"attention: use {multiples(length, 2 * over)}"
        )
    yield from _stage_problems(config, axes["stage"] * slices(mesh)["stage"])


def _stage_problems(config: Config, stages: int) -> Iterator[str]:
    model, rounds, parts = config.model, config.model.pipeline_rounds, config.model.microbatches
    if stages < 0:
        yield "mesh.stage cannot be -1: say into how many stages the layers are split"
    if stages <= 1 or rounds < 1:
        return
    if not model.scan_layers:
        yield f"mesh.stage={stages} needs model.scan_layers=true"
    groups = stages * rounds
    named = f"mesh.stage={stages}" if rounds == 1 else f"mesh.stage * model.pipeline_rounds={groups}"
    for key in ("num_layers", "num_decoder_layers"):
        if (size := getattr(model, key)) % groups:
            yield f"model.{key}={size} is not divisible by {named}: use {multiples(size, groups)}"
    if rounds > 1 and parts % stages:
        yield (
            f"model.microbatches={parts} is not divisible by mesh.stage={stages}, as model.pipeline_rounds={rounds} "
            f"needs: use {multiples(parts, stages)}"
        )


def multiples(size: int, divisor: int, times: int = 1) -> str:
    """The multiples of `divisor` around `size`, each `times` as much, as a suggestion."""
    below = size // divisor * divisor
    return " or ".join(str(n * times) for n in (below, below + divisor) if n)
