"""The fast way to the ids of byte-level BPE: `gigatoken`, taken only where it proves itself.

`tokenizers` defines the ids. gigatoken remembers the ids of every word it has met, which makes it many
times as fast, but it is young: so the versions are pinned, the vocabulary must be of a kind on which the
two cannot differ, and at each load a fixed text of awkward characters must give the ids of `tokenizers`.
"""

import ctypes
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

VERSIONS = "gigatoken>=0.10,<0.11"
"""As in requirements/core.txt."""

_CHECK_BYTES = 1 << 20
"""Characters between two looks at the process's memory."""
_GROWTH = 192 << 20
"""Bytes of memory after which the encoder, whose table of words has no bound, is made anew."""

PROBE = (
    "Hello, world! I'm you're they've it's we'll he'd 'tis '' 'S 'LL don’t\r\n\tdef f(x):\n    return x \n"
    "  leading, trailing  \n\n\n 1234567890 3.14159 1e-8 ²³½ ١٢٣ Ⅷ x1y2 a_b __init__ <|endoftext|>[CLS]</s>"
    "\0\x01\x7f\u0085\u00a0\u1680\u2000\u2003\u200b\u2028\u2029\u202f\u205f\u3000\ufeff\u180e \u00ad"
    "将进酒·君不见　唐·李白，。！？日本語カナ 한국어 \u1100\u1161\u11a8 ไทย हिन्दी العربية עברית ελληνικά Ñ"
    "e\u0301\u0327 ǅ ß ŉ ﬁ ｆｕｌｌ 𝔘𝟙 🙂👍🏽🏳️‍🌈\U000e0067 \U0010ffff\ue000\ufffd ſ K Å ªº\u0345\u0300 "
) + "".join(letter * count + "x" for letter in "a \t\n-='字é7" for count in (9, 33, 300))
"""Contractions, every kind of space, digits of other scripts, marks, controls, pairs beyond 16 bits, runs."""


class FastEncoder:
    """Text to int32 ids through gigatoken, in bounded memory. Raises ImportError and ValueError when made.

    The ids of words met once are remembered without end, so the encoder is renewed once the process has
    grown by `_GROWTH` bytes since the last renewal; ids never depend on it.
    """

    def __init__(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]]) -> None:
        # The extension alone: the package's own door loads awkward and typer, which nothing here needs.
        from gigatoken.gigatoken_rs import load_hf_json

        self._load: Callable[[bytes], object] = load_hf_json
        model = {"type": "BPE", "vocab": vocab, "merges": merges}
        splitting = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        content = {"model": model, "pre_tokenizer": splitting}
        self._content = json.dumps(content, ensure_ascii=False).encode()
        self._encoder = self._load(self._content)
        self._unwatched = 0
        self._before: int | None = None
        self.renewals = 0

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`. Raises UnicodeEncodeError for a lone surrogate."""
        ids = self._encoder.encode(text).view(np.int32)
        self._unwatched += len(text)
        if self._unwatched >= _CHECK_BYTES:
            self._unwatched = 0
            self._bound_memory()
        return ids

    def _bound_memory(self) -> None:
        used = _private_bytes()
        if self._before is None:
            self._before = used
        elif used - self._before > _GROWTH:
            self._encoder = None
            self._encoder = self._load(self._content)
            return_unused_memory()
            self._before = _private_bytes()
            self.renewals += 1


def return_unused_memory() -> None:
    """Gives memory freed by native code back to the system."""
    with suppress(AttributeError, OSError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def _private_bytes() -> int:
    """Resident memory of this process that is no file's; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            fields = file.read().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")
