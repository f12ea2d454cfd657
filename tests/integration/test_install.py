"""Protects: installing from a fresh clone, again in no time, and without any network from a wheelhouse."""

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bash(folder: Path, *words: str, prefix: tuple[str, ...] = (), **environment: str):
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "AQUILA_PYTHON", "VIRTUAL_ENV")}
    return subprocess.run(
        [*prefix, "bash", *words],
        cwd=folder, env={**kept, **environment}, text=True, capture_output=True, timeout=900,
    )  # fmt: skip


def clone(folder: Path) -> Path:
    """The project's files as they are now, without what an install or a run has made."""
    project = folder / "a clone"
    for name in ("aquila", "scripts", "requirements"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, project / name, ignore=ignore)
    shutil.copy(ROOT / "setup.py", project)
    return project


def fake_python(folder: Path, script: str) -> Path:
    """A `python3` on a PATH of its own that behaves as the script says."""
    folder.mkdir()
    for tool in ("bash", "dirname", "cksum", "grep", "cat", "mkdir", "flock", "uname"):
        (folder / tool).symlink_to(shutil.which(tool))
    path = folder / "python3"
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return path


def test_another_system_than_linux_is_one_line(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin", "exit 0")
    (tmp_path / "bin" / "uname").unlink()
    (tmp_path / "bin" / "uname").write_text("#!/bin/bash\necho Darwin\n")
    (tmp_path / "bin" / "uname").chmod(0o755)
    done = bash(clone(tmp_path), "scripts/install.sh", PATH=str(tmp_path / "bin"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: this is Darwin, and the project runs on Linux alone")


def test_too_old_a_python_is_named(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin", 'case "$*" in *version_info*) exit 1;; *) echo 3.8.10;; esac')
    done = bash(clone(tmp_path), "scripts/install.sh", "cpu", PATH=str(tmp_path / "bin"))
    assert done.returncode == 2
    assert "no Python 3.10 to 3.13 found, only: python3 (3.8.10)" in done.stderr


def test_a_missing_venv_module_says_what_to_install(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin", 'case "$*" in *ensurepip*) exit 1;; *) exit 0;; esac')
    done = bash(clone(tmp_path), "scripts/install.sh", "cpu", PATH=str(tmp_path / "bin"))
    assert done.returncode == 2
    assert "python3-venv" in done.stderr


def test_a_missing_compiler_says_what_to_install(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin", "exit 0")
    done = bash(clone(tmp_path), "scripts/install.sh", "cpu", PATH=str(tmp_path / "bin"))
    assert done.returncode == 2
    assert "no C++ compiler" in done.stderr


def test_wrong_words(tmp_path: Path) -> None:
    project = clone(tmp_path)
    assert "unknown argument 'gpu'" in bash(project, "scripts/install.sh", "gpu").stderr
    assert "does not exist" in bash(project, "scripts/install.sh", "--wheelhouse", "absent").stderr
    assert (
        "is not x86_64"
        in bash(project, "scripts/make_wheelhouse.sh", "cpu", "--platform", "s390x", "d").stderr
    )
    assert not (project / ".venv").exists()


def test_the_machine_s_own_torch_is_kept(tmp_path: Path) -> None:
    """As on a vendor's image: nothing that install.sh brings replaces the torch that is there."""
    project = clone(tmp_path)
    own = ROOT / ".venv" / "bin" / "python"
    done = bash(project, "scripts/install.sh", "cpu", "--system-torch", PYTHON=str(own))
    assert done.returncode == 0, done.stderr
    python = project / ".venv" / "bin" / "python"
    where = subprocess.run(
        [python, "-c", "import torch; print(torch.__file__)"], text=True, capture_output=True
    )
    assert str(ROOT / ".venv") in where.stdout
    assert not list((project / ".venv").rglob("torch-*.dist-info"))
    refused = bash(
        clone(tmp_path / "2"), "scripts/install.sh", "cpu", "--system-torch", PYTHON="/usr/bin/python3"
    )
    assert refused.returncode == 2
    assert "cannot import torch" in refused.stderr or "Python's headers" in refused.stderr


def package_index(folder: Path, name: str, *needs: str) -> str:
    """A package index with one wheel of torch, of the release that is asked for: empty, but pip takes it."""
    version = (ROOT / "requirements" / "torch.txt").read_text().strip().removeprefix("torch==")
    (folder / name / "torch").mkdir(parents=True)
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / name / "torch" / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        requires = "".join(f"Requires-Dist: {need}\n" for need in needs)
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n{requires}"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    page = "".join(f"<a href='{path.name}'>x</a>" for path in (folder / name / "torch").iterdir())
    (folder / name / "torch" / "index.html").write_text(page)
    return f"file://{folder / name}"


CUDA = 'nvidia-nccl-cu13==2.29.7; platform_system == "Linux" and platform_machine == "x86_64"'
UNREACHABLE = "http://127.0.0.1:9/whl/cpu"


@pytest.mark.parametrize(
    ("device", "machine", "index_has", "pytorch_has", "chosen"),
    [
        ("cpu", "x86_64", (), None, ""),
        ("cpu", "x86_64", (CUDA,), (), "--index-url PYTORCH"),
        ("cpu", "x86_64", (CUDA,), None, ""),
        ("cpu", "aarch64", (CUDA,), None, ""),
        ("cuda", "x86_64", (CUDA,), (), ""),
        ("npu", "x86_64", (CUDA,), (), "--index-url PYTORCH"),
        ("npu", "aarch64", (), None, ""),
    ],
)
def test_where_torch_comes_from(tmp_path: Path, device, machine, index_has, pytorch_has, chosen) -> None:
    """A CPU build where there is one, else the CUDA build: real pip, on indexes in folders."""
    pytorch = UNREACHABLE if pytorch_has is None else package_index(tmp_path, "pytorch", *pytorch_has)
    done = choose_torch(tmp_path, device, machine, package_index(tmp_path, "index", *index_has), pytorch)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"from {chosen.replace('PYTORCH', pytorch)}"
    cuda_taken = device == "cpu" and machine == "x86_64" and index_has and pytorch_has is None
    assert ("taking the CUDA build" in done.stdout) == bool(cuda_taken)


def choose_torch(folder: Path, device: str, machine: str, index: str, pytorch: str, **environment: str):
    script = (
        f"source scripts/common.sh; PYTORCH_CPU_WHEELS='{pytorch}'; "
        f"choose_torch {device} '{folder}/venv/bin/python' {machine}; echo \"from ${{torch_from[*]}}\""
    )
    subprocess.run([ROOT / ".venv/bin/python", "-m", "venv", "--without-pip", folder / "venv"], check=True)
    # pip, but no torch: as in a .venv that install.sh has just made.
    pip = subprocess.run(
        [ROOT / ".venv/bin/python", "-c", "import pip; print(pip.__path__[0])"],
        text=True,
        capture_output=True,
    ).stdout.strip()
    packages = next((folder / "venv").glob("lib/python*/site-packages"))
    (packages / "pip").symlink_to(pip)
    own = {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": index,
        "PIP_FIND_LINKS": "",
        "TORCH_INDEX_URL": "",
    }
    return bash(ROOT, "-euo", "pipefail", "-c", script, **{**own, **environment})


def test_an_npu_never_gets_the_cuda_build(tmp_path: Path) -> None:
    done = choose_torch(tmp_path, "npu", "x86_64", package_index(tmp_path, "index", CUDA), UNREACHABLE)
    assert done.returncode == 2
    assert "which torch_npu refuses" in done.stderr
    assert "set TORCH_INDEX_URL" in done.stderr


def test_torch_index_url_wins(tmp_path: Path) -> None:
    done = choose_torch(
        tmp_path,
        "cpu",
        "x86_64",
        package_index(tmp_path, "index"),
        UNREACHABLE,
        TORCH_INDEX_URL="http://mine",
    )
    assert done.stdout.splitlines()[-1] == "from --index-url http://mine"


def test_deepspeed_is_built_without_looking_at_the_device() -> None:
    """With a GPU and no CUDA toolkit its setup.py would end with MissingCUDAException."""
    for name in ("install.sh", "make_wheelhouse.sh"):
        text = (ROOT / "scripts" / name).read_text()
        assert text.count("DS_BUILD_OPS=0") == text.count("DS_BUILD_OPS=0 DS_ACCELERATOR=cpu") == 1


@pytest.mark.slow
def test_a_wheelhouse_installs_without_any_network(tmp_path: Path) -> None:
    """Collected with this project's own Python, installed in a network namespace with no way out."""
    isolated = ("unshare", "-n")
    if subprocess.run([*isolated, "true"], capture_output=True).returncode:
        pytest.skip("network namespaces need root")
    project = clone(tmp_path)
    (project / ".venv").symlink_to(ROOT / ".venv")
    made = bash(project, "scripts/make_wheelhouse.sh", "cpu", "wheels")
    assert made.returncode == 0, made.stderr
    (project / ".venv").unlink()

    done = bash(project, "scripts/install.sh", "cpu", "--dev", "--wheelhouse", "wheels", prefix=isolated)
    assert done.returncode == 0, done.stderr
    imports = (
        "import torch, deepspeed, fastapi, zstandard, pytest; print(torch.__version__, torch.version.cuda)"
    )
    python = project / ".venv" / "bin" / "python"
    told = subprocess.run([python, "-c", imports], text=True, capture_output=True, timeout=120)
    assert told.stdout.splitlines()[-1].startswith("2.13.0")
    assert told.stdout.strip().endswith("None")  # no CUDA packages on a CPU machine

    again = bash(project, "scripts/install.sh", "cpu", prefix=isolated)
    assert again.returncode == 0
    assert "up to date" in again.stdout
