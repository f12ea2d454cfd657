"""What the pages say is what the code is: keys, pictures, messages, commands, the table of what fits."""

import re
import runpy
import sys

import pytest

from aquila import plan
from aquila.config.run import RunConfig
from tests.integration.test_readme import commands

TESTED_ELSEWHERE = {
    "bash scripts/quickstart.sh": "tests/integration/test_install.py",
    "bash scripts/demo_two_nodes.sh": "tests/integration/test_launch_dist.py",
}


def test_every_key_has_its_line_and_the_page_is_of_this_code(root) -> None:
    make = runpy.run_path(str(root / "docs" / "site" / "make_pages.py"))
    page = (root / "docs" / "keys.md").read_text(encoding="utf-8")
    assert page == make["keys_page"](), "run python docs/site/make_pages.py"
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(RunConfig.model_fields)
    assert (root / "docs/pictures/architecture.svg").read_text(encoding="utf-8") == make["architecture"]()


@pytest.mark.parametrize("name", ["troubleshooting.md", "troubleshooting_zh.md"])
def test_messages_of_the_page_are_the_program_s(root, name) -> None:
    files = [*root.glob("aquila/**/*.py"), *root.glob("data_tools/*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # texts that go on in the next line
    rows = re.findall(r"^\| `([^`]+)` \|", (root / "docs" / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        for part in filter(None, (part.strip(" ';,") for part in row.split("..."))):
            assert part in source, f"{name}: no message says {part!r}"


def test_commands_of_the_pages_are_those_that_are_run(root) -> None:
    known = {*commands(root / "README.md"), *TESTED_ELSEWHERE}
    for name in ("data", "training", "clusters", "generation", "quickstart"):
        for page in (root / "docs" / f"{name}.md", root / "docs" / f"{name}_zh.md"):
            assert set(commands(page)) <= known, page
        assert commands(root / "docs" / f"{name}.md") == commands(root / "docs" / f"{name}_zh.md")


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_what_fits_is_what_the_plan_says(root, name, monkeypatch, capsys) -> None:
    pattern = r"^\| (aquila\S+) \| (\d+) x (\d+GB) \| (\d+) \| (\d+) \| (\d) \|"
    rows = re.findall(pattern, (root / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 6
    monkeypatch.chdir(root)
    for model, devices, memory, batch, layers, stage in rows:
        monkeypatch.setattr(sys, "argv", ["plan", model, "--devices", devices, "--memory", memory])
        plan.main()
        proposed = f"batch_size={batch} ckpoint_layer={layers} zero_stage={stage}"
        assert proposed in capsys.readouterr().out, f"{name}: {model} on {devices} x {memory}"
