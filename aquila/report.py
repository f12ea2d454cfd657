"""Draws several runs over one another into one PNG and one self-contained HTML page.

    python -m aquila.report EXP... [--output report]

EXP: experiments under checkpoints_out/ (their newest run), or run folders.
"""

import argparse
import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from aquila.core.errors import UserError, run_command
from aquila.core.files import write_atomically
from aquila.training.metrics import METRICS, read_metrics
from aquila.training.plot import draw_runs

OUTPUT = "checkpoints_out"
COLUMNS = ("run", "steps", "tokens", "first loss", "last loss", "best validation loss", "tokens/s", "MFU")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m aquila.report", description=__doc__.split("\n")[0])
    parser.add_argument("experiments", nargs="+", metavar="EXP", help="experiments or run folders")
    parser.add_argument(
        "--output", type=Path, default=Path("report"), help="without suffix (default: report)"
    )
    arguments = parser.parse_args()
    runs = {str(run): records for run, records in map(find_run, arguments.experiments)}
    png = arguments.output.with_suffix(".png")
    page = arguments.output.with_suffix(".html")
    png.parent.mkdir(parents=True, exist_ok=True)
    draw_runs(runs, png)
    svg = io.BytesIO()
    draw_runs(runs, svg, picture="svg")
    write_atomically(page, render(runs, svg.getvalue()))
    print(f"{png}\n{page}")
    return 0


def find_run(name: str) -> tuple[str, list[dict[str, Any]]]:
    """Name and records of a run folder, or of an experiment's newest run. Raises `UserError`."""
    for folder in (Path(name), Path(OUTPUT) / name):
        found = [folder / METRICS, *folder.glob(f"*/{METRICS}")]
        files = [path for path in found if path.is_file()]
        if files:
            newest = max(files, key=lambda path: path.stat().st_mtime)
            records = read_metrics(newest)
            if not any(record.get("loss") is not None for record in records):
                raise UserError(f"{newest} has no logged step yet")
            return f"{newest.parent.parent.name}/{newest.parent.name}", records
    raise UserError(f"no run {name}: neither a run folder nor an experiment under {OUTPUT}/ with {METRICS}")


def summary(records: list[dict[str, Any]]) -> list[str]:
    """The table's cells after the name."""
    valid = [record["valid_loss"] for record in records if record.get("valid_loss") is not None]
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    rates = sorted(record["tokens_per_second"] for record in records if record.get("tokens_per_second"))
    mfu = sorted(record["mfu"] for record in records if record.get("mfu"))
    return [
        f"{records[-1]['step']:,}",
        f"{records[-1]['consumed_tokens']:,}",
        f"{losses[0]:.4f}",
        f"{losses[-1]:.4f}",
        f"{min(valid):.4f}" if valid else "-",
        f"{rates[len(rates) // 2]:,.0f}" if rates else "-",
        f"{mfu[len(mfu) // 2]:.1%}" if mfu else "-",
    ]


def render(runs: dict[str, list[dict[str, Any]]], svg: bytes) -> str:
    """One page with the picture, a table and the data in it; it loads nothing."""
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in [name, *summary(records)]) + "</tr>"
        for name, records in runs.items()
    )
    data = json.dumps(runs).replace("<", "\\u003c")
    picture = base64.b64encode(svg).decode()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Aquila training report</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ padding: .35rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ width: 100%; }}
</style></head><body>
<h1>Training report</h1>
<table id="runs"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>
<img alt="loss, validation loss and throughput by step" src="data:image/svg+xml;base64,{picture}">
<script type="application/json" id="data">{data}</script>
</body></html>
"""


if __name__ == "__main__":
    run_command(main)
