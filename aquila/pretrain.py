"""One rank of a training run: reads the arguments, builds the parts, runs the trainer.

    torchrun ... -m aquila.pretrain CONFIG.yaml MODEL EXP --version VERSION [key=value ...]

The launch scripts start it; any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT may. Exit status: 0 done, 2 the user's input is wrong, 75 stopped on request with a
checkpoint saved, 1 anything else.
"""

import argparse
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from aquila.backend import detect, get_backend
from aquila.config import Device, EffectiveConfig, load_run_config, parse_blend
from aquila.data.batches import Batch, Batches
from aquila.data.indexed import Corpora, open_corpora
from aquila.data.meta import check_datasets
from aquila.errors import run_command
from aquila.model import AquilaModel
from aquila.model.weights import load_weights
from aquila.training.checkpoint import Checkpointer, find_resume, write_atomically
from aquila.training.engine import Engine, on_first_rank, parameter_groups, processes
from aquila.training.metrics import RunLog
from aquila.training.schedule import Schedule, make_schedule
from aquila.training.state import TrainState
from aquila.training.trainer import StopRequest, Trainer

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
    stop = StopRequest()
    stop.install()
    backend = get_backend(detect())
    device = backend.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    here = Device(device.type, tuple(backend.supported_precisions()))
    effective = load_run_config(arguments.config, arguments.model, arguments.overrides, device=here)
    check_datasets(parse_blend(effective.run.data_prefix)[0], effective.model_dir, effective.model.vocab_size)
    run_dir = Path(OUTPUT) / arguments.experiment / arguments.version
    with processes(backend.COMMUNICATION, device) as (rank, world_size):
        return train(effective, backend, device, run_dir, rank, world_size, stop)


def train(
    effective: EffectiveConfig,
    backend: ModuleType,
    device: torch.device,
    run_dir: Path,
    rank: int,
    world_size: int,
    stop: StopRequest,
) -> int:
    """Builds every part of the run and trains to its end."""
    run = effective.run
    if rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / "effective_config.yaml", effective.to_yaml())
        print(effective.table(), flush=True)
    corpora = open_corpora(run.data_prefix, run.split, effective.seq_length, run.seed, None)
    schedule = make_schedule(run, corpora.train.samples_per_epoch, world_size)
    resume = on_first_rank(lambda: find_resume(run_dir, run.resume))
    model = build_model(effective, backend, device, resume)
    optimizer = backend.optimizer(
        run.optimizer, parameter_groups(model, run.weight_decay), run.lr, run.betas, run.eps, run.weight_decay
    )
    engine = Engine(model, optimizer, effective, world_size)
    checkpointer = Checkpointer(run_dir, engine, effective, rank, world_size)
    state = checkpointer.load(resume) if resume else TrainState()
    tokens_per_step = run.global_batch_size(world_size) * effective.seq_length
    log = None
    if rank == 0:
        start = f"resumes at step {state.step} from {resume}" if resume else "starts at step 0"
        print(f"{describe(effective, backend, schedule, corpora, world_size)}; {start}", flush=True)
        log = RunLog(
            run_dir,
            total_steps=schedule.total_steps,
            tokens_per_step=tokens_per_step,
            world_size=world_size,
            flops_per_token=effective.model.flops_per_token(effective.seq_length),
            peak_flops=backend.peak_flops(PRECISIONS[run.precision]),
            resumed_step=state.step,
            tensorboard=run.tensorboard,
        )
    feed = partial(
        Batches,
        rank=rank,
        world_size=world_size,
        micro_batch_size=run.batch_size,
        document_mask=run.document_mask,
        device=device,
    )
    batches = feed(corpora.train, state.consumed_samples)
    trainer = Trainer(
        run_config=run,
        engine=engine,
        schedule=schedule,
        batches=batches,
        valid_batches=partial(validation, feed, corpora, run.eval_iters, run.batch_size * world_size),
        checkpointer=checkpointer,
        log=log,
        state=state,
        stop=stop,
        samples_per_epoch=corpora.train.samples_per_epoch,
        tokens_per_step=tokens_per_step,
        memory_gib=backend.memory_gib,
        synchronize=backend.synchronize,
        saved_step=state.step if resume else -1,
    )
    try:
        return trainer.run()
    finally:
        batches.close()
        if log is not None:
            log.draw()
            log.close()


def build_model(
    effective: EffectiveConfig, backend: ModuleType, device: torch.device, resume: Path | None
) -> AquilaModel:
    """The model with its first weights: of the checkpoint to resume, of the model folder, or random."""
    run = effective.run
    config = effective.model
    if run.ckpoint_layer is not None:
        config = config.model_copy(
            update={"checkpoint_activations": run.ckpoint_layer != 0, "ckpoint_layer": run.ckpoint_layer}
        )
    model = AquilaModel(
        config,
        attention=run.attention,
        recompute=run.recompute,
        z_loss=run.z_loss,
        device=device,
        dtype=PRECISIONS[run.precision],
        seed=run.seed,
    )
    if resume is not None:
        load_weights(model, resume)
    elif run.bmt_pre_load:
        load_weights(model, effective.model_dir)
    if run.compile if run.compile is not None else backend.COMPILE_BLOCKS:
        model.compile_blocks()
    return model


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


def describe(
    effective: EffectiveConfig, backend: ModuleType, schedule: Schedule, corpora: Corpora, world_size: int
) -> str:
    """The run in one line."""
    run, train = effective.run, corpora.train.samples_per_epoch
    valid = corpora.valid.samples_per_epoch if corpora.valid else 0
    return (
        f"{world_size} x {backend.device_name()}, {run.precision}, ZeRO-{run.zero_stage}, "
        f"{backend.kernels()}; {train} training and {valid} validation samples of {effective.seq_length} "
        f"tokens; {schedule.total_steps} steps of {run.global_batch_size(world_size)} samples, "
        f"{schedule.warmup_steps} of them warm-up; MFU = tokens/s/device x (6 x (parameters - embedding) + "
        f"6 x layers x dim x sequence) / peak FLOP/s"
    )


if __name__ == "__main__":
    run_command(main)
