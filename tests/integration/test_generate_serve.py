"""The endpoint, by the official `openai` client and by raw requests, against a real process."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.unit.generation.models import write_model_dir

openai = pytest.importorskip("openai", reason="the openai client is not installed")
pytest.importorskip("fastapi", reason="the serve extra is not installed")
import http.client  # noqa: E402

CONTEXT = 2048


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, root):
    return write_model_dir(tmp_path_factory.mktemp("served"), root, max_seq_len=CONTEXT)


@contextlib.contextmanager
def serving(root, model_dir, ended_by=signal.SIGINT):
    """The port of an endpoint that runs meanwhile; it must end well and without a traceback."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [
        sys.executable, str(root / "generate.py"), "--model-dir", str(model_dir), "--serve", "--port", "0",
        "--max-concurrent", "6", "--max-waiting", "20", "--temperature", "0",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=root)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line):
            break
    else:
        pytest.fail("".join(lines))
    rest = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
    rest.start()
    try:
        yield int(found.group(1))
        process.send_signal(ended_by)
        assert process.wait(30) == 0
        rest.join(10)
        assert "Traceback" not in "".join(lines)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(root, model_dir):
    with serving(root, model_dir) as port:
        yield port


def client_of(port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


@pytest.fixture(scope="module")
def name(client):
    (only,) = client.models.list().data
    return only.id


def post(server, body, headers=None, path="/v1/completions"):
    connection = http.client.HTTPConnection("127.0.0.1", server, timeout=60)
    connection.request("POST", path, body, {"Content-Type": "application/json", **(headers or {})})
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def state(server):
    connection = http.client.HTTPConnection("127.0.0.1", server, timeout=10)
    connection.request("GET", "/health")
    content = json.loads(connection.getresponse().read())
    connection.close()
    return content["running"], content["waiting"]


def wait_until_idle(server):
    for _ in range(100):
        if state(server) == (0, 0):
            return
        time.sleep(0.1)
    pytest.fail(f"still busy: {state(server)}")


def test_completion_equals_the_command(client, name, model_dir, root):
    from aquila.generation import generate
    from aquila.model import AquilaModel
    from aquila.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model_dir)
    ids = [tokenizer.bos_id, *tokenizer.encode("one plus 三")]
    stops = {tokenizer.eos_id, tokenizer.pad_id}
    model = AquilaModel.from_pretrained(model_dir)
    new = generate(model, [ids], max_new_tokens=20, temperature=0.0, stop_ids=stops)[0]
    got = client.completions.create(model=name, prompt="one plus 三", max_tokens=20)
    assert got.choices[0].text == tokenizer.decode(new)
    assert got.usage.prompt_tokens == len(ids)
    assert got.usage.completion_tokens == len(new)
    assert got.choices[0].finish_reason in ("length", "stop")


def test_stream_is_the_same_text_in_pieces(client, name):
    settings = {"model": name, "prompt": "half past ten 🙂", "max_tokens": 40, "temperature": 1.2, "seed": 4}
    whole = client.completions.create(**settings)
    events = list(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    pieces = [event.choices[0] for event in events if event.choices]
    assert "".join(piece.text for piece in pieces) == whole.choices[0].text
    assert len(pieces) > 5
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == whole.choices[0].finish_reason
    assert events[-1].usage == whole.usage


def test_several_prompts_choices_stops_and_echo(client, name):
    got = client.completions.create(
        model=name, prompt=["one", "two"], n=2, max_tokens=8, temperature=1.5, seed=1, echo=True
    )
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in got.choices] == ["one", "one", "two", "two"]
    assert got.choices[0].text != got.choices[1].text
    plain = client.completions.create(model=name, prompt="one", max_tokens=30).choices[0].text
    stop = plain[5:7]
    cut = client.completions.create(model=name, prompt="one", max_tokens=30, stop=[stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (plain[: plain.index(stop)], "stop")


def test_token_ids_as_prompt(client, name, model_dir):
    from aquila.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model_dir)
    ids = [tokenizer.bos_id, *tokenizer.encode("one plus")]
    by_ids = client.completions.create(model=name, prompt=ids, max_tokens=10)
    by_text = client.completions.create(model=name, prompt="one plus", max_tokens=10)
    assert by_ids.choices[0].text == by_text.choices[0].text
    assert client.completions.create(model=name, prompt="one plus").usage.completion_tokens <= 16


@pytest.mark.parametrize("by_ids", [False, True])
def test_log_probabilities_of_prompt_and_answer(client, name, model_dir, by_ids):
    import torch

    from aquila.model import AquilaModel
    from aquila.tokenizer import load_tokenizer

    tokenizer, model = load_tokenizer(model_dir), AquilaModel.from_pretrained(model_dir)
    text = "one plus 三 is"
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    prompt = ids if by_ids else text
    got = client.completions.create(model=name, prompt=prompt, max_tokens=4, logprobs=3, echo=True).choices[0]
    new = client.completions.create(model=name, prompt=prompt, max_tokens=4, logprobs=0).choices[0]
    told, shown = got.logprobs, ids if by_ids else ids[1:]
    count = len(shown) + len(new.logprobs.tokens)
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == count
    assert told.tokens[: len(shown)] == [tokenizer.token_bytes(i).decode(errors="replace") for i in shown]
    logs = model(torch.tensor([ids]))[0].log_softmax(-1)
    wanted = [logs[at, token].item() for at, token in enumerate(ids[1:])]
    if by_ids:
        assert told.token_logprobs[0] is None
    found = told.token_logprobs[int(by_ids) : len(shown)]
    assert found == pytest.approx(wanted, abs=1e-4)
    for place, best in zip(range(len(wanted)), told.top_logprobs[int(by_ids) :], strict=False):
        assert max(best.values()) == pytest.approx(logs[place].max().item(), abs=1e-4)
    assert new.logprobs.token_logprobs == pytest.approx(told.token_logprobs[len(shown) :], abs=1e-4)
    assert new.logprobs.top_logprobs == [{}] * len(new.logprobs.tokens)
    first = logs[-1].max().item()  # the first new token is the likeliest
    assert new.logprobs.token_logprobs[0] == pytest.approx(first, abs=1e-4)
    assert "".join(told.tokens[len(shown) :]).startswith(new.text[:2])


def test_sixteen_clients_at_once_get_what_each_gets_alone(client, name):
    prompts = [f"{number} plus {number * 7} is" + " and" * (number % 5) for number in range(16)]

    def ask(prompt):
        stream = client.completions.create(model=name, prompt=prompt, max_tokens=48, stream=True)
        return "".join(event.choices[0].text for event in stream)

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, prompts)) == alone


def test_a_client_that_leaves_frees_its_place(server, client, name):
    for streaming in (True, False):
        body = json.dumps({"model": name, "prompt": "one", "max_tokens": 2000, "stream": streaming}).encode()
        sockets = []
        for _ in range(3):
            connection = socket.create_connection(("127.0.0.1", server))
            head = (
                "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            connection.sendall(head.encode() + body)
            sockets.append(connection)
        time.sleep(0.5)
        assert state(server)[0] > 0
        for connection in sockets:
            connection.close()
        wait_until_idle(server)
    assert client.completions.create(model=name, prompt="one", max_tokens=4).choices


def test_a_client_that_leaves_while_it_sends_is_nothing_to_report(server):
    # The endpoint's messages are looked at when it ends.
    with socket.create_connection(("127.0.0.1", server)) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 500\r\n\r\n{{".encode())
        time.sleep(0.3)
    wait_until_idle(server)


def test_at_the_end_open_answers_get_a_message_and_the_status_is_0(root, tmp_path):
    folder = write_model_dir(tmp_path, root, max_seq_len=32768)
    with ThreadPoolExecutor(1) as pool, serving(root, folder, signal.SIGTERM) as port:

        def read():
            stream = client_of(port).completions.create(
                model=folder.name, prompt="go on", max_tokens=30000, stream=True
            )
            for event in stream:
                begun.set()
                assert event.choices[0].finish_reason is None, "take a prompt whose answer does not end"

        begun = threading.Event()
        result = pool.submit(read)
        assert begun.wait(30)
    with pytest.raises(openai.APIError, match="shutting down"):
        result.result(30)


def test_too_many_wait_get_429_and_the_others_their_answer(server, client, name):
    def ask(_):
        try:
            return len(client.completions.create(model=name, prompt="one", n=6, max_tokens=150).choices)
        except openai.RateLimitError:
            return 429

    with ThreadPoolExecutor(10) as pool:
        results = list(pool.map(ask, range(10)))
    assert set(results) == {6, 429}
    assert results.count(6) >= 4
    wait_until_idle(server)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{not json", 400, "not valid JSON"),
        (b"\xff\xfe", 400, "not valid JSON"),
        (b"[]", 400, "JSON object"),
        (b"", 400, "not valid JSON"),
        ({"prompt": "x"}, 400, "model is missing"),
        ({"model": "NAME"}, 400, "prompt is missing"),
        ({"model": "NAME", "prompt": 5}, 400, "prompt must be"),
        ({"model": "NAME", "prompt": []}, 400, "empty list"),
        ({"model": "NAME", "prompt": [[]]}, 400, "prompt is empty"),
        ({"model": "NAME", "prompt": [999999]}, 400, "vocabulary"),
        ({"model": "NAME", "prompt": [-1]}, 400, "vocabulary"),
        ({"model": "NAME", "prompt": "x", "temperature": -1}, 400, "temperature"),
        ({"model": "NAME", "prompt": "x", "temperature": "hot"}, 400, "temperature"),
        ({"model": "NAME", "prompt": "x", "top_p": 0}, 400, "top_p"),
        ({"model": "NAME", "prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
        ({"model": "NAME", "prompt": "x", "max_tokens": 1e9}, 400, "valid integer"),
        ({"model": "NAME", "prompt": "x", "max_tokens": 5000}, 400, "at most"),
        ({"model": "NAME", "prompt": "x", "n": 0}, 400, "n:"),
        ({"model": "NAME", "prompt": "x", "n": 100}, 400, "send fewer"),
        ({"model": "NAME", "prompt": "x", "stop": [""]}, 400, "stop"),
        ({"model": "NAME", "prompt": "x", "max_token": 5}, 400, "did you mean 'max_tokens'"),
        ({"model": "NAME", "prompt": "x", "logprobs": -1}, 400, "logprobs: "),
        ({"model": "NAME", "prompt": "x", "logprobs": 21}, 400, "logprobs: "),
        ({"model": "NAME", "prompt": "x", "logprobs": True}, 400, "logprobs: "),
        ({"model": "NAME", "prompt": "x", "logprobs": 1, "stream": True}, 400, "leave out stream"),
        ({"model": "other", "prompt": "x"}, 404, "no model 'other'"),
        ({"model": "NAME", "prompt": "word " * 20_000}, 400, "context holds"),
        ({"model": "NAME", "prompt": "x" * (5 << 20)}, 413, "exceeds"),
    ],
)
def test_a_bad_request_is_explained(server, name, body, status, message):
    if isinstance(body, dict):
        body = json.dumps(body).replace("NAME", name).encode()
    got, content = post(server, body)
    assert (got, set(content)) == (status, {"error"})
    assert message in content["error"]["message"]
    assert state(server) == (0, 0)


CONVERSATION = [
    {"role": "system", "content": "Count."},
    {"role": "user", "content": "one plus 三"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": [{"type": "text", "text": "two "}, {"type": "text", "text": "plus 二"}]},
]
AS_TEXT = "Count.###Human: one plus 三###Assistant: four###Human: two plus 二###Assistant:"


def test_chat_is_the_completion_of_the_conversations_text(server, client, name):
    plain = client.completions.create(model=name, prompt=AS_TEXT, max_tokens=24, stop=["###"])
    body = {"model": name, "messages": CONVERSATION, "max_tokens": 24}
    status, got = post(server, json.dumps(body), path="/v1/chat/completions")
    assert (status, got["object"]) == (200, "chat.completion")
    assert got["id"].startswith("chatcmpl-")
    (choice,) = got["choices"]
    assert choice["message"] == {"role": "assistant", "content": plain.choices[0].text.removeprefix(" ")}
    assert choice["finish_reason"] == plain.choices[0].finish_reason
    assert got["usage"]["prompt_tokens"] == plain.usage.prompt_tokens
    by_library = client.chat.completions.create(model=name, messages=CONVERSATION, max_completion_tokens=24)
    assert by_library.choices[0].message.content == choice["message"]["content"]


def test_chat_streams_over_plain_http(server, name):
    body = {
        "model": name, "messages": CONVERSATION[1:2], "max_tokens": 30, "temperature": 1.2, "seed": 3,
        "n": 2, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", server, timeout=60)
    head = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), head)
    response = connection.getresponse()
    assert response.getheader("Content-Type").startswith("text/event-stream")
    lines = [line for line in response.read().decode().split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] > 0
    choices = [event["choices"][0] for event in events[:-1]]
    body |= {"stream": False, "stream_options": None}
    _, whole = post(server, json.dumps(body), path="/v1/chat/completions")
    for number in range(2):
        parts = [choice for choice in choices if choice["index"] == number]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(part["delta"].get("content", "") for part in parts)
        assert text == whole["choices"][number]["message"]["content"]
        assert [part["finish_reason"] is None for part in parts] == [True] * (len(parts) - 1) + [False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 0: role"),
        ({"messages": [{"role": "user"}]}, "message 0: content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "message 0: content"),
        ({"messages": CONVERSATION[:3]}, "must be the user's"),
        ({"messages": [{"role": "user", "content": "word " * 20_000}]}, "context holds"),
        ({"tools": [{}]}, "tools is not offered"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs is not offered"),
        ({"max_tokens": 5000}, "at most"),
        ({"mesages": []}, "did you mean 'messages'"),
    ],
)
def test_a_bad_conversation_is_explained(server, name, changes, message):
    body = {"model": name, "messages": CONVERSATION, **changes}
    status, content = post(server, json.dumps(body), path="/v1/chat/completions")
    assert (status, set(content)) == (400, {"error"})
    assert message in content["error"]["message"]
    assert state(server) == (0, 0)


def test_other_paths_methods_and_types_are_explained(server):
    assert post(server, b"{}", path="/v1/embeddings")[0] == 404
    assert "/v1/chat/completions" in post(server, b"{}", path="/v1/embeddings")[1]["error"]["message"]
    assert post(server, b"{}", path="/v1/models")[0] == 405
    assert post(server, b"{}", headers={"Content-Type": "text/plain"})[0] == 415


def test_no_new_tokens(client, name):
    got = client.completions.create(model=name, prompt="one", max_tokens=0, echo=True)
    assert got.choices[0].text == "one"
    assert got.usage.completion_tokens == 0


def test_an_address_that_is_taken_is_a_users_mistake(root, model_dir, server):
    done = subprocess.run(
        [sys.executable, "generate.py", "--model-dir", str(model_dir), "--serve", "--port", str(server)],
        capture_output=True, text=True, cwd=root, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "choose another" in done.stderr
