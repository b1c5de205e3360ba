"""The benchmark of hostile clients: its judge of frames against the tail's checks, and an attack from end to end."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.batches import check_batch
from hsplit_flwr.exchange.codecs import CODECS
from hsplit_flwr.exchange.frames import decode, expect_header
from tests.helpers.benchmarks import benchmark
from tests.helpers.models import HIDDEN_SIZE, VOCAB_SIZE

pytestmark = pytest.mark.timeout(240)

MUTANTS, MAX_BYTES = 3000, 1 << 20


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark("_hostile_frames", monkeypatch)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark("_hostile_wire", monkeypatch)


def test_the_judge_calls_nothing_wrong_that_a_client_may_send(frames: ModuleType, wire: ModuleType) -> None:
    for right in (wire.hello("c"), wire.train_frame("c")):
        judge = frames.Judge(right, VOCAB_SIZE)
        assert not judge.is_wrong(right)
        assert not judge.is_wrong(frames.assemble(frames.parse(right)))
    right = wire.train_frame("c")
    outer, inner, data = frames.parse(right)
    begin, end = outer["activations"]["data_offsets"]
    other = frames.assemble((outer, inner, data[:begin] + bytes(end - begin) + data[end:]))
    assert not frames.Judge(right, VOCAB_SIZE).is_wrong(other)  # other activations are another batch


def test_mutants_are_refused_one_by_one(frames: ModuleType, wire: ModuleType) -> None:
    """Without a wire, so many a second: what the judge calls wrong is refused by form, header or content."""
    right = wire.train_frame("c")
    header = decode(right, MAX_BYTES).header
    mutants = frames.Mutants(right, frames.Judge(right, VOCAB_SIZE), seed=1)

    def take(frame: bytes) -> None:
        found, tensors = decode(frame, MAX_BYTES)
        expect_header(found, **{name: getattr(header, name) for name in frames.WHICH})
        check_batch(tensors, codec=CODECS["fp32"], hidden_size=HIDDEN_SIZE, vocab_size=VOCAB_SIZE)

    take(right)
    kinds = set()
    for _ in range(MUTANTS):
        kind, frame = mutants.next()
        kinds.add(kind)
        with pytest.raises(ExchangeError):
            take(frame)
    assert len(kinds) == 8


def test_an_attack_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hostile = benchmark("hostile", monkeypatch)
    monkeypatch.setattr(hostile, "CLIENTS", {"steps beyond the round": 5, "identity theft": 8})
    monkeypatch.setattr(hostile, "LIES", ("update: B x -1000, clipped", "tokens: 10^18"))
    monkeypatch.setattr(sys, "argv", ["hostile.py", "--json", str(tmp_path / "out.json"), "--frames", "40"])
    hostile.main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["accepted_wrong"], found["hangs"], found["honest_equal"]) == (0, 0, True)
    assert 0.5 < found["memory_ratio"] < 2.0
    rows = {row["attack"]: row for row in found["rows"]}
    assert [row["attempts"] for row in rows.values()] == [5, 8, 40, 1, 1]
    assert rows["steps beyond the round"]["said"] == {"too_many_steps": 5}
    assert rows["identity theft"]["said"] == {"unauthenticated": 6, "wrong_client": 2}
    clipped = rows["update: B x -1000, clipped"]
    # A clipped update is stored in float32: its length is the bound's within rounding, from above too.
    rounding = sys.modules["_hostile_rounds"].ROUNDING
    assert 0.5 * clipped["bound"] < clipped["moved"] <= clipped["bound"] * (1 + rounding)
