#!/usr/bin/env python3
"""Talks to a model: one prompt, a file of prompts, a conversation, or an endpoint for other programs.

Without --model-dir it loads the newest checkpoint of the newest run under checkpoints_out.
"""

import argparse
import sys
from pathlib import Path

from aquila.core.errors import UserError, run_command

ROOT = Path(__file__).resolve().parent


def parser() -> argparse.ArgumentParser:
    """The command line; defaults of the sampling are the original recipe's."""
    parse = argparse.ArgumentParser(prog="generate.py", description=__doc__)
    parse.add_argument(
        "--model-dir", metavar="DIR", help="a model folder, a run, or a name in checkpoints_in"
    )
    parse.add_argument("--device", default="auto", metavar="D", help="default: the best that is here")
    parse.add_argument(
        "--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="auto: as stored"
    )
    parse.add_argument("--int8", action="store_true", help="round the matrices to int8 after loading")
    parse.add_argument("--threads", type=int, metavar="N", help="CPU threads")

    what = parse.add_argument_group("what to answer (default: a conversation, or standard input's lines)")
    which = what.add_mutually_exclusive_group()
    which.add_argument("--prompt", metavar="TEXT", help="answer this and leave")
    which.add_argument("--prompt-file", metavar="FILE", help="a prompt a line, or .jsonl with a key prompt")
    what.add_argument("--num-samples", type=int, default=1, metavar="N", help="answers for each prompt")
    what.add_argument("--json", action="store_true", help="one JSON object a line instead of text")

    how = parse.add_argument_group("how to choose tokens")
    how.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    how.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: always the likeliest")
    how.add_argument("--top-k", type=int, default=30, metavar="K", help="0: all")
    how.add_argument("--top-p", type=float, default=0.95, metavar="P")
    how.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="1: none")
    how.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text")
    how.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable"
    )
    how.add_argument(
        "--sliding", action="store_true", help="go on past the context by dropping its beginning"
    )

    endpoint = parse.add_argument_group(
        "an endpoint for other programs (OpenAI completions and chat protocol)"
    )
    which.add_argument("--serve", action="store_true", help="answer HTTP requests until Ctrl-C")
    endpoint.add_argument("--host", default="127.0.0.1", metavar="H", help="default: this machine only")
    endpoint.add_argument("--port", type=int, default=8000, metavar="N", help="0: a free one")
    endpoint.add_argument("--max-concurrent", type=int, default=8, metavar="N", help="answers at once")
    endpoint.add_argument("--max-waiting", type=int, default=64, metavar="N", help="more get status 429")
    return parse


def main() -> int:
    arguments = parser().parse_args()
    for name, least in (("num_samples", 1), ("threads", 1), ("max_concurrent", 1), ("max_waiting", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be {least} or more (got {value})")
    # Imported here, so that --help and a wrong path are answered without waiting for torch.
    from aquila.generation.locate import resolve_checkpoint

    here = Path.cwd()
    model_dir = resolve_checkpoint(arguments.model_dir, here if (here / "checkpoints_out").is_dir() else ROOT)
    from aquila.generation import batch, terminal, tty
    from aquila.generation.chat import Session
    from aquila.generation.load import load
    from aquila.generation.sampling import Sampling

    if arguments.serve:
        from aquila.generation.http import server

        limits = server.Limits(
            arguments.host, arguments.port, arguments.max_concurrent, arguments.max_waiting
        )
        listener = server.listen(limits)  # before the weights: a taken port is known at once
    tty.use_utf8()
    sampling = Sampling(
        arguments.max_new_tokens,
        arguments.temperature,
        arguments.top_k,
        arguments.top_p,
        arguments.repetition_penalty,
        arguments.seed,
        tuple(arguments.stop),
    )
    prompts = [arguments.prompt] if arguments.prompt is not None else None
    if arguments.prompt_file is not None:
        prompts = batch.read_prompts(Path(arguments.prompt_file))
    loaded = load(
        model_dir,
        device=arguments.device,
        dtype=arguments.dtype,
        int8=arguments.int8,
        threads=arguments.threads,
    )
    print(loaded.description, file=sys.stderr, flush=True)
    session = Session(loaded, sampling, sliding=arguments.sliding)
    if arguments.serve:
        return server.serve(session, limits, listener)
    if prompts is not None:
        return batch.run_prompts(session, prompts, arguments.num_samples, arguments.json)
    if sys.stdin.isatty():
        return terminal.converse(session, arguments.json)
    return terminal.converse_by_lines(session, arguments.json)


if __name__ == "__main__":
    run_command(main)
