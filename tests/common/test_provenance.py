import os
import subprocess
import sys
from pathlib import Path

import pytest

from hsplit_flwr.common import provenance


def test_versions_name_what_a_result_depends_on() -> None:
    found = provenance.versions()
    assert set(found) == {"python", "torch", "transformers", "peft", "flwr", "hsplit_flwr"}
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    import torch

    assert found["torch"] == torch.__version__


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package-here",))
    assert provenance.versions()["no-such-package-here"] is None


def git(folder: Path, *arguments: str) -> str:
    identity = {f"GIT_{role}_{key}": "test@test" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        env={**os.environ, **identity, "GIT_CONFIG_GLOBAL": os.devnull},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


def test_commit_is_that_of_the_checkout_which_tracks_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "venv" / "provenance.py"
    module.parent.mkdir()
    module.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(module))
    assert provenance.commit() is None  # no repository
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "another project")
    assert provenance.commit() is None  # an installed copy inside another project's repository
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "ours")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert provenance.commit() == head
    module.write_text("changed")
    assert provenance.commit() == f"{head}+changes"
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() is None  # no git


def test_command_has_no_folders_of_the_machine_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/opt/env/bin/python", "/opt/env/bin/flwr-serverapp", "--token", "s3cret", "--insecure"]
    words += ["--api-key=s3cret", "--max-tokens", "64", "--out=/home/me/results", "--note", "two words"]
    monkeypatch.setattr(sys, "orig_argv", words)
    expected = "python flwr-serverapp --token '***' --insecure '--api-key=***' --max-tokens 64 --out=results"
    assert provenance.command() == f"{expected} --note 'two words'"
