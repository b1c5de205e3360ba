"""Budgets as clients report them in Flower's messages: one JSON object, client id -> figures."""

import json
from collections.abc import Mapping
from dataclasses import asdict

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.planning.budgets.budget import Budget

BUDGETS_KEY = "hsplit-budgets"


def budgets_to_json(budgets: Mapping[str, Budget]) -> str:
    """The text that `budgets_from_json` reads."""
    return json.dumps({client: asdict(budget) for client, budget in budgets.items()})


def budgets_from_json(text: object) -> dict[str, Budget]:
    """What a node reported.

    Raises:
        ConfigError: not budgets.
    """
    try:
        data = json.loads(str(text))
        budgets = {str(client): Budget(**figures) for client, figures in data.items()}
        if not all(type(value) in (int, float) for budget in budgets.values() for value in asdict(budget).values()):
            raise TypeError("a figure that is no number")
        return budgets
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"Expected budgets by client id, found {str(text)!r:.200} ({error!r:.100}).") from error


TASK_KEY = "hsplit-task"
PROBE_KEY = "hsplit-probe"
REFUSED_KEY = "refused"
CLIENTS_KEY = "hsplit-clients"
CONCURRENCY_KEY = "hsplit-concurrency"
