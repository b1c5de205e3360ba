"""The optimizer of heads and tail: torch's own beneath, what it remembers, and what it goes on from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.optimizer import OPTIMIZERS, Optimizer
from tests.helpers.states import through_disk

SHAPES = ((3, 4), (5, 3), (2, 2))
ROUNDING = 1e-7
"""largest absolute difference where a learning rate is formed in another order"""
CONFIG = TrainingConfig(1, 8, 1e-2, warmup_steps=2, weight_decay=0.1, max_grad_norm=1.0)


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(held: list[nn.Parameter], step: int, absent: int | None = None) -> None:
    generator = torch.Generator().manual_seed(step)
    for index, parameter in enumerate(held):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if index == absent else gradient


def run(optimizer: Optimizer, held: list[nn.Parameter], steps: range, absent: int | None = None) -> None:
    for step in steps:
        optimizer.zero_grad()
        set_gradients(held, step, absent)
        optimizer.step(step)


def test_adamw_is_torchs_own() -> None:
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    run(Optimizer(ours, CONFIG), ours, range(8))
    adamw = torch.optim.AdamW(theirs, lr=1.0, weight_decay=0.1)
    for step in range(8):
        set_gradients(theirs, step)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        adamw.param_groups[0]["lr"] = 1e-2 * ((step + 1) / 2 if step < 2 else (8 - step) / 6)
        adamw.step()
    for found, expected in zip(ours, theirs, strict=True):
        assert (found - expected).abs().max() <= ROUNDING


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_from_its_state_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Also where one parameter had no gradient yet."""
    config = TrainingConfig(1, 8, 1e-2, optimizer=name)
    going, restored = parameters(*SHAPES), parameters(*SHAPES)
    first = Optimizer(going, config)
    run(first, going, range(3), absent=1)
    for parameter, trained in zip(restored, going, strict=True):
        parameter.data.copy_(trained.data)
    second = Optimizer(restored, config)
    second.load_state(through_disk(first.state(), tmp_path))
    run(first, going, range(3, 6))
    run(second, restored, range(3, 6))
    for found, expected in zip(restored, going, strict=True):
        assert torch.equal(found, expected)


def test_a_state_is_a_copy_on_both_ways() -> None:
    held = parameters(*SHAPES)
    optimizer = Optimizer(held, CONFIG)
    run(optimizer, held, range(1))
    state = optimizer.state()
    before = state["parameters"]["0"]["values"]["exp_avg"].clone()
    run(optimizer, held, range(1, 3))
    assert torch.equal(state["parameters"]["0"]["values"]["exp_avg"], before)
    optimizer.load_state(state)
    run(optimizer, held, range(1, 3))
    assert torch.equal(state["parameters"]["0"]["values"]["exp_avg"], before)


def moments(optimizer: Optimizer) -> dict[str, Tensor]:
    return {index: saved["values"]["exp_avg"] for index, saved in optimizer.state()["parameters"].items()}


def test_restart_forgets_and_adopt_takes_over() -> None:
    held = parameters(*SHAPES)
    former = Optimizer(held, CONFIG)
    run(former, held, range(2))
    former.restart(held[:1])
    assert moments(former).keys() == {"1", "2"}
    (new,) = parameters((3, 4))
    heir = Optimizer([new, *held[1:]], CONFIG)
    heir.adopt(former, held[1:2])
    assert moments(heir).keys() == {"1"}
    assert torch.equal(moments(heir)["1"], moments(former)["1"])


def test_an_optimizer_of_nothing_has_a_state() -> None:
    """Every rank of a client may be 0."""
    empty = Optimizer([], CONFIG)
    empty.load_state(empty.state())
    assert empty.state() == {"optimizer": "adamw", "parameters": {}}


def other_name(state: dict[str, object]) -> dict[str, object]:
    return {**state, "optimizer": "sgd"}


def trained(*shapes: tuple[int, ...]) -> Callable[[dict[str, object]], dict[str, object]]:
    def state(_: dict[str, object]) -> dict[str, object]:
        held = parameters(*shapes)
        optimizer = Optimizer(held, CONFIG)
        run(optimizer, held, range(1))
        return optimizer.state()

    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_name, "the state of optimizer 'adamw', found that of 'sgd'"),
        (trained((4, 3), *SHAPES[1:]), r"of a parameter \[3, 4\] at 0, found \[4, 3\]"),
        (trained(*SHAPES, (7, 7)), r"of a parameter None at 3, found \[7, 7\]"),
    ],
    ids=["optimizer", "shape", "one more"],
)
def test_a_foreign_state_is_refused(change: Callable[[dict[str, object]], dict[str, object]], message: str) -> None:
    optimizer = Optimizer(parameters(*SHAPES), CONFIG)
    with pytest.raises(ConfigError, match=rf"Expected .*{message}.*Resume with the"):
        optimizer.load_state(change(optimizer.state()))


def test_8_bit_adamw_is_that_of_bitsandbytes_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Factors of 4,096 values and more have moments in 8 bits; smaller ones in float32."""
    from bitsandbytes.optim import AdamW8bit

    config = TrainingConfig(1, 6, 1e-2, warmup_steps=0, schedule="constant", max_grad_norm=0.0, optimizer="adamw_8bit")
    shapes = [(8, 1024), (1024, 8), (4, 16)]

    def parameters() -> list[nn.Parameter]:
        return [nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(7))) for s in shapes]

    def steps(optimizer: Any, of: list[nn.Parameter], first: int, last: int, ours: bool) -> None:
        for step in range(first, last):
            for index, parameter in enumerate(of):
                generator = torch.Generator().manual_seed(100 * step + index)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step(step) if ours else optimizer.step()

    expected, found, resumed = parameters(), parameters(), parameters()
    steps(AdamW8bit(expected, lr=1e-2, weight_decay=0.0), expected, 0, 6, ours=False)
    optimizer = Optimizer(found, config)
    steps(optimizer, found, 0, 3, ours=True)
    state = through_disk(optimizer.state(), tmp_path)
    values = [torch.clone(parameter.detach()) for parameter in found]
    steps(optimizer, found, 3, 6, ours=True)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    moments = [t for t in _tensors(state["parameters"]["0"]) if t.shape == shapes[0]]
    assert {moment.dtype for moment in moments} == {torch.uint8}

    for parameter, value in zip(resumed, values, strict=True):
        parameter.data.copy_(value)
    again = Optimizer(resumed, config)
    again.load_state(state)
    steps(again, resumed, 3, 6, ours=True)
    for one, other in zip(resumed, expected, strict=True):
        assert torch.equal(one, other)


def _tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    return [t for value in state.values() for t in _tensors(value)] if isinstance(state, dict) else []
