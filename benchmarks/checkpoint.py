"""Measures checkpoints: how long a step waits for a save, how long saving takes in all, and reading back.

    python benchmarks/checkpoint.py --model=gpt2_small

Prints one line of JSON. `blocking` is what the training thread waits, `total` until the manifest is written, both of a
save while nothing else goes on; `restore` reads and checks everything. `per_gib` are the same for each GiB of state.
"""

import argparse
import tempfile
import time

import jax
from etils import epath
from measure import about, add_model, configured, spread, tell

from lslm_jax.checkpoint import provenance
from lslm_jax.checkpoint.checkpoint import Checkpoints
from lslm_jax.config import Config
from lslm_jax.parallel.sharding import make_mesh, use
from lslm_jax.runtime import huge_pages
from lslm_jax.train.optimizers import make_optimizer
from lslm_jax.train.train_state import abstract_state, init_state


def main() -> None:
    """Prints one line of JSON."""
    args, config = parse_args()
    mesh = make_mesh(config)
    times: dict[str, list[float]] = {"blocking": [], "total": [], "restore": []}
    with use(mesh, config.mesh), tempfile.TemporaryDirectory(dir=args.directory) as name:
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        state = jax.block_until_ready(init_state(config, optimizer, mesh))
        made_by = provenance.make(config, "", "", mesh)
        for step in range(1, args.rounds + 2):
            saved = jax.block_until_ready(state._replace(step=state.step + step))
            checkpoints = Checkpoints(epath.Path(name), config.checkpoint, made_by)
            begun = time.perf_counter()
            checkpoints.save(saved)
            blocked = time.perf_counter()
            checkpoints.close()
            closed = time.perf_counter()
            again = Checkpoints(epath.Path(name), config.checkpoint, made_by)
            jax.block_until_ready(again.restore(step, abstract_state(config, optimizer, mesh), print))
            read = time.perf_counter()
            again.close()
            if step > 1:  # the first one compiles, and imports
                for kind, seconds in zip(times, (blocked - begun, closed - begun, read - closed), strict=True):
                    times[kind].append(seconds)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    seconds = {kind: spread(found) for kind, found in times.items()}
    per_gib = {kind: round(found["median"] * (1 << 30) / size, 3) for kind, found in seconds.items()}
    tell({"model": args.model, "changes": args.changes} | about() | {"bytes": size} | seconds | {"per_gib": per_gib})


def parse_args() -> tuple[argparse.Namespace, Config]:
    """Reads the command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(flags)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--directory", help="where to write; a temporary one goes into it")
    return configured(flags)


if __name__ == "__main__":
    huge_pages.ensure_large_pages()
    main()
