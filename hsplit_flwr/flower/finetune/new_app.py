"""A new Flower app for people's own data, from the templates beside this file.

Its pyproject lists every run-config key there is, since Flower refuses those that an app does not list: `KEYS`, which
the library's own table is, with what they mean and what a new app begins with.
"""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from string import Template

from hsplit_flwr.errors import ConfigError

FINETUNE = Path(__file__).parent
TEMPLATE = FINETUNE / "template"
KEYS = (FINETUNE / "run_config.toml", FINETUNE.parent / "run_config.toml")
"""what `finetune.data` and `finetune.server` read of a run config, and what the library reads"""
NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9-]{0,31}")
"""as Flower has it for apps"""


def write_app(folder: str) -> list[Path]:
    """Write an app into `folder`, which is new or empty, and named as the app; returns the files.

    Raises:
        ConfigError: a name that Flower or Python would not take, or a folder that cannot be written to.
    """
    path = Path(folder).expanduser()
    name = path.absolute().name
    _check_name(name)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"Expected a new or empty folder for the app, found {path}. Choose another name.")
    shown = name if path.is_absolute() else path.as_posix()
    try:
        return [_write(path / file, text) for file, text in app_files(name, shown).items()]
    except OSError as error:
        raise ConfigError(f"Expected a folder to write the app into at {path}, found: {error}.") from error


def app_files(name: str, app: str) -> Mapping[PurePosixPath, str]:
    """The text of every file of an app, by its path in the app's folder.

    Args:
        name: the app's; its package has underscores for hyphens.
        app: what people run, such as ``simulations/finetune``.
    """
    words = {"name": name, "app": app, "package": package_of(name)}
    files: dict[PurePosixPath, str] = {}
    for source in sorted(path for path in TEMPLATE.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        file = PurePosixPath(source.relative_to(TEMPLATE).as_posix().replace("package/", f"{words['package']}/"))
        text = source.read_text(encoding="utf-8")
        files[file] = text if source.name == "LICENSE" else Template(text).substitute(words)
    keys = "".join(path.read_text(encoding="utf-8") for path in KEYS)
    files[PurePosixPath("pyproject.toml")] += keys.replace('"results"', f'"results/{name}"')
    return files


def package_of(name: str) -> str:
    """The Python package of the app `name`."""
    return name.replace("-", "_")


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(
            "Expected an app's name of up to 32 letters, digits and hyphens that begins with a letter (as Flower wants "
            f"it), found {name!r}. Example: my-app."
        )
    package = package_of(name)
    found = importlib.util.find_spec(package)
    if found is not None and found.origin is not None:  # a folder of that name has no origin
        raise ConfigError(
            f"Expected a name that is no other Python package's, found {name!r}: its package {package} would hide the "
            "installed one. Choose another name."
        )


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
