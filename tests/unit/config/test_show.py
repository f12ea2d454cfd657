"""Protects: start-up fits a small terminal and shows what differs and what was overridden."""

from pathlib import Path

import pytest

from aquila.config import Device, RunConfig, load_run_config
from aquila.config.effective import Setting
from aquila.config.show import SUMMARY_LINES, summary, table

CPU = Device("cpu", ("bf16", "fp32"))


@pytest.mark.parametrize("name", ["Aquila-pretrain.yaml", "Aquila-pretrain-33B.yaml", "Aquila-tiny.yaml"])
def test_the_shipped_files_start_in_twenty_lines_of_eighty_columns(name: str, root: Path) -> None:
    words = ["lr=1e-3", "bmt_pre_load=False"]
    lines = load_run_config(name, "aquila-tiny", words, device=CPU, root=root).summary().splitlines()
    assert len(lines) <= SUMMARY_LINES
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:2] == ["command", "line"] and "lr=0.001" in line for line in lines)
    assert any(line.startswith("lr=0.001 (command line) overrides ") for line in lines)
    assert "--dry-run" in lines[-1]


def test_however_much_is_said_the_summary_stays_small() -> None:
    history = {
        f"a_rather_long_key_{n}": [
            Setting(0, "default"),
            Setting(1, "a.yaml"),
            Setting("x " * 80, f"{n % 9}.yaml"),
        ]
        for n in range(90)
    }
    lines = summary("title " * 30, history, ["note " * 50] * 9).splitlines()
    assert len(lines) == SUMMARY_LINES
    assert max(map(len, lines)) <= 80
    assert sum("more lines of this kind" in line for line in lines) == 3


def test_defaults_alone_say_nothing() -> None:
    history = {key: [Setting(f.get_default(), "default")] for key, f in RunConfig.model_fields.items()}
    assert len(summary("title", history, []).splitlines()) == 2


def test_a_row_that_does_not_fit_goes_on_under_its_value() -> None:
    history = {"key": [Setting(1, "default"), Setting(2, "first.yaml"), Setting("word " * 30, "second.yaml")]}
    lines = table(history, ["model tiny"], 60).splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[2].startswith("key  word")
    assert all(line.startswith("     ") for line in lines[3:-1])
    assert "overrides 2 (first.yaml)" in " ".join(" ".join(lines).split())
