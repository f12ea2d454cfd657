#!/usr/bin/env bash
# what an experiment does now: node by node running or not, step, tokens/s, last checkpoint, slowest rank
#   bash scripts/status.sh EXP [--json] [--watch]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_module aquila.launch status "$@"
