"""lm-eval, the harness itself, on an exported model with a task that a local file defines."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.unit.generation.models import write_model_dir

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

ITEMS = [
    {"question": "one plus two is", "options": [" three", " four", " nine"], "answer": 0},
    {"question": "三加四等于", "options": ["五", "七", "九"], "answer": 1},
    {"question": "half past", "options": [" ten", " blue", " plus"], "answer": 0},
    {"question": "two times two is", "options": [" five", " one", " four"], "answer": 2},
]
TASK = """\
task: aquila_sums
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, root):
    return write_model_dir(tmp_path_factory.mktemp("model"), root, n_kv_heads=2)


@pytest.fixture(scope="module")
def environment(root, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": cache, "OMP_NUM_THREADS": "1"}
    return {**os.environ, **offline, "PYTHONPATH": str(root)}


@pytest.fixture(scope="module")
def exported(root, model_dir, environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    command = [sys.executable, "-m", "aquila.convert", "--input", model_dir, "--output", folder, "--to", "hf"]
    subprocess.run(list(map(str, command)), check=True, cwd=root, env=environment, capture_output=True)
    return folder


def by_hand(model_dir, framed=True):
    """Log probability of every option after its question (and [CLS]), by this project's own model."""
    from aquila.model import AquilaModel
    from aquila.tokenizer import load_tokenizer

    tokenizer, model = load_tokenizer(model_dir), AquilaModel.from_pretrained(model_dir)
    scores = []
    for question, option in ((item["question"], option) for item in ITEMS for option in item["options"]):
        frame = [tokenizer.bos_id] if framed else []
        start = [*frame, *tokenizer.encode(question)]
        whole = [*frame, *tokenizer.encode(question + option)]
        log = torch.log_softmax(model(torch.tensor([whole[:-1]]))[0].double(), -1)
        scores.append(sum(log[at - 1, whole[at]].item() for at in range(len(start), len(whole))))
    return scores


def test_a_local_task_scores_the_exported_model(model_dir, exported, environment, tmp_path):
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS), encoding="utf-8")
    (tmp_path / "aquila_sums.yaml").write_text(TASK.format(data=data))
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf",
        "--model_args", f"pretrained={exported},dtype=float32,add_bos_token=True", "--device", "cpu",
        "--tasks", "aquila_sums", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"),
        "--batch_size", "1", "--log_samples",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    scores = [float(reply[0][0]) for line in lines for reply in line["resps"]]
    expected = by_hand(model_dir)
    assert scores == pytest.approx(expected, abs=1e-3)
    rows = [expected[at : at + 3] for at in range(0, len(expected), 3)]
    right = sum(row.index(max(row)) == item["answer"] for row, item in zip(rows, ITEMS, strict=True))
    accuracy = json.loads(report.read_text())["results"]["aquila_sums"]["acc,none"]
    assert accuracy == pytest.approx(right / len(ITEMS))


@pytest.mark.slow
def test_the_endpoint_scores_as_the_model_does(model_dir, exported, environment, tmp_path, root):
    """lm-eval's local-completions over HTTP: the same log probabilities, up to rounding."""
    pytest.importorskip("fastapi", reason="the serve extra is not installed")
    pytest.importorskip("tenacity", reason="lm-eval[api] is not installed")
    from tests.integration.test_generate_serve import serving

    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS), encoding="utf-8")
    (tmp_path / "aquila_sums.yaml").write_text(TASK.format(data=data))
    with serving(root, model_dir) as port:
        arguments = (
            f"model={model_dir.name},base_url=http://127.0.0.1:{port}/v1/completions,tokenizer={exported},"
            "tokenizer_backend=huggingface,max_length=127"
        )
        command = [
            sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments,
            "--tasks", "aquila_sums", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"),
            "--log_samples",
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=280
        )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    scores = [float(reply[0][0]) for line in lines for reply in line["resps"]]
    assert scores == pytest.approx(by_hand(model_dir, framed=False), abs=1e-3)


@pytest.mark.slow
def test_checkpoints_are_scored_beside_training(tmp_path, monkeypatch, environment):
    """The scores of each are those of its weights; what fails costs a warning alone."""
    from tests.integration.training_runs import make_project, train

    monkeypatch.setenv("HF_HOME", environment["HF_HOME"])
    project = make_project(tmp_path)
    data = project / "sums.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS), encoding="utf-8")
    (project / "tasks").mkdir()
    (project / "tasks" / "aquila_sums.yaml").write_text(TASK.format(data=data))
    options = ["train_iters=4", "eval_interval=0", "save_interval=2", "keep_checkpoints=1", "precision=fp32"]
    task = "lm_eval={tasks: [aquila_sums], every: 2, include_path: tasks}"
    status, output = train(project, "scored", *options, task, ranks=1)
    assert status == 0, output
    run = project / "checkpoints_out" / "scored" / "0"
    records = [json.loads(line) for line in (run / "lm_eval.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4]
    assert "lm_eval at step 4: aquila_sums/acc" in output
    expected = by_hand(run / "checkpoints" / "step-00000004")
    rows = [expected[at : at + 3] for at in range(0, len(expected), 3)]
    right = sum(row.index(max(row)) == item["answer"] for row, item in zip(rows, ITEMS, strict=True))
    assert records[1]["lm_eval"]["aquila_sums/acc"] == pytest.approx(right / len(ITEMS))
    status, output = train(project, "failing", *options, task.replace("[aquila_sums]", "[absent]"), ranks=1)
    assert status == 0, output
    assert "warning: step 2 was not scored by lm_eval" in output


def test_a_wrong_key_of_lm_eval_ends_before_a_rank_starts(tmp_path, root):
    from aquila.config import load_run_config
    from aquila.core.errors import UserError

    (tmp_path / "run.yaml").write_text("save_interval: 10\n")
    tiny = str(root / "checkpoints_in" / "aquila-tiny")
    for text, message in (
        ("{tasks: [a], every: 15}", "no multiple of save_interval 10"),
        ("{tasks: [], every: 10}", "lm_eval.tasks"),
        ("{tasks: [a]}", "lm_eval.every"),
        ("{tasks: [a], evry: 10}", "unknown key 'lm_eval.evry'; did you mean 'every'"),
        ("{tasks: [a], every: 10, include_path: absent}", "absent .* is no folder"),
        ("5", "lm_eval"),
    ):
        with pytest.raises(UserError, match=message):
            load_run_config(tmp_path / "run.yaml", tiny, [f"lm_eval={text}"], root=tmp_path)
    good = load_run_config(tmp_path / "run.yaml", tiny, ["lm_eval={tasks: [a], every: 10}"], root=tmp_path)
    (tmp_path / "again.yaml").write_text(good.to_yaml())
    assert load_run_config(tmp_path / "again.yaml", tiny, [], root=tmp_path).run == good.run
