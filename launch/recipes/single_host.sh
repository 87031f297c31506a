#!/usr/bin/env bash
# One machine: a laptop, a GPU server or one TPU host; every local device is
# used by one process.
#
# Preemption: SIGTERM, SIGINT and SIGUSR1 save and stop with exit code 75, and
# this script starts again at once; set RESTART=0 where the machine itself is
# about to go. A kill without warning loses at most logging.save_interval
# steps. Resume: the newest intact checkpoint in WORKDIR; parameters and
# metrics.jsonl go on as if the run had never stopped.
set -euo pipefail

# --- fill in -----------------------------------------------------------------
REPO="${REPO:-$PWD}"                    # the checkout
PYTHON="${PYTHON:-$REPO/.venv/bin/python}"
CONFIG="${CONFIG:-configs/procedural.py}"
WORKDIR="${WORKDIR:-runs/p}"            # folder of the run, new or to go on with
DATA_ROOT="${DATA_ROOT:-data}"          # prepared by launch/prepare.py
RESTART="${RESTART:-1}"                 # 1: start again after exit code 75
MORE=()                                 # e.g. (--config.mesh.fsdp=8)
# -----------------------------------------------------------------------------

cd "$REPO"
stopped=0
trap 'stopped=1; kill -TERM "$child" 2>/dev/null || true' TERM INT USR1

while true; do
  "$PYTHON" launch/train.py --config="$CONFIG" --workdir="$WORKDIR" \
    --config.data.data_root="$DATA_ROOT" --num_processes=1 \
    ${MORE[@]+"${MORE[@]}"} &
  child=$!
  code=0
  wait "$child" || code=$?
  # A trapped signal ends `wait` early: wait for the save to finish.
  while kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
  done
  if [[ "$code" -ne 75 || "$RESTART" -ne 1 || "$stopped" -eq 1 ]]; then
    exit "$code"
  fi
done
