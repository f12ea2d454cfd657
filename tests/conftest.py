"""What many tests share, and the list of what was skipped, which ends the test command."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

REMEDIES = {
    r"openssh-server|iproute2|network namespaces need": "as root: apt-get install openssh-server iproute2",
    r"Chromium": "apt-get install chromium",
    r"C\+\+ compiler|C compiler": "apt-get install g++",
    r"root": "run as root",
    r"AVX-512|no (avx|amx|neon)": "another processor: there is no emulation of these instructions",
    r"llama": "pip install llama-cpp-python",
    r"hadolint": "put hadolint on the PATH (https://github.com/hadolint/hadolint)",
    r"serve extra": "pip install -e '.[serve]'",
    r"\.\./shared": "nothing: these compare with files that the project may not contain",
}
"""What a reason for skipping says, and what would bring the test."""
_NO_MODULE = re.compile(r"could not import '([\w.]+)'|(\w[\w-]*) is (?:optional and )?not installed")


def remedy(reason: str) -> str:
    """The command that would bring a skipped test."""
    for pattern, command in REMEDIES.items():
        if re.search(pattern, reason):
            return command
    module = _NO_MODULE.search(reason)
    return f"pip install {(module[1] or module[2]).partition('.')[0]}" if module else "see the test"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One list of what was skipped, by reason, each with what would bring it."""
    reasons = Counter(
        str(report.longrepr[2]).removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", ())
        if isinstance(report.longrepr, tuple)
    )
    if not reasons:
        return
    terminalreporter.section(f"{sum(reasons.values())} tests were skipped")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:4} {reason}\n     {remedy(reason)}")


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Corpora, the real tokenizer and golden numbers, which the project does not contain."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(
            "the folder ../shared with the original's tokenizer, corpora and golden numbers is absent"
        )
    return folder


@pytest.fixture
def amx(monkeypatch):
    """Kernels on AMX tiles: the processor's own, else emulated in plain C++ from the same source."""
    from aquila.backend.cpu_kernels import amx, gemv

    if amx.available():
        yield
        return
    monkeypatch.setenv("AQUILA_EMULATE_AMX", "1")
    caches = gemv._tile_rows, gemv._kernels
    try:
        amx.forget()
        for cache in caches:
            cache.cache_clear()
        if not amx.available():
            pytest.skip("no C++ compiler, or a processor without AVX-512 and its bf16 instructions")
        yield
    finally:
        monkeypatch.undo()
        amx.forget()
        for cache in caches:
            cache.cache_clear()
