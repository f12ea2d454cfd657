"""Writes what of the documentation is made from the code: the page of all run keys, and the pictures.

python docs/site/make_pages.py                       docs/keys.md and docs/pictures/architecture.svg
python docs/site/make_pages.py METRICS.jsonl         also docs/pictures/quickstart.svg, from a run
"""

import ast
import json
import sys
from pathlib import Path

from aquila.training.plot import valid_curves

DOCS = Path(__file__).resolve().parents[1]
SOURCE = DOCS.parent / "aquila" / "config" / "run.py"

HEAD = """# Every key of a run

Made from `aquila/config/run.py` by `python docs/site/make_pages.py`. A key stands in the YAML file or behind
the command as `key=value`; the later of defaults, `deepspeed.json`, YAML and `key=value` wins. A key that is
unknown or has another type ends the start with status 2 and the nearest known name.
"""


def keys_page() -> str:
    """A table for each section of `RunConfig`: key, type, default, meaning."""
    text = SOURCE.read_text(encoding="utf-8")
    lines = text.splitlines()
    (run,) = (n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == "RunConfig")
    sections = {at: line.strip()[2:] for at, line in enumerate(lines, 1) if line.startswith("    # ")}
    parts, told = [HEAD], 0
    for field, meaning in zip(run.body[:-1], run.body[1:], strict=True):
        if not isinstance(field, ast.AnnAssign) or not isinstance(meaning, ast.Expr):
            continue
        for at in [at for at in sections if told < at < field.lineno]:
            parts.append(f"\n## {sections[at]}\n\n| key | type | default | meaning |\n|---|---|---|---|\n")
            told = at
        cells = (field.target, field.annotation, _default(field.value))
        name, kind, default = (ast.unparse(cell).replace("|", "\\|") for cell in cells)
        words = " ".join(ast.literal_eval(meaning.value).split()).replace("|", "\\|")
        parts.append(f"| `{name}` | `{kind}` | `{default}` | {words} |\n")
    return "".join(parts)


def _default(value: ast.expr | None) -> ast.expr:
    """What `Field(default, ...)` holds."""
    if isinstance(value, ast.Call) and value.args:
        return value.args[0]
    return value or ast.Constant("needed")


BOXES = (
    (20, "corpus", "JSONL, Parquet, text", "data_tools"),
    (190, ".bin and .idx", "Megatron's format", "aquila/data"),
    (360, "batches", "tokens, labels, masks", "aquila/data"),
    (530, "model and loss", "one backend a device", "aquila/model, backend"),
    (700, "step", "DeepSpeed, ZeRO 1 to 3", "aquila/training"),
    (870, "checkpoint", "is a model folder", "aquila/training"),
)
AROUND = (
    (20, 485, "launch: hostfile, ssh, agents, ranks, faults", "aquila/launch"),
    (525, 475, "preflight and plan: every mistake before a rank starts", "aquila/preflight, planning"),
)
AFTER = (
    (530, "generate.py", "talk, serve"),
    (700, "evaluate, report", "loss, pages"),
    (870, "convert", "HF, GGUF"),
)
STYLE = """<style>
text { font-family: system-ui, "Noto Sans", sans-serif; text-anchor: middle; fill: #1a1a1a }
.b { fill: #eef3fb; stroke: #4a6fa5 } .a { fill: #f6f1e7; stroke: #a5894a }
.g { fill: #edf7ee; stroke: #4a9a58 } .t { font-size: 14px; font-weight: 600 } .s { font-size: 11px }
.l { stroke: #555; stroke-width: 1.5; fill: none }
@media (prefers-color-scheme: dark) { text { fill: #eee } .b { fill: #22304a } .a { fill: #3a3222 }
.g { fill: #22382a } .l { stroke: #bbb } }
</style>"""


def architecture() -> str:
    """The way of the data, and the rooms around it, as SVG that follows the reader's light or dark scheme."""
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1020 300" role="img">', STYLE]
    parts.append("<title>The way of the data, from a corpus to a checkpoint and what reads it</title>")
    parts.append('<defs><marker id="p" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">')
    parts.append('<path d="M0,0 L8,4 L0,8 z" fill="#777"/></marker></defs>')
    for x, width, title, room in AROUND:
        parts.append(_box("a", x, 15, width, 54, title, room))
    for x, title, what, room in BOXES:
        parts.append(_box("b", x, 105, 140, 78, title, what, room))
    for x in (160, 330, 500, 670, 840):
        parts.append(f'<path class="l" d="M{x},144 h26" marker-end="url(#p)"/>')
    for x, title, what in AFTER:
        parts.append(_box("g", x, 225, 140, 54, title, what))
        parts.append(f'<path class="l" d="M940,183 V204 H{x + 70} V222" marker-end="url(#p)"/>')
    return "\n".join([*parts, "</svg>", ""])


def _box(kind: str, x: int, y: int, width: int, height: int, title: str, *lines: str) -> str:
    middle = x + width / 2
    rows = [f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>']
    rows.append(f'<text class="t" x="{middle}" y="{y + 23}">{title}</text>')
    rows += [
        f'<text class="s" x="{middle}" y="{y + 42 + 19 * i}">{line}</text>' for i, line in enumerate(lines)
    ]
    return "\n".join(rows)


def loss_curve(records: list[dict]) -> str:
    """Training loss as a line and validation loss as dots, in the same style."""
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    last, top = train[-1][0], max(loss for _, loss in train)

    def place(point: tuple[int, float]) -> str:
        return f"{60 + 640 * point[0] / last:.1f},{230 - 200 * point[1] / top:.1f}"

    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 270" role="img">', STYLE]
    parts.append(f"<title>Loss of the quickstart: {train[0][1]:.2f} to {train[-1][1]:.2f}</title>")
    for loss in range(0, int(top) + 1):
        y = place((0, loss)).split(",")[1]
        parts.append(f'<path class="l" opacity="0.2" d="M60,{y} H700"/>')
        parts.append(f'<text class="s" x="45" y="{y}" dy="4">{loss}</text>')
    for step in range(0, last + 1, max(1, last // 4)):
        x = place((step, 0)).split(",")[0]
        parts.append(f'<text class="s" x="{x}" y="248">{step}</text>')
    parts.append(
        f'<polyline fill="none" stroke="#4a6fa5" stroke-width="2" points="{" ".join(map(place, train))}"/>'
    )
    for point in valid_curves(records).get("", []):
        x, y = place(point).split(",")
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="#d9822b"/>')
    parts.append('<text class="s" x="380" y="266">optimizer step</text>')
    parts.append('<text class="s" x="560" y="45">line: training loss, nats a token; dots: validation</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    (DOCS / "keys.md").write_text(keys_page(), encoding="utf-8")
    pictures = DOCS / "pictures"
    pictures.mkdir(exist_ok=True)
    (pictures / "architecture.svg").write_text(architecture(), encoding="utf-8")
    for name in sys.argv[1:]:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        (pictures / "quickstart.svg").write_text(loss_curve(records), encoding="utf-8")


if __name__ == "__main__":
    main()
