"""Several runs in one picture and one page that loads nothing."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aquila.training.plot import draw_runs

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


@pytest.fixture(scope="module")
def report(tmp_path_factory, root: Path) -> Path:
    """A folder with two runs and the report on them."""
    folder = tmp_path_factory.mktemp("report")
    for experiment, floor in (("first", 2.0), ("<second>", 1.5)):
        run = folder / "checkpoints_out" / experiment / "2024010100"
        run.mkdir(parents=True)
        records = [
            {
                "step": s,
                "loss": floor + 5 / s,
                "tokens_per_second": 100 + s,
                "mfu": None,
                "consumed_tokens": s * 64,
            }
            for s in range(1, 50)
        ]
        records[20]["valid_loss"] = floor + 0.1
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = [sys.executable, "-m", "aquila.report", "first", "<second>", "--output", "out/report"]
    done = subprocess.run(command, cwd=folder, env=_environment(root), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def _environment(root: Path) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(root)}


def test_the_picture_is_a_png(report: Path) -> None:
    assert (report / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_tells_every_run_and_loads_nothing(report: Path) -> None:
    page = (report / "out" / "report.html").read_text()
    assert "first/2024010100" in page
    assert "&lt;second&gt;/2024010100" in page
    assert "2.1020" in page  # last loss of the first run: 2 + 5 / 49
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    data = re.search(r'id="data">(.*?)</script>', page).group(1)
    assert len(json.loads(data)["first/2024010100"]) == 49


def browse(page: Path, folder: Path, *options: str) -> bytes:
    """What a headless Chromium prints."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-sync", "--disable-component-update",
        f"--user-data-dir={folder / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_a_browser_shows_it(report: Path, tmp_path: Path) -> None:
    shot = tmp_path / "page.png"
    browse(report / "out" / "report.html", tmp_path, "--window-size=1200,1400", f"--screenshot={shot}")
    from matplotlib.image import imread

    pixels = imread(shot)[..., :3]
    assert pixels.shape[:2] == (1400, 1200)
    assert pixels.std() > 0.05  # something is drawn


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_nothing_runs_off_a_phone(report: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    measure = "<script>document.title = 'wide ' + document.documentElement.scrollWidth</script>"
    text = (report / "out" / "report.html").read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", f"{measure}</body>"), encoding="utf-8")
    seen = browse(page, tmp_path, "--window-size=500,900", "--dump-dom").decode()  # Chromium's narrowest
    assert int(re.search(r"<title>wide (\d+)", seen)[1]) <= 500


def test_letters_of_an_svg_stay_letters(tmp_path: Path) -> None:
    records = [{"step": step, "loss": 1.0, "valid_losses": {"中文": 1.0}} for step in (1, 2)]
    draw_runs({"run": records}, tmp_path / "p.svg", picture="svg")
    assert "中文</text>" in (tmp_path / "p.svg").read_text(encoding="utf-8")


def test_an_unknown_run_is_the_users_mistake(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-m", "aquila.report", "nothing"]
    done = subprocess.run(command, cwd=tmp_path, env=_environment(root), capture_output=True, text=True)
    assert done.returncode == 2
    assert "no run nothing" in done.stderr


def write_run(folder: Path, name: str, records: list[dict], starts: list[dict]) -> Path:
    run = folder / "checkpoints_out" / name / "2024010100"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "history.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    return run


def test_settings_losses_restarts_and_goodput_side_by_side(tmp_path: Path, root: Path) -> None:
    step = {"tokens_per_second": 10.0, "step_seconds": 2.0, "learning_rate": 0.1}
    records = [
        {"step": 0, "valid_loss": 7.0, "valid_losses": {"code": 6.0}, "time": 1000.0, "consumed_tokens": 0},
        {"step": 1, "loss": 6.5, **step, "time": 1002.0, "consumed_tokens": 64},
        {"step": 4, "loss": 5.5, **step, "time": 1010.0, "consumed_tokens": 256,
         "train_losses": {"a": 5.0, "b": 6.0}},
        {"step": 5, "skipped": True, "time": 1011.0, "consumed_tokens": 320},
        {"step": 6, "loss": 5.0, **step, "time": 1040.0, "consumed_tokens": 384, "valid_loss": 5.2,
         "valid_losses": {"code": 5.9}, "valid_bits_per_byte": {"code": 1.25}},
    ]  # fmt: skip
    config = {"lr": 0.1, "data_prefix": ["a"], "resume": "auto"}
    starts = [
        {"step": 0, "time": 1000.0, "world_size": 2, "model": "m", "config": config,
         "model_config": {"dim": 8}},
        {"step": 4, "time": 1020.0, "devices": "4 x CPU", "commit": "abc123", "parameters": 1234567,
         "model": "m", "config": {**config, "lr": 0.2},
         "model_config": {"dim": 8}},
    ]  # fmt: skip
    run = write_run(tmp_path, "one", records, starts)
    (run / "lm_eval.jsonl").write_text('{"step": 4, "lm_eval": {"sums/acc": 0.75}}\n')
    write_run(tmp_path, "two", records[1:3], [{**starts[0], "config": {**config, "data_prefix": ["<b>"]}}])
    command = [sys.executable, "-m", "aquila.report", "one", "two", "--output", "report"]
    done = subprocess.run(command, cwd=tmp_path, env=_environment(root), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "report.json").read_text())
    one = told["runs"]["one/2024010100"]
    assert one["valid_losses"]["code"] == {"first": 6.0, "last": 5.9, "best": 5.9}
    assert one["valid_loss"] == {"first": 7.0, "last": 5.2, "best": 5.2}
    assert one["train_losses"] == {"a": 5.0, "b": 6.0}
    assert one["lm_eval"]["lm_eval"] == {"sums/acc": 0.75}
    assert one["starts"] == [0, 4]
    assert one["step_seconds"] == 2 * (1 + 3 + 1)  # not the skipped one
    assert one["goodput"] == pytest.approx(10 / 40)
    assert told["differing"] == {
        "lr": ["0.2", "0.1"],
        "data_prefix": ['["a"]', '["<b>"]'],
        "devices": ["4 x CPU", "2"],
    }
    assert told["changes"]["one/2024010100"] == [[4, "lr", "0.1", "0.2"], [4, "devices", "2", "4 x CPU"]]
    page = (tmp_path / "report.html").read_text()
    for text in (
        "Settings that differ",
        "last validation loss, code",
        "25.0%",
        "[&quot;&lt;b&gt;&quot;]",
        "0.7500",
        "m, 1,234,567 parameters",
        "abc123",
    ):
        assert text in page
    assert json.loads(re.search(r'id="numbers">(.*?)</script>', page).group(1)) == told["runs"]
