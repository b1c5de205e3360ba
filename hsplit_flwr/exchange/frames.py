"""The contract between a head and the tail: tensors <-> verified bytes. No transport, no model.

A frame is one safetensors buffer (https://huggingface.co/docs/safetensors#format). Its ``__metadata__`` holds one
JSON header under the key ``hsplit``: protocol, kind, run, round, client, cut, step, and the kind's own numbers. It is
padded, so that a frame's size depends on the shapes of its tensors alone. Answers come in the order of what they
answer; a head may send further parts before it has them.

    head -> tail   hello     no tensors; header `have`: the version of the weight delta the client holds (0: none),
                             `own`: the round whose adapters of its own it still holds (0: none)
    tail -> head   delta     parts of the weight delta; header `version`, `whole`, `left` (frames to come), `share`
    tail -> head   kept      after the delta, if its `share` is above 0: the rows of activations that the tail has of
                             this client, of which it keeps at most `share` bytes (`kept_rows.py`)
    head -> tail   resume    no tensors; `hello` after a broken connection; header `step`, `part`: the oldest without an
                             answer. It is sent again next, and so are those after it
    head -> tail   leave     no tensors; the last frame of a head that may come back: without it, the connection broke
    head -> tail   train     activations, mask and labels of a batch or of a part of it (`batches.py`); header `part`,
                             `parts`
    tail -> head   gradient  the activations' gradient of the mean loss of what was sent; header `loss`, `tokens`
    head -> tail   evaluate  as `train`
    tail -> head   score     no tensors; header `nll` (sum over tokens, nats), `tokens`
    head -> tail   probe     filler (n,) uint8; header `left`: bytes of filler wanted back (measures the link)
    tail -> head   probe     filler (left,) uint8

Nothing here trusts its input: a frame is refused by size before it is parsed,
by header before its tensors are used, and by name, dtype, shape and finiteness before a model sees it.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.task import PROTOCOL_VERSION

KINDS = ("hello", "delta", "kept", "resume", "leave", "train", "gradient", "evaluate", "score", "probe")
WITHOUT_TENSORS = frozenset(("hello", "resume", "leave", "score"))
MAX_HEADER_BYTES = 1 << 20
HEADER_CHARACTERS = 512
"""headers are padded to it with spaces, so that the digits of a loss do not change a frame's size"""
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Header:
    """Who sends what in which step. Numbers that a kind does not use stay at their defaults."""

    kind: str
    run: str
    round: int
    client: str
    cut: int
    step: int = 0
    part: int = 0
    parts: int = 1
    have: int = 0
    version: int = 0
    whole: bool = False
    left: int = 0
    loss: float = 0.0
    nll: float = 0.0
    tokens: int = 0
    own: int = 0
    share: int = 0
    protocol: int = PROTOCOL_VERSION


class Frame(NamedTuple):
    """A decoded frame."""

    header: Header
    tensors: dict[str, Tensor]


def encode(header: Header, tensors: Mapping[str, Tensor] | None = None) -> bytes:
    """One frame. Tensors are sent in their own dtype and moved to the CPU."""
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in (tensors or {}).items()}
    frame: bytes = save_tensors(dense, metadata={"hsplit": json.dumps(asdict(header)).ljust(HEADER_CHARACTERS)})
    return frame


def decode(frame: bytes, max_bytes: int) -> Frame:
    """The frame in `frame`, checked for size and form, not yet for content (`exchange/batches.py`).

    Raises:
        ExchangeError: ``frame_too_large``, ``malformed_frame``, ``protocol_version``, or ``wrong_tensors`` of a kind
            that has none.
    """
    if len(frame) > max_bytes:
        raise ExchangeError(
            "frame_too_large",
            f"Expected a frame of at most {max_bytes} bytes, found {len(frame)}. "
            "Use smaller batches or raise max-frame-mib on the server.",
        )
    try:
        header = _header(frame)
        tensors = load_tensors(frame)
    except (SafetensorError, struct.error, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ExchangeError("malformed_frame", f"Expected a frame of hsplit_flwr, found {short(error)}.") from error
    if tensors and header.kind in WITHOUT_TENSORS:
        raise ExchangeError(
            "wrong_tensors", f"Expected no tensors in a frame of kind {header.kind!r}, found {short(sorted(tensors))}."
        )
    return Frame(header, tensors)


def _header(frame: bytes) -> Header:
    (length,) = _LENGTH.unpack_from(frame)
    if length > min(MAX_HEADER_BYTES, len(frame)):
        raise ValueError(f"a header of {length} bytes")
    data: Any = json.loads(json.loads(frame[8 : 8 + length])["__metadata__"]["hsplit"])
    if not isinstance(data, dict):
        raise TypeError(f"header={data!r}")
    if data.get("protocol") != PROTOCOL_VERSION:
        raise ExchangeError(
            "protocol_version",
            f"Expected protocol version {PROTOCOL_VERSION}, found {short(data.get('protocol'))}. "
            "Install the same hsplit_flwr version on server and clients.",
        )
    header = Header(**data)
    for name, kind in Header.__annotations__.items():
        value = getattr(header, name)
        if type(value) is not kind:
            raise TypeError(f"{name}={value!r}")
        if (kind is float and not math.isfinite(value)) or (kind is int and not 0 <= value < 1 << 63):
            raise ValueError(f"{name}={value!r}")
    if header.kind not in KINDS:
        raise ValueError(f"kind={header.kind!r}")
    return header


def expect_header(header: Header, **expected: object) -> None:
    """Check the named header fields.

    Raises:
        ExchangeError: ``wrong_<field>`` for the first that differs.
    """
    for name, value in expected.items():
        found = getattr(header, name)
        if found != value:
            raise ExchangeError(f"wrong_{name}", f"Expected {name}={value!r} in the frame, found {short(found)}.")


def rounding_seed(header: Header) -> int:
    """Decides on what a codec rounds by chance in the frame of `header`: other chances in every frame of a run."""
    return derive_seed("rounding", header.kind, header.round, header.client, header.step, header.part)


def probe_filler(size: int) -> dict[str, Tensor]:
    """The tensors of a ``probe`` frame: `size` bytes of nothing."""
    return {"filler": torch.zeros(size, dtype=torch.uint8)}


def short(value: object) -> str:
    """A value of the peer's as a message shows it: the peer decides how long it is, and gets the message back."""
    return repr(value)[:200]
