"""A GGUF file run by llama.cpp, through llama-cpp-python: what `--verify` and the benchmarks compare with."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from aquila.core.errors import UserError

INSTALL = "pip install llama-cpp-python"
_PROMPT_TOKENS = 2048  # tokens a call takes at most
_F32 = 0  # ggml's number of the type


def library() -> ModuleType:
    """The module `llama_cpp`, its messages off. Raises `UserError` where it is not installed."""
    try:
        import llama_cpp
    except ImportError:
        raise UserError(f"llama.cpp is not installed (it is compiled, in minutes): {INSTALL}") from None
    llama_cpp.llama_log_set(_silent(llama_cpp), ctypes.c_void_p(0))
    return llama_cpp


def _silent(llama_cpp: ModuleType) -> object:
    if not hasattr(_silent, "callback"):  # kept: the library calls it later
        _silent.callback = llama_cpp.llama_log_callback(lambda *_: None)
    return _silent.callback


class LlamaCpp:
    """A loaded file with a cache of `rows` sequences of up to `length` tokens.

    `exact` keeps the cache in fp32 and attends as written, else as llama.cpp does by itself.
    """

    def __init__(self, path: Path, *, length: int, rows: int = 1, threads: int, exact: bool = False):
        self.api = api = library()
        self.rows, self.lengths = rows, [0] * rows
        self.model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not self.model:
            raise UserError(f"{path}: llama.cpp cannot load it")
        settings = api.llama_context_default_params()
        settings.n_ctx = rows * (-(-length // 256) * 256)
        settings.n_batch, settings.n_seq_max = _PROMPT_TOKENS, rows
        settings.n_threads = settings.n_threads_batch = threads
        if exact:
            settings.type_k = settings.type_v = _F32
            settings.flash_attn_type = 0
        self.context = api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise UserError(f"{path}: llama.cpp cannot make a cache of {settings.n_ctx} tokens")
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch = api.llama_batch_init(_PROMPT_TOKENS, 0, 1)

    def close(self) -> None:
        """Frees the model and the cache."""
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, with what llama.cpp puts before it."""
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        vocab = self.api.llama_model_get_vocab(self.model)
        count = self.api.llama_tokenize(vocab, data, len(data), room, len(room), True, False)
        return list(room[:count])

    def clear(self) -> None:
        """Empties the cache."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.lengths = [0] * self.rows

    def logits(self, tokens: Sequence[Sequence[int]], *, every: bool = False) -> np.ndarray:
        """Logits fp32 (tokens, vocabulary) behind each row's last new token; with `every`, behind all."""
        queue = [
            (token, row, at == len(new) - 1 or every)
            for row, new in enumerate(tokens)
            for at, token in enumerate(new)
        ]
        found = []
        for first in range(0, len(queue), _PROMPT_TOKENS):
            found += self._call(queue[first : first + _PROMPT_TOKENS])
        return np.stack(found)

    def _call(self, queue: list[tuple[int, int, bool]]) -> list[np.ndarray]:
        batch = self.batch
        batch.n_tokens = len(queue)
        for i, (token, row, wanted) in enumerate(queue):
            batch.token[i], batch.pos[i], batch.logits[i] = token, self.lengths[row], wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            self.lengths[row] += 1
        status = self.api.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        shape = (self.vocab_size,)
        return [
            np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, i), shape).copy()
            for i, (_, _, wanted) in enumerate(queue)
            if wanted
        ]
