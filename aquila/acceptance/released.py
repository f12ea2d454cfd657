"""A folder of weights on this device: read whole, continued the same way as in fp32 on the host."""

from pathlib import Path

import torch

from aquila.acceptance.table import Measured, Table
from aquila.generation.decode import generate
from aquila.model import AquilaModel
from aquila.tokenizer import load_tokenizer

PROMPT = "The capital of China is"
TOKENS = 16


def check_weights(table: Table, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Loads the folder, scores a sentence, continues it; the text is for people to read."""
    held: list[AquilaModel] = []

    def load() -> Measured:
        held.append(AquilaModel.from_pretrained(folder, dtype, device))
        return Measured(held[0].parameter_count() / 1e9, unit="G parameters")

    def finite() -> Measured:
        tokens = load_tokenizer(folder).encode(PROMPT)
        with torch.no_grad():
            logits = held[0](torch.tensor([tokens], device=device))
        return Measured(float((~logits.isfinite()).sum()), 0, "logits that are not finite")

    def text() -> Measured:
        tokenizer = load_tokenizer(folder)
        (found,) = generate(held[0], [tokenizer.encode(PROMPT)], TOKENS, temperature=0.0)
        return Measured(len(found), 1, "tokens", at_least=True, detail=repr(tokenizer.decode(found)))

    table.check("weights", f"read {folder}", load)
    if held:
        table.check("weights", "logits", finite)
        table.check("weights", f"continues '{PROMPT}'", text)
