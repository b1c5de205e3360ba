"""Who hosts whom, whatever nodes claim."""

import pytest

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.federation.roster import NodeAnswer, Roster
from hsplit_flwr.planning.budgets.budget import Budget

BUDGET = Budget(memory_bytes=1, flops_per_s=1.0, uplink_bytes_per_s=1.0, downlink_bytes_per_s=1.0, latency_s=0.0)


def answer(*clients: str, concurrency: int = 0, budgets: bool = False) -> NodeAnswer:
    return NodeAnswer(clients, concurrency, dict.fromkeys(clients, BUDGET) if budgets else {})


def test_concurrency_is_that_of_the_simulation_or_one_client_per_node() -> None:
    simulated, deployed = Roster(), Roster()
    simulated.update({"1", "2"}, {"1": answer("a", "b", concurrency=2), "2": answer("c")})
    assert [simulated.concurrency(c) for c in (["a"], ["a", "b"], ["a", "b", "c"])] == [1, 2, 2]
    deployed.update({"1", "2"}, {"1": answer("a", "b"), "2": answer("c")})
    assert [deployed.concurrency(c) for c in (["a"], ["a", "b"], ["a", "b", "c"])] == [1, 1, 2]


def test_only_nodes_that_have_not_answered_are_unknown() -> None:
    roster = Roster()
    roster.update({"1", "2"}, {"1": answer("a")})
    assert roster.unknown(["1", "2", "3"]) == ["2", "3"]


def test_a_restarted_node_gets_its_client_back_once_its_old_self_is_offline(caplog: pytest.LogCaptureFixture) -> None:
    """Its old self still counts as online for a while; nobody can tell such a node from a thief."""
    roster = Roster()
    roster.update({"1", "9"}, {"1": answer("a", "b"), "9": answer("z")})
    roster.update({"1", "2", "9"}, {"2": answer("a", "b")})
    assert "left out node 2" in caplog.text
    assert "found ['a', 'b'] on node 1 too, which is online" in caplog.text
    assert (roster.node_of("a"), roster.node_of("b")) == ("1", "1")
    assert roster.unknown(["1", "2", "9"]) == ["2"]  # asked again
    roster.update({"2", "9"}, {"2": answer("a", "b")})
    assert (roster.node_of("a"), roster.node_of("b")) == ("2", "2")


def test_nobody_takes_the_client_of_a_living_node() -> None:
    """Any admitted node could: it claimed an id, and the client that had it was never asked again."""
    roster = Roster()
    roster.update({"1"}, {"1": answer("a", budgets=True)})
    for thief in ("2", "3"):
        roster.update({"1", thief}, {thief: answer("a", "b", budgets=True)})
        assert {client: roster.node_of(client) for client in roster.clients} == {"a": "1"}
        assert roster.new_budgets == {}  # nor does it speak for the client


def test_of_two_new_nodes_with_one_client_the_first_keeps_it(caplog: pytest.LogCaptureFixture) -> None:
    """Such a node ended the run for everybody."""
    roster = Roster()
    roster.update({"1", "2"}, {"1": answer("a"), "2": answer("b", "a")})
    assert {client: roster.node_of(client) for client in roster.clients} == {"a": "1"}
    assert "left out node 2: expected clients of its own, found ['a'] on node 1 too" in caplog.text


def test_budgets_are_new_once() -> None:
    roster = Roster()
    roster.update({"1"}, {"1": answer("a", budgets=True)})
    assert roster.new_budgets == {"a": BUDGET}
    roster.update({"1"}, {})
    assert roster.new_budgets == {}


def test_an_answer_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="without repetition"):
        answer("a", "a")
    with pytest.raises(ConfigError, match="concurrency >= 0"):
        answer("a", concurrency=-1)
    with pytest.raises(ConfigError, match=r"at most 100000 clients of a node.*found 100001"):
        answer(*map(str, range(100_001)))
    with pytest.raises(ConfigError, match="ids of at most 256 characters, found 1 with up to 257"):
        answer("a" * 257)
    with pytest.raises(ConfigError, match=r"budget of every client of the node, found none of \['b'\]"):
        NodeAnswer(("a", "b"), 0, {"a": BUDGET})


def test_nobody_is_an_error() -> None:
    with pytest.raises(ConfigError, match="at least one SuperNode"):
        Roster().update(set(), {})
