"""What is published: the sdist builds, a wheel builds from it alone, and the wheel does the main job by itself."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout"),
    pytest.mark.timeout(300),
]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
"""what pip and build do, in this environment (PEP 517)"""


def run(*arguments: str, cwd: Path, **environment: str) -> str:
    command = [sys.executable, *arguments]
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def tracked(*folders: str) -> list[str]:
    listing = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in listing.stdout.split() if (ROOT / path).is_file()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built beside the checkout, so that nothing of an older build gets in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for path in tracked("hsplit_flwr", "pyproject.toml", "README.md", "LICENSE"):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    run("-c", BUILD, "build_sdist", str(out), cwd=source)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as whoever has no checkout does."""
    folder, out = tmp_path_factory.mktemp("unpacked"), tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    run("-c", BUILD, "build_wheel", str(out), cwd=source)
    (path,) = out.iterdir()
    return path


def test_the_wheel_has_every_file_of_the_package_and_the_license(wheel: Path) -> None:
    """Templates, chats or the tiny model missing in it would be seen by users alone."""
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        license_text = content.read("hsplit_flwr-0.1.0.dist-info/licenses/LICENSE").decode()
        commands = content.read("hsplit_flwr-0.1.0.dist-info/entry_points.txt").decode()
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(tracked("hsplit_flwr"))
    assert {"hsplit_flwr/py.typed", "hsplit_flwr/models/assets/tiny-gpt2/model.safetensors"} <= set(names)
    assert license_text == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "hsplit-flwr = hsplit_flwr.cli:main" in commands


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content in a folder that comes first on the module path."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder)
    return folder


def test_the_wheel_writes_an_app_and_asks_the_embedded_model(installed: Path, tmp_path: Path) -> None:
    path = {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    found = run("-c", "import hsplit_flwr; print(hsplit_flwr.__file__)", cwd=tmp_path, **path)
    assert Path(found.strip()).is_relative_to(installed)
    run("-m", "hsplit_flwr.cli", "new", "my-app", cwd=tmp_path, **path)
    assert (tmp_path / "my-app" / "my_app" / "server_app.py").is_file()
    model = str(installed / "hsplit_flwr" / "models" / "assets" / "tiny-gpt2")
    asked = ("--model", model, "--raw", "--max-new-tokens", "4", "--prompt", "The weather in spring is")
    assert "> The weather in spring is\n" in run("-m", "hsplit_flwr.cli", "generate", *asked, cwd=tmp_path, **path)
