"""Small models that generation is tested on."""

import shutil
from pathlib import Path

import torch

from aquila.config import ModelConfig
from aquila.model import AquilaModel, save_weights

TOKENIZER_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json")


def small_model(attention: str = "auto", **changes) -> AquilaModel:
    """A random model whose weights are large enough that its choices depend on the context."""
    values = {
        "dim": 48,
        "n_layers": 2,
        "n_heads": 6,
        "vocab_size": 300,
        "multiple_of": 16,
        "max_seq_len": 64,
        "initializer_range": 0.15,
    }
    model = AquilaModel(ModelConfig(**{**values, **changes}), attention=attention, seed=7)
    return model.requires_grad_(False)


def write_model_dir(folder: Path, root: Path, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A model folder with the demo tokenizer and random weights."""
    values = {"vocab_size": 1217, "max_seq_len": 128, **changes}
    model = small_model(**values)
    save_weights(model, folder, dtype=dtype)
    for name in TOKENIZER_FILES:
        shutil.copy(root / "checkpoints_in" / "aquila-tiny" / name, folder / name)
    text = ModelConfig.model_validate(model.config.model_dump()).model_dump_json(exclude_defaults=True)
    (folder / "config.json").write_text(text)
    return folder


def tokens(count: int, seed: int = 0, vocab: int = 300) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (count,), generator=generator).tolist()
