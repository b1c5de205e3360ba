"""A node's proxy for one client's task: what comes back belongs to that client, whatever the node says."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from flwr.common import (
    DisconnectRes,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    GetParametersRes,
    GetPropertiesIns,
    GetPropertiesRes,
    ReconnectIns,
)
from flwr.server.client_proxy import ClientProxy

from hsplit_flwr.common.reasons import describe_failure
from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.task_limits import LONGEST_S
from hsplit_flwr.flower.messages import pack_turn
from hsplit_flwr.flower.talks import Talk
from hsplit_flwr.flower.watched_grid import LOST_ACTOR

RETRY_S = 1.0

Ins = TypeVar("Ins", FitIns, EvaluateIns)
Res = TypeVar("Res", FitRes, EvaluateRes)


class TaskProxy(ClientProxy):
    """`proxy` of the node that hosts `client`, for one task: Flower hands it back with the result or the failure.

    Args:
        proxy: of the node.
        client: whose task it is.
        on_answer: told the client as soon as its task has ended or a try has failed, so that nobody waits for it.
        talk: its exchange with the tail, where that goes over messages; None: it goes over a connection.
        message_limit_s: how long the node may then take to answer each.
    """

    def __init__(
        self,
        proxy: ClientProxy,
        client: str,
        on_answer: Callable[[str], None] = lambda client: None,
        *,
        talk: Talk | None = None,
        message_limit_s: float = math.inf,
    ) -> None:
        super().__init__(proxy.cid)
        self._proxy = proxy
        self._on_answer = on_answer
        self._talk = talk
        self._message_limit_s = message_limit_s
        self.client = client

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        """As the node's proxy; an exception is named after the client.

        Raises:
            ClientFailureError: the node raised, died or did not answer in time.
        """
        return self._played(self._proxy.fit, ins, timeout, group_id)

    def evaluate(self, ins: EvaluateIns, timeout: float | None, group_id: int | None) -> EvaluateRes:
        """As the node's proxy; raises as `fit`."""
        return self._played(self._proxy.evaluate, ins, timeout, group_id)

    def _played(
        self,
        ask: Callable[[Ins, float | None, int | None], Res],
        ins: Ins,
        timeout: float | None,
        group_id: int | None,
    ) -> Res:
        """The node's last answer: the only one, or after as many as the exchange takes."""
        if self._talk is None:
            return self._ask(ask, ins, timeout, group_id)
        give_up = math.inf if timeout is None else time.monotonic() + timeout
        config = ins.config
        try:
            while True:
                left_s = min(self._message_limit_s, max(RETRY_S, give_up - time.monotonic()))
                res = self._ask(ask, ins, left_s, group_id)
                if not self._talk.hears(res.metrics):
                    return res
                turn = self._talk.turn(min(LONGEST_S, max(RETRY_S, give_up - time.monotonic())))
                if turn is None:
                    raise ClientFailureError(self.client, "the tail did not answer within round-limit-s")
                ins = replace(ins, config={**config, **pack_turn(turn)})
        except ExchangeError as error:
            raise ClientFailureError(self.client, str(error)) from error
        finally:
            self._talk.end()
            self._on_answer(self.client)

    def _ask(
        self,
        ask: Callable[[Ins, float | None, int | None], Res],
        ins: Ins,
        timeout: float | None,
        group_id: int | None,
    ) -> Res:
        # Flower's simulation never replaces an actor whose process died: it hands it further messages, which fail at
        # once. Asking again gets to a living actor as soon as one is free. A client that died in the middle of its
        # task is refused there (its token is used), and its first failure is the one to tell.
        give_up = time.monotonic() + (timeout or 0.0)
        first: Exception | None = None
        while True:
            left = None if timeout is None else max(RETRY_S, give_up - time.monotonic())
            try:
                res = ask(ins, left, group_id)
                if self._talk is None:
                    self._on_answer(self.client)
                return res
            except Exception as error:
                self._on_answer(self.client)
                first = first or error
                if LOST_ACTOR not in str(error) or time.monotonic() + RETRY_S > give_up:
                    raise ClientFailureError(self.client, f"{type(first).__name__}: {first}") from first
            time.sleep(RETRY_S)

    def get_properties(self, ins: GetPropertiesIns, timeout: float | None, group_id: int | None) -> GetPropertiesRes:
        """As the node's proxy."""
        return self._proxy.get_properties(ins, timeout, group_id)

    def get_parameters(self, ins: GetParametersIns, timeout: float | None, group_id: int | None) -> GetParametersRes:
        """As the node's proxy."""
        return self._proxy.get_parameters(ins, timeout, group_id)

    def reconnect(self, ins: ReconnectIns, timeout: float | None, group_id: int | None) -> DisconnectRes:
        """As the node's proxy."""
        return self._proxy.reconnect(ins, timeout, group_id)


class ClientFailureError(Exception):
    """A client's task came to nothing."""

    def __init__(self, client: str, reason: str) -> None:
        super().__init__(describe_failure(client, reason))
