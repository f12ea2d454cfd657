"""The contenders of `train_step.py`, each in a process of its own that trains when told to.

    python benchmarks/step_contenders.py NAME CONFIG.json    (started by train_step.py)

Reads lines from its input: "step N" trains N steps, "profile" prints the longest operations of some, "end"
ends. Answers are lines of "@" and JSON. All get
the same tokens, and the same first weights, drawn parameter by parameter on the device.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

if not "".join(sys.argv[1:2]).startswith("ours"):
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "0")  # others as their users run them; the package sets it

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from aquila.backend import get_backend  # noqa: E402
from aquila.config import Device, ModelConfig, load_run_config  # noqa: E402
from aquila.model import AquilaModel, hf  # noqa: E402
from aquila.training import profiler  # noqa: E402
from aquila.training.deepspeed.config import parameter_groups  # noqa: E402
from aquila.training.deepspeed.zero_step import blocks  # noqa: E402

LR, BETAS, EPS, DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
Step = Callable[[Tensor, Tensor], float]
"""Tokens and labels, int64 (batch, sequence), to the loss; weights are one step further."""


def first_weights(config: ModelConfig, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Released names and fp32 values, one at a time: the same for every contender of a device."""
    shapes = AquilaModel(config, device="meta")
    generator = torch.Generator(device).manual_seed(1)
    for name, parameter in shapes.named_parameters():
        values = torch.ones(parameter.shape, device=device)
        if values.dim() > 1:
            values.normal_(0.0, config.initializer_range, generator=generator)
        yield name, values


# ---- ours ------------------------------------------------------------------------------------------------


def ours(settings: SimpleNamespace, stack: ExitStack, fp8: str = "") -> tuple[Step, str]:
    """The model under `aquila.training.deepspeed.engine.Engine`, ZeRO-2, a world of one; or torch alone.

    fp8: a recipe for layers in float8, as the run key.
    """
    settings.fp8 = fp8
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        return ours_alone(settings)
    from aquila.training.deepspeed.engine import Engine
    from aquila.training.deepspeed.processes import processes

    folder = Path(stack.enter_context(TemporaryDirectory()))
    (folder / "config.json").write_text(settings.config.model_dump_json(exclude_defaults=True))
    (folder / "run.yaml").write_text(
        f"batch_size: {settings.batch}\nprecision: bf16\nseq_length: {settings.seq}\nclip_grad: {CLIP}\n"
        f"ckpoint_layer: {settings.recompute}\nweight_decay: {DECAY}\nbetas: {list(BETAS)}\neps: {EPS}\n"
        f"fp8: {fp8 or 'false'}\n"
    )
    backend = settings.backend
    device = Device(settings.device.type, backend.supported_precisions(), backend.fp8_support())
    effective = load_run_config(folder / "run.yaml", str(folder), [], device=device, root=ROOT)
    _, world_size = stack.enter_context(processes(backend.COMMUNICATION, settings.device))
    model = our_model(settings)
    optimizer = backend.optimizer("auto", parameter_groups(model, DECAY), LR, BETAS, EPS, DECAY)
    engine = Engine(model, optimizer, effective, world_size)
    mask = torch.ones(settings.batch, settings.seq, device=settings.device)

    def step(tokens: Tensor, labels: Tensor) -> float:
        batch = SimpleNamespace(tokens=tokens, labels=labels, loss_mask=mask, documents=None)
        return engine.train_step([batch], LR).loss

    return step, "Engine: DeepSpeed ZeRO-2, world of one" + (f", float8 {fp8}" if fp8 else "")


def our_model(settings: SimpleNamespace) -> AquilaModel:
    config = settings.config.model_copy(
        update={"checkpoint_activations": settings.recompute != 0, "ckpoint_layer": settings.recompute}
    )
    model = AquilaModel(config, device="meta")
    with torch.no_grad():
        for name, values in first_weights(config, settings.device):
            model.place(name, values.to(torch.bfloat16))
    if settings.fp8:
        model.convert_to_fp8(settings.fp8)
    if settings.backend.COMPILE_BLOCKS or settings.compile_ours:
        model.compile_blocks()
    return model


def ours_alone(settings: SimpleNamespace) -> tuple[Step, str]:
    """The same arithmetic without DeepSpeed: bf16 weights, fp32 master weights and moments."""
    model = our_model(settings)
    states = []
    for group in parameter_groups(model, DECAY):
        options = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": group["weight_decay"]}
        for weight in group["params"]:
            master = weight.detach().float().view(-1)
            moments = torch.zeros_like(master), torch.zeros_like(master), master.new_zeros(())
            states.append((weight, master, moments, options))

    @torch.no_grad()
    def update() -> None:
        total = settings.backend.square_sum(block for w, *_ in states for block, _ in blocks([w.grad]))
        factor = min(1.0, CLIP / (total.sqrt().item() + 1e-6))
        for weight, master, (first, second, count), options in states:
            count += 1
            flat = weight.view(-1)
            parts = [(slice(start, start + block.numel()), block) for block, start in blocks([weight.grad])]
            given = [(flat[at], master[at], block, first[at], second[at]) for at, block in parts]
            settings.backend.adamw(given, count, options, factor)
            weight.grad = None

    def step(tokens: Tensor, labels: Tensor) -> float:
        loss = model(tokens, labels=labels)
        loss.backward()
        update()
        return loss.item()

    return step, "torch alone: DeepSpeed is not installed"


# ---- the others ------------------------------------------------------------------------------------------


def transformers_llama(
    settings: SimpleNamespace, stack: ExitStack, precision: str, compiled: bool
) -> tuple[Step, str]:
    """`LlamaForCausalLM` with sdpa, its own loss, clip and torch's fused AdamW, as its users train it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    dtype = torch.bfloat16 if precision == "pure" else torch.float32
    facts = hf.config_to_hf(settings.config, str(dtype).removeprefix("torch."))
    config = transformers.LlamaConfig(**facts, attn_implementation="sdpa", use_cache=False)
    with settings.device:
        model = transformers.LlamaForCausalLM(config).to(dtype).train()
    heads = hf.permuted(settings.config)
    with torch.no_grad():
        for name, values in first_weights(settings.config, settings.device):
            turned = heads.get(hf.short(name))
            target = model.get_parameter(hf.from_released(name))
            target.copy_(values if turned is None else hf.permute(values, turned))
    if settings.recompute:
        model.gradient_checkpointing_enable()
    call = torch.compile(model) if compiled else model

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        return call(input_ids=tokens, labels=labels, shift_labels=labels).loss

    return plain_step(settings, model, loss_of, precision), f"transformers {transformers.__version__}"


def liger_llama(
    settings: SimpleNamespace, stack: ExitStack, precision: str, compiled: bool
) -> tuple[Step, str]:
    """transformers' Llama with Liger's Triton kernels for norms, rotary, gate and loss (GPUs alone)."""
    from importlib.metadata import version

    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(fused_linear_cross_entropy=True)
    step, what = transformers_llama(settings, stack, precision, compiled)
    return step, f"{what} with liger-kernel {version('liger-kernel')}"


def litgpt_llama(settings: SimpleNamespace, stack: ExitStack, precision: str, compiled: bool):
    """litgpt's GPT as a Llama, with its chunked cross-entropy."""
    from importlib.metadata import version

    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    config = settings.config
    shape = Config(
        n_layer=config.n_layers, n_head=config.n_heads, n_embd=config.dim, n_query_groups=config.kv_heads,
        vocab_size=config.vocab_size, padded_vocab_size=config.vocab_size, block_size=config.max_seq_len,
        rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
        norm_eps=config.norm_eps, mlp_class_name="LLaMAMLP", intermediate_size=config.ffn_dim,
        rope_base=int(config.rope_theta),
    )  # fmt: skip
    dtype = torch.bfloat16 if precision == "pure" else torch.float32
    with settings.device:
        model = GPT(shape).to(dtype)
    fill_litgpt(model, settings.config)
    call = torch.compile(model) if compiled else model

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        return chunked_cross_entropy(call(tokens), labels, chunk_size=0)

    return plain_step(settings, model, loss_of, precision), f"litgpt {version('litgpt')}"


_LITGPT = {
    "tok_embeddings": "transformer.wte",
    "norm": "transformer.ln_f",
    "output": "lm_head",
    "attention.wo": "attn.proj",
    "feed_forward.w1": "mlp.fc_1",
    "feed_forward.w3": "mlp.fc_2",
    "feed_forward.w2": "mlp.proj",
    "attention_norm": "norm_1",
    "ffn_norm": "norm_2",
}


@torch.no_grad()
def fill_litgpt(model: nn.Module, config: ModelConfig) -> None:
    """Our weights under litgpt's names; its query, key and value are one matrix."""
    heads, kv_rows = hf.permuted(config), config.kv_heads * config.head_dim
    rows = {"attention.wq": slice(0, config.dim)}
    rows["attention.wk"] = slice(config.dim, config.dim + kv_rows)
    rows["attention.wv"] = slice(config.dim + kv_rows, config.dim + 2 * kv_rows)
    for name, values in first_weights(config, model.lm_head.weight.device):
        short, layer = hf.short(name).removesuffix(".weight"), name.split(".")[1]
        where = f"transformer.h.{layer}." if name.startswith("layers.") else ""
        if short in rows:
            turned = heads.get(hf.short(name))
            values = values if turned is None else hf.permute(values, turned)
            model.get_parameter(where + "attn.qkv.weight")[rows[short]] = values.to(model.lm_head.weight)
        else:
            model.get_parameter(f"{where}{_LITGPT[short]}.weight").copy_(values)


def torchtitan_llama(
    settings: SimpleNamespace, stack: ExitStack, precision: str, compiled: bool
) -> tuple[Step, str]:
    """torchtitan's Llama, its own mixed precision, loss and way to compile (`titan_model.py`)."""
    from importlib.metadata import version

    from titan_model import build as build_titan

    config, backend = settings.config, settings.backend
    weights, recompute = first_weights(config, settings.device), bool(settings.recompute)
    model, loss_of = build_titan(
        config, weights, settings.device, backend.COMMUNICATION, precision, compiled, recompute
    )
    stack.callback(torch.distributed.destroy_process_group)
    # Its mixed precision is FSDP2's: no autocast on top.
    step = plain_step(settings, model, loss_of, "fp32" if precision == "amp" else precision)
    return step, f"torchtitan {version('torchtitan')}"


def plain_step(settings: SimpleNamespace, model: nn.Module, loss_of: Callable, precision: str) -> Step:
    """Forward, backward, clip and torch's fused AdamW in the dtype of the parameters."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
    )

    def step(tokens: Tensor, labels: Tensor) -> float:
        amp = torch.autocast(settings.device.type, torch.bfloat16) if precision == "amp" else nullcontext()
        with amp:
            loss = loss_of(tokens, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


OURS = {"ours": "", "ours-fp8": "tensorwise", "ours-fp8-rowwise": "rowwise"}


def build(name: str, settings: SimpleNamespace, stack: ExitStack) -> tuple[Step, str]:
    """Of "ours", "ours-fp8[-rowwise]", or LIBRARY-PRECISION[-compiled] such as transformers-amp-compiled."""
    if name in OURS:
        return ours(settings, stack, OURS[name])
    library, precision, *compiled = name.split("-")
    makers = {"transformers": transformers_llama, "liger": liger_llama, "litgpt": litgpt_llama}
    makers["torchtitan"] = torchtitan_llama
    maker = makers[library]
    return maker(settings, stack, precision, bool(compiled))


# ---- matrix products -------------------------------------------------------------------------------------


def matmul_seconds(settings: SimpleNamespace) -> dict[str, float]:
    """Seconds of a step's products alone, bf16, each shape by itself; and the best FLOP/s of a large one."""
    config, n = settings.config, settings.batch * settings.seq
    kv = config.kv_heads * config.head_dim
    shapes = {  # (inputs, outputs): how many
        (config.dim, config.dim): 2 * config.n_layers,
        (config.dim, kv): 2 * config.n_layers,
        (config.dim, config.ffn_dim): 2 * config.n_layers,
        (config.ffn_dim, config.dim): config.n_layers,
        (config.dim, config.vocab_size): 1,
    }
    seconds = flops = 0.0
    for (inputs, outputs), count in shapes.items():
        rows = min(n, 1024) if outputs == config.vocab_size else n  # never the whole logits, as in our loss
        x, w = _random(settings, rows, inputs), _random(settings, outputs, inputs)
        y = _random(settings, rows, outputs)
        each = sum(
            _time(settings, torch.mm, *pair) for pair in ((x, w.t()), (y, w), (y.t(), x))
        )  # forward, gradient of the input, gradient of the weight
        seconds += each * count * n / rows
        flops += 6.0 * n * inputs * outputs * count
    side = 2048 if settings.device.type == "cpu" else 8192
    a, b = _random(settings, side, side), _random(settings, side, side)
    large = 2.0 * side**3 / _time(settings, torch.mm, a, b.t())
    return {"shapes_flops": flops / seconds, "large_flops": large}


def _random(settings: SimpleNamespace, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.bfloat16, device=settings.device)


def _time(settings: SimpleNamespace, function: Callable, *arguments: Tensor) -> float:
    """Seconds of a call, the median of five; on a device of twenty calls each, which wait for one another."""
    calls = 1 if settings.device.type == "cpu" else 20
    function(*arguments)
    times = []
    for _ in range(5):
        settings.backend.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            function(*arguments)
        settings.backend.synchronize()
        times.append((time.perf_counter() - started) / calls)
    return sorted(times)[2]


# ---- a contender's process -------------------------------------------------------------------------------


def reset_peak(device: torch.device) -> None:
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        getattr(torch, device.type).reset_peak_memory_stats()


def peak_gib(settings: SimpleNamespace) -> float:
    """Since `reset_peak`: resident memory on a CPU, what torch has reserved on a device."""
    if settings.device.type != "cpu":
        return settings.backend.memory_gib()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20


def answer(facts: dict) -> None:
    print("@" + json.dumps(facts), flush=True)


def profile_of(step: Callable[[], float]) -> str:
    """The longest kernels, operations and pauses of a step, the mean of three."""
    with torch.profiler.profile() as found:
        for _ in range(3):
            step()
    return profiler.report(profiler.kernels_of(found.events()), 3) + profiler.table(found)


def main() -> None:
    name, values = sys.argv[1], json.loads(sys.argv[2])
    config = ModelConfig(**values.pop("config"))
    settings = SimpleNamespace(**values, config=config)
    settings.backend = get_backend(settings.device)
    settings.device = settings.backend.set_device(0)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(0, config.vocab_size, (settings.batch, settings.seq + 1), generator=generator)
    drawn = drawn.to(settings.device)
    tokens, labels = drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
    with ExitStack() as stack:
        step, what = (None, "") if name == "matmul" else build(name, settings, stack)
        answer({"what": what})
        if step is not None and Path("/proc/self/clear_refs").exists():
            reset_peak(settings.device)
        for line in sys.stdin:
            word, *count = line.split()
            if word == "end":
                break
            if word == "profile":
                print(profile_of(lambda: step(tokens, labels)), flush=True)
                continue
            if step is None:
                answer(matmul_seconds(settings))
                continue
            losses, seconds, spent = [], [], []
            for _ in range(int(count[0])):
                settings.backend.synchronize()
                started, cpu = time.perf_counter(), time.process_time()
                losses.append(step(tokens, labels))
                settings.backend.synchronize()
                seconds.append(time.perf_counter() - started)
                spent.append(time.process_time() - cpu)
            facts = {"seconds": seconds, "cpu_seconds": spent, "losses": losses}
            answer(facts | {"peak_gib": peak_gib(settings)})


if __name__ == "__main__":
    main()
