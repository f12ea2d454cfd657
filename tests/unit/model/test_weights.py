"""Weight files of every format, in and out; strict; never running a file's code."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from aquila.core.checkpoints import fingerprint
from aquila.core.errors import UserError
from aquila.model import AquilaModel, hf, load_weights, save_weights
from aquila.model.files import SafetensorsReader, TensorInfo, TorchReader, write_safetensors, write_torch


@pytest.fixture
def model(small_config):
    return AquilaModel(small_config(), seed=7)


@pytest.fixture
def folder(tmp_path, model):
    """A model folder without weights."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(model.config.model_dump()))
    return path


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def hf_state(model):
    heads = hf.permuted(model.config)
    return {
        hf.from_released(name): hf.permute(t, heads[hf.short(name)]) if hf.short(name) in heads else t
        for name, t in state(model).items()
    }


def write_bin(folder, tensors):
    torch.save(tensors, folder / "pytorch_model.bin")


def write_wrapped(folder, tensors):
    torch.save({"module": tensors, "iteration": 5}, folder / "pytorch_model.bin")


def write_legacy(folder, tensors):
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_sharded_bin(folder, tensors):
    names = list(tensors)
    files = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
    for file, part in files.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_safe(folder, tensors):
    save_file(tensors, folder / "model.safetensors")


def write_sharded_safe(folder, tensors):
    save_weights(tensors, folder, max_shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 2


def write_hf(folder, tensors):
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


WRITERS = [write_bin, write_wrapped, write_legacy, write_sharded_bin, write_safe, write_sharded_safe]


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
def test_every_format_loads_bit_for_bit(model, folder, write):
    write(folder, state(model))
    assert same(AquilaModel.from_pretrained(folder), model)
    other = AquilaModel(model.config, seed=1)
    load_weights(other, folder)
    assert same(other, model)


@pytest.mark.parametrize("write", [write_bin, write_safe], ids=lambda w: w.__name__)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_arrive_in_the_wanted_dtype(model, folder, write, stored, wanted):
    tensors = {name: t.to(stored) for name, t in state(model).items()}
    write(folder, tensors)
    loaded = AquilaModel.from_pretrained(folder, dtype=wanted)
    assert all(torch.equal(p, tensors[name].to(wanted)) for name, p in loaded.named_parameters())


def test_a_hugging_face_folder_loads_with_its_names_and_layout(model, folder):
    write_hf(folder, {**hf_state(model), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    (folder / "config.json").write_text(json.dumps(hf.config_to_hf(model.config, "float32")))
    loaded = AquilaModel.from_pretrained(folder)
    assert same(loaded, model)
    assert loaded.config.rope_theta == 50000.0
    assert loaded.config.kv_heads == 2


def test_tied_embeddings_fill_both_matrices(model, folder):
    tensors = hf_state(model)
    del tensors["lm_head.weight"]
    write_hf(folder, tensors)
    config = {**hf.config_to_hf(model.config, "float32"), "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = AquilaModel.from_pretrained(folder)
    assert torch.equal(loaded.output.weight, model.tok_embeddings.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not one of"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "foo": 1}},
            "unknown key 'rope_scaling.foo'",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not one of llama, aquila"),
        ({"head_dim": 7}, "head size 7 must be even"),
        ({"vocab_size": None}, "vocab_size must be a whole number above 0, got None"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be a whole number"),
        ({"intermediate_size": True}, "intermediate_size"),
        (
            {"num_attention_heads": 5, "head_dim": None},
            "hidden_size 48 is no multiple of num_attention_heads 5",
        ),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"),
        ({"rope_theta": float("inf")}, "rope_theta must be a number"),
        ({"rope_parameters": 7}, "rope_parameters must be a table"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": []}},
            "rope_parameters: rope_theta|rope_theta",
        ),
        ({"sliding_window": 32}, "sliding_window"),
    ],
)
def test_what_aquila_lacks_is_refused(model, change, message):
    with pytest.raises(UserError, match=message):
        hf.config_from_hf({**hf.config_to_hf(model.config, "float32"), **change}, "config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": None, "num_key_value_heads": None, "head_dim": None, "attention_bias": None},
        {"hidden_act": "swish", "rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}, "sliding_window": None},
    ],
)
def test_what_changes_nothing_is_accepted(model, change):
    values = hf.config_to_hf(model.config, "float32")
    values["rope_theta"] = 10000.0
    values["num_key_value_heads"] = values["num_attention_heads"]
    plain = hf.config_from_hf(values, "config.json")
    assert hf.config_from_hf({**values, **change}, "config.json") == plain


def test_all_that_does_not_fit_is_listed_and_nothing_loaded(model, folder):
    tensors = state(model)
    del tensors["norm.weight"]
    tensors["extra.weight"] = torch.ones(3)
    tensors["output.weight"] = torch.ones(5, 48)
    write_safe(folder, tensors)
    other = AquilaModel(model.config, seed=1)
    before = state(other)
    with pytest.raises(UserError) as caught:
        load_weights(other, folder)
    text = str(caught.value)
    assert "1 missing: norm.weight" in text
    assert "1 unexpected: extra.weight" in text
    assert "output.weight (5, 48), expected (211, 48)" in text
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_no_weights_and_missing_shards_are_named(model, folder):
    with pytest.raises(UserError, match=r"holds no weights.*bmt_pre_load: False"):
        AquilaModel.from_pretrained(folder)
    write_sharded_bin(folder, state(model))
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"misses pytorch_model-00002-of-00002\.bin"):
        AquilaModel.from_pretrained(folder)


@pytest.mark.parametrize("write", [write_bin, write_safe], ids=lambda w: w.__name__)
@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
def test_a_file_cut_short_is_refused(model, folder, write, keep):
    write(folder, state(model))
    file = next(f for f in folder.iterdir() if f.suffix in (".bin", ".safetensors"))
    size = int(keep * file.stat().st_size) if isinstance(keep, float) else keep
    os.truncate(file, size)
    with pytest.raises(UserError, match=file.name):
        AquilaModel.from_pretrained(folder)


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_never_run(model, folder, tmp_path, zipped):
    target = tmp_path / "broken-into"
    bad = {**state(model), "evil": Malicious(target)}
    torch.save(bad, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="cannot be read"):
        AquilaModel.from_pretrained(folder)
    assert not target.exists()
    pickle.loads(pickle.dumps(Malicious(target)))  # the file would have done it
    assert target.exists()


def test_a_file_of_other_things_is_refused(folder):
    torch.save({"epoch": 3}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds no state dict"):
        AquilaModel.from_pretrained(folder)


def test_an_index_cannot_point_out_of_its_folder(model, folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../config.json"}}))
    (folder.parent / "config.json").write_text("{}")
    with pytest.raises(UserError, match="outside of its folder"):
        AquilaModel.from_pretrained(folder)


def test_a_run_folder_stands_for_its_newest_checkpoint(model, folder, tmp_path):
    step = tmp_path / "run" / "checkpoints" / "step-00000003"
    shutil.copytree(folder, step)
    save_weights(model, step)
    (step / "state.json").write_text("{}")
    manifest = {path.name: fingerprint(path) for path in step.iterdir()}
    (step / "manifest.json").write_text(json.dumps(manifest))
    for path in (tmp_path / "run", step.parent, step):
        assert same(AquilaModel.from_pretrained(path), model)
    (step / "state.json").unlink()
    with pytest.raises(UserError, match=r"step-00000003 is damaged.*state\.json is missing"):
        AquilaModel.from_pretrained(tmp_path / "run")


def test_our_safetensors_are_everyones_and_appear_whole(model, folder):
    save_weights(model, folder, dtype=torch.bfloat16)
    theirs = load_file(folder / "model.safetensors")
    assert all(torch.equal(theirs[name], t.bfloat16()) for name, t in state(model).items())
    infos = {"a": TensorInfo((2,), torch.float32), "b": TensorInfo((2,), torch.float32)}

    def fails_halfway(name):
        if name == "b":
            raise OSError("disk full")
        return torch.ones(2)

    for write in (write_safetensors, write_torch):
        with pytest.raises(OSError, match="disk full"):
            write(folder / "other.file", infos, fails_halfway)
    assert {f.name for f in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_the_streamed_torch_file_is_what_torch_writes(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randint(9, (2, 2))}
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    write_torch(tmp_path / "x.bin", infos, tensors.__getitem__)
    loaded = torch.load(tmp_path / "x.bin", weights_only=True)
    assert list(loaded) == list(tensors)
    assert all(torch.equal(loaded[name], t) for name, t in tensors.items())
    reader = TorchReader(tmp_path / "x.bin")
    assert all(torch.equal(reader.read(name), t) for name, t in tensors.items())


def test_a_header_that_lies_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"

    def write(entry):
        text = json.dumps({"a": entry}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))

    write({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]})
    assert SafetensorsReader(path).read("a").tolist() == [0, 0, 0, 0]
    for entry in (
        {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]},
        {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [4]},
    ):
        write(entry)
        with pytest.raises(UserError, match=r"x\.safetensors"):
            SafetensorsReader(path)


MEASURE = """
import json, sys, torch
from aquila.model import AquilaModel
def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
import aquila.model.weights, safetensors.torch
torch.randn(256, 256).to(torch.bfloat16).float().sum()  # torch's own code and buffers come in on first use
before = status("VmRSS")
model = AquilaModel.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(json.dumps([status("VmHWM") - before, 2 * model.parameter_count()]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measures by Linux's /proc")
@pytest.mark.parametrize("write", [write_bin, write_safe], ids=lambda w: w.__name__)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_loading_peaks_at_little_more_than_the_weights(tmp_path, small_config, root, write, stored):
    config = small_config(dim=1024, n_heads=16, n_kv_heads=16, n_layers=8, multiple_of=256, vocab_size=4000)
    model = AquilaModel(config, device="meta")
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump()))
    write(tmp_path, {name: torch.ones(p.shape, dtype=stored) for name, p in model.named_parameters()})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    peak, weights = json.loads(done.stdout)
    assert weights > 200e6
    assert peak < 1.1 * weights + 200e6  # fp32 would take as much again as the weights


@pytest.mark.parametrize("header", [
    b"[]", b"7", b"null", b"[" * 90000,
    b'{"a": 1}', b'{"a": {"dtype": [], "shape": [], "data_offsets": [0, 0]}}',
    b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}', b'{"a": ' + b"1" * 5000 + b"}",
    b'{"a": {"dtype": "F32", "shape": 5, "data_offsets": [0, 4]}}', b"\xff", b'{"a": {"dtype": "F32"}}',
    b'{"__metadata__": 3}', b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
    b'"b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}',
])  # fmt: skip
def test_odd_safetensors_headers_are_messages(tmp_path, header):
    from aquila.model.files import SafetensorsReader

    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        SafetensorsReader(path)
