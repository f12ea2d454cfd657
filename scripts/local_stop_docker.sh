#!/usr/bin/env bash
# saves a checkpoint, then stops every rank of EXP on this node
#   bash scripts/local_stop_docker.sh EXP
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_module aquila.launch stop "$@"
