"""The README tells the truth: its file tree is complete, its commands are those that CI runs, its code runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(marker: str) -> str:
    """The code block that follows an HTML comment `marker`."""
    found = re.search(rf"<!-- {re.escape(marker)} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, marker
    return found[1]


def tracked(*patterns: str) -> set[str]:
    out = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def tree_files() -> dict[str, str]:
    """Path -> comment of every file in the README's tree."""
    block = README.split("## Files", 1)[1].split("```")[1]
    folders: list[str] = []
    files = {}
    for line in block.strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, comment = line.strip().partition("  ")
        del folders[depth:]
        if name.endswith("/"):
            folders.append(name)
        else:
            files["".join(folders) + name] = comment.strip()
    return files


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_file_tree_names_every_module_with_a_comment() -> None:
    listed = tree_files()
    modules = {path for path in tracked("*.py", "*.toml", "Makefile") if not path.endswith("__init__.py")}
    modules = {path for path in modules if not path.startswith("tests/apps/")}
    assert modules - listed.keys() == set()
    assert {path for path in listed if not (ROOT / path).is_file()} == set()
    assert {path for path, comment in listed.items() if not comment} == set()


def test_ci_runs_the_readme_command() -> None:
    extract = r"sed -n '/<!-- command: test -->/,/```$/p' README.md | sed -n '/^```bash$/,/^```$/p' | sed '1d;$d'"
    assert extract in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    out = subprocess.run(["bash", "-c", extract], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout == fenced("command: test")
    assert "pytest" in out.stdout


def test_run_command_is_the_quickstart() -> None:
    assert fenced("command: run").splitlines()[-1] == "flwr run simulations/quickstart --stream"


def test_every_linked_path_exists() -> None:
    paths = set(re.findall(r"`((?:simulations|tests|hsplit_flwr)/[\w./]+)`", README))
    assert paths
    assert {path for path in paths if not (ROOT / path).exists()} == set()


DATA = """
import itertools
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.data.restaurants import partition_by_slot, restaurant_examples
from hsplit_flwr.data.text_batches import TextBatches

MODEL = str(tiny_checkpoint())

def batches(part):
    train, held_out = restaurant_examples()
    examples = held_out[:16] if part == "held-out" else partition_by_slot(train, num_clients=2)[int(part)]
    return TextBatches(examples, ModelFiles.resolve(MODEL).tokenizer(), batch_size=4, max_length=96)
"""
RUN = """
if __name__ == "__main__":
    from flwr.simulation import run_simulation
    run_simulation(server_app, client_app, num_supernodes=2,
                   backend_config={"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 2}})
"""


@pytest.mark.slow
def test_own_app_runs(tmp_path: Path) -> None:
    (tmp_path / "my_data.py").write_text(DATA)
    (tmp_path / "app.py").write_text(fenced("code: own app") + RUN)
    out = subprocess.run(
        [sys.executable, "app.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert out.returncode == 0, out.stderr[-3000:]
    scores = [float(x) for x in re.findall(r"central perplexity ([\d.]+)", out.stderr + out.stdout)]
    assert len(scores) == 3
    assert scores[-1] < 0.75 * scores[0]
