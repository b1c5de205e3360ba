"""One client through the split equals monolithic PEFT: loss at every step, every adapter tensor at the end."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.exchange.grpc_transport import ServiceConfig, connect
from hsplit_flwr.exchange.remote_tail import RemoteTail
from hsplit_flwr.exchange.tail_service import TailService
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.lora.factors import LoraFactors, init_lora_A
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.segments import segment_from_model
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.head import train_head
from hsplit_flwr.training.session import BatchPart, StepReply, TailSession
from hsplit_flwr.training.tail import SharedTail
from tests.helpers.models import tiny_model
from tests.helpers.replies import gradient_of

STEPS = 20
TOLERANCE = 1e-5
"""largest absolute difference to monolithic PEFT, fp32, after 20 AdamW steps"""
CUTS = [1, 2, 3]
CONFIG = TrainingConfig(rounds=1, local_steps=STEPS, learning_rate=5e-3, warmup_steps=3, max_grad_norm=0.0)
LORA = LoraSpec(r=4, lora_alpha=8, rank_pattern={r"1\..*": 2}, alpha_pattern={r"2\..*": 3.0})
Batch = dict[str, Tensor]


def padded_batches(count: int, vocab: int = 90) -> list[Batch]:
    """Batches of 3 x 10 with right and left padding and a masked prompt."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, vocab, (3, 10), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 7:] = 0
        mask[1, :2] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :3] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def monolithic_peft(
    name: str, batches: list[Batch], cut: int, steps_per_rate: int = 1
) -> tuple[list[float], dict[str, Tensor]]:
    """The reference: PEFT on the whole model, transformers' own loss, torch's AdamW. None of our training code."""
    import peft

    model = tiny_model(name)
    linears = segment_from_model(model).linear_modules()
    names = LORA.targets(linears)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=names,
        rank_pattern={n: LORA.rank(n) for n in names},
        alpha_pattern={n: LORA.scaling(n) * LORA.rank(n) for n in names},
    )
    wrapped = peft.get_peft_model(model, config)
    adapters = {}
    for key, parameter in wrapped.named_parameters():
        if "lora_" in key:
            module, factor = key.removeprefix("base_model.model.").split(".lora_")
            side = "head" if int(module.split(".")[2]) < cut else "tail"
            if factor.startswith("A"):
                parameter.data = init_lora_A(parameter.shape[0], parameter.shape[1], derive_seed(seed_of(side), module))
            else:
                parameter.data.zero_()
            adapters[f"{module}.{factor[0]}"] = parameter
    optimizer = torch.optim.AdamW(adapters.values(), lr=CONFIG.learning_rate, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = CONFIG.learning_rate_at(step // steps_per_rate)
        loss = wrapped(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {key: parameter.detach() for key, parameter in adapters.items()}


def seed_of(side: str) -> int:
    return derive_seed(0, "head", 1, "0") if side == "head" else 77


def split(
    name: str, batches: list[Batch], cut: int, over_grpc: bool, config: TrainingConfig = CONFIG
) -> tuple[list[float], dict[str, Tensor]]:
    model = tiny_model(name)
    head = segment_from_model(copy.deepcopy(model), 0, cut)
    whole = segment_from_model(model)
    tail_names = [n for n in whole.linear_modules() if n not in head.linear_modules()]
    head_adapters = SegmentAdapters(head, LORA)
    tail = SharedTail(whole, SegmentAdapters(whole, LORA, tail_names), config)
    tail.open_training(["0"], concurrency=1, adapter_seed=77)
    head_adapters.reset(seed_of("head"))
    if over_grpc:
        service = TailService(tail, lambda have, cut, own: (0, True, {}), "run", ServiceConfig(frames_ahead=1))
        token = service.open_round(1, "train", {"0": cut}, 0)["0"]
        plan = ClientPlan(cut, LORA)
        task = RoundTask("run", 1, "0", "train", service.address, token, 60.0, 1 << 22, plan, config)
        with RemoteTail(task, 1 << 22, connect) as session:
            session.fetch_delta(0)
            report = train_head(head, head_adapters, batches, session, config)
        service.stop()
    else:
        local = tail.join("0", cut, 0)
        report = train_head(head, head_adapters, batches, local, config)
        local.close()
    tail.close_training()
    tensors = {}
    for module, factors in {**head_adapters.factors(), **tail.adapters.factors()}.items():
        tensors[f"{module}.A"], tensors[f"{module}.B"] = factors.A, factors.B
    return list(report.losses), tensors


@pytest.mark.parametrize("over_grpc", [False, True], ids=["in-process", "grpc"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_one_client_equals_monolithic_peft(name: str, cut: int, over_grpc: bool) -> None:
    batches = padded_batches(STEPS)
    expected_losses, expected = monolithic_peft(name, batches, cut)
    losses, found = split(name, batches, cut, over_grpc)
    assert losses == pytest.approx(expected_losses, abs=TOLERANCE)
    assert losses[-1] < losses[0]  # 20 steps of real training, not a comparison of standing still
    require_alike(found, expected)


@pytest.mark.parametrize("over_grpc", [False, True], ids=["in-process", "grpc"])
@pytest.mark.parametrize(("parts", "in_flight"), [(2, 1), (2, 2), (3, 3), (8, 2)])
@pytest.mark.parametrize("cut", CUTS)
def test_a_batch_in_parts_equals_monolithic_peft(cut: int, parts: int, in_flight: int, over_grpc: bool) -> None:
    """Parts have unequal rows and target tokens; 8 parts of 3 rows are 3."""
    batches = padded_batches(STEPS)
    config = replace(CONFIG, micro_batches=parts, micro_batches_in_flight=in_flight)
    expected_losses, expected = monolithic_peft("llama", batches, cut)
    losses, found = split("llama", batches, cut, over_grpc, config)
    assert losses == pytest.approx(expected_losses, abs=TOLERANCE)
    require_alike(found, expected)


@pytest.mark.parametrize("over_grpc", [False, True], ids=["in-process", "grpc"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_step_per_part_equals_monolithic_peft_on_the_parts(cut: int, over_grpc: bool) -> None:
    """With one part in flight nothing is old: as training on single rows, whose learning rate is that of the batch."""
    batches = padded_batches(STEPS)
    config = replace(CONFIG, micro_batches=3, micro_batches_in_flight=1, micro_steps=True)
    rows = [{key: tensor[i : i + 1] for key, tensor in batch.items()} for batch in batches for i in range(3)]
    tokens = [int((row["labels"][:, 1:] != -100).sum()) for row in rows]
    expected_losses, expected = monolithic_peft("llama", rows, cut, steps_per_rate=3)
    losses, found = split("llama", batches, cut, over_grpc, config)
    weighted = [loss * count for loss, count in zip(expected_losses, tokens, strict=True)]
    by_batch = [sum(weighted[i : i + 3]) / sum(tokens[i : i + 3]) for i in range(0, len(rows), 3)]
    assert losses == pytest.approx(by_batch, abs=TOLERANCE)
    require_alike(found, expected)


def delayed(batches: list[Batch], cut: int, config: TrainingConfig) -> dict[str, Tensor]:
    """The reference of parts in flight, in one loop: part k's head lacks the steps whose gradients are on their way.

    Head and tail are PEFT's and torch's; a row a part, a step a part; each gradient is of the adapters its part met.
    """
    model = tiny_model("llama")
    head, whole = segment_from_model(copy.deepcopy(model), 0, cut), segment_from_model(model)
    sides = {
        "head": SegmentAdapters(head, LORA),
        "tail": SegmentAdapters(whole, LORA, [n for n in whole.linear_modules() if n not in head.linear_modules()]),
    }
    adamw = {}
    for side, adapters in sides.items():
        adapters.reset(seed_of(side))
        adamw[side] = torch.optim.AdamW(adapters.parameters(), lr=1.0, weight_decay=0.0)

    def step(side: str, number: int) -> None:
        adamw[side].param_groups[0]["lr"] = config.learning_rate_at(number // 3)
        adamw[side].step()
        adamw[side].zero_grad()

    in_flight = config.micro_batches_in_flight
    waiting: list[tuple[int, list[Tensor]]] = []
    rows = [{key: tensor[i : i + 1] for key, tensor in batch.items()} for batch in batches for i in range(3)]
    for number in range(len(rows) + in_flight):
        if len(waiting) == in_flight or number >= len(rows):
            if not waiting:
                break
            done, gradients = waiting.pop(0)
            for parameter, gradient in zip(sides["head"].parameters(), gradients, strict=True):
                parameter.grad = gradient
            step("head", done)
        if number >= len(rows):
            continue
        row = rows[number]
        hidden = head(row["input_ids"], row["attention_mask"])
        entered = hidden.detach().requires_grad_()
        logits = whole(entered, row["attention_mask"], entry=cut)
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits[0, :-1], row["labels"][0, 1:]))
        step("tail", number)
        assert entered.grad is not None
        head_gradients = torch.autograd.grad(hidden, sides["head"].parameters(), entered.grad)
        waiting.append((number, list(head_gradients)))
    tensors = {}
    for adapters in sides.values():
        for module, factors in adapters.factors().items():
            tensors[f"{module}.A"], tensors[f"{module}.B"] = factors.A, factors.B
    return tensors


@pytest.mark.parametrize("over_grpc", [False, True], ids=["in-process", "grpc"])
@pytest.mark.parametrize("in_flight", [2, 3])
def test_parts_in_flight_lack_the_steps_that_are_on_their_way(in_flight: int, over_grpc: bool) -> None:
    """And nothing else: once autograd refused a gradient whose adapters had moved, once it took the moved ones."""
    batches = padded_batches(6)
    config = replace(CONFIG, local_steps=6, micro_batches=3, micro_batches_in_flight=in_flight, micro_steps=True)
    config = replace(config, importance_steps=0)  # what is measured is waited for
    _, found = split("llama", batches, 2, over_grpc, config)
    require_alike(found, delayed(batches, 2, config))


def require_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key] - tensor).abs().max() <= TOLERANCE, key


@pytest.mark.parametrize("cut", CUTS)
def test_a_model_that_writes_into_its_embeddings_equals_monolithic_peft(cut: int) -> None:
    """CTRL scales them in place; once that scaled the activations of the tail too: loss 4.526 instead of 4.542."""
    batches = padded_batches(STEPS)
    expected_losses, expected = monolithic_peft("ctrl", batches, cut)
    losses, found = split("ctrl", batches, cut, over_grpc=False)
    assert losses == pytest.approx(expected_losses, abs=TOLERANCE)
    assert all(tensor.abs().max() > 0.01 for tensor in found.values())  # B started at 0
    require_alike(found, expected)


UNEQUAL_CUTS = {"a": 1, "b": 3, "c": 1}
TAIL_NAMES_FROM = 1
"""first block with an adapter of the tail"""


@dataclass
class OneStep:
    """A step of a tail with three clients of unequal cuts and token counts."""

    batches: dict[str, Batch]
    inputs: dict[str, Tensor]
    replies: dict[str, StepReply]
    trained: dict[str, LoraFactors]


def in_parts(session: TailSession, count: int, hidden: Tensor, batch: Batch) -> StepReply:
    """A step whose rows are sent in `count` parts before any answer; the answers' token-weighted mean."""
    split = [torch.tensor_split(t, count) for t in (hidden, batch["attention_mask"], batch["labels"])]
    for index, (sent, mask, labels) in enumerate(zip(*split, strict=True)):
        session.send_part(BatchPart(0, index, count), sent, mask, labels)
    replies = [session.receive_part() for _ in range(count)]
    tokens = sum(reply.tokens for reply in replies)
    gradient = torch.cat([gradient_of(reply) * reply.tokens / tokens for reply in replies])
    return StepReply(gradient, sum(reply.loss * reply.tokens for reply in replies) / tokens, tokens)


def one_step(training: TrainingConfig) -> OneStep:
    whole = segment_from_model(tiny_model("llama"))
    names = [n for n in whole.linear_modules() if int(n.split(".")[2]) >= TAIL_NAMES_FROM]
    tail = SharedTail(whole, SegmentAdapters(whole, LORA, names), training, BarrierLimits(10, 10, 10))
    tail.open_training(UNEQUAL_CUTS, concurrency=3, adapter_seed=3)
    batches = dict(zip(UNEQUAL_CUTS, padded_batches(3), strict=True))
    batches["b"]["labels"][:, :7] = -100  # unequal token counts
    inputs = {
        client: segment_from_model(tiny_model("llama"), 0, cut)(
            batches[client]["input_ids"], batches[client]["attention_mask"]
        ).detach()
        for client, cut in UNEQUAL_CUTS.items()
    }

    def step(client: str) -> StepReply:
        session = tail.join(client, UNEQUAL_CUTS[client], 0)
        batch = batches[client]
        reply = in_parts(session, training.micro_batches, inputs[client], batch)
        session.close()
        return reply

    with ThreadPoolExecutor(3) as pool:
        replies = dict(zip(UNEQUAL_CUTS, pool.map(step, UNEQUAL_CUTS), strict=True))
    tail.close_training()
    return OneStep(batches, inputs, replies, tail.adapters.factors())


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("joint", [False, True], ids=["one-by-one", "joint"])
def test_a_step_of_unequal_clients_equals_peft(joint: bool, passes: int, parts: int) -> None:
    """PEFT on the whole model and AdamW: a step per client in their order, or one on all tokens; then again.

    Every client gets the gradient of its own mean loss, at the tail that it meets in the first pass.
    """
    training = TrainingConfig(1, 1, 1e-2, warmup_steps=0, max_grad_norm=0.0, joint_steps=joint, tail_passes=passes)
    training = replace(training, micro_batches=parts)
    found = one_step(training)
    tokens = {c: int((b["labels"][:, 1:] != -100).sum()) for c, b in found.batches.items()}
    assert {c: r.tokens for c, r in found.replies.items()} == tokens
    assert len(set(tokens.values())) > 1

    reference = segment_from_model(tiny_model("llama"))
    names = [n for n in reference.linear_modules() if int(n.split(".")[2]) >= TAIL_NAMES_FROM]
    adapters = SegmentAdapters(reference, LORA, names)
    adapters.reset(3)
    adamw = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    for number in range(passes):
        for together in [list(found.batches)] if joint else [[client] for client in found.batches]:
            adamw.zero_grad()
            total = sum(tokens[client] for client in together)
            for client in together:
                hidden = found.inputs[client].clone().requires_grad_()
                batch = found.batches[client]
                logits = reference(hidden, batch["attention_mask"], entry=UNEQUAL_CUTS[client])
                loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
                torch.autograd.backward(loss * tokens[client] / total)
                assert hidden.grad is not None
                if number == 0:
                    reply = found.replies[client]
                    assert reply.loss == pytest.approx(loss.item(), abs=TOLERANCE)
                    own = hidden.grad * total / tokens[client]
                    torch.testing.assert_close(reply.gradient, own, atol=TOLERANCE, rtol=0)
            adamw.step()
    expected = adapters.factors()
    assert found.trained.keys() == expected.keys()
    for name, pair in expected.items():
        torch.testing.assert_close(found.trained[name].A, pair.A, atol=TOLERANCE, rtol=0, msg=name)
        torch.testing.assert_close(found.trained[name].B, pair.B, atol=TOLERANCE, rtol=0, msg=name)
