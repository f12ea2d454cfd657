#!/usr/bin/env bash
# continued pretraining from end to end, small: train on prose, go on with code and a replay of the prose, stop twice,
# double the context, average, export, score, report, and recompute every number of the report independently
#   bash examples/continued_pretraining.sh [FOLDER]      FOLDER: what is made (default: example)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/common.sh
python="$(project_python)"
work="${1:-example}"
mkdir -p "$work"
printf 'localhost slots=2\n' > "$work/hostfile"

step() { printf '\n== %s\n' "$*"; }

# Runs one command that must end with status $1.
expect() {
    local wanted="$1" status=0
    shift
    "$@" || status=$?
    [ "$status" -eq "$wanted" ] || { echo "error: status $status instead of $wanted: $*" >&2; exit 1; }
}

train() { bash scripts/local_trigger_docker.sh "$work/hostfile" "$work/run.yaml" "$@" --wait; }

step "Two corpora: this project's prose and its code, a tenth of each held out"
"$python" examples/make_corpora.py "$work"
for name in prose code prose_valid code_valid; do
    bash data_tools/make_indexed_dataset.sh --input "$work/$name.jsonl" --output-prefix "$work/data/$name" \
        --model-dir checkpoints_in/aquila-tiny --workers 2
done
prose="$work/data/prose_text_document" code="$work/data/code_text_document"
held_prose="$work/data/prose_valid_text_document" held_code="$work/data/code_valid_text_document"

step "A small model on prose"
mkdir -p checkpoints_in/example-start
cp checkpoints_in/aquila-tiny/{vocab.json,merges.txt,special_tokens_map.json} checkpoints_in/example-start/
cat > checkpoints_in/example-start/config.json <<JSON
{"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "vocab_size": 1217, "max_seq_len": 64}
JSON
cat > "$work/run.yaml" <<YAML
data_prefix: $prose
valid_data:
  prose: $held_prose
  code: $held_code
  both: [0.5, $held_prose, 0.5, $held_code]
split: "100"
batch_size: 4
precision: fp32
lr: 2.0e-3
warm_up_iters: 5
log_interval: 1
eval_interval: 20
eval_iters: 2
tensorboard: false
YAML
train example-start example-base train_iters=40 save_interval=40 resume=never

step "Continued on code with 30 % replay of prose, stopped twice, from step 30 with twice the batch"
rm -rf checkpoints_in/example-continued checkpoints_in/example-long "$work"/{averaged,hf-*}
"$python" -m aquila.convert --input checkpoints_out/example-base --output checkpoints_in/example-continued \
    --to aquila --verify
continued=(bmt_pre_load=True "data_prefix=[0.7, $code, 0.3, $prose]" "batch_size_schedule={0: 8, 30: 16}"
    train_iters=60 save_interval=20 exit_interval=20)
rm -rf checkpoints_out/example-continued
expect 75 train example-continued example-continued "${continued[@]}"
expect 75 train example-continued example-continued "${continued[@]}"
expect 0 train example-continued example-continued "${continued[@]}"

step "Twice the context, by YaRN"
"$python" -m aquila.convert --input checkpoints_out/example-continued --output checkpoints_in/example-long \
    --to aquila --set max_seq_len=128 \
    --set "rope_scaling={rope_type: yarn, factor: 2, original_max_position_embeddings: 64}" --verify
scores=()
if "$python" -c "import lm_eval, transformers" 2>/dev/null; then
    scores=("lm_eval={tasks: [example_words], every: 10, include_path: $work/tasks}")
fi
train example-long example-long bmt_pre_load=True "data_prefix=[0.7, $code, 0.3, $prose]" train_iters=30 \
    save_interval=10 lr=5e-4 resume=never "${scores[@]}"

step "Averaged and exported"
"$python" -m aquila.average checkpoints_out/example-long --last 3 --output "$work/averaged" --data "$held_code"
for name in base continued long; do
    "$python" -m aquila.convert --input "checkpoints_out/example-$name" --output "$work/hf-$name" --to hf --verify
done
"$python" -m aquila.convert --input "$work/averaged" --output "$work/hf-averaged" --to hf --verify

step "The report, and every number of it once more"
"$python" -m aquila.report example-base example-continued example-long --output "$work/report"
"$python" examples/check_continued.py "$work"
