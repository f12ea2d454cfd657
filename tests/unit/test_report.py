"""Several runs in one picture and one page that loads nothing."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_a_browser_shows_it(report: Path, tmp_path: Path) -> None:
    shot = tmp_path / "page.png"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    options += ["--disable-sync", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"]
    page = (report / "out" / "report.html").as_uri()
    command = [CHROMIUM, *options, "--window-size=1200,1400", f"--screenshot={shot}", page]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    from matplotlib.image import imread

    pixels = imread(shot)[..., :3]
    assert pixels.shape[:2] == (1400, 1200)
    assert pixels.std() > 0.05  # something is drawn


def test_an_unknown_run_is_the_users_mistake(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-m", "aquila.report", "nothing"]
    done = subprocess.run(command, cwd=tmp_path, env=_environment(root), capture_output=True, text=True)
    assert done.returncode == 2
    assert "no run nothing" in done.stderr
