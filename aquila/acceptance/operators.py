"""Every operator of the device's backend against the definition in fp64, forward and backward."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from aquila.acceptance.table import Measured, Skip, Table
from aquila.backend import reference
from aquila.model.loss import cross_entropy
from aquila.model.rotary import RotaryTables

LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
"""Greatest relative error ||x - truth|| / ||truth||, by the rounding of the dtype and some products' sums."""
TOKENS, DIM, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB = 320, 512, 8, 2, 64, 1408, 4000
"""Two batches of 160 tokens of a layer that is small enough for fp64 on the host."""


def relative_error(got: Tensor, truth: Tensor) -> float:
    """||got - truth|| / ||truth|| in fp64 on the host; NaN counts as infinite."""
    got, truth = got.detach().double().cpu(), truth.detach().double().cpu()
    error = float((got - truth).norm() / truth.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def compare(
    ours: Callable[..., Tensor], truth: Callable[..., Tensor], inputs: list[Tensor], device: torch.device
) -> float:
    """Greatest relative error of the result and of the gradients of all floating inputs.

    `inputs` in the dtype under test, on the host; `truth` gets them in fp64.
    """
    results = []
    for function, place in ((ours, device), (truth, None)):
        given = [
            (x.to(place) if place else (x.double() if x.is_floating_point() else x)).requires_grad_(
                x.is_floating_point()
            )
            for x in (x.detach().clone() for x in inputs)
        ]
        out = function(*given)
        slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
        out.backward(slope)
        results.append([out, *(x.grad for x in given if x.requires_grad)])
    return max(relative_error(got, wanted) for got, wanted in zip(*results, strict=True))


def check_operators(
    table: Table, backend: ModuleType, device: torch.device, dtypes: list[torch.dtype]
) -> None:
    """A line for each operator and dtype."""
    for dtype in dtypes:
        word = str(dtype).rpartition(".")[2]
        for name, function in _cases(backend, device, dtype).items():
            table.check("operators", f"{name} {word}", _limited(function, LIMITS[dtype]))
    table.check("operators", "square_sum", lambda: _square_sum(backend, device))


def _limited(function: Callable[[], float], limit: float) -> Callable[[], Measured]:
    return lambda: Measured(function(), limit)


def _cases(backend: ModuleType, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], float]]:
    g = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    x = random(2, TOKENS // 2, DIM)
    heads = random(2, TOKENS // 2, HEADS, HEAD_DIM)
    cos, sin = RotaryTables(HEAD_DIM, 10000.0, TOKENS // 2).on(torch.device("cpu"), TOKENS // 2)
    tokens = torch.randint(VOCAB, (2, TOKENS // 2), generator=g)
    labels = torch.randint(VOCAB, (TOKENS,), generator=g)
    mask = (torch.rand(TOKENS, generator=g) > 0.2).float()
    here = [t.to(device) for t in (cos[None], sin[None], tokens, labels, mask)]

    def on(backend: ModuleType, operation: str, *rest: object) -> Callable[..., Tensor]:
        return lambda *inputs: getattr(backend, operation)(*inputs, *rest)

    def both(
        operation: str, inputs: list[Tensor], rest: tuple = (), rest_here: tuple | None = None
    ) -> Callable:
        given = on(backend, operation, *(rest if rest_here is None else rest_here))
        return lambda: compare(given, on(reference, operation, *rest), inputs, device)

    def loss(backend: ModuleType, labels: Tensor, mask: Tensor) -> Callable[..., Tensor]:
        return lambda hidden, weight: cross_entropy(
            hidden, weight, labels, mask, z_loss=1e-4, backend=backend
        )

    def embed(backend: ModuleType, tokens: Tensor) -> Callable[..., Tensor]:
        return lambda weight: backend.embedding(tokens, weight)

    return {
        "rms_norm": both("rms_norm", [x, random(DIM)], (1e-5,)),
        "rotary": both("rotary", [heads], (cos[None], sin[None]), (here[0], here[1])),
        "swiglu": both("swiglu", [random(2, TOKENS // 2, HIDDEN), random(2, TOKENS // 2, HIDDEN)]),
        "linear": both("linear", [x, random(HIDDEN, DIM, scale=DIM**-0.5)]),
        "embedding": lambda: compare(
            embed(backend, here[2]), embed(reference, tokens), [random(VOCAB, DIM)], device
        ),
        "cross_entropy": lambda: compare(
            loss(backend, here[3], here[4]),
            loss(reference, labels, mask),
            [random(TOKENS, DIM), random(VOCAB, DIM, scale=DIM**-0.5)],
            device,
        ),
    }


def _square_sum(backend: ModuleType, device: torch.device) -> Measured:
    """Whole or in parts, small beside large: the norm of a gradient must not depend on how it was cut."""
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[::1000] *= 1000
    x = x.to(device)
    whole = float(backend.square_sum([x]))
    parts = float(backend.square_sum(x.split(100_003)))
    truth = float(x.cpu().double().square().sum())
    return Measured(max(abs(whole - truth), abs(parts - truth)) / truth, 1e-6)


def check_attention(
    table: Table, backend: ModuleType, device: torch.device, dtypes: list[torch.dtype]
) -> None:
    """Against the definition, and what must hold bit for bit: the future and other documents are not seen."""
    for dtype in dtypes:
        word = str(dtype).rpartition(".")[2]
        for kind in ("fused", "triangle"):
            for packed in (False, True):
                name = f"{kind} {word}" + (", documents" if packed else "")
                given = (backend, device, dtype, kind, packed)
                table.check("attention", name, _limited(_attention_error(*given), LIMITS[dtype]))
            table.check(
                "attention", f"{kind} {word}: the future", _hidden(backend, device, dtype, kind, False)
            )
            table.check(
                "attention", f"{kind} {word}: neighbours", _hidden(backend, device, dtype, kind, True)
            )
    table.check(
        "attention", "triangle float16: scores of 8,400", lambda: _large_scores(backend, device, dtypes)
    )


def _qkv(dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = ((HEADS,), (KV_HEADS,), (KV_HEADS,))
    return [torch.randn(2, 640, *shape, HEAD_DIM, generator=g).to(dtype) for shape in shapes]


def _documents() -> Tensor:
    """Two rows: three documents, of which one ends off every block; and five short ones."""
    documents = torch.zeros(2, 640, dtype=torch.int64)
    for row, ends in enumerate(((100, 417), (64, 128, 129, 600))):
        for end in ends:
            documents[row, end:] += 1
    return documents


def _attention_error(
    backend: ModuleType, device: torch.device, dtype: torch.dtype, kind: str, packed: bool
) -> Callable[[], float]:
    documents = _documents() if packed else None

    def ours(*inputs: Tensor) -> Tensor:
        there = None if documents is None else documents.to(device)
        return backend.attention(*inputs, kind=kind, documents=there)

    def truth(*inputs: Tensor) -> Tensor:
        return reference.plain_attention(*inputs, documents=documents)

    return lambda: compare(ours, truth, _qkv(dtype), device)


def _hidden(
    backend: ModuleType, device: torch.device, dtype: torch.dtype, kind: str, packed: bool
) -> Callable[[], Measured]:
    """Counts outputs that change, in any bit, when what they must not see changes."""

    def count() -> Measured:
        q, k, v = (x.to(device) for x in _qkv(dtype))
        documents = _documents().to(device) if packed else None
        before = backend.attention(q, k, v, kind=kind, documents=documents)
        k, v = k.clone(), v.clone()
        # Position 300: its past does not see it. Packed: the first row's second document, 100 to 416.
        changed = slice(100, 417) if packed else slice(300, 301)
        k[0, changed] += 1
        v[0, changed] -= 3
        after = backend.attention(q, k, v, kind=kind, documents=documents)
        differs = (before != after).any(-1).any(-1).cpu()
        seen = torch.zeros_like(differs)
        seen[0, changed if packed else slice(300, None)] = True
        wrong = int((differs & ~seen).sum()) + int(not differs[0, changed].any())
        return Measured(wrong, 0, "positions")

    return count


def _large_scores(backend: ModuleType, device: torch.device, dtypes: list[torch.dtype]) -> Measured:
    """fp16 scores that leave its range before they are scaled by 1 / sqrt(D)."""
    if torch.float16 not in dtypes:
        raise Skip("fp16 is not offered on this device")
    q, k, v = (x.to(device) for x in _qkv(torch.float16))
    q = q.sign() * 30.0
    k = q[:, :, :: HEADS // KV_HEADS].sign() * 35.0  # 64 x 30 x 35 = 67,200, beyond fp16; 8,400 when scaled
    out = backend.attention(q, k, v, kind="triangle")
    return Measured(int((~out.isfinite()).sum()), 0, "not finite")
