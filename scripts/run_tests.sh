#!/usr/bin/env bash
# Installs what is needed, then lint, types and tests.
#   bash scripts/run_tests.sh [pytest arguments ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

bash "$PROJECT/scripts/install.sh" --dev
# Tests over several hosts need sshd and network namespaces: installed where that can be done. Without them
# these tests are skipped, and the list at the end says so.
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! { [ -x /usr/sbin/sshd ] && command -v ip >/dev/null; }; then
    { apt-get update -q && apt-get install -yq --no-install-recommends openssh-server iproute2; } >/dev/null 2>&1 ||
        echo "note: apt-get could not install openssh-server and iproute2" >&2
fi
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
