#!/usr/bin/env bash
# Installs what is needed, then lint, types and tests.
#   bash scripts/run_tests.sh [pytest arguments ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

bash "$PROJECT/scripts/install.sh" --dev
cd "$PROJECT"
python="$(project_python)"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
# Two workers, and one thread each: the tests start ranks of their own. Files in their order: integration
# tests are few and long, and would otherwise end up last, on one worker alone.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Tests of minutes are left out unless asked for: -m slow, or -m "" for all.
case " $* " in *" -m"*) ;; *) set -- -m "not slow" "$@" ;; esac
exec "$python" -m pytest -n "${AQUILA_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
