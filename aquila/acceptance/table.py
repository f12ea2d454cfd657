"""Results of checks: one line each, and a paragraph at the end."""

import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"


class Skip(Exception):  # noqa: N818 - not an error
    """Raised by a check that does not apply here; its text says why."""


@dataclass(frozen=True)
class Measured:
    """What a check found. `limit` None: nothing to compare with, the value is for people."""

    value: float
    limit: float | None = None
    unit: str = ""
    at_least: bool = False
    """Whether `limit` is the least allowed value; else it is the greatest."""
    detail: str = ""

    @property
    def holds(self) -> bool:
        if self.limit is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    stage: str
    name: str
    state: str
    value: float | None = None
    limit: float | None = None
    unit: str = ""
    at_least: bool = False
    detail: str = ""

    def line(self) -> str:
        value = "" if self.value is None else f"{self.value:.4g}{self.unit and ' ' + self.unit}"
        sign = "" if self.limit is None else f"{'>=' if self.at_least else '<='} {self.limit:.4g}"
        return (
            f"{self.state}  {self.stage + ': ' + self.name:46} {value:>16}  {sign:12} {self.detail}".rstrip()
        )


@dataclass
class Table:
    """Runs checks in order and prints each outcome at once."""

    show: Callable[[str], None] = print
    results: list[Result] = field(default_factory=list)

    def failed(self, *stages: str) -> bool:
        """Whether any check of these stages failed."""
        return any(result.state == FAIL and result.stage in stages for result in self.results)

    def check(
        self, stage: str, name: str, function: Callable[[], Measured], *, needs: tuple[str, ...] = ()
    ) -> None:
        """Runs one check. It is skipped where a check of a stage in `needs` failed.

        Whatever the check raises is its failure: acceptance goes on to the next one.
        """
        if broken := [stage for stage in needs if self.failed(stage)]:
            self._add(Result(stage, name, SKIP, detail=f"needs {', '.join(broken)}, which failed"))
            return
        try:
            found = function()
        except Skip as reason:
            self._add(Result(stage, name, SKIP, detail=str(reason)))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[-300:]
            place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
            self._add(Result(stage, name, FAIL, detail=f"{type(error).__name__}: {text} ({place})"))
        else:
            state = PASS if found.holds else FAIL
            self._add(Result(stage, name, state, **asdict(found)))

    def _add(self, result: Result) -> None:
        self.results.append(result)
        self.show(result.line())

    def counts(self) -> dict[str, int]:
        """How many passed, failed, were skipped."""
        return {state: sum(r.state == state for r in self.results) for state in (PASS, FAIL, SKIP)}

    def paragraph(self, machine: dict[str, Any]) -> str:
        """What a README may say of this machine."""
        counts = self.counts()
        speeds = "; ".join(
            f"{r.name} {r.value:.4g} {r.unit}".rstrip()
            for r in self.results
            if r.stage == "speed" and r.value is not None
        )
        facts = ", ".join(f"{key} {value}" for key, value in machine.items() if value)
        failing = ", ".join(f"{r.stage}: {r.name}" for r in self.results if r.state == FAIL)
        return (
            f"Accepted on {facts}: {counts[PASS]} checks passed, {counts[FAIL]} failed, {counts[SKIP]} were "
            f"skipped." + (f" Failed: {failing}." if failing else "") + (f" {speeds}." if speeds else "")
        )
