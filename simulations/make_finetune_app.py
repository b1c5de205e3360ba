"""Makes the app `simulations/finetune`: it is what ``hsplit-flwr new simulations/finetune`` writes.

``python -m simulations.make_finetune_app``, after a change of the templates or of a ``run_config.toml``.
"""

from pathlib import Path

from hsplit_flwr.flower.finetune.new_app import app_files

NAME = "finetune"
APP = f"simulations/{NAME}"
FOLDER = Path(__file__).parent / NAME


def main() -> None:
    """Write the app's files again."""
    for file, text in app_files(NAME, APP).items():
        (FOLDER / file).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
