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

# PyTorch's own index of builds without CUDA.
PYTORCH_CPU_WHEELS=https://download.pytorch.org/whl/cpu

# choose_torch cpu|cuda|npu PYTHON x86_64|aarch64 [pip's options]: sets torch_from to pip's options that say
# where torch comes from. TORCH_INDEX_URL, when set. Without a GPU: the package index if it has a CPU build,
# else PyTorch's index, else the CUDA build, which runs on a CPU, too. NPU: never the CUDA build.
choose_torch() {
    local device="$1" python="$2" machine="$3" index
    shift 3
    torch_from=()
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        torch_from=(--index-url "$TORCH_INDEX_URL")
        return
    fi
    if [ "$device" = cuda ]; then return; fi
    index="$(torch_build "$python" "$machine" "$@")"
    if [ "$index" = cpu ]; then return; fi
    # One short try: where this index cannot be reached nobody wants to wait for it.
    if [ "$(torch_build "$python" "$machine" "$@" --retries 0 --timeout 10 --index-url "$PYTORCH_CPU_WHEELS")" = cpu ]; then
        torch_from=(--index-url "$PYTORCH_CPU_WHEELS")
        return
    fi
    if [ "$index" != cuda ]; then return; fi # no torch at all: pip's own error says so
    if [ "$device" = npu ]; then
        fail "the package index has torch only as the CUDA build, which torch_npu refuses, and $PYTORCH_CPU_WHEELS cannot be reached; set TORCH_INDEX_URL to a package index that has a CPU build of torch"
    fi
    echo "no CPU build of torch in reach: taking the CUDA build (3 to 4 GB more on disk); to avoid it, set TORCH_INDEX_URL to a package index that has a CPU build"
}

# The build of torch that pip would install from there: cpu (also: what is wanted is installed), cuda or none.
torch_build() {
    local python="$1" machine="$2" report build=none
    shift 2
    report="$(mktemp)"
    if "$python" -m pip --disable-pip-version-check install -qq --dry-run --no-deps --report "$report" \
        "$@" -r "$PROJECT/requirements/torch.txt" 2>/dev/null; then
        build="$("$python" - "$report" "$machine" <<'PYTHON'
import json, sys
from pip._vendor.packaging.requirements import Requirement
report, machine = sys.argv[1:]
there = {"extra": "", "platform_machine": machine}
needs = [Requirement(text) for item in json.load(open(report))["install"] for text in item["metadata"].get("requires_dist", [])]
needs = [need.name for need in needs if not need.marker or need.marker.evaluate(there)]
print("cuda" if any(name.startswith(("nvidia-", "cuda-")) for name in needs) else "cpu")
PYTHON
)"
    fi
    rm -f "$report"
    printf '%s' "$build"
}
