"""Apps as they are published: what ``hsplit-flwr new`` writes, and bundles in Flower's format 1 of all apps."""

import os
import shutil
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from flwr.cli.config_utils import load_and_validate

from hsplit_flwr.cli import main
from hsplit_flwr.common.toml_file import read_toml
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.flower.finetune.new_app import KEYS, app_files, write_app
from simulations import make_finetune_app
from tests.helpers.chats import PAIRS, write_lines
from tests.helpers.flower import BIN, flower_home, read_summary

ROOT = Path(__file__).resolve().parents[2]
APPS = ["quickstart", "e2e-nlg", "finetune"]


@pytest.fixture
def new_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """An app as a user writes it."""
    monkeypatch.chdir(tmp_path)
    assert main(["new", "my-app"]) == 0
    assert "flwr run my-app --stream" in capsys.readouterr().out
    return tmp_path / "my-app"


def app_of(name: str, new_app: Path) -> Path:
    return new_app if name == "my-app" else ROOT / "simulations" / name


def test_a_new_app_has_every_key_and_its_own_name(new_app: Path) -> None:
    project, warnings = load_and_validate(new_app / "pyproject.toml", check_module=False)
    assert warnings == []
    keys = {key: value for path in KEYS for key, value in read_toml(path, "keys").items()}
    assert project["tool"]["flwr"]["app"]["config"] == {**keys, "output-dir": "results/my-app"}
    assert (project["project"]["name"], sorted(path.name for path in (new_app / "my_app").iterdir())) == (
        "my-app",
        ["__init__.py", "client_app.py", "server_app.py"],
    )
    texts = [path.read_text() for path in new_app.rglob("*") if path.is_file()]
    assert not [text for text in texts if "$" in text]


def test_simulations_finetune_is_a_new_app() -> None:
    """One source: what people run from the repository is what the command writes."""
    files = app_files(make_finetune_app.NAME, make_finetune_app.APP)
    found = {file: (make_finetune_app.FOLDER / file).read_text(encoding="utf-8") for file in files}
    assert found == files, "run python -m simulations.make_finetune_app"


@pytest.mark.parametrize("name", [*APPS, "my-app"])
def test_an_app_is_a_bundle_of_format_1(name: str, new_app: Path, tmp_path: Path) -> None:
    command = [str(BIN / "flwr"), "build", "--app", str(app_of(name, new_app))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missing" not in done.stdout, "recommended properties are missing"
    (bundle,) = tmp_path.glob("hsplit-flwr.*.fab")
    with zipfile.ZipFile(BytesIO(bundle.read_bytes())) as fab:
        names = fab.namelist()
        content = fab.read("pyproject.toml").decode()
    assert {"LICENSE", "pyproject.toml"} <= set(names)
    assert f"{name.replace('-', '_')}/server_app.py" in names
    assert "fab-format-version = 1" in content
    (license_file,) = [path for path in names if path == "LICENSE"]
    assert (app_of(name, new_app) / license_file).read_text() == (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("name", [*APPS, "my-app"])
def test_a_run_downloads_nothing(name: str, new_app: Path, tmp_path: Path) -> None:
    """Format 1 wants flwr among the dependencies; Flower's ``uv sync`` then fetched all that it needs, per run."""
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(app_of(name, new_app) / "pyproject.toml", project)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "uv", "sync", "--offline", "--no-cache", "--python", sys.executable),
            *("--no-install-project", "--no-install-package", "flwr", "--inexact"),
        ],
        cwd=project,
        env={**os.environ, "UV_PROJECT_ENVIRONMENT": str(tmp_path / "environment")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Resolved 1 package" in done.stderr  # the app itself


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_app", "letters, digits and hyphens"),
        ("2apps", "begins with a letter"),
        ("a" * 33, "up to 32"),
        ("datasets", "its package datasets would hide the installed one"),
        ("json", "its package json would hide"),
        ("taken", "Expected a new or empty folder for the app, found taken"),
    ],
)
def test_an_app_that_could_not_run_is_not_written(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=message):
        write_app(name)
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "mine.txt"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_new_app_runs_on_ones_own_data(new_app: Path, tmp_path: Path) -> None:
    values = {"data": write_lines(tmp_path / "my.jsonl", PAIRS * 5), "rounds": 1, "local-steps": 2}
    values |= {"model": str(ROOT / "hsplit_flwr" / "models" / "assets" / "tiny-gpt2")}
    with flower_home(tmp_path / "home") as home:
        home.run(new_app, {**values, "output-dir": str(tmp_path / "out")}, timeout_s=420)
    assert read_summary(tmp_path / "out")["status"] == "completed"
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
