"""The app `simulations/finetune`: one command from a file to an adapter, and what it says where that cannot be."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict

from hsplit_flwr.data.assets import DESK, DESK_HELD_OUT
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.flower.apps import message_strategy
from hsplit_flwr.flower.finetune import data as run_data
from hsplit_flwr.flower.message_strategy import HSplitLoRAMessageStrategy
from hsplit_flwr.models.assets import tiny_checkpoint
from simulations import make_chat_set
from tests.helpers.chats import CHATS, INSTRUCTIONS, PAIRS, TEXTS, write_lines
from tests.helpers.deployment import START_S
from tests.helpers.federation import build_one_at_a_time
from tests.helpers.finetune_app import APP, app_config, client_app, context, server_side
from tests.helpers.flower import flower_home, free_port, read_summary, wait_for_log, wait_for_port
from tests.helpers.grid import ThreadGrid

pytestmark = pytest.mark.timeout(180)
MODEL = str(tiny_checkpoint())
FORMS = {"chat": CHATS * 4, "instruction": INSTRUCTIONS * 4, "pairs": PAIRS * 3, "text": TEXTS * 4}
SMALL = {
    "rounds": 1,
    "local-steps": 2,
    "batch-size": 2,
    "cuts": "1,2",
    "ranks": "2,4",
    "tail-rank": 2,
    "max-length": 96,
}


@pytest.fixture(autouse=True)
def building_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    build_one_at_a_time(monkeypatch, "load_segment", "SegmentAdapters")


def config_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**app_config(), **SMALL, "model": MODEL, "output-dir": str(folder / "out"), **changes}


def play(config: dict[str, Any], *node_configs: dict[str, Any]) -> HSplitLoRAMessageStrategy:
    """The whole run in this process; one node for each of `node_configs`, two by default."""
    configs = node_configs or ({}, {})
    grid = ThreadGrid(dict.fromkeys(range(1, len(configs) + 1), client_app.app))
    for number, (node, own) in enumerate(zip(grid.nodes.values(), configs, strict=True)):
        node.context = context(config, {"partition-id": number, "num-partitions": len(configs), **own}, RecordDict())
    strategy = message_strategy(server_side(config))
    strategy.start(grid)
    return strategy


@pytest.mark.parametrize("name", FORMS)
def test_every_form_trains_and_is_scored(name: str, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "own.jsonl", FORMS[name])
    strategy = play(config_of(tmp_path, data=data, **{"chat-template": "plain"}))
    (record,) = strategy.history
    assert not record.failures
    assert [client.client_id for client in record.clients] == ["0", "1"]
    assert record.central_perplexity
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_embedded_chats_train_offline(tmp_path: Path) -> None:
    """Where SmolLM2's wheel is not, the tiny model answers in a plain template: both without a download."""
    strategy = play(config_of(tmp_path, data="embedded", rounds=2, **{"local-steps": 6, "learning-rate": 5e-3}))
    first, second = strategy.history
    assert first.central_perplexity
    assert second.central_perplexity
    assert second.central_perplexity < first.central_perplexity
    samples = json.loads((tmp_path / "out" / "summary.json").read_text())["samples"]
    assert samples[0]["prompt"] == "User: If I take a telescope today, how many days do I have?\nAssistant:"
    assert samples[0]["reference"].startswith("A telescope is yours for 5 days.")


def test_the_embedded_chats_are_what_the_script_makes() -> None:
    for path, chats in {
        DESK: make_chat_set.training_chats(),
        DESK_HELD_OUT: make_chat_set.held_out_chats(),
    }.items():
        assert path.read_text(encoding="utf-8") == make_chat_set.lines(chats)
    asked = [chat["messages"][-2]["content"] for chat in make_chat_set.held_out_chats()]
    trained = [message["content"] for chat in make_chat_set.training_chats() for message in chat["messages"]]
    assert len([*make_chat_set.training_chats()]) >= 200
    assert not set(asked) & set(trained)


def test_a_node_may_have_its_own_file(tmp_path: Path) -> None:
    """Deployments: one file per client, none on the server; a node's clients share its file alone."""
    files = [
        write_lines(tmp_path / f"{n}.jsonl", [{"text": f"only node {n} says {k}"} for k in range(8)]) for n in (0, 1)
    ]
    config = config_of(tmp_path, data="", rounds=1)
    strategy = play(config, *({"data": file} for file in files))
    (record,) = strategy.history
    assert not record.failures
    assert record.central_perplexity is None
    assert record.federated_perplexity
    for client, said in (("0", "only node 0"), ("1", "only node 1")):
        data = run_data.client_data(client, config, {"data": files[int(client)]}, [client])
        own = run_data.tokenizer(MODEL)
        batch = next(iter(data.training_batches(0)))
        assert all(own.decode(row).startswith(said) for row in batch["input_ids"])


def test_a_server_may_score_what_no_client_has(tmp_path: Path) -> None:
    own, held_out = write_lines(tmp_path / "own.jsonl", TEXTS * 4), write_lines(tmp_path / "held-out.jsonl", TEXTS)
    config = config_of(tmp_path, data="", **{"eval-data": held_out})
    (record,) = play(config, {"data": own}, {"data": own}).history
    assert record.central_perplexity


def test_clients_of_one_file_share_it(tmp_path: Path) -> None:
    config = config_of(tmp_path, data=write_lines(tmp_path / "own.jsonl", [{"text": f"row {n}"} for n in range(20)]))
    own, seen = run_data.tokenizer(MODEL), []
    for client in ("0", "1"):
        data = run_data.client_data(client, config, {}, ["0", "1"])
        batches = data.training_batches(0)
        rows = [own.decode(row[row != own.pad_token_id]) for batch in islice(batches, 5) for row in batch["input_ids"]]
        seen.append(set(rows))
        assert len([*data.evaluate]) == 1
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 18  # a tenth is held out


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            TEXTS,
            {"cuts": "1,2,3,4", "ranks": "1,1,1,1"},
            "Expected at least one example for each of 4 clients, found 2",
        ),
        ([{"q": "a"}], {}, r"the columns of one of these forms: .*Found \['q'\]"),
        (TEXTS, {"loss-on": "assistant"}, "In line . of own.jsonl: Expected chats for loss-on=assistant"),
        (CHATS, {}, "Expected a tokenizer with a chat template for chats, found none"),
        (TEXTS, {"packing": "bfd"}, "Expected packing as one of"),
        (TEXTS, {"partition": "dirichlet", "partition-by": "topic"}, "Expected partition-by as 'length' or one of"),
        (TEXTS, {"max-length": 500}, "Expected max-length of at most 192"),
        (TEXTS, {"data": "none.jsonl"}, r"found nothing at 'none\.jsonl' \(looked for /.*none\.jsonl\)"),
        (TEXTS, {"eval-data": "none.csv"}, r"found nothing at 'none\.csv'"),
    ],
)
def test_what_no_client_could_train_on_is_said_before_the_first_round(
    rows: list[dict[str, Any]], changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rows is CHATS:
        monkeypatch.setattr(
            run_data, "tiny_checkpoint", lambda: "another model"
        )  # else the plain template is the default
    config = config_of(tmp_path, data=write_lines(tmp_path / "own.jsonl", rows))
    with pytest.raises(ConfigError, match=message):
        message_strategy(server_side({**config, **changes}))
    assert not (tmp_path / "out").exists()


def test_a_client_without_any_data_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Expected data in the run config or in the node config of this SuperNode"):
        run_data.client_data("0", config_of(tmp_path, data=""), {}, ["0"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_command_from_a_file_to_an_adapter(tmp_path: Path) -> None:
    """As a newcomer types it, on measured budgets; plain transformers and PEFT load what comes out."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    data = write_lines(tmp_path / "my.jsonl", PAIRS * 5)
    values = {"model": MODEL, "data": data, "rounds": 2, "local-steps": 4, "output-dir": str(tmp_path / "out")}
    with flower_home(tmp_path / "home") as home:
        log = home.run(APP, values, timeout_s=420)
    assert f"data: {data}: prompt and completion (prompt, completion), loss on completion, 18 examples" in log
    assert "Results: " in log, log[-3000:]
    summary = read_summary(tmp_path / "out")
    assert summary["status"] == "completed"
    assert summary["final_perplexity"] < summary["initial_perplexity"]
    ids = torch.tensor([[5, 6, 7, 8]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged_model")
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter")
    with torch.no_grad():
        difference = (merged(ids).logits - adapted(ids).logits).abs().max()
        moved = (merged(ids).logits - AutoModelForCausalLM.from_pretrained(MODEL)(ids).logits).abs().max()
    assert difference < 1e-3 * moved


CONNECTION = """\
[superlink]
default = "loopback"

[superlink.loopback]
address = "127.0.0.1:{port}"
insecure = true
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_deployment_with_a_file_per_supernode(tmp_path: Path) -> None:
    """The run config names no file, and the server's log none of theirs."""
    texts = [[{"text": f"node {node} says {row}"} for row in range(20)] for node in (0, 1)]
    files = [write_lines(tmp_path / f"my own {node}.jsonl", rows) for node, rows in enumerate(texts)]
    port = free_port()
    with flower_home(tmp_path / "home") as home:
        (home.folder / "config.toml").write_text(CONNECTION.format(port=port))
        link, log = home.start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
        wait_for_port(port, link, log, START_S)
        for number, file in enumerate(files):
            node, log = home.start(
                "flower-supernode",
                *("--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port())),
                *("--node-config", f'partition-id={number} num-partitions=2 data="{file}"'),
            )
            wait_for_log("SuperNode ID", node, log, START_S)
        values = {"model": MODEL, "data": "", "rounds": 1, "local-steps": 4, "min-nodes": 2}
        said = home.run(APP, {**values, "output-dir": str(tmp_path / "out")}, timeout_s=300)
    assert "Results: " in said, said[-3000:]
    (record,) = read_summary(tmp_path / "out")["history"]
    assert record["failures"] == []
    assert [client["client_id"] for client in record["clients"]] == ["0", "1"]
    assert record["federated_perplexity"]
    assert record["central_perplexity"] is None
    assert "my own" not in said
