"""A client's task for one round, as it travels from the server to the client."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from hsplit_flwr.common.seeds import head_seed
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange.codecs import codec_named
from hsplit_flwr.exchange.task_limits import check_lora_texts, check_task
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.workload import Workload

PROTOCOL_VERSION = 8
Mode = Literal["train", "evaluate", "probe"]


@dataclass(frozen=True)
class RoundTask:
    """Everything a client needs to know for one `fit` or `evaluate`; travels as JSON in the Flower config."""

    run: str
    round: int
    client: str
    mode: Mode
    address: str
    token: str
    time_limit_s: float
    max_frame_bytes: int
    plan: ClientPlan
    training: TrainingConfig
    workload: Workload | None = None
    """what the plan was made for; larger batches are refused"""
    common_start: bool = False
    """see `head_seed`"""
    reconnect_grace_s: float = 0.0
    """how long the client may take to come back when its connection breaks; 0: it may not"""
    kept_from: int = 0
    """the round whose adapters of this client the server has, to go on from; 0: none, all restart"""

    @property
    def first_step(self) -> int:
        """The run step (0-based) at which this round starts."""
        return self.training.first_step(self.round)

    @property
    def adapter_seed(self) -> int:
        """Decides this client's fresh adapters in this round."""
        return head_seed(self.training.seed, self.round, self.client, self.common_start)

    def to_json(self) -> str:
        """The JSON text that `from_json` reads."""
        plan = {"cut": self.plan.cut, "lora": self.plan.lora.to_dict()}
        flat = {f.name: getattr(self, f.name) for f in fields(self)}
        workload = asdict(self.workload) if self.workload else None
        training = asdict(self.training)
        data = {**flat, "plan": plan, "training": training, "workload": workload, "protocol": PROTOCOL_VERSION}
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The task that `to_json` wrote.

        Raises:
            ConfigError: not a task, one of another protocol version, one with a codec that this version lacks, or one
                beyond the limits of `task_limits`.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            protocol = data.pop("protocol")
            if protocol != PROTOCOL_VERSION:
                raise ConfigError(
                    f"Expected a task of protocol version {PROTOCOL_VERSION}, found {protocol}. "
                    "Install the same hsplit_flwr version on server and clients."
                )
            check_lora_texts(data["plan"]["lora"])
            plan = ClientPlan(cut=data["plan"]["cut"], lora=LoraSpec.from_dict(data["plan"]["lora"]))
            for key in ("activation_codec", "gradient_codec"):
                codec_named(data["training"][key])  # a server with more codecs than this client
            training = TrainingConfig(**data["training"])
            workload = Workload(**data["workload"]) if data["workload"] else None
            task = cls(**{**data, "plan": plan, "training": training, "workload": workload})
            if task.mode not in get_args(Mode):
                raise ValueError(f"mode {task.mode!r:.80}")
            check_task(task)
            return task
        except ConfigError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"Expected a round task of hsplit_flwr in the Flower config, found {error!r:.300}."
            ) from error
