#!/usr/bin/env bash
# Text to P_text_document.bin, .idx and .meta.json: see --help.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m data_tools.make_indexed_dataset "$@"
