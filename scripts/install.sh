#!/usr/bin/env bash
# Makes or updates .venv; a second run with nothing to do takes under a second.
#   bash scripts/install.sh [cpu|cuda|npu] [--dev] [--wheelhouse DIR] [--system-torch]
# Without a word: what the machine has. --dev adds tests and lint. --wheelhouse installs from DIR alone, as
# scripts/make_wheelhouse.sh made it, without any network. --system-torch builds on the torch of the machine's
# Python even where no device is visible (images are built so); with a device that is found by itself.
# Environment: PYTHON (which Python to build on), TORCH_INDEX_URL (where torch comes from).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

VENV="$PROJECT/.venv"
STAMP="$VENV/.installed"
LISTS="$PROJECT/requirements"

main() {
    [ "$(uname -s)" = Linux ] || fail "this is $(uname -s), and the project runs on Linux alone: use a Linux container, on Windows WSL 2"
    local device="" dev=0 wheelhouse="" system_torch=0
    while [ $# -gt 0 ]; do
        case "$1" in
            cpu | cuda | npu) device="$1" ;;
            --dev) dev=1 ;;
            --system-torch) system_torch=1 ;;
            --wheelhouse)
                [ $# -gt 1 ] || fail "--wheelhouse needs a folder"
                wheelhouse="$(cd "$2" 2>/dev/null && pwd -P)" || fail "wheelhouse $2 does not exist"
                shift
                ;;
            *) fail "unknown argument '$1'; usage: bash scripts/install.sh [cpu|cuda|npu] [--dev] [--wheelhouse DIR] [--system-torch]" ;;
        esac
        shift
    done
    [ -n "$device" ] || device="$(machine_device)"

    local lists=(torch build core) list
    if [ "$dev" = 1 ]; then lists+=(extras dev); fi
    local wanted=""
    for list in "${lists[@]}"; do
        wanted+="$device $list $(cksum <"$LISTS/$list.txt")"$'\n'
    done
    if [ "$device" = npu ]; then wanted+="npu pairs $(cksum <"$PROJECT/aquila/launch/npu_pairs.txt")"$'\n'; fi
    if installed "$wanted"; then
        echo "$VENV is up to date ($device)"
        return
    fi
    # Two installs at once (a test run beside a quickstart) would break each other.
    mkdir -p "$VENV"
    exec 9>"$VENV/.lock"
    if command -v flock >/dev/null; then flock 9; fi
    if installed "$wanted"; then return; fi
    install_all "$device" "$dev" "$wheelhouse" "$system_torch"
    printf '%s' "$wanted" >>"$STAMP"
    echo "installed into $VENV ($device)"
}

# Whether every line of what is wanted stands in the stamp and the Python still runs.
installed() {
    [ -f "$STAMP" ] && [ -x "$VENV/bin/python" ] || return 1
    local line
    while IFS= read -r line; do
        [ -z "$line" ] || grep -qxF -- "$line" "$STAMP" || return 1
    done <<<"$1"
    "$VENV/bin/python" -c '' 2>/dev/null
}

machine_device() {
    if [ -e /dev/davinci0 ] || [ -e /dev/davinci_manager ]; then
        echo npu
    elif [ -e /dev/nvidia0 ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; then
        echo cuda
    else
        echo cpu
    fi
}

python_works() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local candidate found=""
    if [ -n "${PYTHON:-}" ]; then
        python_works "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.10 to 3.13"
        command -v "$PYTHON"
        return
    fi
    for candidate in python3 python python3.12 python3.11 python3.10 python3.13; do
        command -v "$candidate" >/dev/null || continue
        if python_works "$candidate"; then
            command -v "$candidate"
            return
        fi
        found+=" $candidate ($("$candidate" -c 'import sys; print(sys.version.split()[0])' 2>/dev/null || echo broken))"
    done
    fail "no Python 3.10 to 3.13 found${found:+, only:$found}; install one, or name it: PYTHON=/path/to/python3.11"
}

# The version of a torch that the base Python has and that sees its device ($2 = 1: whatever it sees);
# nothing otherwise.
device_torch() {
    "$1" - "$2" <<'PYTHON' 2>/dev/null || true
import os, sys
if sys.argv[1] == "1":
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch
if sys.argv[1] == "1" or torch.accelerator.is_available():
    print(torch.__version__)
PYTHON
}

check_tools() {
    "$1" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$1 has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)"
    local compiler="${CXX:-}"
    if [ -z "$compiler" ]; then
        for compiler in c++ g++ clang++; do command -v "$compiler" >/dev/null && break; done
    fi
    command -v "$compiler" >/dev/null ||
        fail "no C++ compiler found (DeepSpeed compiles its operators); install g++ (Debian, Ubuntu: apt-get install g++)"
    "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
        fail "Python's headers are missing (DeepSpeed compiles its operators); install them (Debian, Ubuntu: apt-get install python3-dev)"
}

install_all() {
    local device="$1" dev="$2" wheelhouse="$3" python own_torch="" torch_npu
    python="$(find_python)"
    check_tools "$python"
    if [ "$device" = npu ]; then set_up_cann; fi
    if [ "$device" != cpu ] || [ "$4" = 1 ]; then own_torch="$(device_torch "$python" "$4")"; fi
    if [ "$4" = 1 ] && [ -z "$own_torch" ]; then
        fail "--system-torch: $python cannot import torch: $(TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$python" -c 'import torch' 2>&1 | tail -n 1)"
    fi
    if [ "$device" = npu ] && [[ "$own_torch" == *+cu* ]]; then
        fail "torch $own_torch of $python is a CUDA build, which torch_npu refuses; put the CPU build of the same release there (on aarch64 the package index has the CUDA build): pip install --index-url $PYTORCH_CPU_WHEELS torch==${own_torch%%+*}"
    fi
    # From here on torch is imported to build against, without a device: an image is built where no driver is.
    export TORCH_DEVICE_BACKEND_AUTOLOAD=0
    if [ ! -x "$VENV/bin/python" ] || ! python_works "$VENV/bin/python"; then
        echo "making $VENV with $("$python" --version)${own_torch:+ on the torch $own_torch of $python}"
        rm -f "$STAMP"
        if [ -n "$own_torch" ]; then
            "$python" -m venv --system-site-packages "$VENV"
            see_packages_of "$python"
        else
            "$python" -m venv "$VENV"
        fi
    fi
    if [ -n "$own_torch" ] && ! grep -qi 'include-system-site-packages = true' "$VENV/pyvenv.cfg"; then
        fail "$VENV was made without the torch of $python; remove it and run this again: rm -rf '$VENV'"
    fi
    local pip=("$VENV/bin/python" -m pip --disable-pip-version-check) from=()
    if [ -n "$wheelhouse" ]; then
        export PIP_CONFIG_FILE=/dev/null
        unset PIP_FIND_LINKS PIP_INDEX_URL PIP_EXTRA_INDEX_URL
        from=(--no-index --find-links "$wheelhouse")
    fi
    # Nothing that follows may replace the torch that is there.
    local constraints="$VENV/.constraints.txt"
    if [ -n "$own_torch" ]; then
        echo "torch==$own_torch" >"$constraints"
    else
        cp "$LISTS/torch.txt" "$constraints"
        if [ "$device" = npu ] && [ -z "$wheelhouse" ]; then npu_torch "$constraints"; fi
        export TORCH_LIST="$constraints"
        echo "installing torch"
        install_torch "$device"
    fi
    echo "installing the build tools"
    "${pip[@]}" install -qq "${from[@]}" -c "$constraints" -r "$LISTS/build.txt"
    echo "installing the packages of requirements/core.txt (deepspeed is built from source, about a minute)"
    # Its operators are compiled when they are first used, for the device that is there. Called a CPU here: on
    # a machine with a GPU and without CUDA's toolkit deepspeed's setup.py would end with MissingCUDAException.
    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu PATH="$VENV/bin:$PATH" \
        "${pip[@]}" install -qq "${from[@]}" -c "$constraints" --no-build-isolation -r "$LISTS/core.txt"
    if [ "$device" = npu ]; then
        torch_npu="$(torch_npu_for "$VENV/bin/python")"
        if [ -n "$torch_npu" ]; then
            echo "installing $torch_npu"
            "${pip[@]}" install -qq "${from[@]}" -c "$constraints" "$torch_npu"
        fi
    fi
    if [ "$dev" = 1 ]; then install_dev; fi
    # `python -m aquila...` works from every folder.
    "$VENV/bin/python" - "$PROJECT" <<'PYTHON'
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_paths()["purelib"], "aquila-project.pth").write_text(sys.argv[1] + "\n")
PYTHON
}

# The torch that goes with the CANN that is here, where the vendor's table knows it.
npu_torch() {
    local cann pair
    cann="$(cann_version)"
    pair="$(npu_pair "" "$cann")"
    [ -n "$pair" ] || fail "CANN $cann is in none of the vendor's pairs of aquila/launch/npu_pairs.txt (torch $(npu_torches)); install one of their CANN releases"
    echo "torch==${pair% *}" >"$1"
}

# Tests, lint, and the packages of single features, which have tests, too.
install_dev() {
    echo "installing what the tests need"
    "${pip[@]}" install -qq "${from[@]}" -c "$constraints" -r "$LISTS/extras.txt" -r "$LISTS/dev.txt"
    # The vendor's wheel, for tests of its schemas without a device. Beside the packages, never among them:
    # torch would load it by itself and fail for want of CANN. Where there is no wheel those tests skip; so
    # they do with a CUDA build of torch, in which torch_npu does not load.
    if [ "$device" != npu ] && [ ${#from[@]} = 0 ] &&
        "$VENV/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then
        "${pip[@]}" install -qq --no-deps --upgrade --target "$VENV/npu-test" -r "$LISTS/npu.txt" ||
            echo "no torch_npu wheel for this Python and platform: the tests that read it will skip"
    fi
}

# A Python that is itself a virtual environment does not hand its packages on: then .venv is told where
# they lie.
see_packages_of() {
    if "$VENV/bin/python" -c 'import torch' 2>/dev/null; then return; fi
    local folders
    folders="$("$1" -c 'import site, sys; print("\n".join(p for p in sys.path if p.endswith("-packages")))')"
    "$VENV/bin/python" - "$folders" <<'PYTHON'
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_paths()["purelib"], "system-torch.pth").write_text(sys.argv[1] + "\n")
PYTHON
    "$VENV/bin/python" -c 'import torch' || fail "$VENV cannot import the torch of $1"
}

# torch alone and first, by exact version: whatever follows then finds it there.
install_torch() {
    if [ ${#from[@]} = 0 ]; then
        choose_torch "$1" "$VENV/bin/python" "$(uname -m)"
        if [ ${#torch_from[@]} -gt 0 ]; then
            "${pip[@]}" install -qq --no-deps "${torch_from[@]}" -r "$TORCH_LIST"
        fi
    fi
    "${pip[@]}" install -qq "${from[@]}" -r "$TORCH_LIST"
}

main "$@"
