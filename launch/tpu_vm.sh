#!/usr/bin/env bash
# Trains on a Cloud TPU slice from its creation to its end, with gcloud alone:
#
#   export PROJECT=my-project ZONE=us-east5-a NAME=lslm TYPE=v5p-128 BUCKET=gs://my-bucket
#   ./launch/tpu_vm.sh create                    # a spot slice, as soon as there is one
#   ./launch/tpu_vm.sh install                   # this checkout, on every host
#   ./launch/tpu_vm.sh run configs/llama_8b.py llama --config.data.files="$BUCKET/text/*.jsonl"
#   ./launch/tpu_vm.sh keep configs/llama_8b.py llama --config.data.files="$BUCKET/text/*.jsonl"
#   ./launch/tpu_vm.sh delete
#
# `keep` does it all until the run is complete: whenever the slice was taken away, it makes another one and goes on
# from the last checkpoint, in $BUCKET/runs/NAME. The hosts of a slice find each other without being told. It makes at
# most $SLICES slices (100) and waits $PAUSE seconds (60) before each but the first, twice as long after each failure.
#
# Will it fit? On any machine: python -m lslm_jax.main plan --config=configs/llama_8b.py --topology=v5p:4x4x4
set -eu

: "${PROJECT:?}" "${ZONE:?}" "${NAME:?}" "${TYPE:?}" "${BUCKET:?}"
RUNTIME=${RUNTIME:-v2-alpha-tpuv5} # v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv6e for v6e, tpu-ubuntu2204-base for v4
where=(--project="$PROJECT" --zone="$ZONE")

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"
}

create() {
  gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id="$NAME" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME" --spot || return
  until [ "$(state)" = ACTIVE ]; do
    case $(state) in FAILED | SUSPENDED) echo "$NAME: $(state)" >&2 && return 1 ;; esac
    sleep 30
  done
}

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format="value(state.state)"
}

install() {
  gcloud compute tpus tpu-vm scp --recurse "$(cd "$(dirname "$0")/.." && pwd)" "$NAME:lslm_jax" "${where[@]}" --worker=all || return
  on_all_hosts "cd lslm_jax && make setup PYTHON=python3.11 && .venv/bin/pip install --quiet '.[tpu,gcs]'"
}

# Ends with the trainer's code, the highest of all hosts'. Each argument is quoted: a shell on every host reads it.
run() {
  local command
  printf -v command ' %q' "--config=$1" "--workdir=$BUCKET/runs/$2" "${@:3}"
  on_all_hosts "cd lslm_jax && .venv/bin/python -m lslm_jax.main train$command"
}

delete() {
  gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

keep() {
  local code slice failures=0 pause=${PAUSE:-60}
  for ((slice = 1; slice <= ${SLICES:-100}; slice++)); do
    code=0
    create || code=$?
    if [ "$code" = 0 ]; then install || code=$?; fi
    if [ "$code" != 0 ]; then # the cloud's failure, or the network's: another slice may do, but not for ever
      failures=$((failures + 1))
      if [ "$failures" = 3 ]; then break; fi
    else
      failures=0
      run "$@" || code=$?
      case $code in
        # Stopped and saved, or hosts are gone: preempted. 255 is that of ssh, whose host is gone.
        75 | 77 | 134 | 137 | 143 | 255) pause=${PAUSE:-60} ;;
        # Complete; or nothing that another slice would mend: flags, data, numbers, checkpoints, a bug, a crash.
        *) break ;;
      esac
    fi
    echo "slice $slice ended with $code: another one in $pause s" >&2
    delete || true
    sleep "$pause"
    pause=$((pause < 1800 ? 2 * pause : 3600))
  done
  delete || true
  return "$code"
}

case ${1:-} in
  create | install | run | keep | delete) "$@" ;;
  *) sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "$0" >&2 && exit 2 ;;
esac
