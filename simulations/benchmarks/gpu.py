"""What runs on a GPU, in one command: the numbers of the CPU, tokens/s against PEFT, clients that share the GPU.

    python simulations/benchmarks/gpu.py --json OUT              # under ten minutes on one GPU
    python simulations/benchmarks/gpu.py --json OUT --device cpu --small

Three tables, each printed as soon as it is there:

* *numbers*: one step of head and tail on the device against the CPU in fp32: relative difference of the loss, and of
  the gradient that goes back, in the dtypes that people train in. Both add up in different orders, and bf16 rounds.
* *speed*: as `split_overhead.py`, head and tail in two processes on the same device, against monolithic PEFT on it.
  The ``random`` model has random weights, which time does not depend on.
* *shares*: ``flwr run simulations/quickstart`` with five clients that have 1/5 of the GPU each, and one after another
  with the whole; seconds of a round without the first, in which processes start.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _flower import own_home, run_simulation
from _models import source_of
from _provenance import provenance
from split_overhead import Setting, measure, random_batch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from hsplit_flwr.common.device import describe_device
from hsplit_flwr.common.tables import format_table
from hsplit_flwr.models.dtypes import DTYPES
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import load_segment
from hsplit_flwr.training.loss import token_losses

APP = Path(__file__).parents[1] / "quickstart"
CLIENTS = 5
ROUNDS, LOCAL_STEPS = 3, 20
RUN_LIMIT_S = 480.0


def random_model(folder: Path, device: str) -> str:
    """A LLaMA-like model of a billion random weights in bf16, drawn on `device`; returns `folder`."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=16, num_attention_heads=16, dtype="bfloat16"
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return str(folder)


def numbers(model: str, cut: int, dtype: str, device: str) -> dict[str, Any]:
    """A row of the first table."""
    files, setting = ModelFiles.resolve(source_of(model)), Setting(model, cut, 4, 64, 8, 1, dtype, device)

    def step(dtype: str, device: str) -> tuple[Tensor, Tensor]:
        """Loss, and its gradient by the activations (B, T, W)."""
        head, tail = (
            load_segment(files, start, stop, dtype=DTYPES[dtype], device=device)
            for start, stop in ((0, cut), (cut, None))
        )
        batch = {name: tensor.to(device) for name, tensor in random_batch(setting, head.vocab_size).items()}
        hidden = head(batch["input_ids"], batch["attention_mask"]).detach().requires_grad_()
        loss = token_losses(tail(hidden, batch["attention_mask"]), batch["labels"]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        return loss.detach().double().cpu(), hidden.grad.double().cpu()

    (loss, gradient), (reference, reference_gradient) = step(dtype, device), step("fp32", "cpu")
    return {
        "model": model,
        "cut": cut,
        "dtype": dtype,
        "loss_difference": float((loss - reference).abs() / reference),
        "gradient_difference": float((gradient - reference_gradient).norm() / reference_gradient.norm()),
    }


def shares(device: str, share: float, local_steps: int) -> dict[str, Any]:
    """A row of the last table: the quickstart, every client with `share` of the GPU (on the CPU: a share of two cores).

    Raises:
        RuntimeError: the run failed, or took longer than `RUN_LIMIT_S`.
    """
    on_gpu, at_once = device == "cuda", round(1 / share)
    cores = at_once if on_gpu else 2
    federation = (
        f"num-supernodes={CLIENTS} client-resources-num-cpus={1 if on_gpu else max(1, round(2 * share))} "
        f"client-resources-num-gpus={share if on_gpu else 0.0} init-args-num-cpus={cores}"
    )
    with tempfile.TemporaryDirectory(prefix="gpu-") as name, own_home(Path(name)) as environment:
        folder = Path(name)
        heads = f'cuts="2,2,2,2,2" ranks="8,8,8,8,8" output-dir="{folder / "results"}"'
        config = f"rounds={ROUNDS} local-steps={local_steps} {heads}"
        summary = json.loads(run_simulation(APP, federation, config, folder, environment, RUN_LIMIT_S).read_text())
    rounds = summary["history"]
    return {
        "share": share,
        "clients": [len(record["clients"]) for record in rounds],
        "round_s": fmean(sum(record["seconds"].values()) for record in rounds[1:]),
        "perplexity": summary["final_perplexity"],
    }


def speed_settings(small: bool, device: str, folder: Path) -> Iterator[Setting]:
    """What is timed; the random model is written to `folder`."""
    if small:
        yield Setting("tiny-gpt2", 2, 4, 32, 8, 2, "fp32", device)
        return
    for dtype in ("fp32", "bf16"):
        yield Setting("smollm2-135m", 4, 16, 256, 8, 10, dtype, device)
    yield Setting(random_model(folder / "random-1b", device), 4, 8, 256, 8, 10, "bf16", device)


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """One of the three, as text."""
    parts: dict[str, tuple[list[str], Callable[[dict[str, Any]], list[str]]]] = {
        "numbers": (
            ["model", "cut", "dtype", "loss off", "gradient off"],
            lambda r: [r["model"], str(r["cut"]), r["dtype"], f"{r['loss_difference']:.1e}",
                       f"{r['gradient_difference']:.1e}"],
        ),
        "speed": (
            ["model", "cut", "dtype", "split tok/s", "PEFT tok/s", "ratio", "exchange ms"],
            lambda r: [r["model"], str(r["cut"]), r["dtype"], f"{r['split_tokens_per_s']:.0f}",
                       f"{r['monolithic_tokens_per_s']:.0f}", f"{r['ratio_to_monolithic']:.3f}",
                       f"{r['exchange_ms']:.1f}"],
        ),
        "shares": (
            ["share of the GPU", "clients", "s per round", "perplexity"],
            lambda r: [f"{r['share']:g}", " ".join(map(str, r["clients"])), f"{r['round_s']:.1f}",
                       f"{r['perplexity']:.3f}"],
        ),
    }  # fmt: skip
    header, cells = parts[name]
    return f"{name}\n{format_table(header, [cells(row) for row in rows], False, 1)}\n"


def measurements(small: bool, device: str, folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Name and rows of one table after the other."""
    compared = [("tiny-gpt2", 3)] if small else [("tiny-gpt2", 3), ("smollm2-135m", 10)]
    yield "numbers", [numbers(m, cut, dtype, device) for m, cut in compared for dtype in ("fp32", "bf16")]
    yield (
        "speed",
        [
            {**measure(setting), "model": Path(setting.model).name, "dtype": setting.dtype}
            for setting in speed_settings(small, device, folder)
        ],
    )
    yield (
        "shares",
        [shares("cpu", 0.5, 2)] if small else [shares(device, share, LOCAL_STEPS) for share in (1 / CLIENTS, 1.0)],
    )


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("Expected a GPU that torch sees, found none. Give --device cpu --small to try the script.")
    print(describe_device(options.device), flush=True)
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-models-") as folder:
        for name, rows in measurements(options.small, options.device, Path(folder)):
            found[name] = rows
            print(f"\n{table(name, rows)}", flush=True)
    written = {**found, "device": describe_device(options.device), **provenance(0)}
    options.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
