"""HSplitLoRA, its ablations and its rivals, each as a configuration of one engine.

Common to all: the same batches of the same clients in the same order, AdamW and the schedule of `TrainingConfig` over
the whole run, LoRA on every linear layer (all but `ft`), and the token shares p_i. Rank 8 has alpha 16, everywhere.
Other ranks have alpha 16 too where every round's adapters are merged (HSplitLoRA, ``flora``) or all clients have one
rank (SplitLoRA), else alpha = 2r: what is averaged or truncated across ranks needs one scaling.

Ablations of HSplitLoRA: the paper's three parts (``without_iwi``, ``without_armsc``, ``without_naa``) and four of ours
(``with_joint_steps``, ``with_deep_heads``, ``without_one_alpha``, ``without_going_on``), each alone.
``hsplitlora_4_passes`` is HSplitLoRA whose tail trains four times on what it is sent, while clients and links are busy.

Activations and their gradients travel in bfloat16 unless a method's name says otherwise. ``..._pipelined`` sends int8,
in four parts of which three may be in flight, each an optimizer step; SplitLoRA gets it too (it is not its authors').
``hsplitlora_all`` also sends a round's update in bf16, as its best factors of rank 16, and carries what they lack.
``hsplitlora_auto_heads`` is that, and its planner may leave all heads untrained.
``hsplitlora_step_ahead`` sends a batch before the gradient of the one before it is there.
``hsplitlora_keep`` keeps all adapters from round to round, those of heads too, and merges what a round changed in them.

Controls, each beside HSplitLoRA with the same alpha, and none of them anybody's proposal:

* ``splitlora_16``: SplitLoRA at the largest rank that HSplitLoRA's planner may give, 16 instead of 8. Where the planner
  gives one block at rank 16, what is left of the difference is how adapters are aggregated and kept. Unequal devices:
  the smallest lacks 0.25 % of the memory of that head; it trains all the same and counts as too large.
* ``splitlora_4_passes``: the same with four tail passes, as ``hsplitlora_4_passes`` has.
* ``frozen_head``, ``frozen_head_4_passes`` and ``frozen_head_pipelined``: HSplitLoRA's tail behind one block per client
  (where a setting states cuts, behind those) that trains nothing, so that clients only send activations and are sent no
  gradients. What HSplitLoRA ends lower than it is what training on clients brings.
* ``one_model`` and ``one_model_pipelined``: heads and tail hold the same newest adapters at every step, blocks that
  some head holds take one step on the mean gradient of all clients (`rivals.one_model`). Its clock is CenLoRA's: no
  round is deployed like that. What deep heads end above it is what they lose by training apart.
* ``with_shuffled_iwi``: the planner takes each matrix's importance for another's. What HSplitLoRA ends lower than it is
  what knowing the right weights brings, beside unequal ranks as such.
* ``with_common_rank``: all heads have the fewest blocks, and the rank at which the weakest device holds them; the tail
  keeps rank 16. What HSplitLoRA ends lower than it is what ranks per device bring heads: ``without_armsc`` and
  SplitLoRA have that rank in the tail, too.

How we read the rivals, where their texts leave a choice:

* ``splitlora`` (arXiv:2407.00952): one cut and one rank for all, which the weakest device affords; heads' factors are
  averaged and handed back, the tail's adapters and all optimizers are kept over the whole run. The server takes an
  optimizer step on each client's batch, as the released code does; ``splitlora_joint`` takes one on all of them.
* ``splitlora_as_released`` (https://github.com/FDU-INC/Split_LoRA, gpt2_ft_sfl.py): its aggregation averages N + 1
  snapshots of N clients without weights. Each was taken before that client's last step, and the first client has two.
* ``hetlora`` (arXiv:2401.06432): the whole model on every client, rank by device, zero-padding, sparsity-weighted
  average, truncation, rank self-pruning (`pruning`; from the paper's description, its constants from memory).
* ``flora`` (arXiv:2409.05976): as HetLoRA, but stacked, merged and restarted; no split.
* ``flexlora`` (arXiv:2402.11505): as HetLoRA, but the exact sum is redistributed by SVD, to every client as much as its
  rank holds; scored at the largest rank.
* ``fedex_lora`` (arXiv:2410.09432; https://github.com/RaghavSinghal10/fedex-lora, fed_agg.py): the whole model on every
  client, A and B averaged and handed back, and what their product lacks of the exact mean added to the frozen weights.
* ``ffa_lora`` (arXiv:2403.12313; its abstract, and fed_agg.py and models.py of the same code): as that, but A stays at
  its start, one for all clients, and B alone is trained, sent and averaged, which is exact. The clock counts the few
  FLOPs of A's gradient all the same.
* ``lora_fair`` (arXiv:2411.14961; its text and code were not at hand, see `rivals.fair`): as the first, but the server
  corrects the averaged B to point, with the averaged A, where the exact mean does; clients start from both.

  All three have one rank, 8, on every client, whatever its device, as in their experiments; the optimizer is new every
  round, as in that code; and the means are weighted by tokens like everybody's here, where that code weighs clients
  alike. What the server's solver computes for LoRA-FAIR is not in the clock: it is small beside the products.
  As rules for the heads of a split model, in place of noise-free aggregation and new adapters: ``with_fedex``,
  ``with_ffa`` and ``with_fair``. Heads, and the tail for clients whose heads end before a block, are averaged and go on
  from there with new optimizers; what the tail alone trains is kept as in HSplitLoRA, and trains its A, too. These are
  our readings. Smaller ranks are padded with zeros and start from the first rows and columns; where a new plan changes
  a cut or a rank, what was averaged is merged, and all restart.
* ``cenlora``: all data on the server, one LoRA of rank 16; a step takes the batches of all clients at once, so that it
  makes as many steps on as many tokens as the others. ``cenlora_small_batch`` takes them one after another: as many
  tokens, N times the steps.
* ``ft``: federated full fine-tuning, FedAvg (arXiv:1602.05629) of all weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

SPLIT = "split_model:SplitTrainer"
"""the model is split between device and server"""
WHOLE = "rivals.whole_model:WholeTrainer"
"""LoRA on the whole model, on every device"""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What makes a method."""

    title: str
    trainer: str
    """``module:class`` of the `engine.Trainer`, counted from this folder. A name, so that whoever only reads results
    does not import torch."""
    pooled_data: bool = False
    """all data are on the server"""
    rule: str = "noise_free"
    """aggregation rule, one of `aggregation.RULES`"""
    carried: bool = False
    """the aggregated adapters are kept in the next round; else they are merged, and new ones start"""
    correction: str = ""
    """what is added to carried averages, one of `rivals.corrections.CORRECTIONS`; empty: nothing"""
    keep_optimizers: bool = False
    """heads that carry adapters keep their optimizers, too; else these are new every round, as on whole models"""
    planned: bool = False
    """cuts and ranks by the planner; else one cut and one rank (split), or a rank by device (whole)"""
    largest_rank: bool = False
    """one rank for all is the planner's largest, whether or not it fits; else 8, or less if a device needs it"""
    one_rank: bool = False
    """whole models have rank 8 on every device, whether or not it fits"""
    frozen_heads: bool = False
    """one block per client, or as many as the setting states, without adapters; not for the planner"""
    auto_heads: bool = False
    """the planner may leave all heads untrained"""
    importance: Literal["measured", "shuffled", "none"] = "measured"
    """what the planner knows of which weights matter: what clients measure, each weight's taken for another's, or
    nothing"""
    tail_16: bool = False
    """beside one rank for all heads, of the fewest blocks, the tail has the planner's largest; not for the planner"""
    deep_heads: bool = False
    """the planner counts what heads train alone: as many blocks as memory holds, however long a round takes"""
    one_alpha: bool = True
    """planned adapters have one alpha; else one scaling alpha / r"""
    keep_tail: bool = True
    """adapters that the tail alone trains are kept from round to round; else all restart"""
    keep_heads: bool = False
    """adapters of blocks that heads hold are kept, too, and what a round changed in them is merged"""
    tail_passes: int = 1
    """passes of the tail over the batches of a step"""
    self_pruning: bool = False
    stale_snapshots: bool = False
    """aggregates what SplitLoRA's released code does"""
    joint_steps: bool = False
    """the server takes one optimizer step on the batches of all clients together; else one on each client's batch"""
    codec: str = "bf16"
    """of activations and their gradients on the wire"""
    micro_batches: int = 1
    """parts that a batch travels in"""
    in_flight: int = 1
    """parts whose gradients a head may be waiting for"""
    micro_steps: bool = False
    """each part is an optimizer step"""
    update_codec: str = "fp32"
    """of what clients download in a round, where adapters are merged"""
    update_rank: int = 0
    """of what clients download, see `StrategyConfig`; 0: as many as there are"""

    @property
    def frozen_A(self) -> bool:
        """Adapters that are averaged train B alone."""
        return self.correction == "ffa"

    def training_settings(self) -> dict[str, Any]:
        """Fields of `TrainingConfig` that the method decides."""
        return {
            "keep_adapters": self.keep_heads,
            "joint_steps": self.joint_steps,
            "tail_passes": self.tail_passes,
            "activation_codec": self.codec,
            "gradient_codec": self.codec,
            "micro_batches": self.micro_batches,
            "micro_batches_in_flight": self.in_flight,
            "micro_steps": self.micro_steps,
        }


_HSPLITLORA = Method(title="HSplitLoRA", trainer=SPLIT, planned=True)
_SPLITLORA = Method(title="SplitLoRA", trainer=SPLIT, rule="fedavg", carried=True, keep_optimizers=True)
_SPLITLORA_16 = replace(_SPLITLORA, title="SplitLoRA, rank 16", largest_rank=True)
_FROZEN_HEAD = replace(_HSPLITLORA, title="Frozen head", planned=False, largest_rank=True, frozen_heads=True)
_ONE_MODEL = Method(title="One model at every step", trainer="rivals.one_model:OneModelTrainer")
_CENLORA = Method(title="CenLoRA", trainer="rivals.server_model:ServerTrainer", pooled_data=True)
_AVERAGED: dict[str, Any] = {"rule": "fedavg", "carried": True}
_PIPELINED: dict[str, Any] = {"codec": "int8", "micro_batches": 4, "in_flight": 3, "micro_steps": True}
_SMALL_UPDATES: dict[str, Any] = {"update_codec": "bf16", "update_rank": 16}
_ALL = replace(_HSPLITLORA, title="HSplitLoRA, int8, micro-steps, small updates", **_PIPELINED, **_SMALL_UPDATES)
METHODS: Mapping[str, Method] = {
    "hsplitlora": _HSPLITLORA,
    "hsplitlora_4_passes": replace(_HSPLITLORA, title="HSplitLoRA, 4 tail passes", tail_passes=4),
    "hsplitlora_fp32": replace(_HSPLITLORA, title="HSplitLoRA, fp32 wire", codec="fp32"),
    "hsplitlora_int8": replace(_HSPLITLORA, title="HSplitLoRA, int8 wire", codec="int8"),
    "hsplitlora_int4": replace(_HSPLITLORA, title="HSplitLoRA, int4 wire", codec="int4"),
    "hsplitlora_pipelined": replace(_HSPLITLORA, title="HSplitLoRA, int8 wire, micro-steps", **_PIPELINED),
    "hsplitlora_all": _ALL,
    "hsplitlora_auto_heads": replace(
        _ALL, title="HSplitLoRA, int8, micro-steps, small updates, heads that may be frozen", auto_heads=True
    ),
    "hsplitlora_keep": replace(_HSPLITLORA, title="HSplitLoRA, heads keep their adapters", keep_heads=True),
    "hsplitlora_keep_pipelined": replace(
        _HSPLITLORA, title="HSplitLoRA, heads keep, int8, micro-steps", keep_heads=True, **_PIPELINED
    ),
    "hsplitlora_step_ahead": replace(_HSPLITLORA, title="HSplitLoRA, a step ahead", in_flight=2, micro_steps=True),
    "without_iwi": replace(_HSPLITLORA, title="HSplitLoRA without importance", importance="none"),
    "with_shuffled_iwi": replace(_HSPLITLORA, title="HSplitLoRA with shuffled importance", importance="shuffled"),
    "with_common_rank": replace(_HSPLITLORA, title="HSplitLoRA, one rank for all heads", planned=False, tail_16=True),
    "without_armsc": replace(_HSPLITLORA, title="HSplitLoRA with one cut and rank", planned=False),
    "without_naa": replace(_HSPLITLORA, title="HSplitLoRA with averaged factors", rule="fedavg"),
    "with_fedex": replace(_HSPLITLORA, title="HSplitLoRA by FedEx-LoRA's rule", correction="fedex", **_AVERAGED),
    "with_ffa": replace(_HSPLITLORA, title="HSplitLoRA by FFA-LoRA's rule", correction="ffa", **_AVERAGED),
    "with_fair": replace(_HSPLITLORA, title="HSplitLoRA by LoRA-FAIR's rule", correction="lora_fair", **_AVERAGED),
    "with_joint_steps": replace(_HSPLITLORA, title="HSplitLoRA with joint tail steps", joint_steps=True),
    "with_deep_heads": replace(_HSPLITLORA, title="HSplitLoRA with as deep heads as fit", deep_heads=True),
    "without_one_alpha": replace(_HSPLITLORA, title="HSplitLoRA with alpha = 2r", one_alpha=False),
    "without_going_on": replace(_HSPLITLORA, title="HSplitLoRA, all adapters restart", keep_tail=False),
    "splitlora": _SPLITLORA,
    "splitlora_joint": replace(_SPLITLORA, title="SplitLoRA, joint tail steps", joint_steps=True),
    "splitlora_as_released": replace(_SPLITLORA, title="SplitLoRA as released", stale_snapshots=True),
    "splitlora_16": _SPLITLORA_16,
    "splitlora_16_int8": replace(_SPLITLORA_16, title="SplitLoRA, rank 16, int8 wire", codec="int8"),
    "splitlora_16_pipelined": replace(_SPLITLORA_16, title="SplitLoRA, rank 16, int8, micro-steps", **_PIPELINED),
    "splitlora_4_passes": replace(_SPLITLORA_16, title="SplitLoRA, rank 16, 4 tail passes", tail_passes=4),
    "frozen_head": _FROZEN_HEAD,
    "frozen_head_4_passes": replace(_FROZEN_HEAD, title="Frozen head, 4 tail passes", tail_passes=4),
    "frozen_head_pipelined": replace(_FROZEN_HEAD, title="Frozen head, int8, micro-steps", **_PIPELINED),
    "one_model": _ONE_MODEL,
    "one_model_pipelined": replace(_ONE_MODEL, title="One model at every step, micro-steps", **_PIPELINED),
    "hetlora": Method(title="HetLoRA", trainer=WHOLE, rule="zero_pad", carried=True, self_pruning=True),
    "flora": Method(title="FLoRA", trainer=WHOLE),
    "flexlora": Method(title="FlexLoRA", trainer=WHOLE, rule="svd", carried=True),
    "fedex_lora": Method(title="FedEx-LoRA", trainer=WHOLE, correction="fedex", one_rank=True, **_AVERAGED),
    "ffa_lora": Method(title="FFA-LoRA", trainer=WHOLE, correction="ffa", one_rank=True, **_AVERAGED),
    "lora_fair": Method(title="LoRA-FAIR", trainer=WHOLE, correction="lora_fair", one_rank=True, **_AVERAGED),
    "cenlora": replace(_CENLORA, joint_steps=True),
    "cenlora_small_batch": replace(_CENLORA, title="CenLoRA, small batches"),
    "ft": Method(title="FT", trainer="rivals.full_model:FullTrainer"),
}
RIVALS = ("splitlora_16", "hetlora", "flora", "flexlora", "cenlora_small_batch", "ft")
"""whom HSplitLoRA is compared with"""
