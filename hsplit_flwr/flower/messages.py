"""What travels in Flower's messages, by name: tasks, answers of nodes, trained heads, scores; one form for both faces.

Figures are scalars and JSON texts, which a legacy ``config`` or ``metrics`` dict and a `ConfigRecord` hold alike.
Arrays have names: a `NumPyClient` returns them as a list, with their names among the figures.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from hsplit_flwr.common.checks import is_whole
from hsplit_flwr.common.reasons import describe_failure
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange.turns import Said, Turn
from hsplit_flwr.federation.roster import NodeAnswer
from hsplit_flwr.federation.trained_head import Array, HeadReply, Refusal, TrainedHead
from hsplit_flwr.planning.budgets.budget import Budget

TASK_KEY = "hsplit-task"
PROBE_KEY = "hsplit-probe"
CLIENTS_KEY = "hsplit-clients"
CONCURRENCY_KEY = "hsplit-concurrency"
BUDGETS_KEY = "hsplit-budgets"
CLIENT_KEY = "client"
REFUSED_KEY = "refused"
ARRAYS_KEY = "hsplit-arrays"
"""names of the arrays, where they travel as a list"""
LAYERS_KEY = "hsplit-layers"
KEPT_FROM_KEY = "hsplit-kept-from"
"""names that the array of importance is about"""
TURN_KEY, MORE_KEY, FRAME_KEY = "hsplit-turn", "hsplit-more", "hsplit-frame-"
"""where the exchange goes over messages: number of the turn, `Turn.more`, and how the keys of frames begin"""
_log = logging.getLogger("hsplit_flwr")

Figures = Mapping[str, Any]
Raw = TypeVar("Raw")


def pack_answer(answer: NodeAnswer) -> dict[str, Any]:
    """What a node says of itself, as figures."""
    figures: dict[str, Any] = {CLIENTS_KEY: json.dumps(answer.clients), CONCURRENCY_KEY: answer.concurrency}
    return figures | ({BUDGETS_KEY: budgets_to_json(answer.budgets)} if answer.budgets else {})


def unpack_answer(figures: Figures, with_budgets: bool) -> NodeAnswer:
    """The answer that `pack_answer` made.

    Raises:
        ConfigError: not such an answer, or one without budgets although they were asked for.
    """
    try:
        clients = json.loads(str(figures[CLIENTS_KEY]))
        concurrency = int(str(figures[CONCURRENCY_KEY]))
        if not isinstance(clients, list) or not all(isinstance(client, str) for client in clients):
            raise TypeError(f"{CLIENTS_KEY}={clients!r:.200}")
        budgets = budgets_from_json(figures[BUDGETS_KEY]) if with_budgets else {}
        return NodeAnswer(tuple(clients), concurrency, {client: budgets[client] for client in clients if budgets})
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"Expected the ids of a node's clients, found {error!r:.300}.") from error


def pack_trained(trained: TrainedHead | Refusal) -> tuple[dict[str, Array], dict[str, Any]]:
    """A client's round of training as arrays by name, and figures."""
    figures: dict[str, Any] = {CLIENT_KEY: trained.client}
    if trained.budget:
        figures[BUDGETS_KEY] = budgets_to_json({trained.client: trained.budget})
    if isinstance(trained, Refusal):
        return {}, {**figures, REFUSED_KEY: trained.reason}
    figures |= {
        "tokens": trained.tokens,
        "loss": trained.loss,
        LAYERS_KEY: json.dumps(list(trained.importance)),
        KEPT_FROM_KEY: trained.kept_from,
        **{f"{phase}_s": seconds for phase, seconds in trained.seconds.items()},
    }
    return trained.to_arrays(), figures


def unpack_trained(arrays: Mapping[str, Array], figures: Figures, upload_bytes: int) -> HeadReply | Refusal:
    """What `pack_trained` made, not checked against a plan yet.

    Raises:
        ConfigError: figures of another form.
    """
    client = str(figures.get(CLIENT_KEY, ""))
    budget = _budget(figures, client)
    if (reason := figures.get(REFUSED_KEY)) is not None:
        return Refusal(client, reason if isinstance(reason, str) else repr(reason), budget)
    try:
        layers = json.loads(str(figures[LAYERS_KEY]))
        if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
            raise TypeError(f"{LAYERS_KEY}={layers!r:.200}")
        return HeadReply(
            client=client,
            arrays=arrays,
            layers=tuple(layers),
            tokens=int(figures["tokens"]),
            loss=float(figures["loss"]),
            seconds={k.removesuffix("_s"): float(v) for k, v in figures.items() if k.endswith("_s")},
            budget=budget,
            upload_bytes=upload_bytes,
            kept_from=int(figures.get(KEPT_FROM_KEY, 0)),
        )
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"Expected the figures of a trained head, found {error!r:.300}.") from error


def named_arrays(arrays: list[Array], figures: Figures) -> dict[str, Array]:
    """A list of arrays by the names that the figures give them.

    Raises:
        ConfigError: not as many different names as arrays.
    """
    try:
        names = json.loads(str(figures.get(ARRAYS_KEY, "[]")))
        if len(set(names)) != len(names) or len(names) != len(arrays) or not all(isinstance(n, str) for n in names):
            raise TypeError(f"{len(names)} names")
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"Expected a name for each of {len(arrays)} arrays, found {error!r:.300}.") from error
    return dict(zip(names, arrays, strict=True))


def unpack_each(
    replies: Iterable[tuple[str, Raw]], unpack: Callable[[Raw], HeadReply | Refusal]
) -> tuple[dict[str, HeadReply | Refusal], list[str]]:
    """The replies by client, and a line for each that could not be unpacked: whatever one sends must not stop a run."""
    unpacked: dict[str, HeadReply | Refusal] = {}
    failures = []
    for client, raw in replies:
        try:
            unpacked[client] = unpack(raw)
        except Exception as error:
            failures.append(describe_failure(client, f"{type(error).__name__}: {error}"))
    return unpacked, failures


def pack_turn(turn: Turn) -> dict[str, Any]:
    """What the tail says to a client, as figures."""
    return {TURN_KEY: turn.number, MORE_KEY: turn.more, **_numbered(turn.frames)}


def unpack_turn(figures: Figures) -> Turn:
    """The turn that `pack_turn` packed; the first one where there is none.

    Raises:
        ConfigError: figures of another form.
    """
    number, more = figures.get(TURN_KEY, 1), figures.get(MORE_KEY, False)
    if not is_whole(number, 1) or not isinstance(more, bool):
        raise ConfigError(
            f"Expected the number of a turn, found {number!r:.100}. Install the same hsplit_flwr version."
        )
    return Turn(number, _frames(figures), more)


def pack_said(said: Said) -> dict[str, Any]:
    """What a client says to the tail, as figures."""
    return {TURN_KEY: said.number, **_numbered(said.frames)}


def unpack_said(figures: Figures) -> Said | None:
    """The answer that `pack_said` packed, not checked yet; None: figures of something else."""
    if TURN_KEY not in figures:
        return None
    number = figures[TURN_KEY]
    return Said(number if is_whole(number, 1) else 0, _frames(figures))


def _numbered(frames: Sequence[bytes]) -> dict[str, bytes]:
    return {f"{FRAME_KEY}{number}": frame for number, frame in enumerate(frames)}


def _frames(figures: Figures) -> list[bytes]:
    """The frames from number 0 on, without a gap."""
    frames: list[bytes] = []
    while isinstance(frame := figures.get(f"{FRAME_KEY}{len(frames)}"), bytes):
        frames.append(frame)
    return frames


def budgets_to_json(budgets: Mapping[str, Budget]) -> str:
    """The text that `budgets_from_json` reads."""
    return json.dumps({client: asdict(budget) for client, budget in budgets.items()})


def budgets_from_json(text: object) -> dict[str, Budget]:
    """Budgets by client id, as a node reported them.

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


def _budget(figures: Figures, client: str) -> Budget | None:
    if BUDGETS_KEY not in figures:
        return None
    try:
        return budgets_from_json(figures[BUDGETS_KEY]).get(client)
    except ConfigError as error:
        _log.warning("client %s: its budget stays as it was: %s", client, error)
        return None
