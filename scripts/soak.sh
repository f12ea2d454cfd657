#!/usr/bin/env bash
# the fault suite at length: kills, damaged files, a full disk, and each other fault once; prints a table of
# faults tried and survived
#   bash scripts/soak.sh [--kills N] [--saves N] [--terms N] [--damages N] [--others 0|1] [--seed S]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
python="$(project_python)"
exec "$python" -m tests.integration.faults.soak "$@"
