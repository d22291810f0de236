#!/usr/bin/env bash
# Trains on all GPUs of one machine:
#
#   pip install '.[cuda]'
#   ./launch/gpu.sh configs/gpt2_small.py runs/gpt2 --config.data.files=texts/
#
# Weights and optimizer state are split over the GPUs (mesh.preset=fsdp); further flags go to the trainer, as
# --config.mesh.preset=ddp. Ctrl-C or SIGTERM saves and ends with 75; the same command goes on from there.
#
# Will it fit, and how fast can it be? Ask before you pay, on any machine:
#   python -m lslm_jax.main plan --config=configs/gpt2_small.py --topology=h100:8
#
# PYTHON names the interpreter; without it, it is the .venv that `make setup` makes, or python3.
set -eu

if [ $# -lt 2 ]; then
  echo "usage: $0 CONFIG WORKDIR [FLAG...]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2
if [ -z "${PYTHON:-}" ]; then
  here=$(cd "$(dirname "$0")/.." && pwd)
  PYTHON=python3
  if [ -x "$here/.venv/bin/python" ]; then PYTHON=$here/.venv/bin/python; fi
fi
if ! command -v nvidia-smi > /dev/null; then
  echo "$0: no NVIDIA driver here (nvidia-smi is missing)" >&2
  exit 66
fi

# One process takes all GPUs. It takes most of their memory at once, which is what keeps it from running out later.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
exec "$PYTHON" -m lslm_jax.main train --config="$config" --workdir="$workdir" --config.mesh.preset=fsdp "$@"
