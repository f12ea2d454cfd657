#!/usr/bin/env bash
# text to P_text_document.bin/.idx and P_text_document.meta.json
#   bash data_tools/make_indexed_dataset.sh --input FILE... --output-prefix P --model-dir DIR [--workers N] [--json-keys text]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/common.sh"
python="$(project_python)"
exec "$python" -m data_tools.make_indexed_dataset "$@"
