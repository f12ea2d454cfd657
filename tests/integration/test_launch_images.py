"""Protects: the Dockerfiles: clean to a linter, what they copy and call is there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import launch_helpers as helpers
import pytest

FILES = sorted((helpers.ROOT / "docker").glob("Dockerfile.*"))
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
NOT_OURS = ("DL3008", "DL3033")
"""Versions of the distribution's packages: those of the base image that the user chooses."""


def instructions(path: Path) -> list[tuple[str, str]]:
    """Each instruction with its words, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


@pytest.mark.skipif(not HADOLINT, reason="hadolint is not installed")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_linter_finds_nothing(path: Path) -> None:
    words = [HADOLINT, "--failure-threshold", "warning", "--no-color"]
    ignored = [word for rule in NOT_OURS for word in ("--ignore", rule)]
    done = subprocess.run([*words, *ignored, str(path)], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_copied_and_called_is_there(path: Path) -> None:
    ignored = (helpers.ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "checkpoints_out"} <= set(ignored)  # else `COPY . .` buries what was installed
    present: set[str] = set()
    for name, words in instructions(path):
        if name == "COPY":
            *sources, _ = words.split()
            for source in sources:
                assert (helpers.ROOT / source).exists(), source
                present.add(source)
        if name == "RUN":
            syntax = subprocess.run(["sh", "-n", "-c", words], text=True, capture_output=True)
            assert syntax.returncode == 0, syntax.stderr
            for script in re.findall(r"bash (scripts/\S+\.sh)", words):
                assert script in present
                assert {"requirements", "scripts/common.sh"} <= present
            for device, options in re.findall(r"install\.sh (\w+)(.*)$", words):
                assert device == path.suffix[1:]
                assert options.strip() in ("", "--system-torch")
    assert any(name == "RUN" and "install.sh" in words for name, words in instructions(path))


@pytest.mark.slow
def test_the_installer_runs_on_what_the_images_copy_first(tmp_path: Path) -> None:
    """Packages are installed before the code is copied: install.sh needs nothing but its lists beside it."""
    for source in ("requirements", "scripts/install.sh", "scripts/common.sh"):
        target = tmp_path / source
        target.parent.mkdir(parents=True, exist_ok=True)
        whole = helpers.ROOT / source
        shutil.copytree(whole, target) if whole.is_dir() else shutil.copy(whole, target)
    done = subprocess.run(
        ["bash", "scripts/install.sh", "cpu", "--system-torch"],
        cwd=tmp_path, env={**helpers.environment(tmp_path), "PYTHON": sys.executable, "PYTHONPATH": ""},
        text=True, capture_output=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "installed into" in done.stdout
