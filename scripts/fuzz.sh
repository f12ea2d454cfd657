#!/usr/bin/env bash
# tries damaged and hostile inputs on every reader of files and messages, new ones in each round, until the time
# is over or one is found, which is then kept in tests/fuzz/corpus/
#   bash scripts/fuzz.sh [MINUTES] [pytest arguments, such as -k metrics]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
python="$(project_python)"
minutes="${1:-60}"
shift || true
end=$((SECONDS + 60 * minutes))
while ((SECONDS < end)); do
    export AQUILA_FUZZ_SEED="$RANDOM" AQUILA_FUZZ_EXAMPLES="${AQUILA_FUZZ_EXAMPLES:-1000}"
    echo "seed $AQUILA_FUZZ_SEED, $AQUILA_FUZZ_EXAMPLES inputs for each reader"
    "$python" -m pytest -q -p no:cacheprovider tests/fuzz/test_fuzz.py -k "any_damage" "$@"
done
