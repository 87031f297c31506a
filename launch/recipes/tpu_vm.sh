#!/usr/bin/env bash
# Cloud TPU VM slice, single host or pod: one process a host, started on all
# workers at once; JAX detects the processes from the TPU's metadata.
#
#   launch/recipes/tpu_vm.sh            # from your own machine
#
# Preemption: Cloud TPU sends SIGTERM ahead of maintenance and when it takes a
# spot slice back. One host's SIGTERM makes all of them save at the same step
# and end with exit code 75. If the slice is still there, this script starts
# the run again; if it is gone, create the slice again (or let a queued
# resource do so) and start this script anew. A host that dies ends the others
# (exit code 69 or 134) within HEARTBEAT seconds plus one step.
# Resume: from the newest intact checkpoint in WORKDIR, on a slice of any size;
# with the same batch size the loss goes on as if nothing had happened.
set -uo pipefail

# --- fill in -----------------------------------------------------------------
TPU_NAME="${TPU_NAME:-FILL_IN_TPU_NAME}"
ZONE="${ZONE:-FILL_IN_ZONE}"
PROJECT="${PROJECT:-FILL_IN_PROJECT}"
REPO="${REPO:-FILL_IN_REPO_ON_THE_HOSTS}" # same path on every host, installed
PYTHON="${PYTHON:-$REPO/.venv/bin/python}" # with pip install -e '.[tpu]'
CONFIG="${CONFIG:-configs/clevr.py:small}"
WORKDIR="${WORKDIR:-FILL_IN_SHARED_FOLDER/runs/c}" # all hosts see this folder
DATA_ROOT="${DATA_ROOT:-FILL_IN_SHARED_FOLDER/data}"
NUM_HOSTS="${NUM_HOSTS:-FILL_IN_NUM_HOSTS}" # v5e-16 has 4, for example
HEARTBEAT="${HEARTBEAT:-60}"            # seconds until a silent host is dead
MAX_RESTARTS="${MAX_RESTARTS:-20}"
MORE="${MORE:-}"                        # e.g. --config.mesh.fsdp=16
# -----------------------------------------------------------------------------

# --num_processes refuses a slice on which some workers did not start.
command="cd $REPO && $PYTHON launch/train.py --config=$CONFIG \
--workdir=$WORKDIR --config.data.data_root=$DATA_ROOT \
--num_processes=$NUM_HOSTS --heartbeat_timeout=$HEARTBEAT $MORE"

for ((attempt = 0; attempt <= MAX_RESTARTS; attempt++)); do
  code=0
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" \
    --project="$PROJECT" --worker=all --command="$command" || code=$?
  case "$code" in
    69 | 75 | 134) echo "exit code $code: starting again" ;;
    *) exit "$code" ;;
  esac
done
exit "$code"
