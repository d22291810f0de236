#!/usr/bin/env bash
# All that is measured on one GPU, what matters most first, in under nine minutes:
#
#     bash benchmarks/gpu.sh [RESULTS.json]
#
# Needs jax for CUDA, flax, optax and orbax-checkpoint; torch and transformers for the peers. Writes one JSON object a
# line, by default to benchmarks/results/DATE-DEVICE.json. What fails, or would take too long, leaves a line that says so.
set -u
cd "$(dirname "$0")/.."
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-.cache/xla}
export PYTHONPATH=.
python=${PYTHON:-python3}
device=$("$python" -c 'import jax; print(jax.devices()[0].device_kind.replace(" ", "-"))') || exit 1
results=${1:-benchmarks/results/$(date +%F)-$device.json}
until=$((SECONDS + ${BUDGET:-530}))

# measure SECONDS COMMAND...: one command, for so long at most, its lines to the results.
measure() {
  local limit=$1
  shift
  if ((SECONDS + 20 > until)); then
    echo "{\"command\": \"$*\", \"failed\": \"no time left\"}" >>"$results"
    return
  fi
  ((SECONDS + limit > until)) && limit=$((until - SECONDS))
  echo "$*" >&2
  timeout "$limit" "$python" "$@" 2>/tmp/gpu.err | grep '^{' >>"$results"
  local code=${PIPESTATUS[0]}
  if ((code)); then
    echo "{\"command\": \"$*\", \"failed\": $code}" >>"$results"
    tail -3 /tmp/gpu.err >&2
  fi
}

step=benchmarks/train_step.py
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv,noheader |
  sed 's/.*/{"gpu": "&"}/' >>"$results"
measure 45 $step --model=gpt2_small --config.train.batch_size=64 --kernels=20
measure 45 $step --model=gpt2_small --config.train.batch_size=64 --config.data.mask_documents=true
measure 45 $step --model=gpt2_small --config.train.batch_size=64 --config.train.loss_logits=compute
measure 70 $step --model=gpt2_xl --config.train.batch_size=16 --config.model.remat=none --config.model.scan_layers=false
measure 50 $step --model=llama_1b --config.train.batch_size=16 --config.model.remat=none
measure 60 $step --model=llama_8b_part --config.train.batch_size=2
measure 60 benchmarks/decode.py --model=llama_1b --batch_sizes=1,32 --rounds=3
measure 70 benchmarks/attention.py --xla
measure 60 benchmarks/checkpoint.py --model=gpt2_small
measure 200 benchmarks/peers.py --model=gpt2_small --batch_size=64 --seq_len=1024 --rounds=1 --gpu
measure 200 benchmarks/peers.py --model=llama_1b --batch_size=8 --seq_len=2048 --rounds=1 --gpu
measure 100 benchmarks/start.py --model=llama_1b --rounds=1 --config.train.batch_size=16 --config.model.remat=none
measure 200 benchmarks/peers.py --model=gpt2_xl --batch_size=16 --seq_len=1024 --rounds=1 --gpu
measure 60 benchmarks/peers.py --model=llama_1b --batch_size=1 --rounds=1 --gpu --what=decode
measure 45 $step --model=gpt2_small --config.train.batch_size=64 --config.model.scan_layers=true
measure 45 $step --model=gpt2_xl --config.train.batch_size=16
measure 45 benchmarks/decode.py --model=llama_1b --batch_sizes=1 --rounds=3 --weights=int8
measure 45 benchmarks/decode.py --model=llama_1b --batch_sizes=1 --rounds=3 --weights=int4
measure 45 $step --model=bert_base
measure 45 $step --model=t5_base
cat "$results"
