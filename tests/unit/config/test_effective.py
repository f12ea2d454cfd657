"""One precedence rule, strict keys, and a table that says what overrode what."""

import contextlib
import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from aquila.config import Device, RunConfig, load_run_config, parse_blend, parse_split
from aquila.config.deepspeed import DeepSpeedFile
from aquila.config.strict import parse_yaml
from aquila.core.errors import UserError

CPU = Device("cpu", ("bf16", "fp32"))
NPU = Device("npu", ("bf16", "fp16", "fp32"), overlap_comm=False)
RECIPE = {
    "batch_size": 2, "gradient_accumulation_steps": 1, "epochs": 600, "lr": 3.0e-4, "warm_up": 0.01,
    "save_interval": 1000, "log_interval": 1, "bmt_loss_scale": 131072, "save_optim": True, "save_rng": True,
    "eps": 1.0e-8, "bmt_pre_load": True,
}  # fmt: skip
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 64,
    "gradient_accumulation_steps": 1,
    "steps_per_print": 100,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 10e7, "cpu_offload": False},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2000}},
    "fp16": {
        "enabled": True,
        "loss_scale": 8192,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "optimizer": {
        "type": "Adam",
        "params": {"lr": 1e-5, "weight_decay": 0.1, "betas": [0.9, 0.98], "eps": 1e-6},
    },
    "activation_checkpointing": {"partition_activations": True},
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project root with a model folder and the original's two files."""
    model = tmp_path / "checkpoints_in" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text(
        json.dumps({"dim": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128})
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "deepspeed.json").write_text(json.dumps(DEEPSPEED))
    return tmp_path


def load(project: Path, *overrides: str, device: Device | None = CPU):
    return load_run_config(project / "run.yaml", "tiny", list(overrides), device=device, root=project)


def rewrite(project: Path, name: str, **changes) -> None:
    path = project / name
    read, write = (json.loads, json.dumps) if name.endswith("json") else (yaml.safe_load, yaml.safe_dump)
    path.write_text(write(read(path.read_text()) | changes))


def test_the_later_source_wins(project: Path) -> None:
    effective = load(project, "batch_size=7", "betas=[0.8, 0.9]")
    run = effective.run
    assert run.batch_size == 7  # command line over YAML's 2 over JSON's 64
    assert run.lr == 3e-4  # YAML over JSON's 1e-5
    assert run.eps == 1e-8
    assert run.log_interval == 1  # YAML over JSON's steps_per_print
    assert run.weight_decay == 0.1  # JSON over the default
    assert run.betas == [0.8, 0.9]
    assert run.seed == RunConfig.model_fields["seed"].default
    assert effective.sources["batch_size"] == "command line"
    assert effective.sources["lr"] == "run.yaml"
    assert effective.sources["weight_decay"] == "deepspeed.json optimizer.params.weight_decay"
    assert effective.sources["seed"] == "default"


def test_the_table_says_what_lost(project: Path) -> None:
    lines = load(project, "batch_size=7").table().splitlines()
    row = next(line for line in lines if line.startswith("batch_size "))
    assert "64 (deepspeed.json train_micro_batch_size_per_gpu)" in row
    assert "2 (run.yaml)" in row
    assert "scheduler" in "\n".join(lines)
    agreed = next(line for line in lines if line.startswith("gradient_accumulation_steps "))
    assert "deepspeed" not in agreed  # both say 1: nothing was overridden


def test_fp16_of_the_json_becomes_bf16_on_a_device_without_it(project: Path) -> None:
    effective = load(project)
    assert effective.run.precision == "bf16"
    assert "bf16 instead" in effective.table()
    on_gpu = load(project, device=Device("gpu", ("bf16", "fp16", "fp32")))
    assert on_gpu.run.precision == "fp16"
    assert on_gpu.run.bmt_loss_scale == 131072


@pytest.mark.parametrize("where", ["yaml", "command line"])
def test_fp16_said_outright_is_an_error_there(project: Path, where: str) -> None:
    if where == "yaml":
        rewrite(project, "run.yaml", precision="fp16")
    with pytest.raises(UserError, match="precision fp16"):
        load(project, *(["precision=fp16"] if where == "command line" else []))


def test_precision_auto_takes_the_best_of_the_device(project: Path) -> None:
    (project / "deepspeed.json").unlink()
    assert load(project).run.precision == "bf16"
    assert load(project, device=Device("old", ("fp16", "fp32"))).run.precision == "fp16"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epoch=3", "did you mean 'epochs'?"),
        ("lr=fast", "lr: input should be a valid number"),
        ("lr", "key=value"),
        ("batch_size=True", "batch_size"),
        ("batch_size=0", "batch_size"),
        ("betas=[0.9]", "betas"),
        ("min_lr=1", "min_lr 1 is larger than lr"),
        ("split=many", "split 'many'"),
        ("seq_length=129", "max_seq_len 128"),
        ("lr=.inf", "not a finite number"),
        ("data_prefix=[a, 0.5, b]", "weight before every path"),
        ("attention=flash", "attention"),
    ],
)
def test_wrong_overrides(project: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load(project, override)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("size", "length", "heads", "message"),
    [
        (3, 128, {}, "does not divide seq_length 128"),
        (4, 126, {}, "does not divide seq_length 126"),
        (8, 128, {}, "does not divide the 4 heads"),
        (4, 120, {"n_heads": 12, "n_kv_heads": 6}, "neither divides the 6 heads of keys and values nor"),
    ],
)
def test_ranks_that_cannot_share_samples(
    project: Path, size: int, length: int, heads: dict, message: str
) -> None:
    rewrite(project, "checkpoints_in/tiny/config.json", **heads, **({"dim": 120} if heads else {}))
    with pytest.raises(UserError) as error:
        load(project, f"sequence_parallel={size}", f"seq_length={length}")
    assert message in str(error.value)
    assert f"sequence_parallel {size} (command line)" in str(error.value)


def test_ranks_that_share_samples_take_fewer_of_them(project: Path) -> None:
    effective = load(
        project, "sequence_parallel=4", "batch_size=2", "gradient_accumulation_steps=3", "seq_length=128"
    )
    assert effective.run.global_batch_size(8) == 12
    assert any("4 neighbouring ranks share each sample" in note for note in effective.notes)
    with pytest.raises(UserError, match="does not divide the 6 device"):
        effective.run.global_batch_size(6)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("run.yaml", {"warmup": 0.1}, "unknown key 'warmup'; did you mean 'warm_up'?"),
        ("run.yaml", {"save_optim": "yes please"}, "save_optim"),
        ("deepspeed.json", {"gradient_cliping": 1}, "did you mean 'gradient_clipping'?"),
        ("deepspeed.json", {"zero_optimization": {"stge": 2}}, "zero_optimization.stge"),
        ("deepspeed.json", {"optimizer": {"type": "Lamb"}}, "Lamb"),
        ("deepspeed.json", {"bf16": {"enabled": True}}, "both true"),
        ("deepspeed.json", {"train_batch_size": 33}, "train_batch_size"),
    ],
)
def test_wrong_files(project: Path, name: str, changes: dict, message: str) -> None:
    rewrite(project, name, **changes)
    with pytest.raises(UserError) as error:
        load(project)
    assert message in str(error.value)
    assert name in str(error.value)


def test_yaml_with_a_key_twice_names_both_lines(project: Path) -> None:
    (project / "run.yaml").write_text("lr: 1e-4\nseed: 1\nlr: 2e-4\n")
    with pytest.raises(UserError, match=r"line 3: key 'lr'.*line 1"):
        load(project)


def test_the_effective_yaml_gives_the_same_run_again(project: Path) -> None:
    effective = load(project, "betas=[0.8, 0.99]", "data_prefix=0.3 a 0.7 b", "lr=1e-3")
    (project / "again.yaml").write_text(effective.to_yaml())
    again = load_run_config(project / "again.yaml", "tiny", [], device=CPU, root=project)
    assert again.run == effective.run


def test_config_is_found_by_its_bare_name(project: Path) -> None:
    (project / "configs").mkdir()
    (project / "run.yaml").rename(project / "configs" / "run.yaml")
    assert load_run_config("run.yaml", "tiny", [], device=CPU, root=project).run.batch_size == 2
    with pytest.raises(UserError, match=r"other\.yaml does not exist"):
        load_run_config("other.yaml", "tiny", [], device=CPU, root=project)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=3))
def test_split_shares_sum_to_one(shares: list[float]) -> None:
    parsed = parse_split(",".join(map(str, shares)))
    assert len(parsed) == 3
    assert sum(parsed) == pytest.approx(1)
    assert parsed[0] == pytest.approx(shares[0] / sum(shares))


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.from_regex(r"[a-z]+/[a-z_]+", fullmatch=True)), min_size=1)
)
def test_blend_round_trips(pairs: list[tuple[float, str]]) -> None:
    flat = [item for pair in pairs for item in pair]
    assert parse_blend(flat) == ([path for _, path in pairs], [weight for weight, _ in pairs])
    assert parse_blend([path for _, path in pairs]) == ([path for _, path in pairs], None)


def test_float8_stands_in_the_table_with_how_it_runs(project: Path) -> None:
    effective = load(project, "fp8=tensorwise", device=CPU._replace(fp8="emulated"))
    assert effective.run.fp8 == "tensorwise"
    (row,) = [line for line in effective.table().splitlines() if line.startswith("fp8 ")]
    assert row.split() == ["fp8", "tensorwise", "command", "line"]
    assert "note: fp8: tensorwise (command line): the layers' matrices" in effective.table()
    assert "cpu emulates it" in effective.table()
    native = load(project, "fp8=rowwise", device=Device("gpu", ("bf16",), "native"))
    assert "emulates" not in native.table()
    assert "note: fp8" not in load(project, device=CPU._replace(fp8="torchao is not installed")).table()
    rewrite(project, "run.yaml", fp8=False)
    assert load(project, device=CPU._replace(fp8="torchao is not installed")).run.fp8 is False


@pytest.mark.parametrize(
    ("overrides", "device", "message"),
    [
        (["fp8=true"], CPU, "fp8: input should be False, 'tensorwise' or 'rowwise'"),
        (["fp8=rowwise"], CPU._replace(fp8="old; get a new one"), "fp8: rowwise (command line): old; get a"),
        (["fp8=rowwise", "precision=fp32"], CPU, "goes with precision bf16, not fp32 (command line)"),
        (["fp8=rowwise", "zero_stage=3"], CPU, "zero_stage 1 or 2, not 3 (command line)"),
        (["fp8=rowwise", "batch_size=1", "seq_length=40"], CPU, "and batch_size x seq_length is 40"),
    ],
)
def test_float8_that_cannot_be_is_refused(project: Path, overrides, device, message) -> None:
    with pytest.raises(UserError) as error:
        load(project, *overrides, device=device)
    assert message in str(error.value)


def test_float8_wants_sizes_that_are_multiples_of_16(project: Path) -> None:
    for sizes, what in (
        ({"dim": 40, "n_heads": 5}, "dim of "),
        ({"dim": 64, "n_heads": 8, "n_kv_heads": 1}, "width of keys and values of "),
        ({"dim": 64, "n_heads": 4, "multiple_of": 4}, "feed-forward size of "),
    ):
        path = project / "checkpoints_in" / "tiny" / "config.json"
        path.write_text(json.dumps({"n_layers": 2, "max_seq_len": 128, **sizes}))
        load(project)
        with pytest.raises(UserError, match=f"need multiples of 16.* {what}"):
            load(project, "fp8=tensorwise")


@pytest.mark.parametrize(
    ("words", "device", "overlaps", "source"),
    [
        ([], CPU, True, "deepspeed.json zero_optimization.overlap_comm"),
        ([], NPU, False, "safe on npu"),
        (["overlap_comm=True"], NPU, True, "command line"),
        (["overlap_comm=False"], CPU, False, "command line"),
    ],
)
def test_a_json_s_overlap_gives_way_to_what_is_safe_on_the_device(project, words, device, overlaps, source):
    (project / "deepspeed.json").write_text('{"zero_optimization": {"stage": 2, "overlap_comm": true}}')
    found = load(project, *words, device=device)
    assert (found.run.overlap_comm, found.sources["overlap_comm"]) == (overlaps, source)
    assert any("NaN" in note for note in found.notes) == (source == "safe on npu")


WRONG = [
    ({"fp16": {"enabled": "false"}}, "fp16.enabled: 'false' is a text"),
    ({"fp16": {"enabled": 1}}, "fp16.enabled: must be true or false"),
    ({"fp16": {"enabled": True, "initial_scale_power": 10**9}}, "no loss scale"),
    ({"fp16": {"enabled": True, "loss_scale": "8192"}}, "without quotes"),
    ({"fp16": {"hysteresis": 1.5}}, "whole number"),
    ({"fp16": True}, "fp16: must be a JSON object"),
    ({"optimizer": {"type": "AdamW", "params": [1]}}, "optimizer.params: must be a JSON object"),
    ({"optimizer": {"type": 5}}, "optimizer.type: must be a text"),
    ({"optimizer": {"params": {"betas": [0.9, "0.95"]}}}, "'0.95' is a text"),
    ({"activation_checkpointing": "yes"}, "activation_checkpointing: must be a JSON object"),
    (
        {"zero_optimization": {"reduce_bucket_size": "5e8"}},
        "reduce_bucket_size: '5e8' is a text",
    ),
    ({"zero_optimization": {"reduce_bucket_size": True}}, "must be a number"),
    ({"zero_optimization": {"reduce_bucket_size": -1}}, "0 or more"),
    ({"zero_optimization": {"overlap_comm": "off"}}, "write true or false without quotes"),
    ({"zero_optimization": {"offload_optimizer": "cpu"}}, "JSON object, such as"),
    ({"zero_optimization": {"offload_param": {"device": "gpu"}}}, "'gpu' is none of"),
    ({"zero_optimization": {"offload_param": {"buffer": 5}}}, "unknown key 'zero_optimization.offload_param"),
    ({"zero_optimization": {"leaf_module": {"classes": "Block"}}}, "must be a list of texts"),
    ({"zero_optimization": {"stage3_max_live_parameters": "1e9"}}, "'1e9' is a text"),
    ({"zero_optimization": {"zero_hpz_partition_size": 1.5}}, "whole number"),
    ({"zero_optimization": {"mics_shard_size": 8}}, "DeepSpeed has dropped MiCS"),
    ({"train_batch_size": [8]}, "train_batch_size"),
    ({"train_batch_size": "16"}, "'16' is a text"),
    ({"communication_data_type": "fp12"}, "is none of"),
    ({"flops_profiler": {"enabled": "true"}}, "flops_profiler.enabled: 'true' is a text"),
    ({"wall_clock_breakdown": float("inf")}, "no JSON"),
]


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_a_value_of_the_json_is_what_it_looks_like(project: Path, content: dict, message: str) -> None:
    (project / "deepspeed.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(message)):
        load(project)


@pytest.mark.parametrize("value", ["auto", None])
def test_auto_and_null_leave_a_key_open(project: Path, value: str | None) -> None:
    """As transformers writes them: every key and block at once."""
    blocks = {
        "fp16": ["enabled", "initial_scale_power", "hysteresis", "min_loss_scale"],
        "bf16": ["enabled"],
        "optimizer": ["type", "params"],
        "zero_optimization": ["stage", "overlap_comm", "reduce_bucket_size", "offload_optimizer"],
    }
    content = {name: dict.fromkeys(keys, value) for name, keys in blocks.items()}
    content |= dict.fromkeys(["train_batch_size", "gradient_clipping", "scheduler", "flops_profiler"], value)
    content["activation_checkpointing"] = value
    (project / "deepspeed.json").write_text(json.dumps(content))
    effective = load(project)
    assert effective.run.precision == "bf16"
    assert effective.run.zero_stage == 2
    assert effective.deepspeed == {"zero_optimization": {}}
    assert ('"auto" leaves fp16.enabled' in effective.table()) == (value == "auto")


@given(st.data())
def test_any_json_value_anywhere_is_used_or_named(tmp_path_factory, data) -> None:
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    value = data.draw(
        leaf | st.lists(leaf, max_size=2) | st.dictionaries(st.text(max_size=3), leaf, max_size=2)
    )
    content = json.loads(json.dumps(DEEPSPEED))
    place = data.draw(st.sampled_from([content, *(v for v in content.values() if isinstance(v, dict))]))
    place[data.draw(st.sampled_from(sorted(place)))] = value
    path = tmp_path_factory.mktemp("json") / "deepspeed.json"
    path.write_text(json.dumps(content))
    with contextlib.suppress(UserError):
        DeepSpeedFile(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0200", 200), ("1:30", "1:30"), ("98:2", "98:2"), ("0o17", 15), ("0x10", 16), ("1_000", 1000),
     ("1e3", 1000.0), ("-7", -7), ("1.5", 1.5), (".5", 0.5), ("190:20:30.15", "190:20:30.15"),
     ("0b11", "0b11"), ("09", 9)],
)  # fmt: skip
def test_numbers_of_yaml_are_what_they_look_like(text: str, value: object) -> None:
    assert parse_yaml(text, "x") == value


@pytest.mark.parametrize("override", [
    "data_prefix=[.nan, a, 1, b]", "data_prefix=[.inf, a, 1, b]", "data_prefix=[nan, a, 1, b]", "split=nan,1",
    "data_prefix=[1e308, a, 1e308, b]", "split=90,inf", "betas=[.nan, 0.9]", "lr=.inf",
    "train_iters=" + "9" * 5000,
])  # fmt: skip
def test_no_number_without_end_anywhere(project: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"not a finite number|not valid YAML") as raised:
        load(project, override)
    assert len(str(raised.value)) < 1000


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", [
    BOMB, "data_prefix: " + "[" * 5000, "a: &a [*a]", "? {a: 1}\n: 2", "? [a]\n: 2", "a: \0",
    "lr: " + "1" * 5000, "train_iters: 5\r\n\x1a", "deepspeed_config: no", "deepspeed_config: [a]", "<<: 3",
    "2024-02-30: 1", "lr: 2024-02-30", "lr: !!python/object/apply:os.system [true]", "- 1", "lr: [",
    "batch_size: " + "x" * 10**5, "\ufeff1: 2",
])  # fmt: skip
def test_odd_yaml_is_a_short_message(project: Path, text: str) -> None:
    (project / "run.yaml").write_text(text)
    with pytest.raises(UserError) as raised:
        load(project)
    assert len(str(raised.value)) < 1000


@given(st.text(alphabet="ab:[]{}&*-? \n0.1e\"'|>!%@,#<~", max_size=60))
def test_any_yaml_is_read_or_named(text: str) -> None:
    with contextlib.suppress(UserError):
        parse_yaml(text, "x")


def test_a_dataset_s_path_may_hold_blanks(project: Path, monkeypatch) -> None:
    monkeypatch.chdir(project)
    (project / "my data.idx").touch()
    assert load(project, "data_prefix=my data").run.data_prefix == ["my data"]
    assert load(project, "data_prefix=0.5 a 0.5 b").run.data_prefix == ["0.5", "a", "0.5", "b"]
