"""Dropout before the adapters and autocast, of head and tail, against PEFT on the whole transformers model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.dropout import mask_seed
from hsplit_flwr.lora.factors import init_lora_A
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.files import ATTENTIONS, ModelFiles
from hsplit_flwr.models.segments import block_of, linear_shapes, load_segment, segment_from_model
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.head import HeadTraining
from hsplit_flwr.training.optimizer import Optimizer
from hsplit_flwr.training.session import StepReply
from hsplit_flwr.training.step import StepRequest
from hsplit_flwr.training.tail_step import TailTrainer
from hsplit_flwr.training.workload import ATTENTIONS as WORKLOAD_ATTENTIONS
from hsplit_flwr.training.workload import Workload
from tests.helpers.models import tiny_config, tiny_model

TOLERANCE = 1e-5
"""largest difference of loss and gradients to PEFT, in units of the largest entry of the gradient"""
SHARE = 0.25
LORA = LoraSpec(4, 8.0, rank_pattern={r"1\..*": 2})
CONFIG = TrainingConfig(1, 3, 1e-2, warmup_steps=0, max_grad_norm=0.0, importance_steps=0)
HEAD_SEED, TAIL_SEED, FIRST_STEP = 11, 22, 6
CUT = 2
Batch = dict[str, Tensor]
Gradients = dict[str, Tensor]


def batch_of(step: int = 0, rows: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(40 + step)
    ids = torch.randint(3, 90, (rows, 10), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    mask[1, :2] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Split:
    """A head and a tail whose messages are calls; gradients are looked at instead of being stepped on."""

    def __init__(self, name: str, config: TrainingConfig, *, checkpointing: bool = False) -> None:
        self.head = segment_from_model(tiny_model(name), 0, CUT)
        self.head.gradient_checkpointing = checkpointing
        tail = segment_from_model(tiny_model(name), CUT)
        self.adapters = [SegmentAdapters(segment, LORA) for segment in (self.head, tail)]
        for adapters, seed in zip(self.adapters, (HEAD_SEED, TAIL_SEED), strict=True):
            adapters.reset(seed)
            _fill(adapters)
        self.trainer = TailTrainer(tail, self.adapters[1], config)
        self.config = config
        self._replies: list[StepReply] = []
        self.losses: list[float] = []

    def send_part(self, part: Any, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        request = StepRequest(
            client="0",
            cut=CUT,
            run_step=FIRST_STEP + part.step,
            activations=activations,
            attention_mask=attention_mask,
            labels=labels,
            number=part.number,
            ends_batch=part.is_last,
        )
        with _without_steps(self.trainer):
            trained = self.trainer.train([request])
        assert not trained.refused
        self._replies.append(trained.replies["0"])

    def receive_part(self) -> StepReply:
        reply = self._replies.pop(0)
        self.losses.append(reply.loss)
        return reply

    def step(self, step: int = 0) -> tuple[float, Gradients]:
        """Loss and all gradients of one step on one batch."""
        one = batch_of(step)
        optimizer = Optimizer(self.adapters[0].parameters(), self.config)
        training = HeadTraining(self.head, self.adapters[0], self, self.config, FIRST_STEP, optimizer)  # type: ignore[arg-type]
        with _without_steps(training):
            training.step(step, one["input_ids"], one["attention_mask"], one["labels"])
        found = {}
        for adapters in self.adapters:
            for name in adapters.module_names:
                for side, parameter in zip("AB", adapters.parameters([name]), strict=True):
                    assert parameter.grad is not None
                    found[f"{name}.{side}"] = parameter.grad.clone()
                    parameter.grad = None
        return self.losses[-1], found


@contextmanager
def _without_steps(owner: Any) -> Iterator[None]:
    """Gradients stay, parameters do not move."""
    optimizer = owner._optimizer
    step, zero = optimizer.step, optimizer.zero_grad
    optimizer.step = optimizer.zero_grad = lambda *_: None
    try:
        yield
    finally:
        optimizer.step, optimizer.zero_grad = step, zero


def _fill(adapters: SegmentAdapters) -> None:
    """B as after training."""
    for name in adapters.module_names:
        _, B = adapters.parameters([name])
        B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(derive_seed(name)))


def by_peft(name: str, config: TrainingConfig, step: int = 0) -> tuple[float, Gradients]:
    """PEFT's own dropout, reseeded before each layer as the segments' layers are; torch's autocast around it all."""
    model = tiny_model(name)
    names = LORA.targets(linear_shapes(segment_from_model(model)))
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=config.lora_dropout,
            target_modules=names,
            rank_pattern={n: LORA.rank(n) for n in names},
            alpha_pattern={n: LORA.scaling(n) * LORA.rank(n) for n in names},
        ),
    ).train()
    pass_seed = {
        True: derive_seed(HEAD_SEED, FIRST_STEP + step, 0),
        False: derive_seed(TAIL_SEED, 0, "0", FIRST_STEP + step, 0),
    }

    def reseed(module_name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any) -> None:
            torch.manual_seed(mask_seed(pass_seed[block_of(module_name) < CUT], module_name))

        return hook

    layers: dict[str, Any] = {}
    for module_name in names:
        layer = layers[module_name] = wrapped.base_model.model.get_submodule(module_name)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        seed = HEAD_SEED if block_of(module_name) < CUT else TAIL_SEED
        A.data.copy_(init_lora_A(A.shape[0], A.shape[1], derive_seed(seed, module_name)))
        B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(derive_seed(module_name)))
        layer.lora_dropout["default"].register_forward_pre_hook(reseed(module_name))
    with torch.autocast("cpu", torch.bfloat16, enabled=config.autocast == "bf16"):
        logits = wrapped(**{k: v for k, v in batch_of(step).items() if k != "labels"}, use_cache=False).logits
    labels = batch_of(step)["labels"]
    loss = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {}
    for module_name, layer in layers.items():
        gradients[f"{module_name}.A"] = layer.lora_A["default"].weight.grad
        gradients[f"{module_name}.B"] = layer.lora_B["default"].weight.grad
    return float(loss.detach()), gradients


def assert_equal(found: tuple[float, Gradients], expected: tuple[float, Gradients]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=TOLERANCE, rel=0)
    assert found[1].keys() == expected[1].keys()
    for key, gradient in expected[1].items():
        assert float((found[1][key] - gradient).abs().max()) <= TOLERANCE * float(gradient.abs().max()), key


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed-again"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_dropout_is_pefts_with_the_same_seeds(name: str, checkpointing: bool) -> None:
    config = replace(CONFIG, lora_dropout=SHARE)
    split = Split(name, config, checkpointing=checkpointing)
    for step in (0, 1):
        assert_equal(split.step(step), by_peft(name, config, step))
    plain = Split(name, CONFIG).step()
    assert abs(plain[0] - split.losses[0]) > 1e-3  # something was dropped


@pytest.mark.parametrize("share", [0.0, SHARE])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_autocast_is_that_of_the_whole_model(name: str, share: float) -> None:
    config = replace(CONFIG, autocast="bf16", lora_dropout=share)
    found = Split(name, config).step()
    assert_equal(found, by_peft(name, config))
    assert 1e-4 < abs(found[0] - Split(name, replace(config, autocast="none")).step()[0]) < 0.1


def test_masks_depend_on_the_pass_and_nothing_else() -> None:
    """So a resumed run is bit-equal, whoever else computes meanwhile, and draws from torch's own generator."""
    config = replace(CONFIG, lora_dropout=SHARE)
    first = Split("llama", config).step(2)
    torch.manual_seed(3)
    other = Split("llama", config)
    other.step(0)
    torch.rand(5)
    state = torch.get_rng_state()
    again = other.step(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert again[0] == first[0]
    assert all(torch.equal(again[1][key], gradient) for key, gradient in first[1].items())
    differing = other.step(1)
    assert not torch.equal(differing[1]["model.layers.0.mlp.up_proj.B"], first[1]["model.layers.0.mlp.up_proj.B"])


def test_parts_in_flight_are_computed_again_with_their_own_masks() -> None:
    """With gradient checkpointing a part's backward pass comes after the next part's forward pass."""
    config = replace(CONFIG, lora_dropout=SHARE, micro_batches=2, micro_batches_in_flight=2)
    kept, again = (Split("llama", config, checkpointing=checkpointing).step() for checkpointing in (False, True))
    for key, gradient in kept[1].items():
        assert torch.allclose(again[1][key], gradient, atol=1e-7, rtol=1e-5), key


def test_scoring_drops_nothing() -> None:
    split = Split("llama", replace(CONFIG, lora_dropout=0.9))
    plain = Split("llama", CONFIG)
    one = batch_of()
    scores = []
    for each in (split, plain):
        each.step()
        with torch.no_grad():
            hidden = each.head(one["input_ids"], one["attention_mask"])
        scores.append(each.trainer.score(CUT, hidden, one["attention_mask"], one["labels"]))
    assert scores[0] == scores[1]


def test_further_passes_have_masks_of_their_own() -> None:
    def losses(passes: int) -> list[Tensor]:
        split = Split("llama", replace(CONFIG, lora_dropout=SHARE, tail_passes=passes))
        seen = []
        for number in range(passes):
            request = StepRequest(
                client="0",
                cut=CUT,
                run_step=FIRST_STEP,
                activations=torch.ones(4, 10, split.head.hidden_size),
                attention_mask=batch_of()["attention_mask"],
                labels=batch_of()["labels"],
                pass_number=number,
            )
            with _without_steps(split.trainer):
                seen.append(torch.tensor(split.trainer.train([request]).replies["0"].loss))
        return seen

    first, second = losses(2)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attention_is_computed_as_it_is_chosen(name: str, tmp_path: Path) -> None:
    """Heads and tail ask transformers for that implementation, and compute what its whole model does with it."""
    tiny_model(name).save_pretrained(tmp_path)
    one = batch_of()
    plain = ModelFiles.resolve(str(tmp_path))
    for chosen in ("sdpa", "eager"):
        files = plain.attending_by(chosen)
        whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation=chosen).eval()
        head, tail = load_segment(files, 0, CUT), load_segment(files, CUT)
        shared = segment_from_model(load_segment(files).model, CUT)
        assert {s.config._attn_implementation for s in (head, tail, shared)} == {chosen}
        with torch.no_grad():
            hidden = head(one["input_ids"], one["attention_mask"])
            expected = whole(input_ids=one["input_ids"], attention_mask=one["attention_mask"], use_cache=False).logits
            seen = one["attention_mask"].bool()
            for segment in (tail, shared):
                assert torch.equal(segment(hidden, one["attention_mask"])[seen], expected[seen])
        costs = ModelCosts(plain.config, Workload(4, 10, attn_implementation=chosen))
        assert costs.head_memory(CUT, {}).total_bytes > 0
    assert plain.attending_by("auto").config._attn_implementation is None
    for attend in (plain.attending_by, lambda name: Workload(attn_implementation=name)):
        with pytest.raises(ConfigError, match=r"attn_implementation as one of .*, found 'flash_attention_2'"):
            attend("flash_attention_2")
    assert ATTENTIONS == WORKLOAD_ATTENTIONS


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lora_dropout": 1.0}, r"lora_dropout >= 0 and < 1, found 1\.0 \(run config: lora-dropout\)"),
        ({"lora_dropout": -0.1}, "lora_dropout >= 0 and < 1"),
        ({"autocast": "fp16"}, r"autocast as one of \('none', 'bf16'\), found 'fp16'"),
    ],
)
def test_passes_that_there_are_not_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **wrong)
    with pytest.raises(ConfigError, match=message):
        Workload(**wrong)


def test_plans_count_masks_and_casts() -> None:
    """A head keeps a mask and what is left of every adapter's input, and the casts of its weights."""
    shapes = linear_shapes(segment_from_model(tiny_model("llama"), 0, CUT))
    ranks = dict.fromkeys(shapes, 1)

    def activations(**options: Any) -> int:
        return ModelCosts(tiny_config("llama", True), Workload(4, 10, **options)).head_memory(CUT, ranks).activations

    masks = 4 * 4 * 10 * sum(d_in for _, d_in in shapes.values())
    assert activations(lora_dropout=SHARE) >= activations() + masks
    assert activations(autocast="bf16") > 2 * sum(d_out * d_in for d_out, d_in in shapes.values())
