"""torchtitan's Llama as its own trainer builds and calls it, for `step_contenders.py`.

From torchtitan 0.3.0: FSDP2 in a world of one for mixed precision (fp32 weights, bf16 products), its fused
query-key-value matrix, its loss in chunks, its way to compile (each block, and the loss). Attention is its
SDPA module, plain and causal as every contender's here; its trainer takes FlexAttention for masks of
documents, and replays a step as a CUDA graph, which this does not.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aquila.config import ModelConfig


def build(
    config: ModelConfig,
    weights: Iterator[tuple[str, Tensor]],
    device: torch.device,
    communication: str,
    precision: str,
    compiled: bool,
    recompute: bool,
) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """The model with `weights` (released names), and its loss of tokens and labels.

    precision: amp, its default (fp32 weights, bf16 products, fp32 reduction); pure, all in bf16; fp32.
    """
    import torchtitan.tools.utils as tools

    tools.device_type, tools.device_module = (
        device.type,
        getattr(torch, device.type),
    )  # it takes any CPU for a GPU
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed import utils as distributed
    from torchtitan.distributed.activation_checkpoint import FullAC
    from torchtitan.models.llama3 import parallelize_llama

    dist.init_process_group(communication, store=dist.HashStore(), rank=0, world_size=1)
    parallelism = ParallelismConfig()
    distributed.set_spmd_backend(parallelism.spmd_backend)
    with (
        torch.device("meta"),
        tools.set_default_dtype(torch.bfloat16 if precision == "pure" else torch.float32),
    ):
        model = shape_of(config).build()
    compile_config = CompileConfig(enable=compiled)
    model = parallelize_llama(
        model,
        parallel_dims=ParallelDims.from_config(parallelism, 1),
        training=TrainingConfig(mixed_precision_param="float32" if precision == "fp32" else "bfloat16"),
        parallelism=parallelism,
        compile_config=compile_config,
        ac_config=FullAC.Config() if recompute else None,
        dump_folder="",
    )
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights()  # the rotary table alone
        fill(model, config, weights)
    chunked = ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=config.vocab_size))
    loss = chunked.build(compile_config=compile_config)
    loss.set_lm_head(model.lm_head)
    model._skip_lm_head = True

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        return loss(model(tokens), labels, torch.tensor(labels.numel(), device=device))[0]

    return model, loss_of


def shape_of(config: ModelConfig):
    """`Llama3Model.Config` of our sizes; parameters are not initialized."""
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm, ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
    from torchtitan.models.common.param_init import skip_param_init
    from torchtitan.models.llama3 import Llama3Model, Llama3TransformerBlock
    from torchtitan.models.llama3.sharding import set_llama3_sharding_config

    none = {"weight": skip_param_init}
    dim, vocabulary = config.dim, config.vocab_size
    rope = ComplexRoPE.Config(dim=config.head_dim, max_seq_len=config.max_seq_len, theta=config.rope_theta)

    def norm():
        return RMSNorm.Config(normalized_shape=dim, eps=config.norm_eps, param_init=none)

    def layer():
        return Llama3TransformerBlock.Config(
            attention_norm=norm(),
            ffn_norm=norm(),
            attention=make_gqa_config(
                dim=dim, n_heads=config.n_heads, n_kv_heads=config.kv_heads, rope=rope, fuse_qkv=True,
                inner_attention=ScaledDotProductAttention.Config(), wqkv_param_init=none, wo_param_init=none,
            ),
            feed_forward=make_ffn_config(
                dim=dim, hidden_dim=config.ffn_dim, w1_param_init=none, w2w3_param_init=none
            ),
        )  # fmt: skip

    shape = Llama3Model.Config(
        dim=dim,
        vocab_size=vocabulary,
        tok_embeddings=Embedding.Config(num_embeddings=vocabulary, embedding_dim=dim, param_init=none),
        norm=norm(),
        lm_head=Linear.Config(in_features=dim, out_features=vocabulary, param_init=none),
        layers=[layer() for _ in range(config.n_layers)],
    )
    set_llama3_sharding_config(shape, enable_sp=True)
    return shape


def fill(model: nn.Module, config: ModelConfig, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Released weights into the model; query, key and value are one matrix, by groups of key heads.

    Its rotary embedding turns neighbouring pairs, as ours does: no row changes its place within a head.
    """
    targets = {clean(name): parameter.to_local() for name, parameter in model.named_parameters()}
    left, group = set(targets), config.n_heads // config.kv_heads
    places = {"wq": slice(0, group), "wk": slice(group, group + 1), "wv": slice(group + 1, group + 2)}
    for name, values in weights:
        *where, matrix, _ = name.split(".")
        if matrix in places:
            name = ".".join([*where, "qkv_linear.wqkv.weight"])
            target = targets[name].view(config.kv_heads, group + 2, config.head_dim, config.dim)
            target[:, places[matrix]] = values.view(config.kv_heads, -1, config.head_dim, config.dim).to(
                target
            )
        else:
            name = "lm_head.weight" if matrix == "output" else name
            targets[name].copy_(values)
        left.discard(name)
    assert not left, left


def clean(name: str) -> str:
    """A parameter's name without what recomputation and compilation wrap around its block."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
