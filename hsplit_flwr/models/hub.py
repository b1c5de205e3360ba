"""The folder of a model of the hub: from the local cache, and from the network only what that does not hold."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from hsplit_flwr.errors import ConfigError, HSplitError
from hsplit_flwr.models.tensor_files import stored_tensors

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def hub_folder(name: str) -> Path:
    """Where the files of the model `name` are.

    Raises:
        ConfigError: nothing is found under that name.
    """
    wanted: dict[str, Any] = {"allow_patterns": _HUB_FILES, "ignore_patterns": ["*/*"]}
    try:
        folder = Path(snapshot_download(name, local_files_only=True, **wanted))
        if _is_complete(folder):
            return folder
    except HFValidationError as error:
        raise _not_found(name) from error
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(name, **wanted))
    # The hub client raises its own, requests', httpx' and OSErrors for "not there" and "not reachable".
    except Exception as error:
        raise _not_found(name) from error


def _is_complete(folder: Path) -> bool:
    try:
        stored_tensors(folder)
    except HSplitError:
        return False
    return (folder / "config.json").is_file()


def _not_found(name: str) -> ConfigError:
    return ConfigError(
        f"Expected a local folder, a .gguf file or a model of the hub, found nothing under {name!r}. "
        "Check the path, or the name and the connection to the hub."
    )
