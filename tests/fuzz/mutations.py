"""What goes wrong with text files on their way: rewrites that change nothing, and damage."""

from __future__ import annotations

import re

import numpy as np

NUMBER = re.compile(rb"[-+]?\d+\.?\d*(?:[EeDd][-+]?\d+)?")
TOKENS = (
    *(
        b"0",
        b"-1",
        b"1",
        b"2",
        b"-3",
        b"1000000000000000000",
        b"99999999999999999999999",
        b"2147483648",
        b"-2147483649",
    ),
    *(b"nan", b"NaN", b"inf", b"-inf", b"1e308", b"1e309", b"-1e400", b"1e-400", b"1.0-100", b"1.0+100", b"1.0D-3"),
    *(
        b"1e18",
        b"0x10",
        b"1_000",
        b"1,5",
        b"--1",
        b"+",
        b".",
        b"",
        b"abc",
        b"\xff\xfe",
        b"\x00",
        b"1e5000",
        b"************",
    ),
    *(b"3.7", b"4 4", b"1000000", b"100000", b"\xe2\x88\x921", b"'; DROP", b"../../../../etc/passwd", b"%s%n", b"{0}"),
)


def equal_rewrite(text: bytes, rng: np.random.Generator) -> bytes:
    """The same file as another system would write it: ends of lines, blanks, and exponents as Fortran has them."""
    out = text
    if rng.random() < 0.5:
        out = out.replace(b"\n", b"\r\n")
    if rng.random() < 0.5:
        out += rng.choice([b"\n", b"\n\n", b"  \n"])
    if rng.random() < 0.3:
        out = re.sub(rb"(\d)E([-+]\d\d)\b", rb"\1D\2", out)
    elif rng.random() < 0.3:
        out = re.sub(rb"(\d)E([-+]\d\d)\b", rb"\1\2", out)
    return out


def damaged(text: bytes, rng: np.random.Generator) -> bytes:
    """The file after one to three accidents."""
    for _ in range(int(rng.integers(1, 4))):
        text = ACCIDENTS[int(rng.integers(len(ACCIDENTS)))](text, rng)
    return text


def _place(text: bytes, rng: np.random.Generator) -> int:
    # Half of the accidents happen in the head, where the counts are.
    return int(rng.integers(max(1, min(len(text), 400) if rng.random() < 0.5 else len(text))))


def cut(text: bytes, rng: np.random.Generator) -> bytes:
    """Cut off anywhere."""
    return text[: _place(text, rng)]


def _token(text: bytes, rng: np.random.Generator) -> bytes:
    start = _place(text, rng)
    found = NUMBER.search(text, start) or NUMBER.search(text)
    new = TOKENS[int(rng.integers(len(TOKENS)))]
    return text if found is None else text[: found.start()] + new + text[found.end() :]


def _word(text: bytes, rng: np.random.Generator) -> bytes:
    words = list(re.finditer(rb"[A-Za-z_:=\"]+", text[:4000]))
    if not words:
        return text
    found = words[int(rng.integers(len(words)))]
    new = TOKENS[int(rng.integers(len(TOKENS)))]
    return text[: found.start()] + new + text[found.end() :]


def _lines(text: bytes, rng: np.random.Generator) -> bytes:
    lines = text.split(b"\n")
    i = text[: _place(text, rng)].count(b"\n")
    what = int(rng.integers(4))
    if what == 0:
        del lines[i : i + int(rng.integers(1, 4))]
    elif what == 1:
        lines[i:i] = [lines[i]] * int(rng.integers(1, 4))
    elif what == 2:
        j = int(rng.integers(len(lines)))
        lines[i], lines[j] = lines[j], lines[i]
    else:
        lines.insert(i, TOKENS[int(rng.integers(len(TOKENS)))])
    return b"\n".join(lines)


def _bytes(text: bytes, rng: np.random.Generator) -> bytes:
    i, n = _place(text, rng), int(rng.integers(1, 40))
    noise = rng.bytes(n)
    return text[:i] + noise + text[i + (n if rng.random() < 0.5 else 0) :]


def _flip(text: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(text)
    for _ in range(int(rng.integers(1, 6))):
        if data:
            data[_place(text, rng) % len(data)] ^= 1 << int(rng.integers(8))
    return bytes(data)


def _mark(text: bytes, rng: np.random.Generator) -> bytes:
    return b"\xef\xbb\xbf" + text if rng.random() < 0.5 else b"\xff\xfe" + text.decode("latin1").encode("utf-16-le")


def _ends(text: bytes, rng: np.random.Generator) -> bytes:
    return text.replace(b"\n", rng.choice([b"\r", b"\r\n", b" ", b"\n\n", b"\x00"]))


def _long(text: bytes, rng: np.random.Generator) -> bytes:
    i = _place(text, rng)
    return text[:i] + rng.choice([b"9", b" ", b"a", b"1 "]) * int(rng.choice([1000, 200_000])) + text[i:]


ACCIDENTS = (cut, _token, _token, _token, _word, _lines, _lines, _bytes, _flip, _mark, _ends, _long)
