"""The table of methods: what a row names exists."""

import inspect

import pytest

from hsplit_flwr.experiments.engine import Trainer, trainer_of
from hsplit_flwr.experiments.methods import METHODS, RIVALS
from hsplit_flwr.lora.aggregation import RULES

STEPS = ("round", "score", "global_model")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_names_a_trainer_and_a_rule(method: str) -> None:
    trainer = trainer_of(METHODS[method])
    assert list(inspect.signature(trainer).parameters) == ["task", "method"]
    for step in STEPS:
        expected = inspect.signature(getattr(Trainer, step))
        assert inspect.signature(getattr(trainer, step)) == expected, step
    assert METHODS[method].rule in RULES


def test_titles_tell_methods_apart() -> None:
    assert len({method.title for method in METHODS.values()}) == len(METHODS)
    assert METHODS.keys() >= set(RIVALS)
