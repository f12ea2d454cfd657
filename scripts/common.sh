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

# run_module NAME ARGS...: `python -m NAME` of this project, whichever folder the user stands in (`-m` alone
# would take a package of the same name from there).
run_module() {
    local python
    python="$(project_python)"
    exec "$python" -c 'import runpy, sys
sys.path[0] = sys.argv.pop(1)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)' "$PROJECT" "$@"
}
