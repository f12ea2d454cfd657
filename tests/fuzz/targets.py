"""A target for each reader of files and messages that a stranger may have written.

A target gets bytes and a folder of its own; it reads them as the program would and uses what it got. It
may raise `REFUSALS`; everything else that it raises is a fault of the program.
"""

import gzip
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from aquila.config import load_run_config
from aquila.config.model import load_model_config
from aquila.core.checkpoints import find_corruption, fingerprint, newest_checkpoint, read_state
from aquila.core.errors import UserError
from aquila.core.jsonl import last_lines
from aquila.data.indexed import open_corpora
from aquila.data.indexfile import bin_path, idx_path, write_index
from aquila.data.meta import check_dataset, meta_path
from aquila.data.order import open_order
from aquila.data.prepare.assemble import DatasetWriter
from aquila.data.prepare.inputs import find_sources
from aquila.data.prepare.pipeline import PrepareOptions, _plan, make_datasets
from aquila.generation.batch import read_prompts
from aquila.generation.http.protocol import ChatRequest, CompletionRequest, RequestError, parse
from aquila.generation.sampling import Sampling
from aquila.launch.hostfile import read_hostfile
from aquila.model.files import SafetensorsReader, TensorInfo, TorchReader, write_safetensors
from aquila.model.weights import load_config, weight_files
from aquila.report import render
from aquila.tokenizer import load_tokenizer
from aquila.training.metrics import METRICS
from aquila.training.run_summary import differing, read_run

REFUSALS = (UserError, RequestError)
ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "checkpoints_in" / "aquila-tiny"


@dataclass(frozen=True)
class Target:
    """One reader."""

    read: Callable[[bytes, Path], None]
    seeds: list[bytes]
    """Valid inputs, from which damaged ones are made."""
    examples: int
    """Inputs in each run of the test command: a second or two."""


TARGETS: dict[str, Target] = {}


def _target(seeds: list[bytes], examples: int = 60) -> Callable[[Callable[[bytes, Path], None]], None]:
    def register(read: Callable[[bytes, Path], None]) -> None:
        TARGETS[read.__name__] = Target(read, seeds, examples)

    return register


def _file(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@_target([b"node-1 slots=8\nnode-2 slots=4\n", b"# two\n10.0.0.1 slots=2 # a\n\nfe80::1 slots=1\n"])
def hostfile(data: bytes, folder: Path) -> None:
    for node in read_hostfile(_file(folder, "hostfile", data)):
        assert node.slots > 0
        assert "/" not in node.file_name


def _load_config(folder: Path) -> None:
    effective = load_run_config("run.yaml", str(TINY), [], root=folder)
    effective.table(), effective.summary(), effective.to_yaml()


YAML = b"""data_prefix: [0.3, data/a, 0.7, data/b]
split: 95,5
batch_size: 4
gradient_accumulation_steps: 2
train_iters: 100
lr: 6.0e-5
betas: [0.9, 0.95]
warm_up_iters: 2
precision: bf16
seed: 1
save_interval: 10
"""


@_target([YAML, *(path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml")))])
def run_yaml(data: bytes, folder: Path) -> None:
    _file(folder, "run.yaml", data)
    for path in (ROOT / "configs").glob("*.json"):
        shutil.copy(path, folder)
    _load_config(folder)


@_target([path.read_bytes() for path in sorted((ROOT / "configs").glob("*.json"))])
def deepspeed_json(data: bytes, folder: Path) -> None:
    _file(folder, "run.yaml", YAML + b"deepspeed_config: deepspeed.json\n")
    _file(folder, "deepspeed.json", data)
    _load_config(folder)


@_target([path.read_bytes() for path in sorted((ROOT / "checkpoints_in").glob("*/config.json"))]
         + [json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
                        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "vocab_size": 100, "rms_norm_eps": 1e-6,
                        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
                        "max_position_embeddings": 512, "tie_word_embeddings": False}).encode()])  # fmt: skip
def model_config(data: bytes, folder: Path) -> None:
    _file(folder, "config.json", data)
    for load in (load_model_config, load_config):
        try:
            config = load(folder)
        except UserError:
            continue
        config.to_dict(), config.parameter_count(), config.flops_per_token(128)


@cache
def _index() -> bytes:
    file = io.BytesIO()
    write_index(file, np.array([5, 9, 1, 30, 12], np.int32))
    return file.getvalue()


def _tokens(count: int = 57) -> bytes:
    return np.arange(count, dtype=np.int32).tobytes()


@_target([_index()])
def idx(data: bytes, folder: Path) -> None:
    idx_path(folder / "c").write_bytes(data)
    bin_path(folder / "c").write_bytes(_tokens())
    check_dataset(folder / "c", None, 100)
    stream = open_corpora([str(folder / "c")], "1", 8, 0, folder / "order").train
    for k in range(8):
        stream[k]


META = {"format": 1, "made_by": "aquila", "tokenizer": {"fingerprint": "f" * 64, "vocab_size": 100},
        "counts": {"documents": 5, "tokens": 57, "min_id": 0, "max_id": 56}, "inputs": []}  # fmt: skip


@_target([json.dumps(META, indent=1).encode()])
def meta_json(data: bytes, folder: Path) -> None:
    idx_path(folder / "c").write_bytes(_index())
    bin_path(folder / "c").write_bytes(_tokens())
    meta_path(folder / "c").write_bytes(data)
    check_dataset(folder / "c", None, 100)


@_target([b"", b"documents", b"\x00" * 16], examples=30)
def stored_order(data: bytes, folder: Path) -> None:
    """Files of a stored order that are cut or overwritten."""
    idx_path(folder / "c").write_bytes(_index())
    bin_path(folder / "c").write_bytes(_tokens())
    open_corpora([str(folder / "c")], "1", 8, 0, folder / "order").train[0]
    stored = sorted((folder / "order").rglob("*.npy"))
    path = stored[len(data) % len(stored)]
    whole = path.read_bytes()
    at = sum(data) % len(whole)
    path.write_bytes(whole[:at] + data + (b"" if data.endswith(b"\n") else whole[at + len(data) :]))
    stream = open_corpora([str(folder / "c")], "1", 8, 0, folder / "order").train
    with suppress(UserError):
        for k in range(14):
            stream[k]


@cache
def _safetensors() -> bytes:
    path = Path(_scratch()) / "seed.safetensors"
    infos = {"a": TensorInfo((2, 3), torch.float32), "b": TensorInfo((4,), torch.bfloat16)}
    write_safetensors(path, infos, lambda name: torch.ones(infos[name].shape, dtype=infos[name].dtype))
    return path.read_bytes()


@cache
def _scratch() -> str:
    return tempfile.mkdtemp(prefix="aquila-fuzz-")


@_target([_safetensors()])
def safetensors(data: bytes, folder: Path) -> None:
    reader = SafetensorsReader(_file(folder, "model.safetensors", data))
    for name in reader.info:
        reader.read(name)


@cache
def _torch_file() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, file)
    return file.getvalue()


@_target([_torch_file()], examples=40)
def torch_weights(data: bytes, folder: Path) -> None:
    reader = TorchReader(_file(folder, "pytorch_model.bin", data))
    for name in reader.info:
        reader.read(name)


@_target(
    [json.dumps({"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}).encode()]
)
def weight_index(data: bytes, folder: Path) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        _file(folder, name, _safetensors())
    _file(folder, "model.safetensors.index.json", data)
    for path in weight_files(folder):
        assert path.parent == folder


def _manifest() -> bytes:
    state = b'{"step": 5, "consumed_samples": 20}'
    path = _file(Path(_scratch()), "state.json", state)
    return json.dumps({"state.json": fingerprint(path)}).encode()


@_target([_manifest()])
def checkpoint_manifest(data: bytes, folder: Path) -> None:
    checkpoint = folder / "step-00000005"
    _file(checkpoint, "state.json", b'{"step": 5, "consumed_samples": 20}')
    _file(checkpoint, "manifest.json", data)
    newest, problems = newest_checkpoint(folder)
    assert newest == checkpoint or len(problems) == 1
    assert (find_corruption(checkpoint) is None) == (newest == checkpoint)
    read_state(checkpoint)


LINES = [
    {"kind": "train", "step": step, "loss": 3.0 - step / 10, "lr": 1e-4, "grad_norm": 1.0,
     "tokens_per_second": 100.0, "consumed_samples": 4 * step, "consumed_tokens": 512 * step,
     "seconds": 1.0 * step, "launch": 1, "time": 1e9}
    for step in range(1, 6)
]  # fmt: skip


@_target([b"".join(json.dumps(line).encode() + b"\n" for line in LINES)], examples=30)
def metrics_lines(data: bytes, folder: Path) -> None:
    path = _file(folder, f"v1/{METRICS}", data)
    last_lines(path, 3)
    run = read_run("e/v1", path.parent)
    summaries = {run.name: run.summary()}
    differing([run])
    render([run], summaries, b"<svg></svg>")


ORDER = {"split": "1", "seq_length": 8, "seed": 0, "samples_per_epoch": {"c": 7},
         "segments": [{"start": 0, "weights": {"c": 1.0}, "consumed": {"c": 0}}]}  # fmt: skip


@_target([json.dumps(ORDER).encode()])
def data_order_json(data: bytes, folder: Path) -> None:
    idx_path(folder / "c").write_bytes(_index())
    bin_path(folder / "c").write_bytes(_tokens())
    _file(folder, "data_order.json", data.replace(b'"c"', json.dumps(str(folder / "c")).encode()))
    stream = open_order(folder)
    stream.locate(3)


def _tokenizer_target(name: str) -> None:
    others = [path for path in TINY.iterdir() if path.name in ("vocab.json", "merges.txt", "config.json")]
    seeds = [path.read_bytes() for path in others if path.name == name]

    def read(data: bytes, folder: Path) -> None:
        for path in others:
            shutil.copy(path, folder)
        _file(folder, name, data)
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode("a word,   and 1234 北京\n")
        tokenizer.decode(ids)

    read.__name__ = name.replace(".", "_")
    _target(seeds, examples=25)(read)


_tokenizer_target("vocab.json")
_tokenizer_target("merges.txt")


def _tokenizer_json() -> bytes:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: i for i, letter in enumerate(sorted(letters))} | {"</s>": 256, "ab": 257}
    made = Tokenizer(models.BPE(vocab, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["</s>"])
    return made.to_str().encode()


@_target([_tokenizer_json()], examples=40)
def tokenizer_json(data: bytes, folder: Path) -> None:
    _file(folder, "tokenizer.json", data)
    _file(folder, "tokenizer_config.json", b'{"eos_token": "</s>", "bos_token": "</s>"}')
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("a word, 1234 北京\n"))


@cache
def _pieces() -> list[bytes]:
    try:
        import sentencepiece
    except ImportError:
        return []
    file = io.BytesIO()
    texts = iter(["one line of text", "another line, with 北京", "and words and more words"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=file, vocab_size=300, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return [file.getvalue()]


if _pieces():

    @_target(_pieces(), examples=40)
    def tokenizer_model(data: bytes, folder: Path) -> None:
        _file(folder, "tokenizer.model", data)
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("a word, 1234 北京\n"))


COMPLETIONS = [
    {"model": "a", "prompt": "Hello", "max_tokens": 5, "temperature": 0.7, "stop": ["."], "n": 2},
    {"model": "a", "prompt": [[1, 2, 3]], "logprobs": 3, "top_p": 0.9},
]
PARTS = [{"type": "text", "text": "Hello"}]
MESSAGES = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": PARTS}]
CHAT = {"model": "a", "messages": MESSAGES, "max_completion_tokens": 5, "stream": True}


@_target([json.dumps(body).encode() for body in COMPLETIONS], examples=200)
def completion_body(data: bytes, folder: Path) -> None:
    _body(parse(data, CompletionRequest))


@_target([json.dumps(CHAT).encode()], examples=200)
def chat_body(data: bytes, folder: Path) -> None:
    _body(parse(data, ChatRequest))


def _body(request: CompletionRequest | ChatRequest) -> None:
    request.prompts()
    request.stops(("###",))
    for choice in range(2):
        request.sampling(Sampling(), choice, 100)


TEXTS = [{"text": "one line"}, {"text": "北京\n two"}, {"conversations": [{"from": "human", "value": "Hi"}]}]
DOCUMENTS = b"".join(json.dumps(text, ensure_ascii=False).encode() + b"\n" for text in TEXTS)


def _prepare(data: bytes, folder: Path, name: str) -> None:
    source = _file(folder, name, data)
    options = PrepareOptions([str(source)], str(folder / "out"), on_error="skip")
    result = make_datasets(options, _tokenizer())
    check_dataset(result.prefixes[0], _tokenizer(), _tokenizer().vocab_size)


@cache
def _tokenizer():
    return load_tokenizer(TINY)


@_target([DOCUMENTS], examples=40)
def documents_jsonl(data: bytes, folder: Path) -> None:
    _prepare(data, folder, "in.jsonl")


@_target([b"[" + DOCUMENTS.strip().replace(b"\n", b",\n") + b"]"], examples=40)
def documents_json(data: bytes, folder: Path) -> None:
    _prepare(data, folder, "in.json")


@_target([gzip.compress(DOCUMENTS, mtime=0)], examples=40)
def documents_gzip(data: bytes, folder: Path) -> None:
    _prepare(data, folder, "in.jsonl.gz")


JOURNAL = {"parts": 1, "documents": 3, "text": 20, "rejected": 0, "rejects": 0, "file": "in.jsonl",
           "lines": 3, "counted": 0, "bin": [40], "low": [0], "high": [200], "crc": [1]}  # fmt: skip


@_target([json.dumps(JOURNAL).encode() + b"\n"], examples=20)
def preparation_journal(data: bytes, folder: Path) -> None:
    """A journal of which the first line, the plan, is whole."""
    source = _file(folder, "in.jsonl", DOCUMENTS)
    options = PrepareOptions([str(source)], str(folder / "out"))
    writer = DatasetWriter(options.prefixes, _plan(options, find_sources(options.inputs), _tokenizer()))
    writer.close()
    (journal,) = folder.rglob("journal")
    plan = journal.read_bytes().partition(b"\n")[0]
    journal.write_bytes(plan + b"\n" + data)
    result = make_datasets(options, _tokenizer())
    assert result.documents == 3
    check_dataset(result.prefixes[0], _tokenizer(), _tokenizer().vocab_size)


@cache
def _parquet() -> list[bytes]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return []
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["one", "北京", "three"], "n": [1, 2, 3]}), file)
    return [file.getvalue()]


if _parquet():

    @_target(_parquet(), examples=40)
    def documents_parquet(data: bytes, folder: Path) -> None:
        _prepare(data, folder, "in.parquet")


@_target([b'{"prompt": "Hello"}\n{"prompt": "\xe5\x8c\x97"}\n'])
def prompts_jsonl(data: bytes, folder: Path) -> None:
    read_prompts(_file(folder, "prompts.jsonl", data))
