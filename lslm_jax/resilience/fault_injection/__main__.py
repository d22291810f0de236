"""Breaks real runs on purpose, again and again, and proves that nothing was lost silently.

python -m lslm_jax.resilience.fault_injection [--minutes=20] [--seed=0] [--only=NAME] [--most=N] [--steps=N]
    [--workdir=DIR]

A small model is trained undisturbed, by one process and by two. Then it is trained again while faults are drawn at
random: signals at any moment, also of a save; damaged checkpoints, shards and records; a full disk. After each, the
same command goes on. At its end, each run's curve must equal the undisturbed one byte for byte, and its ledger be
whole. Prints a table and one line of JSON; exits with 0 only if every fault was survived, and all damage was told.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NoReturn

from lslm_jax.resilience.fault_injection.campaign import Campaign
from lslm_jax.resilience.fault_injection.faults import FAULTS
from lslm_jax.resilience.fault_injection.run import STEPS, Broken
from lslm_jax.runtime.progress import clock_time, say


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command line."""
    flags = argparse.ArgumentParser(
        prog="python -m lslm_jax.resilience.fault_injection", description=(__doc__ or "").partition("\n")[0]
    )
    flags.add_argument("--minutes", type=float, default=20.0, help="how long it takes altogether (default 20)")
    flags.add_argument("--seed", type=int, default=0, help="of the faults (default 0)")
    flags.add_argument("--only", default="", metavar="NAME", help="faults whose names hold this, as SIGTERM")
    flags.add_argument("--most", type=int, metavar="N", help="end after so many faults")
    flags.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"of each run (default {STEPS})")
    flags.add_argument("--workdir", type=pathlib.Path, help="an empty directory; default: a temporary one")
    asked = flags.parse_args(argv)
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        root = asked.workdir or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(parents=True, exist_ok=True)
        campaign = Campaign(root, asked.minutes, asked.seed, asked.only, asked.most, asked.steps)
        if not campaign.counts:
            flags.error(f"--only={asked.only} names no fault: there are {', '.join(fault.name for fault in FAULTS)}")
        try:
            campaign.go()
        except Broken as error:
            print(f"chaos: {error}", file=sys.stderr)
            sys.exit(1)
        found = campaign.report() | {"seconds": round(time.monotonic() - begun)}
    say(f"chaos: {clock_time(time.monotonic() - begun)}")
    print(json.dumps(found))
    sys.exit(1 if campaign.broken else 0)


if __name__ == "__main__":
    main()
