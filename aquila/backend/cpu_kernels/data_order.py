"""The long loops of the data order, compiled; without a compiler NumPy and plain Python.

They change nothing but time: an order is the same bit for bit, whoever computes it.
"""

import ctypes
from functools import lru_cache

import numpy as np

from aquila.backend.cpu_kernels import native


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    library = native.library("data_order.cpp")
    if library is not None:
        library.shuffle.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
        library.blend.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p] + [ctypes.c_int64] * 2
        library.blend.argtypes += [ctypes.c_void_p]
        library.shuffle.restype = library.blend.restype = None
        library.sample_starts.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2
        library.sample_starts.argtypes += [ctypes.c_void_p, ctypes.c_int64]
        library.sample_starts.restype = ctypes.c_int64
    return library


def available() -> bool:
    """Whether the compiled loops are there (compiling them at the first call)."""
    return _library() is not None


def shuffle(numbers: np.ndarray, random: np.random.RandomState) -> None:
    """`random.shuffle(numbers)`, in place, for a contiguous array (n,)."""
    library = _library()
    if library is None or numbers.itemsize != 4 or len(numbers) >= 1 << 32:
        random.shuffle(numbers)
        return
    name, key, place, has_gauss, gauss = random.get_state(legacy=True)
    key, place = np.array(key, np.uint32), ctypes.c_int64(place)
    library.shuffle(numbers.ctypes.data, len(numbers), key.ctypes.data, ctypes.addressof(place))
    random.set_state((name, key, place.value, has_gauss, gauss))


def sample_starts(
    lengths: np.ndarray, documents: np.ndarray, seq_length: int, starts: np.ndarray
) -> int | None:
    """Fills `starts`, int32 (samples, 2), with where samples begin: a place in `documents`, a token there.

    lengths: int32, tokens of each document. documents: int32, their order. Returns the tokens of all of them,
    or -1 where one has less than none; None without a compiler.
    """
    library = _library()
    contiguous = all(
        array.flags.c_contiguous and array.dtype == np.int32 for array in (lengths, documents, starts)
    )
    if library is None or not contiguous:
        return None
    arrays = lengths.ctypes.data, documents.ctypes.data, len(documents)
    return library.sample_starts(*arrays, seq_length, starts.ctypes.data, len(starts))


def blend(weights: np.ndarray, counts: np.ndarray, first: int, samples: int) -> np.ndarray:
    """The corpora, int16 (samples,), of samples `first` on of a blend.

    weights: float64 (corpora,), of sum 1. counts: int64 (corpora,), what each corpus gave before `first`; it
    goes on in place. Each sample comes from the corpus that has given the least of its share, as in
    Megatron's `build_blending_indices`, which can only begin at 0.
    """
    which = np.empty(samples, np.int16)
    library = _library()
    if library is not None:
        arrays = weights.ctypes.data, len(weights), counts.ctypes.data
        library.blend(*arrays, first, samples, which.ctypes.data)
        return which
    for at in range(samples):
        errors = weights * max(first + at, 1.0) - counts
        which[at] = errors.argmax()
        counts[which[at]] += 1
    return which
