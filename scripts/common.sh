# shellcheck shell=bash
# Sourced by the scripts beside it: where the project is, and which Python runs it.

unset CDPATH # with it, cd prints where it went
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
        "$@" -r "${TORCH_LIST:-$PROJECT/requirements/torch.txt}" 2>/dev/null; then
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

# CANN's variables, where they are not set and its set_env.sh is found (as aquila/launch/toolkit.py does).
set_up_cann() {
    local place
    if [ -n "${ASCEND_HOME_PATH:-}" ]; then return; fi
    for place in "${AQUILA_CANN_SET_ENV:-}" /usr/local/Ascend/{cann,ascend-toolkit}/set_env.sh ~/Ascend/{cann,ascend-toolkit}/set_env.sh; do
        if [ -f "$place" ]; then
            set +eu
            # shellcheck disable=SC1090
            source "$place" >/dev/null 2>&1
            set -eu
            return
        fi
    done
}

# The version of the CANN that is set up, such as 8.3.RC1; nothing when it is not found.
cann_version() {
    local home="${ASCEND_HOME_PATH:-}" found=""
    [ -n "$home" ] || return 0
    found="$(cat "$home"/ascend_toolkit_install.info "$home"/*/ascend_toolkit_install.info 2>/dev/null |
        sed -n 's/^version=\([0-9][0-9]*\.[^ ]*\).*/\1/p' | head -n 1)" || true
    [ -n "$found" ] || found="$(cat "$home"/version.cfg "$home"/*/version.cfg 2>/dev/null |
        sed -n 's/.*:\([0-9][0-9]*\.[0-9][^]]*\)\].*/\1/p' | head -n 1)" || true
    printf '%s' "$found"
}

# npu_pair TORCH CANN: the vendor's newest "torch torch_npu" for both (aquila/launch/npu_pairs.txt), else for
# that torch alone. Either may be empty; both empty: the newest of all. Nothing when there is none.
npu_pair() {
    awk -v torch="$1" -v cann="$2" '
        function release(version, parts) { split(version, parts, "."); return parts[1] "." parts[2] }
        /^#/ || NF < 3 || (torch != "" && $1 != torch) { next }
        { any = any == "" ? $1 " " $2 : any }
        cann == "" || release($3) == release(cann) { print $1, $2; found = 1; exit }
        END { if (!found && torch != "" && any != "") print any }
    ' "$PROJECT/aquila/launch/npu_pairs.txt"
}

# torch_npu_for PYTHON: what pip is to install as torch_npu beside the torch that this Python has; nothing
# when it has a torch_npu, which stays: a vendor's image knows its own pair.
torch_npu_for() {
    local versions torch pair
    versions="$("$1" -c 'from importlib.metadata import PackageNotFoundError, version
for name in ("torch", "torch_npu"):
    try:
        print(version(name).split("+")[0])
    except PackageNotFoundError:
        print()')"
    torch="${versions%%$'\n'*}"
    if [ "$torch" != "$versions" ] && [ -n "${versions#*$'\n'}" ]; then return; fi
    pair="$(npu_pair "$torch" "$(cann_version)")"
    [ -n "$pair" ] || fail "aquila/launch/npu_pairs.txt has no torch_npu for torch $torch; install the vendor's for it, and this script keeps it, or take one of: $(npu_torches)"
    printf 'torch_npu==%s' "${pair#* }"
}

npu_torches() { awk '!/^#/ && NF { print $1 }' "$PROJECT/aquila/launch/npu_pairs.txt" | sort -Vru | paste -sd' ' -; }
