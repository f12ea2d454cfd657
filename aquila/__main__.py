"""Every command of the project with one line each; completion for the shell.

python -m aquila
source <(python -m aquila completion bash)        # or: completion zsh
"""

import argparse
import re
import sys
from pathlib import Path

from aquila.config import RunConfig
from aquila.core.errors import run_command
from aquila.core.paths import ROOT

GROUPS = {
    "first": {
        "scripts/install.sh": "makes .venv for this machine",
        "scripts/quickstart.sh": "from a fresh clone to talking",
        "scripts/run_tests.sh": "lint and tests",
        "aquila/accept.py": "checks a new machine",
    },
    "data": {
        "data_tools/make_indexed_dataset.sh": "text to an indexed dataset",
        "data_tools/verify_dataset.py": "checks datasets byte by byte",
        "data_tools/inspect_dataset.py": "looks into a dataset",
        "data_tools/merge_datasets.py": "several datasets into one",
        "data_tools/build_index.py": "the order of a run, ahead of it",
        "data_tools/show_batch.py": "which documents a step read",
        "data_tools/train_tokenizer.py": "a tokenizer from text",
        "data_tools/make_demo_corpus.py": "writes the demo corpus",
        "data_tools/check_demo.py": "50 questions on the demo corpus",
    },
    "training": {
        "aquila/plan.py": "what fits on which devices",
        "aquila/preflight/__main__.py": "finds mistakes before the start",
        "scripts/local_trigger_docker.sh": "trains on this node",
        "scripts/dist_trigger_docker.sh": "trains on the nodes of a hostfile",
        "scripts/slurm.sbatch": "trains under Slurm",
        "scripts/status.sh": "how a run goes, on every node",
        "scripts/local_stop_docker.sh": "saves and stops, on this node",
        "scripts/dist_stop_docker.sh": "saves and stops, on all nodes",
    },
    "results": {
        "aquila/report.py": "runs as a page and a picture",
        "generate.py": "talks to a model, or serves it",
        "aquila/evaluate.py": "loss and bits per byte of a model",
        "aquila/average.py": "the mean of several checkpoints",
        "aquila/convert.py": "checkpoints to Hugging Face and back",
    },
    "upkeep": {
        "scripts/make_wheelhouse.sh": "wheels for machines without internet",
        "scripts/demo_two_nodes.sh": "a run over two nodes, shown",
        "scripts/soak.sh": "plants every fault, many times",
        "scripts/fuzz.sh": "tries hostile input on every reader",
        "scripts/check_pythons.sh": "tries each Python version",
    },
}
"""Files of the commands by what they are for, in the order in which one comes to need them."""
BY_OTHERS = {
    "aquila/__main__.py": "this command",
    "aquila/pretrain.py": "the triggers start it on every rank",
    "aquila/launch/__main__.py": "what the scripts call",
    "data_tools/make_indexed_dataset.py": "called by its script",
    "scripts/common.sh": "sourced by the scripts",
}
"""Files that look like commands and are none for people, and why."""
CLOSING = (
    "Each explains itself with --help (a .sh or .sbatch file: in its first lines).",
    "Completion of names and keys: source <(python -m aquila completion bash)",
)
MODELS, RUNS = "checkpoints_in", "checkpoints_out"
_HOSTFILE, _CONFIG, _MODEL, _RUN, _KEY = "hostfile", "config", "model", "run", "key"
OPERANDS = {
    "scripts/local_trigger_docker.sh": (_HOSTFILE, _CONFIG, _MODEL, _RUN, _KEY),
    "scripts/dist_trigger_docker.sh": (_HOSTFILE, _CONFIG, _MODEL, _RUN, _KEY),
    "scripts/slurm.sbatch": (_CONFIG, _MODEL, _RUN, _KEY),
    "scripts/quickstart.sh": (_KEY,),
    "scripts/status.sh": (_RUN,),
    "scripts/local_stop_docker.sh": (_RUN,),
    "scripts/dist_stop_docker.sh": (_HOSTFILE, _RUN),
    "aquila/preflight/__main__.py": (_HOSTFILE, _CONFIG, _MODEL, _KEY),
    "aquila/plan.py": (_MODEL,),
    "aquila/report.py": (_RUN, _RUN),
    "data_tools/show_batch.py": (_RUN,),
}
"""What the words after a command name, one by one; the last goes on where it is a key, or stands twice."""
SHELL = {
    "bash": """\
_aquila() {
    local IFS=$'\\n'
    COMPREPLY=($(cd '%(root)s' && '%(python)s' -m aquila candidates -- "${COMP_LINE:0:COMP_POINT}"))
    [[ "${COMPREPLY[*]}" != *= ]] || compopt -o nospace
}
complete -o default -o bashdefault -F _aquila bash python python3 .venv/bin/python sbatch
""",
    "zsh": """\
_aquila() {
    local -a found
    found=("${(@f)$(cd '%(root)s' && '%(python)s' -m aquila candidates -- "$BUFFER[1,CURSOR]" 2>/dev/null)}")
    if [[ -n "${found[*]}" ]]; then compadd -Q -S '' -a found; else _files; fi
}
compdef _aquila bash python python3 .venv/bin/python sbatch
""",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m aquila", description=(__doc__ or "").split("\n")[0])
    actions = parser.add_subparsers(dest="action", metavar="completion|candidates")
    shells = actions.add_parser("completion", help="prints a shell's completion script, to be sourced")
    shells.add_argument("shell", choices=SHELL)
    words = actions.add_parser("candidates", help="what may come next on a line; the completion asks this")
    words.add_argument("line")
    arguments = parser.parse_args()
    if arguments.action == "completion":
        print(SHELL[arguments.shell] % {"root": ROOT, "python": sys.executable}, end="")
    elif arguments.action == "candidates":
        print("\n".join(candidates(arguments.line)))
    else:
        print(overview())
    return 0


def overview() -> str:
    """A line of at most 80 columns for every command, under its group."""
    width = max(len(typed(file)) for file in _files()) + 2
    lines = []
    for group, files in GROUPS.items():
        lines += [f"{group}:", *(f"  {typed(file):<{width}}{what}" for file, what in files.items())]
    return "\n".join([*lines, "", *CLOSING])


def typed(file: str) -> str:
    """How a user starts the command in `file`."""
    if file.endswith((".sh", ".sbatch")):
        return f"{'sbatch' if file.endswith('.sbatch') else 'bash'} {file}"
    if "/" not in file:
        return f"python {file}"
    return "python -m " + file.removesuffix(".py").removesuffix("/__main__").replace("/", ".")


def candidates(line: str, root: Path = ROOT) -> list[str]:
    """What may stand in place of the last word of a command line; nothing where files are the best guess."""
    *before, word = _words(line)
    if not before:
        return []
    if before[1:] in ([], ["-m"]):
        kind = (
            "python -m " if before[1:] == ["-m"] else f"{Path(before[0]).name.replace('python3', 'python')} "
        )
        names = [typed(file).removeprefix(kind) for file in _files() if typed(file).startswith(kind)]
        return [name for name in names if name.startswith(word) and not name.startswith("-m")]
    file = _file_of(before)
    if file is None:
        return []
    if "=" in word:
        return []
    if word.startswith("-"):
        return [option for option in options(root / file) if option.startswith(word)]
    kinds = OPERANDS.get(file, ())
    place = sum(not other.startswith("-") for other in before[3 if "-m" in before[:2] else 2 :])
    if not kinds or (place >= len(kinds) and kinds[-1] != _KEY and kinds.count(kinds[-1]) < 2):
        return []
    return [name for name in _named(kinds[min(place, len(kinds) - 1)], root) if name.startswith(word)]


def _words(line: str) -> list[str]:
    words = line.split()
    return [*words, ""] if not line or line[-1].isspace() else words


def _files() -> list[str]:
    return [file for files in GROUPS.values() for file in files]


def _file_of(words: list[str]) -> str | None:
    """The command's file that the words of a line begin with."""
    if words[1] == "-m":
        return next((file for file in _files() if typed(file) == f"python -m {words[2]}"), None)
    script = words[1].removeprefix("./")
    return next((file for file in _files() if script == file or script.endswith("/" + file)), None)


def options(path: Path) -> list[str]:
    """The options of a command: from a Python file's parser, or a script's usage lines."""
    if path.name == "make_indexed_dataset.sh":
        path = path.with_suffix(".py")
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return sorted({*re.findall(r'\(\s*"(--[a-z][a-z0-9-]*)"', source), "--help"})
    usage = [line for line in source.splitlines() if line.startswith("#   ")]
    return sorted(set(re.findall(r"--[a-z][a-z-]*", " ".join(usage))))


def _named(kind: str, root: Path) -> list[str]:
    """Models, experiments, configurations or keys that there are."""
    if kind == _KEY:
        return [f"{name}=" for name in RunConfig.model_fields]
    if kind == _CONFIG:
        return [f"configs/{path.name}" for path in sorted((root / "configs").glob("*.yaml"))]
    if kind == _HOSTFILE:
        return sorted(path.name for path in root.glob("hostfile*"))
    folder = root / (MODELS if kind == _MODEL else RUNS)
    return sorted(path.name for path in folder.glob("*/"))


def missing(root: Path = ROOT) -> list[str]:
    """Commands of the project that the overview does not tell of; for its test."""
    found = [*root.glob("scripts/*.sh"), *root.glob("scripts/*.sbatch"), *root.glob("data_tools/*.sh")]
    for path in [
        *root.glob("aquila/*.py"),
        *root.glob("aquila/*/__main__.py"),
        *root.glob("data_tools/*.py"),
    ]:
        if "run_command(main)" in path.read_text(encoding="utf-8"):
            found.append(path)
    names = {str(path.relative_to(root)) for path in found}
    return sorted(names - set(_files()) - set(BY_OTHERS))


if __name__ == "__main__":
    run_command(main)
