"""One rank of a training run: reads the arguments, builds the parts, runs the trainer.

    torchrun ... -m aquila.pretrain CONFIG.yaml MODEL EXP --version VERSION [key=value ...]

The launch scripts start it; any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT may. Exit status: 0 done, 2 the user's input is wrong, 75 stopped on request with a
checkpoint saved, 1 anything else.
"""

import argparse
import contextlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from aquila.backend import detect, fp8, get_backend
from aquila.config import Device, EffectiveConfig, RunConfig, load_run_config, parse_blend
from aquila.config.compare import check_launched
from aquila.config.run import as_blend, profiled_steps
from aquila.core.errors import UserError, run_command
from aquila.core.files import write_atomically
from aquila.core.paths import commit
from aquila.core.run_folder import check_experiment
from aquila.data.batches import Batches
from aquila.data.indexed import Corpora, SampleStream, open_corpora
from aquila.data.meta import check_datasets
from aquila.data.order import FILE, continue_order, order_files, order_text
from aquila.model import AquilaModel
from aquila.model.weights import load_weights, open_weights
from aquila.tokenizer import has_tokenizer, load_tokenizer
from aquila.training.checkpoint import Checkpointer
from aquila.training.console import say
from aquila.training.deepspeed.config import PRECISIONS, parameter_groups
from aquila.training.deepspeed.engine import Engine
from aquila.training.deepspeed.muon import make_muon
from aquila.training.deepspeed.processes import processes
from aquila.training.deepspeed.ranks import on_first_rank, share_samples
from aquila.training.deepspeed.sharded_model import Fill, divide_model
from aquila.training.evaluation import BATCH as EVALUATION_BATCH
from aquila.training.evaluation import SPLIT, Evaluator, token_bytes
from aquila.training.export import Exporter
from aquila.training.lm_evaluation import LmEvaluator
from aquila.training.lock import lock_run
from aquila.training.metric_writers import MetricWriter, TensorBoard, WeightsAndBiases
from aquila.training.metrics import RunLog
from aquila.training.profiler import Profiler
from aquila.training.resume import Resumption, find_resume, same_samples_per_step
from aquila.training.run_summary import HISTORY
from aquila.training.schedule import Schedule, make_schedule
from aquila.training.signals import Requests
from aquila.training.state import TrainState
from aquila.training.trainer import Trainer
from aquila.training.watchdog import Watchdog

OUTPUT = "checkpoints_out"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m aquila.pretrain", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("config", help="run YAML, such as configs/Aquila-pretrain.yaml")
    parser.add_argument("model", help="folder under checkpoints_in/")
    parser.add_argument("experiment", help="name of the folder under checkpoints_out/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the YAML file")
    parser.add_argument("--version", default="0", help="folder under the experiment (default: 0)")
    return parser.parse_intermixed_args()  # overrides may stand on both sides of --version


def main() -> int:
    arguments = parse_arguments()
    check_experiment(arguments.experiment)
    check_experiment(arguments.version, "--version")
    requests = Requests()
    requests.install()
    backend = get_backend(detect())
    device = backend.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    precisions = tuple(backend.supported_precisions())
    here = Device(device.type, precisions, backend.fp8_support(), backend.OVERLAP_COMM, backend.ZERO_KERNELS)
    effective = load_run_config(arguments.config, arguments.model, arguments.overrides, device=here)
    check_launched(effective)
    if effective.run.deterministic:
        backend.make_deterministic()
    if effective.run.fp8:
        fp8.load()  # what does not load says so before anything is written
    if os.environ.get("RANK", "0") == "0":  # a dataset without .meta.json is read whole: once is enough
        check_datasets(effective.run.datasets, effective.model_dir, effective.model.vocab_size)
    run_dir = Path(OUTPUT) / arguments.experiment / arguments.version
    with ExitStack() as closing:
        timeout = effective.run.group_timeout
        rank, world_size = closing.enter_context(processes(backend.COMMUNICATION, device, timeout))
        return train(effective, backend, device, run_dir, rank, world_size, requests, closing)


def train(
    effective: EffectiveConfig,
    backend: ModuleType,
    device: torch.device,
    run_dir: Path,
    rank: int,
    world_size: int,
    requests: Requests,
    closing: ExitStack,
) -> int:
    """Builds every part of the run and trains to its end."""
    run = effective.run
    on_first_rank(lambda: prepare(run_dir, effective))
    later = [prefix for _, blend in run.blends for prefix in parse_blend(blend)[0]]
    corpora = open_corpora(
        run.data_prefix,
        run.split,
        effective.seq_length,
        run.seed,
        later=later,
        ids=effective.model.vocab_size,
    )
    held_out = open_held_out(effective, corpora)
    schedule = make_schedule(run, corpora.train.samples_per_epoch, world_size)
    folder = on_first_rank(lambda: find_resume(run_dir, run.resume))
    resumption = Resumption(folder, effective, world_size) if folder else None
    model = build_model(effective, backend, device, folder)
    if run.sequence_parallel > 1:
        model.divide_sequence(share_samples(run.sequence_parallel, run.group_timeout))
    if run.optimizer == "muon":
        optimizer = make_muon(model, run, device)
    else:
        groups = parameter_groups(model, run.weight_decay)
        optimizer = backend.optimizer(run.optimizer, groups, run.lr, run.betas, run.eps, run.weight_decay)
    engine = Engine(model, optimizer, effective, world_size)
    engine.unequal = corpora.train.is_masked
    if engine.unequal or len(corpora.train.corpora) > 1:
        engine.tell_apart = len(corpora.train.corpora)
    state = resumption.load(engine, rank) if resumption else TrainState()
    lines = follow_blends(run, corpora.train, schedule, state, order_files(run_dir, folder))
    lines += corpora.train.open_orders(state.consumed_samples)
    watchdog = Watchdog(run_dir / "logs", rank, world_size, run.hang_timeout)
    engine.alive = watchdog.alive
    closing.callback(watchdog.close)
    log, after_saves = None, []
    if rank == 0:
        write_atomically(run_dir / FILE, order_text(corpora.train))
        record_start(run_dir, effective, state, folder, f"{world_size} x {backend.device_name()}")
        lines += resumption.model_changes if resumption else []
        if resumption and (warning := same_samples_per_step(resumption.facts, effective, world_size)):
            lines.append(warning)
        say(
            "\n".join([describe(effective, backend, schedule, corpora, world_size), engine.zero_step, *lines])
        )
        say(f"resumes at step {state.step} from {folder}" if folder else "starts at step 0")
        log = open_log(effective, backend, schedule, corpora, run_dir, world_size, state.step)
        closing.callback(log.close)
        closing.callback(log.draw)
        if run.export == "hf":
            after_saves.append(Exporter(run_dir, run.export_every))
        if run.lm_eval is not None:
            after_saves.append(LmEvaluator(run_dir, run.lm_eval, log.scored))
        for line in after_saves:
            closing.callback(line.wait, watchdog.alive)
    shares = (rank // run.sequence_parallel, run.replicas(world_size), run.batch_size)
    batches = Batches(
        corpora.train, state.consumed_samples, *shares, document_mask=run.document_mask, device=device
    )
    closing.callback(batches.close)
    profiler = None
    if run.profile is not None:
        tell = say if rank == 0 else lambda text: None
        profiler = Profiler(profiled_steps(run.profile), run_dir / "profile", rank, backend, tell)
        closing.callback(lambda: profiler.close(state.step))
    return Trainer(
        config=run,
        engine=engine,
        schedule=schedule,
        batches=batches,
        evaluate=make_evaluator(effective, engine, held_out, shares) if held_out else None,
        documents_of=partial(documents_of, corpora.train),
        checkpointer=Checkpointer(
            run_dir, engine, effective, rank, world_size, beside={FILE: order_text(corpora.train)}
        ),
        after_save=lambda checkpoint: [line(checkpoint) for line in after_saves],
        watchdog=watchdog,
        requests=requests,
        log=log,
        state=state,
        seq_length=effective.seq_length,
        profiler=profiler,
    ).run()


def prepare(run_dir: Path, effective: EffectiveConfig) -> None:
    """The run folder, locked against a second run, with the effective configuration in it. Rank 0 alone."""
    try:
        lock_run(run_dir)
        write_atomically(run_dir / "effective_config.yaml", effective.to_yaml())
    except OSError as error:
        raise UserError(f"{run_dir} cannot be written: {error.strerror}") from None
    say(effective.table())


def build_model(
    effective: EffectiveConfig, backend: ModuleType, device: torch.device, resume: Path | None
) -> AquilaModel:
    """The model with its first weights: of the checkpoint to resume, of the model folder, or random.

    Under ZeRO-3 each rank holds its share alone.
    """
    run = effective.run
    config = effective.model
    if run.ckpoint_layer is not None:
        config = config.model_copy(
            update={"checkpoint_activations": run.ckpoint_layer != 0, "ckpoint_layer": run.ckpoint_layer}
        )
    folder = resume or (effective.model_dir if run.bmt_pre_load else None)
    options = {"attention": run.attention, "recompute": run.recompute, "z_loss": run.z_loss}
    dtype = PRECISIONS[run.precision]
    if run.zero_stage == 3:
        backend.allocate_compactly()
        model = AquilaModel(config, **options, device="meta", dtype=dtype)

        def source() -> Fill:
            return open_weights(model, folder).read if folder else model.first_weights(run.seed)

        divide_model(model, source, effective, dtype, device)
    else:
        seed = None if folder else run.seed
        model = AquilaModel(config, **options, device=device, dtype=dtype, seed=seed)
        if folder is not None:
            load_weights(model, folder)
    if run.fp8:
        model.convert_to_fp8(run.fp8)
    compiles = backend.COMPILE_BLOCKS and run.zero_stage < 3  # ZeRO-3 gathers each module's weights in hooks
    if run.compile if run.compile is not None else compiles:
        model.compile_blocks()
    return model


def open_log(
    effective: EffectiveConfig,
    backend: ModuleType,
    schedule: Schedule,
    corpora: Corpora,
    run_dir: Path,
    world_size: int,
    resumed_step: int,
) -> RunLog:
    """metrics.jsonl and the boards that the run asks for."""
    run = effective.run
    boards: list[MetricWriter] = []
    if run.tensorboard:
        boards.append(TensorBoard(run_dir / "tensorboard", resumed_step))
    if run.wandb:
        boards.append(WeightsAndBiases(run_dir, run_dir.parent.name, run.model_dump()))
    return RunLog(
        run_dir,
        total_steps=schedule.total_steps,
        tokens_per_step=schedule.samples_of(resumed_step + 1) * effective.seq_length,
        samples_per_epoch=corpora.train.samples_per_epoch,
        world_size=world_size,
        flops_per_token=effective.model.flops_per_token(effective.seq_length),
        peak_flops=backend.peak_flops(PRECISIONS[run.precision]),
        memory_gib=backend.memory_gib,
        resumed_step=resumed_step,
        boards=boards,
        corpora=[corpus.prefix for corpus in corpora.train.corpora],
    )


def follow_blends(
    run: RunConfig, stream: SampleStream, schedule: Schedule, state: TrainState, recorded: Sequence[Path]
) -> list[str]:
    """Lets the stream go on where the run stands, and change as `blend_schedule` says; lines for the user."""
    blends = [(step, stream.shares(*parse_blend(blend))) for step, blend in run.blends]
    stream.begin(next(weights for step, weights in reversed(blends) if step <= state.step))
    lines = continue_order(recorded, stream, state.consumed_samples)
    for step, weights in blends:
        if step > state.step:
            start = state.consumed_samples + schedule.samples_between(state.step, step)
            stream.plan(start, weights)
            lines.append(f"the blend is to change after step {step:,}, at sample {start:,}")
    return lines


def record_start(
    run_dir: Path, effective: EffectiveConfig, state: TrainState, checkpoint: Path | None, devices: str
) -> None:
    """One line of `history.jsonl` for each start of the run: from where, on what, with which settings."""
    start = {
        "step": state.step,
        "consumed_samples": state.consumed_samples,
        "time": round(time.time(), 3),
        "checkpoint": str(checkpoint) if checkpoint else None,
        "devices": devices,
        "commit": commit(),
        "model": str(effective.model_dir),
        "parameters": effective.model.parameter_count(),
        "model_config": effective.model.model_dump(mode="json", exclude_defaults=True),
        "config": effective.run.model_dump(mode="json"),
    }
    with contextlib.suppress(OSError), (run_dir / HISTORY).open("a", encoding="utf-8") as file:
        file.write(json.dumps(start, ensure_ascii=False) + "\n")


def open_held_out(effective: EffectiveConfig, corpora: Corpora) -> dict[str, SampleStream]:
    """The validation sets by name: what `split` leaves, and those of `valid_data`; none where never asked."""
    run = effective.run
    if run.eval_interval == 0:
        return {}
    sets = {SPLIT: corpora.valid} if corpora.valid else {}
    for name, data in run.valid_data.items():
        # A seed of its own: runs that differ in theirs can be compared.
        sets[name] = open_corpora(as_blend(data), "100", effective.seq_length, 0).train
    return sets


def make_evaluator(
    effective: EffectiveConfig, engine: Engine, sets: dict[str, SampleStream], shares: tuple[int, int, int]
) -> Evaluator:
    """shares: this rank's place among those with other samples, their number, samples of a micro step."""
    run, sizes = effective.run, None
    if has_tokenizer(effective.model_dir):
        tokenizer = load_tokenizer(effective.model_dir)
        sizes = token_bytes(tokenizer, effective.model.vocab_size, engine.device)
    samples = run.eval_iters * EVALUATION_BATCH
    return Evaluator(engine, sets, samples, *shares, run.document_mask, sizes)


def documents_of(stream: SampleStream, samples: range) -> str:
    """'corpus: documents 3, 17, 4' for each corpus that `samples` read from."""
    found: dict[str, list[int]] = {}
    for k in samples:
        provenance = stream[k].provenance
        found.setdefault(provenance.corpus, []).extend(provenance.document_ids)
    texts = (f"{corpus}: documents {', '.join(map(str, ids))}" for corpus, ids in found.items())
    return f"samples {samples.start} to {samples.stop - 1}, " + "; ".join(texts)


def describe(
    effective: EffectiveConfig, backend: ModuleType, schedule: Schedule, corpora: Corpora, world_size: int
) -> str:
    """The run in a few lines."""
    run, train = effective.run, corpora.train.samples_per_epoch
    valid = corpora.valid.samples_per_epoch if corpora.valid else 0
    told = (*backend.ENVIRONMENT_DEFAULTS, *(backend.DETERMINISTIC if run.deterministic else ()))
    variables = [f"{name}={os.environ[name]}" for name in told if name in os.environ]
    environment = f"environment: {', '.join(variables)}\n" if variables else ""
    placement = f"{backend.placement()}\n" if backend.placement() else ""
    sizes = ", then ".join(str(samples) for _, samples in schedule.batch_sizes)
    kernels = ", ".join(f"{operation}: {kernel}" for operation, kernel in backend.kernels().items())
    return (
        f"{world_size} x {backend.device_name()}, {run.precision}, ZeRO-{run.zero_stage}; {kernels}\n"
        f"{environment}{placement}"
        f"{train} training and {valid} validation samples of {effective.seq_length} tokens; "
        f"{schedule.total_steps} steps of {sizes} samples, "
        f"{schedule.warmup_steps} of them warm-up\n"
        "MFU = tokens/s/device x (6 x (parameters - embedding) + 6 x layers x dim x sequence) / peak FLOP/s"
    )


if __name__ == "__main__":
    run_command(main)
