"""Every reader of foreign input ends with a result or a refusal, in bounded memory, whatever it is given.

A few seconds for each reader here, always the same inputs; `scripts/fuzz.sh MINUTES` tries new ones for as
long as it is told. An input that was once a fault is kept in `corpus/READER/` and tried in every run.
"""

import hashlib
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings

from tests.fuzz.mutation import damaged
from tests.fuzz.targets import REFUSALS, TARGETS, Target

CORPUS = Path(__file__).parent / "corpus"
MEMORY = 1 << 30
"""Bytes that one input of a few kilobytes may take."""
HUNG = 120
"""Seconds after which a reader that has not answered never will."""
LONG = int(os.environ.get("AQUILA_FUZZ_EXAMPLES", "0"))
SEED = int(os.environ.get("AQUILA_FUZZ_SEED", "0"))


@contextmanager
def bounded() -> Iterator[None]:
    """Within it no more than `MEMORY` can be allocated, and no more than `HUNG` seconds pass."""

    def hung(*_: object) -> None:
        raise TimeoutError(f"no answer within {HUNG} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text()
    used = int(status.split("VmData:")[1].split()[0]) * 1024
    before = signal.signal(signal.SIGALRM, hung)
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, hard))
    signal.alarm(HUNG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def attempt(target: Target, data: bytes, folder: Path) -> None:
    """Gives `data` to a reader, in an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with bounded(), suppress(*REFUSALS):
        target.read(data, folder)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_any_damage_is_read_or_refused(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]

    @seed(SEED)
    @settings(
        max_examples=LONG or target.examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(target.seeds))
    def check(data: bytes) -> None:
        try:
            attempt(target, data, tmp_path / "run")
        except BaseException:
            last[:] = [data]
            raise

    last: list[bytes] = []
    try:
        check()
    except BaseException:
        if last and LONG:
            found = CORPUS / name / hashlib.sha256(last[0]).hexdigest()[:12]
            found.parent.mkdir(parents=True, exist_ok=True)
            found.write_bytes(last[0])
        raise


@pytest.mark.parametrize(
    "path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_inputs_that_once_were_faults(path: Path, tmp_path: Path) -> None:
    attempt(TARGETS[path.parent.name], path.read_bytes(), tmp_path / "run")


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_valid_inputs_are_read(name: str, tmp_path: Path) -> None:
    """A target that refuses its own seeds would find nothing."""
    target = TARGETS[name]
    for number, data in enumerate(target.seeds):
        folder = tmp_path / str(number)
        folder.mkdir()
        target.read(data, folder)
