#!/usr/bin/env bash
# Collects every package as a wheel (deepspeed is built), for machines without any network.
#   bash scripts/make_wheelhouse.sh cpu|cuda|npu [--platform x86_64|aarch64] [--python 3.11] DIR
# There: bash scripts/install.sh [cpu|cuda|npu] --wheelhouse DIR
# TORCH_INDEX_URL, when set, says where torch comes from; else as install.sh chooses.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="usage: bash scripts/make_wheelhouse.sh cpu|cuda|npu [--platform x86_64|aarch64] [--python X.Y] DIR"
LISTS="$PROJECT/requirements"
device="" platform="$(uname -m)" version="" dir=""
while [ $# -gt 0 ]; do
    case "$1" in
        --platform) platform="${2:-}" && shift ;;
        --python) version="${2:-}" && shift ;;
        -*) fail "unknown option '$1'; $usage" ;;
        *) if [ -z "$device" ]; then device="$1"; elif [ -z "$dir" ]; then dir="$1"; else fail "$usage"; fi ;;
    esac
    shift
done
case "$device" in cpu | cuda | npu) ;; *) fail "$usage" ;; esac
case "$platform" in x86_64 | aarch64) ;; *) fail "platform '$platform' is not x86_64 or aarch64; $usage" ;; esac
[ -n "$dir" ] || fail "$usage"
[ -x "$PROJECT/.venv/bin/python" ] || bash "$PROJECT/scripts/install.sh"
python="$(project_python)"
[ -n "$version" ] || version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
[[ "$version" =~ ^3\.1[0-3]$ ]] || fail "--python $version is not 3.10 to 3.13"
mkdir -p "$dir"
dir="$(cd "$dir" && pwd -P)"

pip=("$python" -m pip --disable-pip-version-check)
# Wheels for the machine that will install, whatever this one is.
target=(--only-binary=:all: --implementation cp --python-version "$version")
for glibc in 2_17 2_24 2_26 2_27 2_28 2_31 2_34; do target+=(--platform "manylinux_${glibc}_$platform"); done
target+=(--platform "manylinux2014_$platform" --platform "linux_$platform")

echo "building deepspeed"
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu PATH="$PROJECT/.venv/bin:$PATH" "${pip[@]}" wheel -qq --no-deps --no-build-isolation -w "$dir" \
    "$(grep '^deepspeed==' "$LISTS/core.txt")"
"${pip[@]}" wheel -qq --no-deps --no-build-isolation -w "$dir" -r "$LISTS/unbuilt.txt"
echo "collecting torch for $device, $platform, Python $version"
choose_torch "$device" "$python" "$platform" "${target[@]}" --target "$dir"
"${pip[@]}" download -qq --no-deps "${target[@]}" "${torch_from[@]}" -d "$dir" -r "$LISTS/torch.txt"
echo "collecting the other packages"
lists=(-r "$LISTS/torch.txt" -r "$LISTS/build.txt" -r "$LISTS/core.txt" -r "$LISTS/extras.txt" -r "$LISTS/dev.txt")
if [ "$device" = npu ]; then lists+=(-r "$LISTS/npu.txt"); fi
"${pip[@]}" download -qq "${target[@]}" --find-links "$dir" -d "$dir" "${lists[@]}"

# Whole? Resolved once more from the folder alone.
check="$(mktemp -d)"
trap 'rm -rf "$check"' EXIT
PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS="" PIP_INDEX_URL="" PIP_EXTRA_INDEX_URL="" \
    "${pip[@]}" download -qq "${target[@]}" --no-index --find-links "$dir" -d "$check" "${lists[@]}" ||
    fail "$dir is not complete; see above"
echo "$(find "$dir" -name '*.whl' | wc -l) wheels, $(du -sh "$dir" | cut -f1), in $dir"
