# shellcheck shell=bash
# Sourced by the scripts beside it: where the project is, and which Python runs it.

PROJECT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
export PYTHONPATH="$PROJECT${PYTHONPATH:+:$PYTHONPATH}"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# The .venv that install.sh made; AQUILA_PYTHON names another Python that has everything installed.
project_python() {
    local python="${AQUILA_PYTHON:-$PROJECT/.venv/bin/python}"
    [ -x "$python" ] || fail "$python does not exist; run: bash scripts/install.sh"
    printf '%s' "$python"
}
