"""Text files to P_text_document.bin, .idx and .meta.json, in parallel; an interrupted run goes on.

Inputs are .jsonl, .json (an array, or FastChat conversations), .txt and .parquet files, also .gz and
.zst, and folders and globs of them. Each document is framed as `[CLS] ids </s>`.
"""

import argparse
import os
import sys

from aquila.core.errors import EXIT_STOPPED, UserError, run_command
from aquila.data.loss_mask import mask_prefix
from aquila.data.prepare.answers import TEMPLATES
from aquila.data.prepare.pipeline import PrepareOptions, make_datasets
from aquila.tokenizer import load_tokenizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="data_tools/make_indexed_dataset.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="files, folders or quoted globs, in order")
    add("--output-prefix", required=True, metavar="P", help="P_text_document.* will be written")
    add("--model-dir", required=True, metavar="DIR", help="model folder; only its tokenizer is read")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="default: %(default)s")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="a dataset for each; default: text")
    add("--conversation-template", choices=TEMPLATES, default="plain", help="default: plain (turns by lines)")
    add(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="skip: see P_text_document.rejects.jsonl",
    )
    add("--txt-documents", choices=("file", "line"), default="file", help="what a document is in .txt files")
    add("--allow-special-tokens", action="store_true", help="parse [CLS], </s>, ... written in the text")
    add("--mask-prompts", action="store_true", help="of conversations the answers alone count in the loss")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: give at least 1")
    if len(set(arguments.json_keys)) != len(arguments.json_keys):
        raise UserError(f"--json-keys {' '.join(arguments.json_keys)}: a key stands twice")
    if arguments.mask_prompts and arguments.json_keys != ["text"]:
        raise UserError("--mask-prompts masks conversations, which --json-keys does not read; leave one out")
    request = PrepareOptions(
        inputs=arguments.input,
        output_prefix=arguments.output_prefix,
        workers=arguments.workers,
        keys=tuple(arguments.json_keys),
        template=arguments.conversation_template,
        on_error=arguments.on_error,
        text_lines=arguments.txt_documents == "line",
        allow_special=arguments.allow_special_tokens,
        mask_prompts=arguments.mask_prompts,
    )
    try:
        tokenizer = load_tokenizer(arguments.model_dir)
        if not tokenizer.is_fast:
            print(f"encoding by {tokenizer.engine}", file=sys.stderr)
        outcome = make_datasets(request, tokenizer)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the finished parts", file=sys.stderr)
        return EXIT_STOPPED
    if outcome.resumed_parts:
        print(f"went on from {outcome.resumed_parts} finished parts of an interrupted run")
    for prefix, tokens in zip(outcome.prefixes, outcome.tokens, strict=True):
        print(f"{prefix}: {outcome.documents:,} documents, {tokens:,} tokens, {outcome.seconds:.1f} s")
    if outcome.counted is not None:
        share = outcome.counted / max(1, outcome.tokens[0])
        print(
            f"{mask_prefix(outcome.prefixes[0])}: {outcome.counted:,} tokens ({share:.1%}) count in the loss"
        )
    if outcome.rejected:
        print(f"{outcome.rejected:,} bad documents were skipped: see {request.rejects}")
    return 0


if __name__ == "__main__":
    run_command(main)
