"""The documentation builds as a site, offline, with every link inside it leading somewhere."""

import re
import subprocess
import sys

import pytest


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(root, tmp_path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?:https?:)?//[^\"]+", text), page
    (keys,) = (page for page in pages if page.name == "keys.html")
    assert "gradient_accumulation_steps" in keys.read_text(encoding="utf-8")
