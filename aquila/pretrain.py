"""One rank of a training run: reads the arguments, builds the parts, runs the trainer.

    torchrun ... -m aquila.pretrain CONFIG.yaml MODEL EXP --version VERSION [key=value ...]

The launch scripts start it; any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT may. Exit status: 0 done, 2 the user's input is wrong, 75 stopped on request with a
checkpoint saved, 1 anything else.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from aquila.backend import detect, fp8, get_backend
from aquila.config import Device, EffectiveConfig, load_run_config, parse_blend
from aquila.core.checkpoints import write_atomically
from aquila.core.errors import UserError, run_command
from aquila.data.batches import Batch, Batches
from aquila.data.indexed import Corpora, SampleStream, open_corpora
from aquila.data.meta import check_datasets
from aquila.data.order import continue_order, record_order
from aquila.model import AquilaModel
from aquila.model.weights import load_weights, open_weights
from aquila.training.checkpoint import Checkpointer
from aquila.training.console import say
from aquila.training.deepspeed.config import parameter_groups
from aquila.training.deepspeed.engine import Engine, processes
from aquila.training.deepspeed.ranks import on_first_rank
from aquila.training.deepspeed.sharded_model import Fill, divide_model
from aquila.training.export import Exporter
from aquila.training.lock import lock_run
from aquila.training.metric_writers import Board, TensorBoard, WeightsAndBiases
from aquila.training.metrics import RunLog
from aquila.training.resume import Resumption, find_resume, same_samples_per_step
from aquila.training.schedule import Schedule, make_schedule
from aquila.training.signals import Requests
from aquila.training.state import TrainState
from aquila.training.trainer import Trainer
from aquila.training.watchdog import Watchdog

OUTPUT = "checkpoints_out"
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m aquila.pretrain", description=__doc__.split("\n")[0])
    parser.add_argument("config", help="run YAML, such as configs/Aquila-pretrain.yaml")
    parser.add_argument("model", help="folder under checkpoints_in/")
    parser.add_argument("experiment", help="name of the folder under checkpoints_out/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the YAML file")
    parser.add_argument("--version", default="0", help="folder under the experiment (default: 0)")
    return parser.parse_intermixed_args()  # overrides may stand on both sides of --version


def main() -> int:
    arguments = parse_arguments()
    requests = Requests()
    requests.install()
    backend = get_backend(detect())
    device = backend.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    precisions = tuple(backend.supported_precisions())
    here = Device(device.type, precisions, backend.fp8_support(), backend.OVERLAP_COMM)
    effective = load_run_config(arguments.config, arguments.model, arguments.overrides, device=here)
    if effective.run.fp8:
        fp8.load()  # what does not load says so before anything is written
    if os.environ.get("RANK", "0") == "0":  # a dataset without .meta.json is read whole: once is enough
        prefixes = parse_blend(effective.run.data_prefix)[0]
        check_datasets(prefixes, effective.model_dir, effective.model.vocab_size)
    run_dir = Path(OUTPUT) / arguments.experiment / arguments.version
    with ExitStack() as closing:
        rank, world_size = closing.enter_context(processes(backend.COMMUNICATION, device))
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
    corpora = open_corpora(run.data_prefix, run.split, effective.seq_length, run.seed, None)
    schedule = make_schedule(run, corpora.train.samples_per_epoch, world_size)
    folder = on_first_rank(lambda: find_resume(run_dir, run.resume))
    resumption = Resumption(folder, effective, world_size) if folder else None
    model = build_model(effective, backend, device, folder)
    groups = parameter_groups(model, run.weight_decay)
    optimizer = backend.optimizer(run.optimizer, groups, run.lr, run.betas, run.eps, run.weight_decay)
    engine = Engine(
        model, optimizer, effective, world_size, universal=bool(resumption and resumption.universal)
    )
    state = resumption.load(engine, run_dir, rank) if resumption else TrainState()
    lines = continue_order(run_dir, corpora.train, state.consumed_samples)
    watchdog = Watchdog(run_dir / "logs", rank, world_size, run.hang_timeout)
    closing.callback(watchdog.close)
    log, after_save = None, lambda checkpoint: None
    if rank == 0:
        record_order(run_dir, corpora.train)
        if resumption and (warning := same_samples_per_step(resumption.facts, effective, world_size)):
            lines.append(warning)
        say("\n".join([describe(effective, backend, schedule, corpora, world_size), *lines]))
        say(f"resumes at step {state.step} from {folder}" if folder else "starts at step 0")
        log = open_log(effective, backend, schedule, corpora, run_dir, world_size, state.step)
        closing.callback(log.close)
        closing.callback(log.draw)
        if run.export == "hf":
            after_save = Exporter(run_dir, run.export_every)
            closing.callback(after_save.wait, watchdog.alive)
    feed = partial(
        Batches,
        rank=rank,
        world_size=world_size,
        micro_batch_size=run.batch_size,
        document_mask=run.document_mask,
        device=device,
    )
    batches = feed(corpora.train, state.consumed_samples)
    closing.callback(batches.close)
    return Trainer(
        config=run,
        engine=engine,
        schedule=schedule,
        batches=batches,
        valid_batches=partial(validation, feed, corpora, run.eval_iters, run.batch_size * world_size),
        documents_of=partial(documents_of, corpora.train),
        checkpointer=Checkpointer(run_dir, engine, effective, rank, world_size),
        after_save=after_save,
        watchdog=watchdog,
        requests=requests,
        log=log,
        state=state,
        seq_length=effective.seq_length,
        synchronize=backend.synchronize,
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
        model = AquilaModel(config, **options, device="meta", dtype=dtype)

        def source() -> Fill:
            return open_weights(model, folder).read if folder else model.first_weights(run.seed)

        divide_model(model, source, effective, dtype, device)
    else:
        model = AquilaModel(config, **options, device=device, dtype=dtype, seed=run.seed)
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
    boards: list[Board] = []
    if run.tensorboard:
        boards.append(TensorBoard(run_dir / "tensorboard", resumed_step))
    if run.wandb:
        boards.append(WeightsAndBiases(run_dir, run_dir.parent.name, run.model_dump()))
    return RunLog(
        run_dir,
        total_steps=schedule.total_steps,
        tokens_per_step=run.global_batch_size(world_size) * effective.seq_length,
        samples_per_epoch=corpora.train.samples_per_epoch,
        world_size=world_size,
        flops_per_token=effective.model.flops_per_token(effective.seq_length),
        peak_flops=backend.peak_flops(PRECISIONS[run.precision]),
        memory_gib=backend.memory_gib,
        resumed_step=resumed_step,
        boards=boards,
    )


def validation(feed: partial, corpora: Corpora, iterations: int, samples: int) -> Iterator[Batch]:
    """The same first micro batches of the validation split each time, at most one pass over it."""
    if corpora.valid is None or corpora.valid.samples_per_epoch < samples:
        return
    batches = feed(corpora.valid, 0)
    try:
        for _ in range(min(iterations, corpora.valid.samples_per_epoch // samples)):
            yield next(batches)
    finally:
        batches.close()


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
    variables = [f"{name}={os.environ[name]}" for name in backend.ENVIRONMENT_DEFAULTS if name in os.environ]
    environment = f"environment: {', '.join(variables)}\n" if variables else ""
    kernels = ", ".join(f"{operation}: {kernel}" for operation, kernel in backend.kernels().items())
    return (
        f"{world_size} x {backend.device_name()}, {run.precision}, ZeRO-{run.zero_stage}; {kernels}\n"
        f"{environment}"
        f"{train} training and {valid} validation samples of {effective.seq_length} tokens; "
        f"{schedule.total_steps} steps of {run.global_batch_size(world_size)} samples, "
        f"{schedule.warmup_steps} of them warm-up\n"
        "MFU = tokens/s/device x (6 x (parameters - embedding) + 6 x layers x dim x sequence) / peak FLOP/s"
    )


if __name__ == "__main__":
    run_command(main)
