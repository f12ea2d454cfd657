"""What many tests share."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
