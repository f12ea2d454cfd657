#!/usr/bin/env bash
# saves a checkpoint, then stops every rank of EXP on every node of the hostfile
#   bash scripts/dist_stop_docker.sh HOSTFILE EXP
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_module aquila.launch dist-stop "$@"
