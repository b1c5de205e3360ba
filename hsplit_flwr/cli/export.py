"""``hsplit-flwr export``: a result for other programs."""

import argparse
from pathlib import Path

from hsplit_flwr.cli.parsing import OneLineParser, model_command


def declare(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    """Add the command and its options."""
    command = model_command(
        commands,
        "export",
        "write a result as a GGUF file, for llama.cpp",
        "Write a merged model, or an adapter merged into its base, as a GGUF file.",
    )
    command.add_argument("--gguf", required=True, type=Path, metavar="FILE", help="the file to write")
    command.add_argument("--dtype", default="fp32", choices=["fp32", "fp16", "bf16"], help="of matrices")
    like = "the base's own GGUF file, whose metadata are taken (default: made of config and tokenizer)"
    command.add_argument("--like", type=Path, metavar="FILE", help=like)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the file, and print how large it is."""
    from hsplit_flwr.common.tables import format_bytes
    from hsplit_flwr.models.gguf_export import write_gguf
    from hsplit_flwr.models.trained import load_trained

    model, tokenizer = load_trained(options.model, base=options.base)
    write_gguf(model, tokenizer, options.gguf, dtype=options.dtype, like=options.like)
    print(f"{options.gguf} ({format_bytes(options.gguf.stat().st_size)}, {options.dtype})")
    return 0
