"""Noise-free aggregation at the size of LLaMA-7B: what it costs beside one matrix product, and what other rules lose.

    python simulations/benchmarks/aggregation.py --json aggregation.json [--layers 4]

Ten clients with ranks 64, 32, 16, 16, 8, 8, 4, 4, 4, 4 on the q and v matrices (4096 x 4096, W_0 in bf16) of some
layers; factors are random and independent, lora_alpha is 16 for all (so scalings differ), token counts are uneven.

Timed, alternated matrix by matrix in one run, on the threads that torch is given:

- *GEMM*: ``B (4096, 160) @ A (160, 4096)`` from factors that are already stacked, into a new float32 matrix;
- *product*: the rule from ten clients' adapters to the dense update: checks, stack, the same product;
- *round*: all that the first round does to a matrix: checks, stack, add to the cumulative delta (none yet) and
  W = round(W_0 + delta) in bf16. This is what `seconds`, `peak_bytes` and their ratios at the top level are about;
- *late round*: the same once the cumulative delta is dense (after 13 such rounds): a float32 matrix is renewed, too.

Seconds are medians over the repeats of the sum over all matrices; ratios are medians of the ratios within a repeat.
Bytes are the most that new tensors hold at once while one matrix is done. Relative errors are Frobenius norms of one
matrix's update against the weighted sum in float64.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _peak_bytes import peak_bytes
from _provenance import provenance
from torch import Tensor

from hsplit_flwr.lora.aggregation import RULES, Contribution, aggregate, noise_free, terms_by_module, token_shares
from hsplit_flwr.lora.delta_log import DeltaLog
from hsplit_flwr.lora.deltas import MatrixDelta, WeightDelta
from hsplit_flwr.lora.factors import LoraFactors, init_lora_A
from hsplit_flwr.lora.merge import merge_into

RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
HIDDEN = 4096
LORA_ALPHA = 16.0
WARM_UPS = 1


@dataclass(frozen=True)
class Matrix:
    """One matrix of the benchmark: its base weight, its adapters, and what a late round starts from."""

    name: str
    W_0: Tensor
    contributions: list[Contribution]
    stacked: LoraFactors
    late: WeightDelta

    def gemm(self) -> Tensor:
        """The product alone."""
        return self.stacked.B @ self.stacked.A

    def product(self) -> Tensor:
        """From adapters to the dense update."""
        increment = aggregate(self.contributions, {}, block_of)[self.name]
        return increment.B @ increment.A

    def round(self) -> Tensor:
        """From adapters to new weights, the first time."""
        return self._merge_with(DeltaLog())

    def late_round(self) -> Tensor:
        """From adapters to new weights, on a dense delta (left as it is, so every repeat does the same)."""
        return self._merge_with(DeltaLog(self.late.restricted([self.name]), version=13))

    def _merge_with(self, log: DeltaLog) -> Tensor:
        log.append(aggregate(self.contributions, {}, block_of))
        return merge_into(self.W_0, log.total.form(self.name), transposed=False, dtype=self.W_0.dtype)


TIMED: dict[str, Callable[[Matrix], Tensor]] = {
    "gemm": Matrix.gemm,
    "product": Matrix.product,
    "round": Matrix.round,
    "late_round": Matrix.late_round,
}


def block_of(name: str) -> int:
    """The block of ``model.layers.3.self_attn.q_proj`` is 3."""
    return int(name.split(".")[2])


def make_matrix(name: str, layers: int, seed: int) -> Matrix:
    """Random base weight and adapters of `name`; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    shares = token_shares({client: 1000 + 137 * client for client in range(len(RANKS))})
    contributions = []
    for client, rank in enumerate(RANKS):
        B = 1e-3 * torch.randn(HIDDEN, rank, generator=generator)
        adapter = LoraFactors(init_lora_A(rank, HIDDEN, seed=seed + 1 + client), B, LORA_ALPHA / rank)
        contributions.append(Contribution(shares[client], layers, {name: adapter}))
    return Matrix(
        name,
        W_0=(0.02 * torch.randn(HIDDEN, HIDDEN, generator=generator)).bfloat16(),
        contributions=contributions,
        stacked=noise_free(terms_by_module(contributions, {}, block_of)[name]),
        late=WeightDelta({name: MatrixDelta((HIDDEN, HIDDEN), dense=torch.zeros(HIDDEN, HIDDEN))}),
    )


def time_all(matrices: list[Matrix], repeats: int) -> dict[str, list[float]]:
    """Seconds over all matrices for each thing timed, one entry per repeat, alternated matrix by matrix."""
    seconds: dict[str, list[float]] = {key: [] for key in TIMED}
    for repeat in range(-WARM_UPS, repeats):
        totals = dict.fromkeys(TIMED, 0.0)
        for matrix in matrices:
            for key, action in TIMED.items():
                start = time.perf_counter()
                action(matrix)
                totals[key] += time.perf_counter() - start
        if repeat >= 0:
            for key, total in totals.items():
                seconds[key].append(total)
    return seconds


def relative_errors(matrix: Matrix) -> dict[str, float]:
    """Of each rule's update against the weighted sum of the dense updates in float64."""
    terms = terms_by_module(matrix.contributions, {}, block_of)[matrix.name]
    exact = torch.zeros(HIDDEN, HIDDEN, dtype=torch.float64)
    for term in terms:
        weight = term.weight * term.factors.scaling
        exact.addmm_(term.factors.B.double(), term.factors.A.double(), alpha=weight)
    errors = {}
    for name, rule in RULES.items():
        found = rule(terms)
        errors[name] = float((found.B.double() @ found.A.double() - exact).norm() / exact.norm())
    return errors


def run(layers: int, repeats: int, seed: int) -> dict[str, Any]:
    """All figures, JSON-able."""
    names = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(layers) for part in "qv"]
    matrices = [make_matrix(name, layers, seed + 100 * i) for i, name in enumerate(names)]
    seconds = time_all(matrices, repeats)
    peaks = {key: peak_bytes(partial(action, matrices[0])) for key, action in TIMED.items()}

    def over_gemm(key: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[key], seconds["gemm"], strict=True))

    return {
        "seconds": statistics.median(seconds["round"]),
        "seconds_over_gemm": over_gemm("round"),
        "peak_bytes": peaks["round"],
        "peak_over_gemm": peaks["round"] / peaks["gemm"],
        "relative_error": relative_errors(matrices[0]),
        "detail": {
            key: {
                "seconds": statistics.median(seconds[key]),
                "seconds_over_gemm": over_gemm(key),
                "peak_bytes": peaks[key],
                "peak_over_gemm": peaks[key] / peaks["gemm"],
            }
            for key in TIMED
        },
        "config": {
            "ranks": RANKS,
            "hidden": HIDDEN,
            "lora_alpha": LORA_ALPHA,
            "layers": layers,
            "matrices": len(matrices),
            "repeats": repeats,
            "base_dtype": "bfloat16",
        },
        **provenance(seed),
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as one Markdown table."""
    lines = [
        f"| {figures['config']['matrices']} matrices | seconds | x GEMM | peak MiB | x GEMM |",
        "|---|---|---|---|---|",
    ]
    for key, row in figures["detail"].items():
        lines.append(
            f"| {key.replace('_', ' ')} | {row['seconds']:.3f} | {row['seconds_over_gemm']:.2f} "
            f"| {row['peak_bytes'] / 2**20:.1f} | {row['peak_over_gemm']:.2f} |"
        )
    lines += [f"| {rule}: relative error | {error:.1e} | | | |" for rule, error in figures["relative_error"].items()]
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--layers", type=int, default=4, help="layers with a q and a v matrix each (0.2 GB a layer)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    figures = run(arguments.layers, arguments.repeats, arguments.seed)
    arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(table(figures))


if __name__ == "__main__":
    main()
