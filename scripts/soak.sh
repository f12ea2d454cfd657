#!/usr/bin/env bash
# the fault suite at length: kills, damaged files, full disks; prints a table of faults tried and survived
#   bash scripts/soak.sh [--kills N] [--saves N] [--terms N] [--damages N] [--seed S]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
python="$(project_python)"
exec "$python" -m tests.integration.faults.soak "$@"
