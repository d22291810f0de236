"""Order of imports between packages: the table that tests/test_house.py checks and ARCHITECTURE.md shows.

python tests/import_layers.py writes the table into ARCHITECTURE.md.
"""

import pathlib

ARCHITECTURE = pathlib.Path(__file__).resolve().parents[1] / "ARCHITECTURE.md"
BEGIN, END = "<!-- import layers: python tests/import_layers.py -->", "<!-- end of import layers -->"

# Each layer imports from the layers above it. The groups of a layer do not import each other; inside a group, imports
# are free. A module has the layer of its own name, else that of its package.
LAYERS = [
    [["errors"]],
    [["runtime"]],
    [["config", "data.batch"]],
    [["parallel"]],
    [["data"], ["models", "kernels", "parallel.context_parallel", "parallel.pipeline_parallel"]],
    [["generate"], ["convert"], ["train.losses", "train.optimizers", "train.train_state", "train.train_step"]],
    [["checkpoint"], ["evaluate"]],
    [["resilience"]],
    [["train"], ["plan"]],
    [["cli"]],
    [["main"], ["resilience.supervisor", "resilience.fault_injection"]],
]
_PLACES = {
    name: (number, group) for number, layer in enumerate(LAYERS) for group, names in enumerate(layer) for name in names
}


def layer_of(module: str) -> tuple[int, int] | None:
    """Layer and group of a module below `lslm_jax`, as `data.shards`; None if the table lacks it."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((_PLACES[name] for name in names if name in _PLACES), None)


def may_import(module: str, imported: str) -> bool:
    """True if the table allows `module` to import `imported`."""
    here, there = layer_of(module), layer_of(imported)
    return here is not None and there is not None and (there[0] < here[0] or there == here)


def table() -> str:
    """The layers as text, one line each, the lowest first."""
    rows = ["   |   ".join(", ".join(group) for group in layer) for layer in LAYERS]
    return "\n".join(f"{number:2}  {row}" for number, row in enumerate(rows))


def section() -> str:
    """The generated section of ARCHITECTURE.md."""
    return f"{BEGIN}\n```\n{table()}\n```\n{END}"


def main() -> None:
    """Replaces the generated section of ARCHITECTURE.md."""
    before, _, rest = ARCHITECTURE.read_text().partition(BEGIN)
    ARCHITECTURE.write_text(before + section() + rest.partition(END)[2])


if __name__ == "__main__":
    main()
