"""Budgets and importance in, cuts and ranks out: adaptive rank and split configuration (HSplitLoRA, arXiv:2505.02795).

Choose, for every client i, a cut s_i in 1..L-1 and, for the matrices m of blocks below s_i, ranks r_im that are 0 or a
candidate, to

    maximize    sum_i ( sum_{m in head(s_i)} I_m g(r_im) + w sum_{m in tail(s_i)} I_m g(r_m) )
                I: importance, sum 1; g: `objective.gain`; w: `tail_worth`; r_m: the tail's rank

    subject to  head_base_bytes(s_i) + sum_m r_im rank_bytes_m  <=  memory_i                                 every i
                steps * (head_flops(s_i, r_i) / compute_i + up / uplink_i + down / downlink_i + 2 latency_i + t)
                    + 4 sum_m r_im (d_in + d_out) / uplink_i + update(s_i) / downlink_i  <=  deadline        every i
                t = passes sum_i tail_flops(s_i) / server compute;  update(s): bytes by which a round changes a head,
                at most
                weights + tail adapters with optimizer state + sum_i activations(s_i)  <=  server memory

The tail serves the clients of a step one after another, so t couples them: a deeper cut of one gives all others time.
So time is counted as if nothing went on at once, client by client. A plan's own figures are by the virtual clock
(`prediction`), which knows what overlaps, and that clients wait for each other: where one is slow to download and
another slow to compute, a round is some percent longer. Then the plan is made under an earlier deadline, so that the
clock keeps the stated one (`plan_in_time`). The server's memory is that of `costs.tail_memory`: of a tail that computes
on one client after another, and of all clients' frames. The tail's own ranks follow from `tail_rank` and the
importance alone: they maximize sum_m I_m g(r_m) over the blocks from 1 on, subject to sum_m r_m (d_in + d_out) <=
tail_rank sum_m (d_in + d_out).

The objective counts what every client's data trains, in its head or in the tail. The tail trains better: it steps on
all clients' batches, and goes on from round to round. Where nobody states w, plans are made for w = 2, whose round ends
when the slowest client can be done (`balance`), and for w = 0 under several limits of depth and time; taken is the one
that makes most progress per second of the virtual clock (`paced_plans`). No cut is below `min_cut`.

As many clients as possible take part (`participants`); the objective comes second. With the same clients taking
part, more of any budget or a later deadline never gives a lower objective (`greedy` says how far that goes). The
paper's own formulation is not public text to us; this one is ours.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from hsplit_flwr.common.checks import is_above, is_at_least, is_whole, require, require_whole
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.module_choice import ALL_LINEAR
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.lora.update_coding import UpdateCoding
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.exchange_choice import CHOICES, choose, choose_update
from hsplit_flwr.planning.paced_plans import paced_plan
from hsplit_flwr.planning.prediction import predict
from hsplit_flwr.planning.round_plan import Exchange, PlannedClient, PlannedTail, RoundPlan
from hsplit_flwr.planning.solver import greedy
from hsplit_flwr.planning.solver.balance import balanced_deadline
from hsplit_flwr.planning.solver.depths import within
from hsplit_flwr.planning.solver.limits import limits
from hsplit_flwr.planning.solver.model_problem import problem_of
from hsplit_flwr.planning.solver.objective import Ints
from hsplit_flwr.planning.solver.pace import pace
from hsplit_flwr.planning.solver.participants import participants
from hsplit_flwr.planning.solver.problem import Problem
from hsplit_flwr.planning.solver.solution import Solution, needed_bytes, own_seconds, tail_blocks, values

if TYPE_CHECKING:
    from hsplit_flwr.planning.costs.model_costs import ModelCosts

EARLIER = 6
"""times that a plan is made anew under an earlier deadline, where clients' waits for each other make a round longer"""
WORTH = 2.0
"""`tail_worth` of a plan that leaves the tail what it can train, where nobody states it"""
Solver = Callable[[Problem, Ints], Solution]


@dataclass(frozen=True)
class PlannerConfig:
    """What the planner may choose from, and by when a round must be over."""

    ranks: tuple[int, ...] = (2, 4, 8, 16)
    """candidates for every matrix, besides 0 (no adapter)"""
    tail_rank: int = 16
    """mean rank of the tail's adapters, weighted by what a unit of rank costs; spread by importance"""
    tail_worth: float | None = None
    """of a matrix that the tail trains, against one of the same rank in a head; 0: only what heads train counts, which
    gives every device as many blocks as it affords. None: the plan of most progress per second (`paced_plans`)"""
    deadline_s: float | None = None
    """for a round: download, all steps and the adapters' upload; inf: no deadline; None: what the slowest client needs
    for the shallowest head (`balance.balanced_deadline`)"""
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """which linear layers may get an adapter, as in `LoraSpec`; all others have rank 0, in heads and tail"""
    update: UpdateCoding = field(default_factory=UpdateCoding)
    """how a round's update goes to the clients, which is what they download"""
    choose_update: bool = False
    """whether it may go out small instead, where that is quicker (`exchange_choice.choose_update`)"""
    choose: tuple[str, ...] = ()
    """what of the exchange the plan chooses, of `exchange_choice.CHOICES`; all else is as the costs' workload says"""
    min_cut: int = 1
    """blocks that every head holds at least: what leaves a device has gone through so many (privacy)"""
    exclude_modules: str | tuple[str, ...] = ()
    """which of the `target_modules` may not, as in `LoraSpec`"""
    layers_to_transform: tuple[int, ...] | None = None
    """the blocks whose layers may; None: all"""
    frozen_heads: bool = False
    """whether all heads may train nothing, if that makes more progress per second (`solver.frozen`)"""
    round_weight: float = 1.0
    """how often what a client exchanges once a round counts: not once where a model stands for a larger one, as in the
    experiments"""

    def __post_init__(self) -> None:
        whole = all(is_whole(rank, 1) for rank in self.ranks)
        distinct = len(set(self.ranks)) == len(self.ranks)
        expected = "as whole numbers >= 1, at least one candidate and no two equal"
        require(bool(self.ranks) and whole and distinct, "ranks", expected, self.ranks, key="candidate-ranks")
        require_whole("tail_rank", self.tail_rank, 0)
        known = self.tail_worth is None or is_at_least(self.tail_worth, 0)
        require(known, "tail_worth", ">= 0 and finite, or None (auto)", self.tail_worth)
        require_whole("min_cut", self.min_cut, 1)
        require(is_above(self.round_weight, 0), "round_weight", "> 0 and finite", self.round_weight)
        weighed = not self.frozen_heads or self.tail_worth is None
        expected = "= auto where frozen-heads = true, which is weighed by progress per second"
        require(weighed, "tail_worth", expected, self.tail_worth, key="tail-worth")
        good = self.deadline_s is None or self.deadline_s > 0
        require(good, "deadline_s", "> 0 (inf: none), or None", self.deadline_s)
        self._choice()  # refuses none at all
        require(set(self.choose) <= set(CHOICES), "choose", f"some of {CHOICES}", self.choose)

    def targets(self, module_names: Iterable[str]) -> list[str]:
        """Those linear layers of a model that may get an adapter, in the given order.

        Raises:
            ConfigError: a target matches none of them.
        """
        return self._choice().targets(module_names)

    def _choice(self) -> LoraSpec:
        return LoraSpec(
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            layers_to_transform=self.layers_to_transform,
        )


def plan(
    costs: "ModelCosts",
    importance: Mapping[str, float],
    clients: Mapping[str, Budget],
    server: Budget,
    config: PlannerConfig,
) -> RoundPlan:
    """A plan near the optimum, for any number of clients; the same for the same input in any order.

    Args:
        costs: of the model and the workload.
        importance: whole-model module name -> I_m >= 0, for all of `costs.matrices`; any scale.
        clients: client id -> budget.
        server: its memory and compute; its links are not looked at.
        config: candidates, target modules, tail rank, deadline.

    Raises:
        ConfigError: no clients, importance that is not complete, finite and >= 0, a target module that matches nothing,
            or a server with too little memory.
    """
    return _best(costs, importance, clients, server, config, greedy.solve)


def plan_exact(
    costs: "ModelCosts",
    importance: Mapping[str, float],
    clients: Mapping[str, Budget],
    server: Budget,
    config: PlannerConfig,
    *,
    time_limit_s: float = 60.0,
    gap: float = 1e-4,
) -> RoundPlan:
    """The optimal plan (up to `gap`, relative) for the same clients as in `plan`, for few clients.

    Raises:
        ConfigError: as in `plan`, or not solved within `time_limit_s`.
    """
    return _best(costs, importance, clients, server, config, exact_solver(time_limit_s=time_limit_s, gap=gap))


def exact_solver(*, time_limit_s: float = 60.0, gap: float = 1e-4) -> Solver:
    """The exact planner as a solver for `plan_problem`."""
    from hsplit_flwr.planning.solver import exact  # scipy: only who asks for the optimum waits for it

    return lambda problem, _: exact.solve(problem, time_limit_s=time_limit_s, gap=gap)


def plan_problem(problem: Problem, solver: Solver) -> RoundPlan:
    """The plan that `solver` finds for the clients of `problem` that can take part.

    Raises:
        ConfigError: the server's memory is too small; whatever `solver` raises.
    """
    stay, least_load, left_out = participants(problem)
    served = problem.restricted(stay)
    if len(stay):
        solution = solver(served, least_load)
    else:
        solution = Solution(np.zeros(0, int), np.zeros((0, len(problem.matrices.names)), np.int8))
    return _round_plan(served, solution, left_out)


def _best(
    costs: "ModelCosts",
    importance: Mapping[str, float],
    clients: Mapping[str, Budget],
    server: Budget,
    config: PlannerConfig,
    solver: Solver,
) -> RoundPlan:
    """The plan, with the exchange and updates that are best for it where those are the planner's to choose."""

    def made(problem: Problem) -> RoundPlan:
        return plan_in_time(problem, solver) if config.deadline_s else plan_problem(problem, solver)

    def best(update: UpdateCoding) -> RoundPlan:
        def make(under: "ModelCosts") -> RoundPlan:
            problem = _problem(under, importance, clients, server, replace(config, update=update))
            if config.tail_worth is not None:
                return made(problem)
            return paced_plan(problem, config.deadline_s or math.inf, made, frozen_heads=config.frozen_heads)

        return choose(costs, config.choose, make) if config.choose else make(costs)

    if config.choose_update:
        return choose_update(config.update, max(config.ranks), best)
    return replace(best(config.update), update=config.update)


def plan_in_time(problem: Problem, solver: Solver) -> RoundPlan:
    """The plan for a stated deadline, to which the virtual clock holds it, too: under an earlier one if need be.

    As long as everybody takes part who has the time by itself: that comes first, and a round may be some percent late.
    """
    made, allowed_s = plan_problem(problem, solver), problem.deadline_s
    for _ in range(EARLIER):
        if made.round_s <= problem.deadline_s:
            break
        allowed_s *= min(0.95, problem.deadline_s / made.round_s)  # cuts are whole: less would change nothing
        earlier = plan_problem(replace(problem, deadline_s=allowed_s), solver)
        if earlier.clients.keys() != made.clients.keys():
            break  # who has the time by itself is not left out for others' sake
        made = earlier
    return made


def _problem(
    costs: "ModelCosts",
    importance: Mapping[str, float],
    clients: Mapping[str, Budget],
    server: Budget,
    config: PlannerConfig,
) -> Problem:
    if not clients:
        raise ConfigError("Expected at least one client's budget, found none. Wait for clients to report theirs.")
    problem = problem_of(
        costs,
        importance,
        clients,
        server,
        ranks=config.ranks,
        tail_rank=config.tail_rank,
        tail_worth=WORTH if config.tail_worth is None else config.tail_worth,
        trained=config.targets(matrix.name for matrix in costs.matrices),
        deadline_s=config.deadline_s or math.inf,
        update=config.update,
        round_weight=config.round_weight,
    )
    if config.min_cut > problem.num_cuts:
        raise ConfigError(
            f"Expected min_cut (key min-cut) <= {problem.num_cuts}, the deepest cut of {costs.num_blocks} blocks, "
            f"found {config.min_cut}. Lower it."
        )
    problem = within(problem, config.min_cut, problem.num_cuts)
    return problem if config.deadline_s else replace(problem, deadline_s=balanced_deadline(problem))


def _round_plan(problem: Problem, solution: Solution, left_out: Mapping[str, str]) -> RoundPlan:
    blocks, steps = tail_blocks(problem, solution), problem.local_steps
    server_step = problem.server_step_s(blocks, problem.num_clients)
    whole, outside = own_seconds(problem, solution)
    predicted, load = predict(problem, solution), problem.workload
    value, memory = values(problem, solution), needed_bytes(problem, solution)
    found = limits(problem, solution)
    ranks = _RankTables(problem)
    clients = {
        name: PlannedClient(
            client=name,
            cut=int(solution.cuts[i]),
            ranks=ranks.of(solution, i),
            memory_bytes=round(memory[i]),
            memory_budget_bytes=round(problem.devices.memory[i]),
            step_s=float((whole[i] - outside[i]) / steps + server_step),
            round_s=predicted.done_s[name],
            limited_by=found[i],
            value=float(value[i]),
        )
        for i, name in enumerate(problem.devices.clients)
    }
    tail_ranks = zip(problem.matrices.names, problem.tail.ranks.tolist(), problem.matrices.block, strict=True)
    tail = PlannedTail(
        ranks={name: rank for name, rank, block in tail_ranks if block >= 1},
        memory_bytes=round(problem.server_bytes(blocks, problem.num_clients)),
        memory_budget_bytes=round(problem.devices.server_memory),
        step_s=server_step,
    )
    return RoundPlan(
        clients=clients,
        left_out=dict(left_out),
        tail=tail,
        value=sum(client.value for client in clients.values()),
        round_s=predicted.round_s,
        step_s=predicted.step_s,
        pace=pace(problem, solution),
        exchange=Exchange(**{field.name: getattr(load, field.name) for field in fields(Exchange)}),
    )


class _RankTables:
    """Ranks by module name; equal heads share one mapping, as there are few different ones among many clients."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._known: dict[bytes, dict[str, int]] = {}

    def of(self, solution: Solution, client: int) -> dict[str, int]:
        """Ranks of one client, for all matrices of its head."""
        problem, cut, levels = self._problem, solution.cuts[client], solution.levels[client]
        key = bytes([*int(cut).to_bytes(4, "little"), *levels.tobytes()])
        if key not in self._known:
            held = int(np.searchsorted(problem.matrices.block, cut))
            ranks = problem.levels[levels[:held]].astype(int).tolist()
            self._known[key] = dict(zip(problem.matrices.names[:held], ranks, strict=True))
        return self._known[key]
