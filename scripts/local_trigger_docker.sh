#!/usr/bin/env bash
# trains on this one node
#   bash scripts/local_trigger_docker.sh HOSTFILE CONFIG.yaml MODEL EXP [key=value ...] [--wait] [--dry-run] [--no-preflight]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_module aquila.launch local "$@"
