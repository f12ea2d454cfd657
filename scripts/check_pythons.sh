#!/usr/bin/env bash
# Installs, quick-starts and unit-tests a clone of the last commit with each Python named; prints a table.
#   bash scripts/check_pythons.sh python3.10 python3.11 python3.12 python3.13
# Each clone needs up to 6 GB and is removed after its turn. Logs: check-pythons/ in the folder for temporary files.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -gt 0 ] || fail "usage: bash scripts/check_pythons.sh PYTHON ..."
unset AQUILA_PYTHON PYTHONPATH

logs="${TMPDIR:-/tmp}/check-pythons"
mkdir -p "$logs"

# timed NAME COMMAND ...: runs it in the clone; prints its seconds, or says where it failed.
timed() {
    local name="$1" started=$SECONDS
    shift
    if (cd "$clone" && "$@") >"$logs/$name.log" 2>&1; then
        printf '%d s' $((SECONDS - started))
    else
        printf 'failed: %s' "$logs/$name.log"
    fi
}

main() {
    local python version clone row failed=0
    echo "| Python | torch | install | quickstart | unit tests |"
    echo "|---|---|---|---|---|"
    for python in "$@"; do
        version="$("$python" -c 'import sys; print(sys.version.split()[0])')" || fail "$python does not run"
        clone="$(mktemp -d)/aquila"
        git clone -q "$PROJECT" "$clone"
        row="$(timed "$version-install" env PYTHON="$python" bash scripts/install.sh cpu --dev)"
        row="$("$clone/.venv/bin/python" -c 'import torch; print(torch.__version__)' 2>/dev/null || echo none) | $row"
        row+=" | $(timed "$version-quickstart" bash scripts/quickstart.sh)"
        row+=" | $(timed "$version-unit" env OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 tests/unit)"
        row+=" ($(tail -n 1 "$logs/$version-unit.log"))"
        echo "| $version | $row |"
        case "$row" in *failed:*) failed=1 ;; esac
        rm -rf "$(dirname "$clone")"
    done
    return $failed
}

main "$@"
