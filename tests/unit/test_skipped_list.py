"""The list of skipped tests at the end of the test command."""

import subprocess
import sys

import pytest

from tests.conftest import remedy


@pytest.mark.parametrize(
    ("reason", "command"),
    [
        ("openssh-server is not installed", "as root: apt-get install openssh-server iproute2"),
        ("no Chromium on this machine", "apt-get install chromium"),
        ("could not import 'kubeflow.training.models': No module named 'kubeflow'", "pip install kubeflow"),
        ("lm-eval is not installed", "pip install lm-eval"),
        ("wandb is optional and not installed", "pip install wandb"),
        ("this processor or compiler has no avx512_bf16", "another processor"),
    ],
)
def test_each_reason_has_a_remedy(reason, command):
    assert remedy(reason).startswith(command)


def test_what_was_skipped_is_listed_once_with_its_number(root, tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n\n"
        "@pytest.mark.parametrize('i', range(3))\n"
        "def test_pages(i):\n    pytest.skip('no Chromium on this machine')\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.conftest",
        str(tmp_path),
        "--rootdir",
        str(tmp_path),
    ]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout
    assert "3 tests were skipped" in output
    assert "   3 no Chromium on this machine\n     apt-get install chromium\n" in output
