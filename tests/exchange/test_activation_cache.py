"""Rounds over gRPC in which a frozen head's rows come again: nothing that is learnt changes, fewer bytes travel."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange import frame_bytes, tail_service
from hsplit_flwr.exchange.admission import Ticket
from hsplit_flwr.exchange.codecs import CODECS
from hsplit_flwr.exchange.frames import Header, encode
from hsplit_flwr.exchange.grpc_transport import ServiceConfig, connect
from hsplit_flwr.exchange.kept_rows import LEAST_ROW_BYTES, ActivationCache, KeptRows
from hsplit_flwr.exchange.positions import BatchForm, gathered, traveling
from hsplit_flwr.exchange.remote_tail import RemoteTail
from hsplit_flwr.exchange.row_references import LEAST_SAVED_BYTES, REFERENCE_BYTES
from hsplit_flwr.exchange.tail_service import TailService
from hsplit_flwr.exchange.task import Mode, RoundTask
from hsplit_flwr.lora.delta_update import OwnRound
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.segments import Segment, segment_from_model
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.batch import Batch, part_rows
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.head import TrainReport, score_head, train_head
from hsplit_flwr.training.session import BatchPart, ScoreReply, TailSession, wants_gradient
from hsplit_flwr.training.tail import SharedTail
from hsplit_flwr.training.workload import Workload
from tests.helpers.cuttable_proxy import CuttableProxy
from tests.helpers.models import HIDDEN_SIZE, VOCAB_SIZE, tiny_model

pytestmark = pytest.mark.timeout(120)

STEPS, ROWS, LENGTH, EXAMPLES = 3, 4, 24, 8
PLANS = {"frozen": ClientPlan(2, LoraSpec(r=0)), "learns": ClientPlan(1, LoraSpec(r=2, lora_alpha=4))}
TAIL_LORA = LoraSpec(r=2, lora_alpha=4)
CONFIG = TrainingConfig(3, STEPS, 1e-2, warmup_steps=0, importance_steps=1, activation_cache_mib=1)
CHANGED = 3
"""the round before which the frozen head's weights have changed"""
MAX_FRAME = 1 << 20
Played = list[tuple[Mode, int]]
Disturb = Callable[[CuttableProxy], object]
ALL: Played = [("train", 1), ("evaluate", 1), ("train", 2), ("evaluate", 2), ("train", 3), ("evaluate", 3)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Whether a row's bits are the same in another batch is up to the kernels; here they need not differ by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batches(client: str, round_number: int, count: int = STEPS) -> list[Batch]:
    """Of the client's 8 rows of 12 to 24 tokens, in other company in every round."""
    chance = torch.Generator().manual_seed(len(client))
    ids = torch.randint(1, VOCAB_SIZE, (EXAMPLES, LENGTH), generator=chance)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (EXAMPLES, 1), generator=chance)
    chance.manual_seed(round_number)
    found: list[Batch] = []
    for _ in range(count):
        rows = torch.randperm(EXAMPLES, generator=chance)[:ROWS]
        mask = (torch.arange(LENGTH) < lengths[rows]).long()[:, : lengths[rows].max()]
        tokens = ids[rows, : mask.shape[1]] * mask
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)})
    return found


@dataclass
class Outcome:
    """What a run left."""

    learned: dict[str, Tensor] = field(default_factory=dict)
    reports: list[TrainReport | ScoreReply | str] = field(default_factory=list)
    """or codes of refusals; of each round client by client"""
    tickets: list[dict[str, Ticket]] = field(default_factory=list)
    importance: list[dict[str, dict[str, float]]] = field(default_factory=list)


class Federation:
    """A tail behind gRPC, and its two heads."""

    def __init__(self, config: TrainingConfig, *, grace_s: float = 20.0, name: str = "llama") -> None:
        self.config = config
        self.grace_s = grace_s
        model = tiny_model(name)
        self.heads = {c: segment_from_model(copy.deepcopy(model), 0, plan.cut) for c, plan in PLANS.items()}
        whole = segment_from_model(model)
        names = [n for n in whole.linear_modules() if n not in self.heads["learns"].linear_modules()]
        limits = BarrierLimits(30.0, 30.0, 60.0)
        self.tail = SharedTail(whole, SegmentAdapters(whole, TAIL_LORA, names), config, limits)
        self.round_number = 0

    def deltas(self, have: int, cut: int, own: OwnRound | None) -> tuple[int, bool, dict[str, Tensor]]:
        """The frozen head's weights change once; the other's always."""
        changes = cut == 1 or (self.round_number == CHANGED and have < CHANGED)
        return self.round_number, False, {"change": torch.ones(3)} if changes else {}

    def play(self, played: Played, disturb: Disturb = lambda proxy: None) -> Outcome:
        """Play some rounds; `disturb` is told of the frozen client's proxy before each."""
        outcome = Outcome()
        config = ServiceConfig(
            activation_codec=self.config.activation_codec,
            gradient_codec=self.config.gradient_codec,
            max_frame_bytes=MAX_FRAME,
            frames_ahead=self.config.parts_in_flight - 1,
            reconnect_grace_s=self.grace_s,
            activation_cache_bytes=self.config.activation_cache_mib << 20,
        )
        service = TailService(self.tail, self.deltas, "run", config)
        try:
            for mode, number in played:
                self._play(mode, number, service, outcome, disturb)
        finally:
            self.tail.close_training()
            service.stop()
        for client, head in self.heads.items():
            outcome.learned |= {f"{client}.{n}": p.detach() for n, p in head.named_parameters()}
        state = self.tail.state()
        for number, saved in state["optimizer"]["parameters"].items():
            outcome.learned |= {f"adamw.{number}.{k}": torch.as_tensor(v) for k, v in saved["values"].items()}
        outcome.learned |= {f"tail.{number}": p.detach() for number, p in enumerate(self.tail.adapters.parameters())}
        return outcome

    def _play(
        self,
        mode: Mode,
        number: int,
        service: TailService,
        outcome: Outcome,
        disturb: Disturb,
    ) -> None:
        if mode == "train":
            if number == CHANGED:
                next(self.heads["frozen"].parameters()).data.mul_(1.01)
            self.round_number = number
            self.tail.open_training(PLANS, concurrency=2, adapter_seed=7)
        cuts = {client: plan.cut for client, plan in PLANS.items()}
        tokens = service.open_round(number, mode, cuts, (number - 1) * STEPS, ["frozen"])
        with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
            proxies = {client: stack.enter_context(CuttableProxy(service.address)) for client in PLANS}
            disturb(proxies["frozen"])
            tasks = [self._task(client, mode, number, proxies[client].address, tokens[client]) for client in PLANS]
            outcome.reports += pool.map(self._take_part, tasks)
        if mode == "train":
            self.tail.close_training()
            outcome.importance.append(self.tail.importance())
        outcome.tickets.append(service.close_round())

    def _take_part(self, task: RoundTask) -> TrainReport | ScoreReply | str:
        head, client = self.heads[task.client], task.client
        have = self.round_number if task.mode == "evaluate" else self.round_number - 1
        try:
            with RemoteTail(task, MAX_FRAME, connect) as session:
                session.fetch_delta(have)
                if task.mode == "evaluate":
                    return score_head(head, batches(client, 50, count=1), session)
                return self.train(client, task.round, session)
        except ExchangeError as error:
            return error.code

    def train(self, client: str, round_number: int, session: TailSession) -> TrainReport:
        """A head's round; its adapters go at the end."""
        adapters = SegmentAdapters(self.heads[client], PLANS[client].lora)
        adapters.reset(round_number)
        first_step = (round_number - 1) * STEPS
        report = train_head(
            self.heads[client], adapters, batches(client, round_number), session, self.config, first_step
        )
        adapters.remove()
        return report

    def _task(self, client: str, mode: Mode, number: int, address: str, token: str) -> RoundTask:
        return RoundTask(
            run="run",
            round=number,
            client=client,
            mode=mode,
            address=address,
            token=token,
            time_limit_s=60.0,
            max_frame_bytes=MAX_FRAME,
            plan=PLANS[client],
            training=self.config,
            reconnect_grace_s=self.grace_s,
        )


def assert_same(found: Outcome, expected: Outcome) -> None:
    assert found.learned.keys() == expected.learned.keys()
    assert any("exp_avg" in name for name in expected.learned)
    for name, tensor in expected.learned.items():
        assert torch.equal(found.learned[name], tensor), name
    assert found.importance == expected.importance
    assert all(expected.importance)
    for got, due in zip(found.reports, expected.reports, strict=True):
        assert type(got) is type(due)
        if isinstance(due, TrainReport) and isinstance(got, TrainReport):
            assert (got.losses, got.importance) == (due.losses, due.importance)
        else:
            assert got == due


def packed_rows(head: Segment, batch: Batch, codec: str) -> tuple[BatchForm, list[int], list[bytes]]:
    """Form, positions of each row, and each row's bytes: packed row by row, unlike in the library."""
    mask, labels = batch["attention_mask"], batch["labels"]
    with torch.no_grad():
        hidden = head(batch["input_ids"], mask)
    positions = traveling(mask, labels)
    found = []
    for values, places in zip(hidden, positions, strict=True):
        parts = CODECS[codec].encode("x", gathered(values[None], places[None]))
        found.append(b"".join(bytes(part.contiguous().view(torch.uint8).numpy()) for part in parts.values()))
    return BatchForm.of(mask, labels), positions.sum(1).tolist(), found


def foretold(federation: Federation, played: Played) -> list[tuple[int, int]]:
    """(bytes up, bytes down) of the frozen client in each round, and nothing of the library's tables."""
    config = federation.config
    head = segment_from_model(tiny_model("llama"), 0, PLANS["frozen"].cut)
    load = Workload.of(config, batch_size=ROWS, sequence_length=LENGTH)
    bare = frame_bytes.hello_bytes()
    seen: set[bytes] = set()
    traffic = []
    for mode, number in played:
        change = mode == "train" and number == CHANGED
        if change:
            next(head.parameters()).data.mul_(1.01)
            seen.clear()
        told = frame_bytes.kept_bytes(len(seen)) if config.activation_cache_mib else 0
        delta = len(encode(Header("delta", "run", 1, "frozen", 2), {"change": torch.ones(3)} if change else {}))
        up, down = 2 * bare, delta + told
        for step, batch in enumerate(batches("frozen", number) if mode == "train" else batches("frozen", 50, 1)):
            count = config.micro_batches if mode == "train" else 1
            for place, rows in enumerate(part_rows(ROWS, count)):
                part = {name: tensor[rows] for name, tensor in batch.items()}
                form, counts, packed = packed_rows(head, part, config.activation_codec)
                known = [n for n, row in enumerate(packed) if config.activation_cache_mib and row in seen]
                if sum(len(packed[n]) - REFERENCE_BYTES for n in known) >= LEAST_SAVED_BYTES:
                    form = form._replace(kept_rows=len(known), kept_positions=sum(counts[n] for n in known))
                seen |= {row for row in packed if len(row) >= LEAST_ROW_BYTES}
                up += frame_bytes.step_bytes_up(load, HIDDEN_SIZE, form)
                wanted = wants_gradient(BatchPart(step, place), trains=False, importance_steps=1)
                wanted = wanted and mode == "train"
                down += frame_bytes.step_bytes_down(load, HIDDEN_SIZE, form, wants_gradient=wanted)
        traffic.append((up, down))
    return traffic


WIRES: dict[str, Mapping[str, object]] = {
    "fp32": {},
    "bf16": {"activation_codec": "bf16", "gradient_codec": "bf16"},
    "int8": {"activation_codec": "int8", "gradient_codec": "int8"},
    "int4": {"activation_codec": "int4", "gradient_codec": "int4_stochastic"},
    "parts": {"micro_batches": 2, "micro_batches_in_flight": 2},
    "int8, micro-steps": {"activation_codec": "int8", "micro_batches": 2, "micro_steps": True},
    "joint, further passes": {"joint_steps": True, "tail_passes": 2},
}


@pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES)
def test_nothing_changes_but_the_bytes(wire: Mapping[str, object]) -> None:
    config = replace(CONFIG, **wire)  # type: ignore[arg-type]
    cached, plain = Federation(config), Federation(replace(config, activation_cache_mib=0))
    found, expected = cached.play(ALL), plain.play(ALL)
    assert_same(found, expected)
    for federation, outcome in ((cached, found), (plain, expected)):
        traffic = [(t["frozen"].bytes_up, t["frozen"].bytes_down) for t in outcome.tickets]
        assert traffic == foretold(federation, ALL)
    for with_cache, without in zip(found.tickets, expected.tickets, strict=True):
        assert with_cache["learns"].bytes_up == without["learns"].bytes_up
        for name in ("steps", "tokens", "nll"):
            assert getattr(with_cache["frozen"], name) == getattr(without["frozen"], name)
    sums = [sum(tickets["frozen"].bytes_up for tickets in outcome.tickets) for outcome in (found, expected)]
    assert sums[0] < sums[1]
    scored_again = ALL.index(("evaluate", 2))  # the very batch of round 1
    assert found.tickets[scored_again]["frozen"].bytes_up < expected.tickets[scored_again]["frozen"].bytes_up


def test_it_is_what_is_learnt_in_one_process_without_a_wire() -> None:
    """The independent reference: sessions of the tail itself, no frames, no tables."""
    over_grpc = Federation(CONFIG).play([("train", 1), ("train", 2)])
    local = Federation(replace(CONFIG, activation_cache_mib=0))
    reports: list[TrainReport] = []
    for number in (1, 2):
        local.tail.open_training(PLANS, concurrency=2, adapter_seed=7)
        sessions = {
            c: local.tail.join(c, plan.cut, (number - 1) * STEPS, trains=c == "learns") for c, plan in PLANS.items()
        }
        with ThreadPoolExecutor(2) as pool:
            reports += pool.map(lambda c, n=number, s=sessions: local.train(c, n, s[c]), PLANS)
        local.tail.close_training()
        assert local.tail.importance() == over_grpc.importance[number - 1]
    for got, due in zip(over_grpc.reports, reports, strict=True):
        assert isinstance(got, TrainReport)
        assert (got.losses, got.importance) == (due.losses, due.importance)
    for number, parameter in enumerate(local.tail.adapters.parameters()):
        assert torch.equal(over_grpc.learned[f"tail.{number}"], parameter)


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_connection_that_breaks_costs_nothing_that_is_learnt(way: str) -> None:
    """Frames with references are sent again as they were; the tables stay the same, so the next ones fit, too."""
    config = replace(CONFIG, micro_batches=2, micro_batches_in_flight=2)

    def cut_twice(proxy: CuttableProxy) -> None:
        proxy.cut_at(way, *((4_000, 9_000) if way == "up" else (2_500, 4_000)))

    found = Federation(config).play(ALL, cut_twice)
    assert_same(found, Federation(config).play(ALL))
    assert all(isinstance(report, TrainReport | ScoreReply) for report in found.reports)


class Forgetful(ActivationCache):
    """In its third round it loses what it has, after it told the frozen client of it."""

    rounds = asked = 0

    def open_round(self, cuts: Mapping[str, int], frozen: Collection[str]) -> None:
        super().open_round(cuts, frozen)
        self.rounds, self.asked = self.rounds + 1, 0

    def of(self, client: str) -> KeptRows | None:
        table = super().of(client)
        self.asked += table is not None
        for_delta, for_telling = 1, 1
        if table is not None and self.rounds == 3 and self.asked > for_delta + for_telling:
            return KeptRows(table.limit_bytes)
        return table


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail_service, "ActivationCache", Forgetful)


ROUNDS_WITHOUT_SCORES: Played = [("train", 1), ("train", 2), ("train", 2)]


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("wire", [{}, {"micro_batches": 2, "micro_batches_in_flight": 2}], ids=["whole", "parts"])
def test_a_head_whose_reference_is_refused_sends_whole_rows(
    wire: Mapping[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(CONFIG, **wire)  # type: ignore[arg-type]
    found = Federation(config).play(ROUNDS_WITHOUT_SCORES)
    expected = Federation(replace(config, activation_cache_mib=0)).play(ROUNDS_WITHOUT_SCORES)
    assert_same(found, expected)
    assert "client frozen sends all activations until the end of the round: [unknown_rows]" in caplog.text
    last = found.tickets[-1]["frozen"]
    assert last.bytes_up > expected.tickets[-1]["frozen"].bytes_up  # references first, then all of it
    assert ["unknown_rows" in error for error in last.errors] == [True]


@pytest.mark.usefixtures("forgetful")
def test_without_a_grace_period_it_loses_its_round() -> None:
    found = Federation(CONFIG, grace_s=0.0).play(ROUNDS_WITHOUT_SCORES)
    assert found.reports[-2] == "unknown_rows"
    assert isinstance(found.reports[-1], TrainReport)
