"""An experiment as data: what decides a run (`RunSpec`) and what it found (`Evaluation`)."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields

from hsplit_flwr.common.checks import require_whole
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.reports.text_intervals import TextIntervals
from hsplit_flwr.reports.text_metrics import TextScores

EMBEDDED_DATA = ("desk", "metar", "relexified")
"""names of the data sets that the package brings beside the restaurants; a folder of that name is ``./NAME``"""


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides a run: two runs of equal specs give equal numbers on one machine and version."""

    method: str
    """one of `methods.METHODS`"""
    setting: str
    """one of `settings.SETTINGS`: the devices"""
    partition: str
    """``iid`` or ``dirichlet``"""
    seed: int
    """source of partition, batches, adapters and availability"""
    learning_rate: float
    model: str = "tiny"
    """``tiny`` (embedded), ``smollm2``, or whatever `ModelFiles.resolve` takes"""
    data: str = ""
    """empty: the embedded restaurants; another name of `EMBEDDED_DATA`; a folder with ``train.csv`` and ``valid.csv``
    (columns ``mr`` and ``ref``); or one file of instruction data, see `instructions`"""
    rounds: int = 5
    local_steps: int = 10
    """steps of every client in a round"""
    batch_size: int = 4
    max_length: int = 96
    warmup_steps: int = 10
    alpha: float = 0.3
    """concentration of the Dirichlet partition"""
    held_out: str = "test"
    """``test`` or ``validation``: two halves of the held-out meaning representations; settings are searched on the
    second"""
    eval_examples: int = 200
    """examples of that half for perplexity, evenly spaced; all where there are fewer"""
    text_prompts: int = 0
    """held-out prompts that the final model writes texts for; all where there are fewer; 0: no text metrics"""
    cut: int = 0
    """every client's cut, instead of what the method chooses; 0: the method chooses"""
    rank: int = 0
    """every adapter's rank, instead of what the method chooses; 0: the method chooses"""

    def __post_init__(self) -> None:
        least = {"seed": 0, "rounds": 1, "local_steps": 1, "batch_size": 1, "max_length": 2, "warmup_steps": 0}
        least |= {"eval_examples": 1, "text_prompts": 0, "cut": 0, "rank": 0}
        for name, minimum in least.items():
            require_whole(name, getattr(self, name), minimum, key=name)
        for name, allowed in {"partition": ("iid", "dirichlet"), "held_out": ("test", "validation")}.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"Expected {name} as one of {allowed}, found {getattr(self, name)!r}.")
        if not (self.learning_rate > 0 and self.alpha > 0):
            raise ConfigError(f"Expected learning_rate and alpha > 0, found {self.learning_rate} and {self.alpha}.")

    @property
    def key(self) -> str:
        """12 hexadecimal digits that tell this spec from all others."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Names of the fields in the order of the class."""
        return tuple(field.name for field in fields(cls))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The state of a run after a round (round 0: before training). Totals count from the start of the run."""

    round: int
    perplexity: float
    """perplexity of the server's held-out examples"""
    train_loss: float | None
    """mean over the round's clients, weighted by tokens, of their mean over the steps, nats; None in round 0"""
    tokens: int
    """target tokens trained on"""
    virtual_s: float
    """time on the devices of the setting, by the virtual clock"""
    idle_share: float
    """mean share of the rounds so far that clients waited; 0 in round 0"""
    bytes_up: int
    """all clients to server"""
    bytes_down: int
    clients: int
    """clients that finished the round"""
    too_large: int
    """clients of the round whose memory budget their part exceeds; they train all the same"""
    wall_s: float
    """real time on the machine that computed it"""
    scores: TextScores | None = None
    """scores of texts, in the last round if asked for"""
    intervals: TextIntervals | None = None
    """of `scores`, over meaning representations; None in stores that are older"""

    @classmethod
    def untrained(cls, perplexity: float) -> "Evaluation":
        """Round 0: a perplexity, and nothing done yet."""
        return cls(
            round=0,
            perplexity=perplexity,
            train_loss=None,
            tokens=0,
            virtual_s=0.0,
            idle_share=0.0,
            bytes_up=0,
            bytes_down=0,
            clients=0,
            too_large=0,
            wall_s=0.0,
        )

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Names of the fields in the order of the class."""
        return tuple(field.name for field in fields(cls))
