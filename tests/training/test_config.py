"""Settings and plans: what is refused, and the learning rate that every optimizer follows."""

import hashlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.training.config import ClientPlan, TrainingConfig

pytestmark = pytest.mark.timeout(20)


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, r"rounds as a whole number >= 1, found 0\.$"),
        ({"local_steps": 0}, r"local_steps as a whole number >= 1, found 0 \(run config: local-steps\)\.$"),
        ({"learning_rate": 0.0}, r"learning_rate > 0, found 0\.0 \(run config: learning-rate\)\.$"),
        ({"learning_rate": -1e-3}, "learning_rate > 0"),
        ({"learning_rate": math.nan}, "learning_rate > 0"),
        ({"learning_rate": math.inf}, "learning_rate > 0"),
        ({"learning_rate": "2e-3"}, "learning_rate > 0, found '2e-3'"),
        ({"warmup_steps": -1}, "warmup_steps as a whole number >= 0, found -1"),
        ({"tail_passes": 0}, "tail_passes as a whole number >= 1, found 0"),
        ({"tail_passes": 1.5}, "tail_passes as a whole number >= 1, found 1.5"),
        ({"rounds": 2.5}, "rounds as a whole number >= 1, found 2.5"),
        ({"warmup_steps": 1.5}, "warmup_steps as a whole number >= 0, found 1.5"),
        ({"importance_rows": -1}, r"importance_rows as a whole number >= 0, found -1 \(run config: importance-rows\)"),
        ({"importance_steps": True}, "importance_steps as a whole number >= 0, found True"),
        ({"activation_cache_mib": -1}, r"activation_cache_mib as a whole number >= 0.*activation-cache-mib"),
        ({"activation_cache_mib": 1.5}, "activation_cache_mib as a whole number >= 0, found 1.5"),
        (
            {"activation_cache_mib": 1, "activation_codec": "int4_stochastic"},
            r"activation_codec that rounds the same .*found 'int4_stochastic' \(run config: activation-codec\)",
        ),
        ({"weight_decay": -0.1}, "weight_decay >= 0"),
        ({"weight_decay": math.nan}, "weight_decay >= 0"),
        ({"weight_decay": math.inf}, "weight_decay >= 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm >= 0"),
        ({"schedule": "step"}, "schedule as one of .*'linear', 'cosine', 'constant'.*found 'step'"),
        ({"optimizer": "adam"}, r"optimizer as one of \('adamw',.*found 'adam'"),
        ({"activation_codec": "int3"}, "activation_codec as one of .*'fp32', 'bf16', 'fp16'.*found 'int3'"),
        ({"gradient_codec": "int3"}, "gradient_codec as one of .*'fp32', 'bf16', 'fp16'.*found 'int3'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"Expected {message}"):
        TrainingConfig(**changes)


@pytest.mark.parametrize("cut", [0, -1, 1.0, "1", None, True])
def test_a_plan_needs_a_cut(cut: Any) -> None:
    with pytest.raises(ConfigError, match=rf"Expected a cut >= 1 \(blocks held by the client\), found {cut!r}"):
        ClientPlan(cut, LoraSpec())


# ---------------------------------------------------------------------------------------------- learning rate


def rates(schedule: str, warmup: int, total: int) -> list[float]:
    config = TrainingConfig(rounds=1, local_steps=total, learning_rate=0.8, warmup_steps=warmup, schedule=schedule)
    return [config.learning_rate_at(step) for step in range(total + 3)]


def test_learning_rates_by_hand() -> None:
    assert rates("linear", 2, 6) == pytest.approx([0.4, 0.8, 0.8, 0.6, 0.4, 0.2, 0, 0, 0])
    assert rates("constant", 2, 4) == pytest.approx([0.4] + [0.8] * 6)
    half = 0.4 * math.sqrt(0.5)  # 0.8 (1 + cos(pi / 4)) / 2 = 0.4 + half
    assert rates("cosine", 0, 4) == pytest.approx([0.8, 0.4 + half, 0.4, 0.4 - half, 0, 0, 0])


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(
    ("schedule", "theirs"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
def test_schedules_after_the_warm_up_are_those_of_transformers(schedule: str, theirs: Any, warmup: int) -> None:
    total = 11
    adamw = torch.optim.AdamW([torch.zeros(1)], lr=0.8)
    scheduler = theirs(adamw, warmup, total)
    expected = []
    for _ in range(total):
        expected.append(adamw.param_groups[0]["lr"])
        adamw.step()
        scheduler.step()
    assert rates(schedule, warmup, total)[warmup:total] == pytest.approx(expected[warmup:])


def test_warm_up_rises_from_the_first_step_to_the_full_rate() -> None:
    found = rates("linear", 4, 10)
    assert found[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert max(found) == pytest.approx(0.8)
    assert found[9] > 0  # the last step still trains


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_run_shorter_than_its_warm_up(schedule: str) -> None:
    found = rates(schedule, 10, 5)
    assert found[:5] == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4])
    assert all(0 <= rate <= 0.8 for rate in found)


# ---------------------------------------------------------------------------------------------- seeds


def test_seeds_are_the_same_on_every_machine() -> None:
    """Golden values: a change would make old runs irreproducible."""
    assert derive_seed(0, "head", 1, "0") == 8757407034198502101
    assert derive_seed() == int.from_bytes(hashlib.sha256(b"").digest()[:8], "little") >> 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers() | st.text(alphabet="abc.é", max_size=4), max_size=4))
def test_seeds_fit_torch_and_tell_parts_apart(parts: list[int | str]) -> None:
    seed = derive_seed(*parts)
    assert 0 <= seed < 1 << 63
    torch.Generator().manual_seed(seed)
    assert seed == derive_seed(*parts)
    assert seed != derive_seed(*parts, "x")


def test_the_order_and_the_borders_of_parts_matter() -> None:
    assert len({derive_seed("a", "b"), derive_seed("b", "a"), derive_seed("ab"), derive_seed("a b")}) == 4
