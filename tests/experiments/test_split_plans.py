"""Plans of the methods that split the model: what the planner is told, and floors that rivals keep, too."""

from dataclasses import replace

import pytest

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments import engine
from hsplit_flwr.experiments.methods import METHODS
from hsplit_flwr.experiments.settings import SETTINGS, round_weight
from hsplit_flwr.experiments.split_plans import planner_config, plans_of
from hsplit_flwr.experiments.task import LORA_ALPHA, Task
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.lora.update_coding import UpdateCoding
from hsplit_flwr.planning.plans import plans_in_force
from hsplit_flwr.training.config import ClientPlan
from tests.helpers.references import SPEC


def task_of(setting: str, method: str = "hsplitlora", cut: int = 0) -> Task:
    return Task.of(replace(SPEC, setting=setting, method=method, cut=cut, local_steps=8, max_length=96))


def cuts_of(task: Task) -> dict[str, int]:
    """Client -> cut of the first round."""
    found = plans_of(task, METHODS[task.spec.method])
    modules = [matrix.name for matrix in task.costs.matrices]
    book = plans_in_force(found.plans, found.tail_lora, found.workload, task.training, modules)
    book.settle(task.devices, task.devices)
    return {client: book.plan(client).cut for client in task.devices}


def test_the_planner_is_the_librarys_default_and_told_how_the_method_exchanges() -> None:
    """It was not told of the size of updates: a plan of `hsplitlora_all` counted a round's download in float32."""
    task = task_of("heterogeneous", "hsplitlora_all")
    load, method = task.costs.workload, METHODS["hsplitlora_all"]
    assert (load.activation_codec, load.gradient_codec, load.micro_batches, load.parts_alive) == ("int8", "int8", 4, 3)
    config = planner_config(method, task.min_cut, task.round_weight)
    assert config.tail_worth is None
    assert config.deadline_s is None
    assert config.update == UpdateCoding("bf16", 16)
    assert config.round_weight == round_weight(task.costs) > 3
    assert planner_config(METHODS["hsplitlora"], 1, 1.0).update == UpdateCoding()
    planning = plans_of(task, method).plans
    assert planning.settings()["planner"] == config  # type: ignore[union-attr]


@pytest.mark.parametrize("setting", ["privacy_floor", "tight_memory"])
@pytest.mark.parametrize(
    "method", ["hsplitlora", "without_armsc", "splitlora", "splitlora_16", "splitlora_16_pipelined", "frozen_head"]
)
def test_the_floor_is_everybodys(setting: str, method: str) -> None:
    """Rivals' one cut is what the weakest device affords, and a frozen head was one block."""
    task = task_of(setting, method)
    assert task.min_cut == 2
    cuts = cuts_of(task)
    assert list(cuts) == list(SETTINGS[setting].clients)
    assert min(cuts.values()) >= 2
    if method == "frozen_head":
        assert set(cuts.values()) == {2}


def test_a_rival_has_the_rank_at_which_the_weakest_holds_the_floor() -> None:
    """In ``tight_memory`` the smallest device holds two blocks at rank 2, and one block at 8."""
    found = plans_of(task_of("tight_memory", "splitlora"), METHODS["splitlora"])
    assert found.tail_lora
    assert found.tail_lora.r == 2


@pytest.mark.parametrize(("setting", "rank"), [("privacy_floor", 8), ("tight_memory", 2)])
def test_one_rank_for_all_heads_leaves_the_tail_its_own(setting: str, rank: int) -> None:
    """What HSplitLoRA gains on it are ranks of heads alone; on SplitLoRA also its tail's."""
    found = plans_of(task_of(setting, "with_common_rank"), METHODS["with_common_rank"])
    assert found.plans == ClientPlan(2, LoraSpec(rank, LORA_ALPHA))
    assert found.tail_lora == LoraSpec(16, LORA_ALPHA)


def test_a_stated_cut_below_the_floor_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Expected cut >= 2, .* in the setting 'privacy_floor', found 1"):
        plans_of(task_of("privacy_floor", cut=1), METHODS["hsplitlora"])
    assert set(cuts_of(task_of("privacy_floor", cut=3)).values()) == {3}


def test_the_clock_counts_a_rounds_transfers_as_the_plan_does() -> None:
    """3.7 times in the embedded model; what is reported as sent is what was sent."""
    spec = replace(SPEC, setting="heterogeneous", method="hsplitlora", rounds=1, local_steps=1, max_length=96)
    found, task = engine.run(spec), Task.of(spec)
    assert task.round_weight == pytest.approx(3.7, abs=0.01)
    client, device = "4", task.devices["4"]
    ranks = {matrix.name: 16 for matrix in task.costs.matrices if matrix.block < 1}
    sent = task.costs.update_bytes(1, ranks)
    (upload,) = [i for i in found.timelines[0].of(client) if i.what == "upload"]
    assert upload.seconds - device.latency_s == pytest.approx(3.7 * sent / device.uplink_bytes_per_s, rel=0.01)
    assert found.evaluations[-1].bytes_up < 5 * (sent + 1.1 * task.costs.step_bytes_up)
