"""Damaged and hostile inputs: valid ones after a few edits, drawn by hypothesis, which also shrinks them."""

from collections.abc import Sequence

from hypothesis import strategies as st

ODD = (
    b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b"\r\n", b" ", b"\t", b'"', b"'", b"\\",
    b"\\ud800", b",", b":", b"[", b"]", b"{", b"}", b"-", b"-1", b"0", b"1", b"1.5", b"1e400", b"1e-40",
    b"NaN", b"Infinity", b".nan", b"null", b"true", b"auto", b"~", b"[]", b"{}", b'""', b"*a", b"&a ",
    b"<<: ", b"!!", b"../", b"/", b"\xe4\xb8", "北京".encode(), b"\xf4\x90\x80\x80", b"9" * 30, b"9" * 5000,
    b"[" * 3000, b'{"a":' * 3000, b" " * 3000, b"\xff" * 8, b"\x00" * 8, b"\x7f" + b"\xff" * 7,
    b"\x80" + b"\x00" * 7, b"\x01" + b"\x00" * 7,
)  # fmt: skip
"""What readers of text and of binary files stumble over."""


@st.composite
def damaged(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of `seeds` after up to five edits: bytes replaced, put in, cut out, repeated, or an end cut off."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 5))):
        data = _edited(draw, data, draw(st.sampled_from(seeds)))
    return data


def _edited(draw: st.DrawFn, data: bytes, other: bytes) -> bytes:
    at = draw(st.integers(0, len(data)))
    end = min(len(data), at + draw(st.integers(0, 20)))
    kind = draw(st.sampled_from(["odd", "bytes", "flip", "remove", "repeat", "cut", "splice", "value"]))
    if kind == "odd":
        return data[:at] + draw(st.sampled_from(ODD)) + data[draw(st.sampled_from([at, end])) :]
    if kind == "bytes":
        return data[:at] + draw(st.binary(max_size=8)) + data[end:]
    if kind == "flip" and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
    if kind == "repeat":
        return data[:end] + data[at:]
    if kind == "cut":
        return data[:at]
    if kind == "splice":
        return data[:at] + other[draw(st.integers(0, len(other))) :]
    if kind == "value":  # what stands between a colon and the next comma or line's end
        first = data.find(b":", at) + 1
        ends = [place for place in (data.find(mark, first) for mark in (b",", b"}", b"\n")) if place >= 0]
        return data[:first] + draw(st.sampled_from(ODD)) + data[min(ends, default=len(data)) :]
    return data[:at] + data[end:]
