#!/usr/bin/env bash
# The whole way on a laptop, from text files to text, step by step:
#
#   ./launch/cpu.sh runs/cpu                                  about a minute: the quickstart, shrunk by :smoke
#   ./launch/cpu.sh runs/cpu_full configs/quickstart.py       the same in full
#
# PYTHON names the interpreter; without it, it is the .venv that `make setup` makes, or python3.
set -eu

if [ $# -lt 1 ]; then
  echo "usage: $0 WORKDIR [CONFIG]" >&2
  exit 2
fi
mkdir -p "$1"
workdir=$(cd "$1" && pwd)
config=${2:-configs/quickstart.py:smoke}

cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi

lslm() {
  "$PYTHON" -m lslm_jax.main "$@"
}

# Text files -> cleaned documents -> a vocabulary -> token shards. The quickstart's text is Python's own library.
lslm prepare --config="$config" --workdir="$workdir"

# Shards -> a model. Stopped with Ctrl-C, it saves; this script, run again, goes on from there.
lslm train --config="$config" --workdir="$workdir"

# From here on the run directory knows its own config. All held-out documents, not only the first batches:
lslm evaluate --workdir="$workdir" --config.eval.batches=0

# One prompt streams as it is drawn; more than one make a batch. --json is for programs.
lslm generate --workdir="$workdir" --prompt="import os"
lslm generate --workdir="$workdir" --prompt="def main():" --prompt="class Stack:" --json
