#!/usr/bin/env bash
# from a fresh clone to generated text: installs, makes the demo corpus, trains aquila-tiny on 2 ranks, generates
#   bash scripts/quickstart.sh [key=value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/common.sh
[ -n "${AQUILA_PYTHON:-}" ] || bash scripts/install.sh
python="$(project_python)"
started=$SECONDS

step() { printf '\n== %s\n' "$*"; }

step "Demo corpus: sums, number words, calendars, translations and stories, in English and Chinese"
"$python" -m data_tools.make_demo_corpus --output data/demo.jsonl
bash data_tools/make_indexed_dataset.sh --input data/demo.jsonl --output-prefix indexed_dataset/data/demo \
    --model-dir checkpoints_in/aquila-tiny --workers 2

step "Training aquila-tiny on 2 local ranks with ZeRO-2"
bash scripts/local_trigger_docker.sh hostfile configs/Aquila-tiny.yaml aquila-tiny quickstart "$@" resume=never --wait

step "Generating"
for prompt in "The day after Monday is" "On Friday Tom the baker met" "“太阳”的英文是："; do
    printf '\n> %s\n' "$prompt"
    "$python" generate.py --prompt "$prompt" --temperature 0 --max-new-tokens 24
done

step "50 prompts drawn from the corpus's grammar, completed greedily"
"$python" -m data_tools.check_demo --prompts 50

step "Done in $((SECONDS - started)) s after installation"
echo "Talk to it: .venv/bin/python generate.py"
