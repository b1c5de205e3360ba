"""What it takes to repeat a run: versions, the commit and the command."""

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft", "flwr", "hsplit_flwr")
SECRET_WORDS = {"token", "secret", "password", "key"}
GIT_SECONDS = 10


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages a result depends on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The git commit this package is checked out at, with ``+changes`` if tracked files differ from it.

    None from an installed copy or without git.

    Only a checkout that tracks this very file counts: a virtual environment may lie in another repository.
    """
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    head = _git(here.parent, "rev-parse", "HEAD")
    changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+changes" if head and changed else head


def command() -> str:
    """The command of this process as one shell line, without folders of the machine and without secrets.

    Flower hands its app processes a one-time token as an argument.
    """
    words: list[str] = []
    hide_next = False
    for word in sys.orig_argv:
        option, equals, value = word.partition("=")
        is_secret = option.startswith("-") and not SECRET_WORDS.isdisjoint(option.lower().split("-"))
        if hide_next and not word.startswith("-"):
            words.append("***")
        elif option.startswith("-") and equals:
            words.append(f"{option}={'***' if is_secret else _without_folder(value)}")
        else:
            words.append(_without_folder(word))
        hide_next = is_secret and not equals
    return shlex.join(words)


def _without_folder(word: str) -> str:
    return Path(word).name if Path(word).is_absolute() else word


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
