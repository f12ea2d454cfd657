"""`python generate.py` as a user runs it: real processes, a real model folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest

from aquila.core.checkpoints import fingerprint
from tests.unit.generation.models import write_model_dir


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, root):
    return write_model_dir(tmp_path_factory.mktemp("model"), root)


@pytest.fixture(scope="module")
def run(root, model_dir):
    def call(*arguments, stdin="", status=0, where=None, model=model_dir):
        chosen = ["--model-dir", str(model)] if model else []
        command = [sys.executable, str(root / "generate.py"), *chosen, *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command,
            input=stdin.encode(),
            capture_output=True,
            cwd=where or root,
            env=environment,
            timeout=120,
        )
        assert done.returncode == status, done.stderr.decode()
        return done.stdout.decode(), done.stderr.decode()

    return call


def test_one_shot_writes_the_answer_alone_on_standard_output(run):
    text, messages = run("--prompt", "one plus two", "--max-new-tokens", 12, "--seed", 1)
    again, _ = run("--prompt", "one plus two", "--max-new-tokens", 12, "--seed", 1, "--json")
    answer = json.loads(again)
    assert text == answer["text"] + "\n"
    assert answer["new_tokens"] == len(answer["token_ids"]) <= 12
    assert answer["prompt"] == "one plus two"
    assert "parameters" in messages


def test_prompt_begins_with_cls_and_has_no_end(run, root):
    from aquila.tokenizer import load_tokenizer

    ids = load_tokenizer(root / "checkpoints_in" / "aquila-tiny").encode("one plus")
    answer = json.loads(run("--prompt", "one plus", "--max-new-tokens", 1, "--json")[0])
    assert answer["prompt_tokens"] == len(ids) + 1


def test_greedy_from_the_command_is_greedy_from_python(run, model_dir):
    from aquila.generation import generate
    from aquila.model import AquilaModel
    from aquila.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model_dir)
    prompt = [tokenizer.bos_id, *tokenizer.encode("三加四")]
    stops = {tokenizer.eos_id, tokenizer.pad_id}
    model = AquilaModel.from_pretrained(model_dir)
    expected = generate(model, [prompt], max_new_tokens=16, temperature=0.0, stop_ids=stops)[0]
    answer = json.loads(run("--prompt", "三加四", "--max-new-tokens", 16, "--temperature", 0, "--json")[0])
    assert answer["token_ids"] == expected


def test_prompt_file_and_samples(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n两个字\n", encoding="utf-8")
    out, _ = run(
        "--prompt-file", file, "--num-samples", 2, "--seed", 5, "--temperature", 1.5,
        "--json", "--max-new-tokens", 6,
    )  # fmt: skip
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["one", "one", "两个字", "两个字"]
    assert [answer["seed"] for answer in answers] == [5, 6, 5, 6]
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "one\ntwo"}) + "\n")
    out, _ = run("--prompt-file", file, "--json", "--max-new-tokens", 2)
    assert json.loads(out)["prompt"] == "one\ntwo"


def test_piped_lines_are_answered_in_turn(run):
    settings = ("--max-new-tokens", 4, "--temperature", 0, "--json")
    out, _ = run(*settings, stdin="one\n\n/set max_new_tokens 2\n你好🙂\nexit\nnever\n")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["one", "你好🙂"]
    assert answers[1]["new_tokens"] <= 2


def test_a_long_line_is_refused_or_slides(run):
    long = "x1 " * 5000
    _, messages = run("--max-new-tokens", 2, stdin=f"{long}\nshort\n", status=2)
    assert "context holds 128" in messages
    answer = json.loads(run("--max-new-tokens", 140, "--sliding", "--json", stdin=long + "\n")[0])
    assert answer["prompt_tokens"] > 5000
    assert answer["finish_reason"] in ("length", "stop")


@pytest.mark.slow
def test_full_context_is_said(run):
    settings = ("--max-new-tokens", 500, "--temperature", 2, "--seed", 1)
    answer = json.loads(run("--prompt", "one", *settings, "--json")[0])
    assert answer["finish_reason"] == "context", "another seed, with no end token in its first 128 tokens"
    assert answer["prompt_tokens"] + answer["new_tokens"] == 128
    said = "(the context of 128 tokens is full; --sliding lets it slide)"
    assert said in run("--prompt", "one", *settings)[1]
    assert said in run(*settings, stdin="one\n")[1]
    assert f"[2/2] {said}" in run("--prompt", "one", *settings[:-1], 0, "--num-samples", 2)[1]


@pytest.mark.parametrize("stdin", ["one\ntwo\nthree\n", None])
def test_ctrl_c_ends_the_program_by_the_signal_and_without_a_traceback(root, tmp_path, stdin):
    """Also where lines are still to come from a pipe."""
    folder = write_model_dir(tmp_path, root, max_seq_len=32768)
    command = [
        sys.executable, str(root / "generate.py"), "--model-dir", str(folder), "--sliding",
        "--max-new-tokens", "1000000000", "--temperature", "0", *([] if stdin else ["--prompt", "go on"]),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored below a shell's "&"
    with subprocess.Popen(command, **pipes, env=environment, cwd=root, preexec_fn=heard) as process:
        process.stdin.write((stdin or "").encode())
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, messages = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert b"Traceback" not in messages


def test_stop_string(run):
    base = ("--prompt", "one", "--max-new-tokens", 30, "--temperature", 0)
    whole = run(*base)[0].rstrip("\n")
    stop = whole[4:6]
    assert run(*base, "--stop", stop)[0] == whole[: whole.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "x", "--temperature", "-1"), "temperature"),
        (("--prompt", "x", "--top-p", "2"), "top-p"),
        (("--prompt", "x", "--num-samples", "0"), "num-samples"),
        (("--prompt-file", "no-such-file"), "cannot be read"),
        (("--prompt", "x", "--device", "abacus"), "abacus"),
        (("--prompt", "x", "--top-k", "many"), "top-k"),
    ],
)
def test_mistakes_end_with_status_2_and_a_clear_message(run, arguments, message):
    out, messages = run(*arguments, status=2)
    assert message in messages
    assert "Traceback" not in messages
    assert out == ""


def test_newest_run_is_found_and_its_absence_explained(run, model_dir, tmp_path):
    (tmp_path / "checkpoints_out").mkdir()
    _, messages = run("--prompt", "x", model=None, where=tmp_path, status=2)
    assert "quickstart.sh" in messages
    step = tmp_path / "checkpoints_out" / "exp" / "v1" / "checkpoints" / "step-00000010"
    step.parent.mkdir(parents=True)
    shutil.copytree(model_dir, step)
    (step / "state.json").write_text("{}")
    manifest = {path.name: fingerprint(path) for path in step.iterdir()}
    (step / "manifest.json").write_text(json.dumps(manifest))
    out, messages = run("--prompt", "x", "--json", "--max-new-tokens", 2, model=None, where=tmp_path)
    assert "step-00000010" in messages
    assert json.loads(out)["new_tokens"] <= 2


def test_a_tokenizer_larger_than_the_model_is_refused(run, root, tmp_path):
    folder = write_model_dir(tmp_path, root, vocab_size=900)
    _, messages = run("--prompt", "x", model=folder, status=2)
    assert "1217" in messages
    assert "900" in messages


def test_start_loads_nothing_that_generation_does_not_need(root):
    """Everything before the weights: a user who mistypes a path, or waits, should not wait for imports."""
    code = (
        "import sys, generate, aquila.generation.load, aquila.generation.batch, aquila.generation.terminal\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    slow = {
        "deepspeed",
        "megatron",
        "transformers",
        "torchao",
        "matplotlib",
        "tensorboard",
        "fastapi",
        "wandb",
    }
    assert slow & set(done.stdout.split()) == set()
