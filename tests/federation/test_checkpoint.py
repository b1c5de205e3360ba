"""Checkpoints: what is read back is what was saved, and nothing else is ever read."""

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hsplit_flwr.common.provenance import versions
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.federation import checkpoint
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles

SETTINGS: dict[str, Any] = {"rounds": 3, "training": {"seed": 0, "learning_rate": 0.1}, "plans": {"cuts": [1, 2]}}
FILES = [checkpoint.ABOUT, checkpoint.VALUES, checkpoint.TENSORS]
SHARED = torch.randn(6, 4)


def state() -> dict[str, Any]:
    return {
        "zebra": {"b": torch.randn(3, 2), "a": torch.zeros(0, 5), "moments": {"step": torch.tensor(7.0)}},
        "half": torch.randn(2).bfloat16(),
        "twice": [SHARED, SHARED],
        "part": SHARED[:2],
        "turned": SHARED.T,
        "number": 0.1 + 0.2,
        "text": "$tensor",
        "none": None,
        "records": [{"loss": "nan", "failures": ["client 1: \u00e9 \u2028"], "exact": True}],
        "empty": {},
    }


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)  # sums are taken in this order
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def save(folder: Path, round_number: int = 1, keep: int = 2, content: dict[str, Any] | None = None) -> Path:
    return checkpoint.save(folder, round_number, SETTINGS, state() if content is None else content, keep)


def rounds(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / checkpoint.CHECKPOINTS).iterdir())


# --- what is saved ---


def test_a_state_comes_back_bit_by_bit_and_in_its_order(tmp_path: Path) -> None:
    saved = state()
    found = checkpoint.load(save(tmp_path, content=saved), SETTINGS)
    assert_same(found, saved)


def test_what_was_read_outlives_its_file(tmp_path: Path) -> None:
    saved = state()
    folder = save(tmp_path, content=saved)
    found = checkpoint.load(folder, SETTINGS)
    tensors = folder / checkpoint.TENSORS
    with tensors.open("r+b") as file:
        file.write(bytes(tensors.stat().st_size))
    shutil.rmtree(folder)
    assert_same(found, saved)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    folder = save(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    json.loads((folder / checkpoint.ABOUT).read_text())
    json.loads((folder / checkpoint.VALUES).read_text())
    assert load_file(folder / checkpoint.TENSORS)


@pytest.mark.parametrize("wrong", [{"a": {1, 2}}, {"a": b"x"}, {1: "a"}, {"$tensor": "0"}, {"a": Path("x")}])
def test_a_state_of_other_things_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Expected"):
        save(tmp_path, content=wrong)
    assert rounds(tmp_path) == []


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for number in range(1, 12):
        save(tmp_path, number, keep=3)
    assert rounds(tmp_path) == ["round-0009", "round-0010", "round-0011"]
    assert [path.name for path in checkpoint.saved(tmp_path)] == rounds(tmp_path)


def test_rounds_of_an_abandoned_line_go(tmp_path: Path) -> None:
    """Resumed from round 2 of 5: the newest checkpoint is that of the new round 3, not the old ones of 4 and 5."""
    for number in (2, 3, 4, 5):
        save(tmp_path, number, keep=9)
    newest = save(tmp_path, 3, keep=2, content={"line": "new"})
    assert rounds(tmp_path) == ["round-0002", "round-0003"]
    assert checkpoint.load(newest, SETTINGS) == {"line": "new"}
    assert checkpoint.find(str(tmp_path), tmp_path) == newest


def test_what_a_killed_process_left_is_no_checkpoint_and_goes(tmp_path: Path) -> None:
    save(tmp_path, 1)
    half = tmp_path / checkpoint.CHECKPOINTS / ".round-0002.unfinished"
    half.mkdir()
    (half / checkpoint.ABOUT).write_text("{")
    assert [path.name for path in checkpoint.saved(tmp_path)] == ["round-0001"]
    save(tmp_path, 2)
    assert rounds(tmp_path) == ["round-0001", "round-0002"]


# --- what cannot be saved ---


@contextmanager
def full_disk(nbytes: int) -> Iterator[None]:
    """No file of this process may grow beyond `nbytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("nbytes", [10, 3000])  # the first file does not fit; the tensors do not
def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path: Path, nbytes: int) -> None:
    save(tmp_path, 1)
    with full_disk(nbytes), pytest.raises(OSError, match=r"File too large|IO"):
        save(tmp_path, 2, content={"large": torch.randn(5000), "text": "x" * 1000})
    assert rounds(tmp_path) == ["round-0001"]
    checkpoint.load(checkpoint.find(str(tmp_path), tmp_path), SETTINGS)


def test_a_folder_that_cannot_be_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / checkpoint.CHECKPOINTS).write_text("")
    with pytest.raises(OSError, match=checkpoint.CHECKPOINTS):
        save(tmp_path)


# --- damage ---


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_the_last(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def foreign(path: Path) -> None:
    if path.name == checkpoint.TENSORS:
        save_file({"weight": torch.zeros(2)}, path)
    else:
        path.write_text(json.dumps({"model": "another program's"}))


def a_list(path: Path) -> None:
    path.write_text("[1, 2]")


def unlink(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = [truncate, empty, flip, flip_the_last, foreign, a_list, unlink, a_folder]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_with_the_file_and_what_to_do(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    damage(newest / name)
    with pytest.raises(ConfigError) as refused:
        checkpoint.load(newest, SETTINGS)
    message = str(refused.value)
    assert message.startswith("Expected ")
    assert "found" in message
    assert str(newest) in message
    assert name in message
    assert f"Resume from another checkpoint: {older}" in message


def test_without_another_checkpoint_the_run_begins_anew(tmp_path: Path) -> None:
    newest = save(tmp_path)
    truncate(newest / checkpoint.TENSORS)
    with pytest.raises(ConfigError, match=r'Expected the [\d,]+ bytes that were saved .*Begin the run anew: resume=""'):
        checkpoint.load(newest, SETTINGS)


def test_a_checkpoint_under_another_rounds_name_is_refused(tmp_path: Path) -> None:
    renamed = save(tmp_path, 2).rename(tmp_path / checkpoint.CHECKPOINTS / "round-0007")
    with pytest.raises(ConfigError, match=r"Expected the checkpoint of round 7 .*found that of round 2"):
        checkpoint.load(renamed, SETTINGS)


# --- of another run ---


def test_other_settings_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path)
    other = {"rounds": 5, "training": {"seed": 1}, "plans": {"cuts": (1, 2)}, "dirichlet-alpha": 0.3}
    with pytest.raises(ConfigError) as refused:
        checkpoint.load(folder, other)
    message = str(refused.value)
    assert "rounds = 3 (not 5), training.seed = 0 (not 1), dirichlet-alpha = nothing (not 0.3) and 1 more" in message
    assert "Resume with the settings of the run that saved it." in message


def test_another_version_of_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as then:
        then.setattr(checkpoint, "versions", lambda: {"hsplit_flwr": "9.9"})
        folder = save(tmp_path)
    with pytest.raises(ConfigError, match=r"Expected a checkpoint of hsplit_flwr \S+, found one of 9\.9 in"):
        checkpoint.load(folder, SETTINGS)


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = checkpoint.FORMAT
    with monkeypatch.context() as then:
        then.setattr(checkpoint, "FORMAT", ours + 1)
        folder = save(tmp_path)
    with pytest.raises(ConfigError, match=rf"Expected a checkpoint of format {ours} in .*found {ours + 1}"):
        checkpoint.load(folder, SETTINGS)


def test_other_versions_of_other_packages_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as then:
        then.setattr(checkpoint, "versions", lambda: {**versions(), "torch": "1.0"})
        folder = save(tmp_path)
    checkpoint.load(folder, SETTINGS)
    assert "torch 1.0 -> " in caplog.text


def test_a_base_model_of_the_same_form_with_other_weights_is_another_one(tmp_path: Path) -> None:
    """It would have trained on: the delta fits, and every number would be wrong."""
    tuned = tmp_path / "tuned"
    shutil.copytree(tiny_checkpoint(), tuned)
    weights = load_file(tuned / "model.safetensors")
    name = next(name for name in weights if name.endswith("c_attn.weight"))
    weights[name] = weights[name] * 1.001
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    model = GlobalModel(ModelFiles.resolve(str(tiny_checkpoint())))
    identity = model.identity
    other = GlobalModel(ModelFiles.resolve(str(tuned))).identity
    assert {key for key in identity if identity[key] != other[key]} == {"weights"}
    next(iter(model.segment.parameters())).data.zero_()  # training changes the weights, not what they began as
    assert GlobalModel(ModelFiles.resolve(str(tiny_checkpoint()))).identity == model.identity == identity


# --- which one ---


def touch(folder: Path, seconds: int) -> None:
    os.utime(folder / checkpoint.ABOUT, (seconds, seconds))


def test_latest_is_the_run_that_saved_last(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for folder, number, seconds in (("out", 4, 100), ("out-2", 1, 300), ("out-2", 2, 400), ("out-10", 7, 200)):
        touch(save(tmp_path / folder, number), seconds)
    touch(save(tmp_path / "out-other", 9), 900)
    (tmp_path / "out-3").mkdir()
    assert checkpoint.find("latest", out) == tmp_path / "out-2" / "checkpoints" / "round-0002"
    touch(tmp_path / "out" / "checkpoints" / "round-0004", 500)
    assert checkpoint.find("latest", out) == tmp_path / "out" / "checkpoints" / "round-0004"


def test_a_run_or_one_of_its_checkpoints_can_be_named(tmp_path: Path) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert checkpoint.find(str(tmp_path), tmp_path / "elsewhere") == second
    assert checkpoint.find(str(first), tmp_path / "elsewhere") == first
    assert checkpoint.run_folder(first) == tmp_path


@pytest.mark.parametrize("resume", ["latest", "no-such-folder", "."])
def test_no_run_to_resume(tmp_path: Path, resume: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"Expected .* found none"):
        checkpoint.find(resume, tmp_path / "out")
