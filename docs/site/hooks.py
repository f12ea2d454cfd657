"""What MkDocs does with these pages beyond its own: README as front page, an API reference, links outside.

`mkdocs build` with `mkdocs.yml` makes the site from the same files that are read in the repository.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("config", "data", "tokenizer", "model", "backend", "training", "training/deepspeed", "generation",
         "launch", "preflight", "planning", "core")  # fmt: skip
FRONT = {"README.md": "index.md", "README_zh.md": "index_zh.md"}


def on_files(files: Files, config: Any) -> Files:
    """Adds the front pages and a page for each room of the package."""
    for name, page in FRONT.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        text = re.sub(r"\]\(docs/", "](", text.replace('src="docs/', 'src="'))
        for other, target in FRONT.items():
            text = text.replace(f"]({other})", f"]({target})")
        files.append(File.generated(config, page, content=_inside(text, ROOT / "docs")))
    for room in ROOMS:
        modules = sorted((ROOT / "aquila" / room).glob("*.py"))
        names = [
            f"aquila.{room.replace('/', '.')}.{path.stem}" for path in modules if path.stem != "__init__"
        ]
        text = f"# aquila/{room}\n\n" + "".join(f"::: {name}\n\n" for name in names)
        files.append(File.generated(config, f"api/{room.replace('/', '_')}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files that are not pages of the site become their names."""
    return _inside(markdown, (ROOT / "docs" / page.file.src_uri).parent)


def _inside(text: str, folder: Path) -> str:
    def named(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        path = target.partition("#")[0]
        if not path or "://" in path or path in FRONT.values() or (folder / path).suffix == ".svg":
            return match[0]
        file = (folder / path).resolve()
        inside = file.exists() and file.is_relative_to(ROOT / "docs")
        return match[0] if inside else f"{words} (`{path.removeprefix('../')}`)"

    return re.sub(r"(?<!!)\[([^\]\n]+)\]\(([^)\s]+)\)", named, text)
