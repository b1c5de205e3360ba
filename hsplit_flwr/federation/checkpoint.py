"""Checkpoints of a run: written beside and renamed, the last few kept, checked before anything is read from them.

::

    RUN/checkpoints/round-0003/
        checkpoint.json       whose state this is: format, round, settings, versions; SHA-256 of itself and the others
        state.json            the state, but for its tensors
        state.safetensors     the tensors (`common/state_files.py`)

Nothing is ever pickled. What the state is made of, its owners know (`common/state.py`).
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hsplit_flwr.common.provenance import versions
from hsplit_flwr.common.state import State
from hsplit_flwr.common.state_files import save_tensors, with_tensors, without_tensors
from hsplit_flwr.common.whole_folder import discard, remove_leftovers, whole_folder
from hsplit_flwr.errors import ConfigError

FORMAT = 4
"""of the files; another one is refused"""
CHECKPOINTS = "checkpoints"
ABOUT, VALUES, TENSORS = "checkpoint.json", "state.json", "state.safetensors"
LATEST = "latest"
_PACKAGE = "hsplit_flwr"
_MOST_DIFFERENCES = 3
_log = logging.getLogger("hsplit_flwr")


def save(folder: Path, round_number: int, settings: Mapping[str, Any], state: State, keep: int) -> Path:
    """Write the checkpoint of round `round_number`; returns its folder, which is there whole or not at all.

    Args:
        folder: the run's.
        round_number: the round that ended last.
        settings: what a run that resumes it must have alike, as values that JSON knows.
        state: of the run.
        keep: how many checkpoints stay, this one included; those of later rounds, which a run that was resumed from an
            earlier one left behind, do not.

    Raises:
        OSError: a full disk or an unwritable folder; earlier checkpoints stay as they are.
        ConfigError: a state that is not made as `State` says.
    """
    target = folder / CHECKPOINTS / f"round-{round_number:04d}"
    with whole_folder(target) as unfinished:
        tensors: dict[str, Tensor] = {}
        values = without_tensors(state, tensors)
        (unfinished / VALUES).write_text(json.dumps(values, allow_nan=False), encoding="utf-8")
        save_tensors(tensors, unfinished / TENSORS)
        about = {
            "format": FORMAT,
            "round": round_number,
            "settings": settings,
            "versions": versions(),
            "files": {name: _measure(unfinished / name) for name in (VALUES, TENSORS)},
        }
        about["sha256"] = _digest(about)
        (unfinished / ABOUT).write_text(json.dumps(about, indent=1, allow_nan=False), encoding="utf-8")
    _prune(folder, round_number, keep)
    return target


def load(checkpoint: Path, settings: Mapping[str, Any]) -> State:
    """The state that `save` wrote to `checkpoint`, if it is whole and of a run with these `settings`.

    Raises:
        ConfigError: a file is missing or damaged, or the checkpoint is of another version, model or other settings.
    """
    about = _read_about(checkpoint)
    _check_settings(checkpoint, settings, about["settings"])
    _check_versions(checkpoint, about["versions"])
    for name in (VALUES, TENSORS):
        _check_file(checkpoint / name, about["files"][name])
    try:
        tensors = {
            key: tensor.clone() for key, tensor in load_file(checkpoint / TENSORS).items()
        }  # not the mapped file
        state: State = with_tensors(_read_json(checkpoint / VALUES), tensors)
    except (SafetensorError, OSError, KeyError) as error:
        raise _refusal(checkpoint / TENSORS, "the tensors of a checkpoint", repr(error)) from error
    return state


def find(resume: str, output_dir: Path) -> Path:
    """The folder of the checkpoint that `resume` means.

    Args:
        resume: ``latest``: the newest one of the run that wrote a checkpoint last, among OUTPUT_DIR, OUTPUT_DIR-2 and
            so on; or the folder of a run, or that of one of its checkpoints.
        output_dir: where runs write.

    Raises:
        ConfigError: there is none.
    """
    if resume == LATEST:
        runs = [output_dir, *_numbered(output_dir)]
        newest = [found[-1] for run in runs if (found := saved(run))]
        if not newest:
            raise ConfigError(
                f"Expected a run with checkpoints in {output_dir} or beside it ({output_dir.name}-2, ...) to resume, "
                'found none. Name its folder (resume="FOLDER"), or begin a run: resume="".'
            )
        return max(newest, key=lambda checkpoint: (checkpoint / ABOUT).stat().st_mtime_ns)
    folder = Path(resume).expanduser().resolve()
    if folder.parent.name == CHECKPOINTS and (folder / ABOUT).is_file():
        return folder
    if not (found := saved(folder)):
        raise ConfigError(
            f"Expected resume as {LATEST!r}, the folder of a run with checkpoints or one of its checkpoints, found "
            f"none in {folder}. Give the output folder of the run."
        )
    return found[-1]


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that wrote `checkpoint`."""
    return checkpoint.parent.parent


def saved(folder: Path) -> list[Path]:
    """The checkpoints of the run in `folder`, by their rounds."""
    found = (folder / CHECKPOINTS).glob("round-*")
    return sorted((path for path in found if (path / ABOUT).is_file()), key=_round_of)


def rounds_of(folder: Path) -> list[int]:
    """The rounds after which the run in `folder` can be resumed."""
    return [_round_of(path) for path in saved(folder)]


# --- writing ---


def _measure(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _prune(folder: Path, round_number: int, keep: int) -> None:
    kept = [path for path in saved(folder) if _round_of(path) <= round_number][-keep:]
    for path in saved(folder):
        if path not in kept:
            discard(path)
    remove_leftovers(folder / CHECKPOINTS, "round-*")


# --- reading ---


def _read_about(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, in this version's format."""
    path = checkpoint / ABOUT
    about = _read_json(path)
    found = about.get("format") if isinstance(about, dict) else None
    if found != FORMAT:
        raise _refusal(path, f"a checkpoint of format {FORMAT}", f"{found!r:.80}")
    content: dict[str, Any] = {key: value for key, value in about.items() if key != "sha256"}
    if about.get("sha256") != _digest(content):
        raise _refusal(path, "what was saved", "other content")
    if content["round"] != _round_of(checkpoint):
        raise _refusal(path, f"the checkpoint of round {_round_of(checkpoint)}", f"that of round {content['round']}")
    return content


def _check_settings(checkpoint: Path, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    ours, theirs = dict(_leaves(json.loads(json.dumps(expected)))), dict(_leaves(found))
    absent = "nothing"
    differing = [
        f"{name} = {theirs.get(name, absent)} (not {ours.get(name, absent)})"
        for name in [*ours, *(name for name in theirs if name not in ours)]
        if ours.get(name, absent) != theirs.get(name, absent)
    ]
    if differing:
        more = f" and {len(differing) - _MOST_DIFFERENCES} more" if len(differing) > _MOST_DIFFERENCES else ""
        raise ConfigError(
            f"Expected a checkpoint of a run like this one, found in {checkpoint}: "
            f"{', '.join(differing[:_MOST_DIFFERENCES])}{more}. Resume with the settings of the run that saved it."
        )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name -> value, of all that is not a mapping."""
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, item in value.items():
        yield from _leaves(item, f"{name}.{key}" if name else key)


def _check_versions(checkpoint: Path, found: Mapping[str, Any]) -> None:
    """This package must be of the same version; others may differ, and the log says so."""
    ours = versions()
    if found.get(_PACKAGE) != ours[_PACKAGE]:
        raise ConfigError(
            f"Expected a checkpoint of {_PACKAGE} {ours[_PACKAGE]}, found one of {found.get(_PACKAGE)} in "
            f"{checkpoint}. Resume with the version that saved it."
        )
    if others := [f"{name} {found.get(name)} -> {ours[name]}" for name in ours if found.get(name) != ours[name]]:
        _log.warning("resumed with other versions (%s): results may differ in their last bits", ", ".join(others))


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    try:
        found = _measure(path)
    except OSError as error:
        raise _refusal(path, "a file of a checkpoint", str(error)) from error
    if found != expected:
        same = found["bytes"] == expected["bytes"]
        what = "other content" if same else f"{found['bytes']:,} bytes"
        raise _refusal(path, f"the {expected['bytes']:,} bytes that were saved", what)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(path, "JSON", f"{error}") from error


def _refusal(path: Path, expected: str, found: str) -> ConfigError:
    others = [str(other) for other in saved(run_folder(path.parent)) if other != path.parent]
    remedy = f"Resume from another checkpoint: {', '.join(others)}." if others else 'Begin the run anew: resume="".'
    return ConfigError(f"Expected {expected} in {path}, found {found}. {remedy}")


# --- names ---


def _round_of(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("round-")
    return int(number) if number.isdecimal() else -1


def _numbered(output_dir: Path) -> Sequence[Path]:
    """OUTPUT_DIR-2, OUTPUT_DIR-3, ..., as many as there are."""
    pattern = re.compile(re.escape(output_dir.name) + r"-\d+")
    return [path for path in output_dir.parent.glob("*") if pattern.fullmatch(path.name)]
