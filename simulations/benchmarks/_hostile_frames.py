"""Frames that are wrong: mutations of a right one, and a judge of its own that says whether a mutant is wrong at all.

The judge shares no code with the checks of the library: it reads safetensors and JSON by their formats. It knows the
right frame, and calls wrong what says anything else of whose frame it is, is not well formed, or has other tensors
than their marks say, values that are not finite, or labels beyond the vocabulary. Other activations are another batch,
and right.
"""

import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

ITEM_BYTES = {"F32": 4, "I32": 4, "U8": 1}
NUMPY: dict[str, Any] = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4"), "U8": np.dtype("u1")}
WHOSE = ("kind", "run", "round", "client", "cut", "protocol")
WHICH = (*WHOSE, "step", "part", "parts")
"""header fields that must be as in the right frame: of every kind, and of a batch; what it does not use may be any"""
EVIL_WORDS: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 7, 1 << 31, 1 << 62, 1 << 63, 1 << 200, -(1 << 63), 0.5, 1e308, math.nan, math.inf, True, False),
    *(
        None,
        "",
        "x",
        "honest",
        "train",
        "gradient",
        "leave",
        "resume",
        "\x00",
        "é" * 50,
        "9" * 300,
        [],
        [1],
        {},
        {"a": 1},
    ),
)
EVIL_INTS = (-1, -(2**31), 2**31 - 1, 2**30, 65536, 97, 7, 0)
EVIL_FLOATS = (math.nan, math.inf, -math.inf)
LENGTH = struct.Struct("<Q")
Parsed = tuple[dict[str, Any], dict[str, Any], bytes]
"""the frame's own header, ours within it, and the tensors' bytes"""


def parse(frame: bytes) -> Parsed:
    """A frame by its formats.

    Raises:
        ValueError, KeyError, TypeError, struct.error: it is none.
    """
    (length,) = LENGTH.unpack_from(frame)
    if length > len(frame) - LENGTH.size:
        raise ValueError("the header is longer than the frame")
    outer = json.loads(frame[LENGTH.size : LENGTH.size + length].decode())
    inner = json.loads(outer.pop("__metadata__")["hsplit"])
    if not isinstance(inner, dict):
        raise TypeError("no header")
    return outer, inner, frame[LENGTH.size + length :]


def assemble(parsed: Parsed) -> bytes:
    """A frame of what `parse` gave, changed or not."""
    outer, inner, data = parsed
    header = json.dumps({"__metadata__": {"hsplit": json.dumps(inner)}, **outer}).encode()
    return LENGTH.pack(len(header)) + header + data


def _is_in_range(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or 0 <= value < 1 << 63


class Judge:
    """Says what is wrong.

    Args:
        right: a frame that the tail takes.
        vocabulary: labels are below it.
    """

    def __init__(self, right: bytes, vocabulary: int) -> None:
        self._entries, self._header, _ = parse(right)
        self._right = self._tensors(right)
        self._decisive = WHICH if self._right else WHOSE
        self._vocabulary = vocabulary

    def is_wrong(self, frame: bytes) -> bool:
        """Whether nobody may take `frame`. What is neither surely wrong nor surely right is not called wrong."""
        try:
            outer, inner, _ = parse(frame)
            if inner.keys() - self._header.keys() or any(self._differs(inner, name) for name in self._decisive):
                return True
            if any(type(value) is not type(self._header[name]) for name, value in inner.items()):
                return True
            if any(not _is_in_range(value) for value in inner.values()):
                return True
            if outer.keys() != self._entries.keys():
                return True
            tensors = self._tensors(frame)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, struct.error):
            return True
        return bool(tensors) and self._has_wrong_values(outer, tensors)

    def _differs(self, inner: dict[str, Any], name: str) -> bool:
        found = inner.get(name)
        return name in inner and (found != self._header[name] or type(found) is not type(self._header[name]))

    def _has_wrong_values(self, outer: dict[str, Any], tensors: dict[str, Any]) -> bool:
        marks = [name for name in tensors if name == "size" or name.endswith((".spans", ".bits"))]
        if any(outer[name]["dtype"] != self._entries[name]["dtype"] for name in outer):
            return True
        if not np.isfinite(tensors["activations"]).all():
            return True
        labels = tensors["labels"]
        if (labels < 0).any() or (labels >= self._vocabulary).any():
            return True
        same = all(np.array_equal(tensors[name], self._right[name]) for name in marks)
        if same:
            return any(outer[name]["shape"] != self._entries[name]["shape"] for name in outer)
        width = int(tensors["size"][1]) if tensors["size"].shape == (2,) else -1
        spans = [tensors[name] for name in marks if name.endswith(".spans")]
        return any((span < 0).any() or (span.astype(np.int64).sum(1) > width).any() for span in spans if span.ndim == 2)

    @staticmethod
    def _tensors(frame: bytes) -> dict[str, Any]:
        """The tensors; ValueError where they do not fill the frame, each its own part."""
        outer, _, data = parse(frame)
        tensors, filled = {}, 0
        for name, entry in sorted(outer.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            shape = entry["shape"]
            if any(type(size) is not int or size < 0 for size in (begin, end, *shape)) or begin != filled:
                raise ValueError(name)
            if math.prod(shape) * ITEM_BYTES[entry["dtype"]] != end - begin or end > len(data):
                raise ValueError(name)
            tensors[name] = np.frombuffer(data[begin:end], NUMPY[entry["dtype"]]).reshape(shape)
            filled = end
        if filled != len(data):
            raise ValueError("bytes that are of no tensor")
        return tensors


class Mutants:
    """Endless wrong frames.

    Args:
        right: a frame that the tail takes.
        judge: of it.
        seed: of what becomes of it.
    """

    def __init__(self, right: bytes, judge: Judge, seed: int) -> None:
        self._right = right
        self._judge = judge
        self._random = random.Random(seed)
        self._kinds: tuple[Callable[[], bytes], ...] = (
            self._flipped,
            self._overwritten,
            self._cut_short,
            self._longer,
            self._other_length,
            self._other_field,
            self._other_entry,
            self._other_value,
            self._other_value,
            self._other_value,
        )

    def next(self) -> tuple[str, bytes]:
        """A kind of mutation and a frame that is wrong by it."""
        while True:
            kind = self._random.choice(self._kinds)
            frame = kind()
            if self._judge.is_wrong(frame):
                return kind.__name__.lstrip("_"), frame

    def _place(self) -> int:
        """Anywhere in the frame; in every other case in its header, which is the smaller part."""
        (length,) = LENGTH.unpack_from(self._right)
        return self._random.randrange(
            min(len(self._right), length + 8) if self._random.random() < 0.5 else len(self._right)
        )

    def _flipped(self) -> bytes:
        frame = bytearray(self._right)
        for _ in range(self._random.choice((1, 1, 2, 8, 64))):
            frame[self._place()] ^= 1 << self._random.randrange(8)
        return bytes(frame)

    def _overwritten(self) -> bytes:
        begin, size = self._place(), self._random.choice((1, 4, 16, 200))
        filler = self._random.choice((bytes(size), b"\xff" * size, self._random.randbytes(size)))
        return (self._right[:begin] + filler + self._right[begin + size :])[: len(self._right)]

    def _cut_short(self) -> bytes:
        return self._right[: self._place()]

    def _longer(self) -> bytes:
        begin, size = self._place(), self._random.choice((1, 8, 100, 5000))
        return self._right[:begin] + self._random.randbytes(size) + self._right[begin:]

    def _other_length(self) -> bytes:
        length = self._random.choice((0, 1, 2**20 + 1, 2**31, 2**63, 2**64 - 1, self._random.randrange(2**64)))
        return LENGTH.pack(length) + self._right[8:]

    def _other_field(self) -> bytes:
        outer, inner, data = parse(self._right)
        name = self._random.choice([*inner, "unknown"])
        if self._random.random() < 0.1:
            inner.pop(name, None)
        else:
            alike = [word for word in EVIL_WORDS if type(word) is type(inner.get(name))]
            inner[name] = self._random.choice(alike if alike and self._random.random() < 0.7 else EVIL_WORDS)
        return assemble((outer, inner, data))

    def _other_entry(self) -> bytes:
        outer, inner, data = parse(self._right)
        if not outer:
            outer["extra"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
            return assemble((outer, inner, data))
        name = self._random.choice(list(outer))
        entry = outer[name]
        match self._random.randrange(5):
            case 0:
                entry["dtype"] = self._random.choice(
                    ("F64", "F16", "BF16", "I64", "U8", "BOOL", "F32", "I32", "X", "", None)
                )
            case 1:
                entry["shape"][self._random.randrange(len(entry["shape"]))] = self._random.choice(EVIL_WORDS)
            case 2:
                entry["data_offsets"][self._random.randrange(2)] = self._random.choice(EVIL_WORDS)
            case 3:
                outer[self._random.choice(("", "x" * 1000, "activations.scale", *outer))] = outer.pop(name)
            case _:
                del outer[name]
        return assemble((outer, inner, data))

    def _other_value(self) -> bytes:
        outer, inner, data = parse(self._right)
        if not outer:
            return self._other_field()
        entry = outer[self._random.choice(list(outer))]
        place = entry["data_offsets"][0] + 4 * self._random.randrange(math.prod(entry["shape"]))
        evil = struct.pack("<f", self._random.choice(EVIL_FLOATS)) if entry["dtype"] == "F32" else None
        evil = evil or struct.pack("<i", self._random.choice(EVIL_INTS))
        return assemble((outer, inner, data[:place] + evil + data[place + 4 :]))
