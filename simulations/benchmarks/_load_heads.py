"""Many heads of `load.py` in one process: a thread and a real gRPC connection each, and no compute of their own."""

import json
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from statistics import quantiles
from typing import Any

import torch
from _child import answer
from _deployment import ROUND, RUN, SEED, Deployment
from torch import Tensor

from hsplit_flwr.exchange.grpc_transport import connect
from hsplit_flwr.exchange.remote_tail import RemoteTail
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.models.segments import load_segment
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.session import BatchPart

KINDS = 4
"""different batches, which all heads send in turn"""
LIMIT_S = 300.0


def activations_of(deployment: Deployment) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Activations (B, T, H), mask and labels of real batches, by the real head; computed once for all."""
    head = load_segment(deployment.files(), 0, deployment.cut)
    alike = replace(deployment, heads=1)  # the same batches for however many
    batches = list(islice(alike.batches("0", padding_travels=False), KINDS))
    with torch.no_grad():
        return [
            (head(batch["input_ids"], batch["attention_mask"]), batch["attention_mask"], batch["labels"])
            for batch in batches
        ]


class Heads:
    """The heads of this process; each fails for itself."""

    def __init__(self, deployment: Deployment, told: dict[str, Any], steps: int) -> None:
        self._batches = activations_of(deployment)
        self._told = told
        self._plan = ClientPlan(deployment.cut, deployment.lora)
        self._training = TrainingConfig(rounds=1, local_steps=steps, importance_steps=0, seed=SEED)
        self._lock = threading.Lock()
        self._joined = threading.Semaphore(0)
        self._go = threading.Event()
        self.seconds: list[float] = []
        """of every batch, from its sending to its gradient"""
        self.errors: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._run, args=(client,)) for client in told["tokens"]]

    def join(self) -> None:
        """Connect all and let them join the round."""
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            self._joined.acquire()

    def train(self) -> None:
        """All steps of all heads."""
        self._go.set()
        for thread in self._threads:
            thread.join()

    def _run(self, client: str) -> None:
        waited = False
        try:
            task = self._task(client)
            with RemoteTail(task, task.max_frame_bytes, connect) as tail:
                tail.fetch_delta(0)
                self._joined.release()
                waited = True
                self._go.wait()
                for step in range(self._training.local_steps):
                    started = time.perf_counter()
                    tail.send_part(BatchPart(step), *self._batches[(int(client) + step) % KINDS])
                    tail.receive_part()
                    with self._lock:
                        self.seconds.append(time.perf_counter() - started)
        except Exception as error:
            with self._lock:
                self.errors[f"{getattr(error, 'code', type(error).__name__)}: {error}"[:200]] += 1
        finally:
            if not waited:
                self._joined.release()

    def _task(self, client: str) -> RoundTask:
        return RoundTask(
            run=RUN,
            round=ROUND,
            client=client,
            mode="train",
            address=self._told["address"],
            token=self._told["tokens"][client],
            time_limit_s=2 * LIMIT_S,
            max_frame_bytes=64 << 20,
            plan=self._plan,
            training=self._training,
            reconnect_grace_s=30.0,
        )


def main() -> None:
    """Compute the activations; join at a line, train at the next."""
    order = json.loads(sys.argv[1])
    steps = order.pop("steps")
    deployment = Deployment(**order)
    torch.set_num_threads(1)
    answer({})
    heads = Heads(deployment, json.loads(sys.stdin.readline()), steps)
    heads.join()
    answer({"errors": dict(heads.errors)})
    sys.stdin.readline()
    cpu, started = time.process_time(), time.perf_counter()
    heads.train()
    cut_points = quantiles(heads.seconds, n=20) if len(heads.seconds) > 1 else [0.0] * 19
    answer(
        {
            "errors": dict(heads.errors),
            "cpu_s": time.process_time() - cpu,
            "seconds": time.perf_counter() - started,
            "batches": len(heads.seconds),
            "median_s": cut_points[9],
            "p95_s": cut_points[18],
        }
    )


if __name__ == "__main__":
    main()
