"""Two corpora of real text that every copy of the project has, and a task of the harness on one of them.

    python examples/make_corpora.py FOLDER

prose: the paragraphs of the documentation; code: the functions and classes of the package. Every tenth
document is held out. The task: which of three words stands next in a held-out paragraph.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TASK = """\
task: example_words
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def main() -> None:
    folder = Path(sys.argv[1])
    pages = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
    prose = [
        part.strip() for page in pages for part in re.split(r"\n\s*\n", page.read_text(encoding="utf-8"))
    ]
    sources = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("aquila/**/*.py"))]
    code = [part.strip() for source in sources for part in re.split(r"\n(?=def |class )", source)]
    for name, documents in (("prose", prose), ("code", code)):
        documents = [text for text in documents if len(text) > 80]
        write(folder / f"{name}.jsonl", [{"text": text} for i, text in enumerate(documents) if i % 10])
        write(folder / f"{name}_valid.jsonl", [{"text": text} for text in documents[::10]])
        if name == "prose":
            make_task(folder / "tasks", documents[::10])


def make_task(folder: Path, documents: list[str]) -> None:
    """Questions of 40 characters or so, their next word, and two words of other paragraphs."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [re.match(r"([A-Z].{30,60}?)( \w{3,})", text) for text in documents]
    pairs = [match.groups() for match in found if match][:12]
    words = [word for _, word in pairs]
    items = []
    for number, (question, word) in enumerate(pairs):
        options = [word, words[(number + 1) % len(words)], words[(number + 2) % len(words)]]
        items.append({"question": question, "options": options, "answer": 0})
    write(folder / "words.jsonl", items)
    (folder / "example_words.yaml").write_text(TASK.format(data=(folder / "words.jsonl").resolve()))


def write(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
