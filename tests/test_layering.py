"""The house's rules: who may import whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hsplit_flwr

PACKAGE = Path(__file__).resolve().parents[1] / "hsplit_flwr"
FLOORS = (
    {"errors"},
    {"common"},
    {"data"},
    {"models"},
    {"lora"},
    {"training"},
    {"exchange"},
    {"planning"},
    {"reports"},
    {"federation"},
    {"flower", "experiments"},
    {"cli", "__init__"},
)
"""from the ground up; a room imports itself and what lies below it"""
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Every module that the file imports, wherever in it, those for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def room(module: str) -> str:
    """``hsplit_flwr.lora.spec`` -> ``lora``."""
    return module.split(".")[1]


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    own = Path(name_of(path)).parts[0].removesuffix(".py")
    above = {
        module
        for module in imported(path)
        if module.startswith("hsplit_flwr.") and room(module) in floor and room(module) != own
        if floor[room(module)] >= floor[own]
    }
    assert not above


@pytest.mark.parametrize(("package", "home"), [("grpc", "exchange/grpc_transport.py"), ("flwr", "flower/")])
def test_one_place_knows_the_package(package: str, home: str) -> None:
    users = {name_of(path) for path in FILES if any(m.split(".")[0] == package for m in imported(path))}
    assert users
    assert {user for user in users if not user.startswith(home)} == set()


@pytest.mark.parametrize("face", ["client", "message_client"])
def test_a_client_process_loads_nothing_of_the_server(face: str) -> None:
    code = f"import sys, hsplit_flwr.flower.{face}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    loaded = set(done.stdout.split())
    ours = {module for module in loaded if module.startswith("hsplit_flwr.")}
    servers = ("planning.solver", "planning.planner", "planning.plans", "reports.health", "federation.round_server")
    assert not {module for module in ours if module.startswith(tuple(f"hsplit_flwr.{name}" for name in servers))}
    assert not loaded & {"scipy", "matplotlib"}
    assert len(ours) <= 52


def test_every_public_name_is_there() -> None:
    """They are imported on first use: a moved class was missed by nobody but its users."""
    assert {name: getattr(hsplit_flwr, name).__name__ for name in hsplit_flwr.__all__ if name != "DEVICES"} == {
        name: name for name in hsplit_flwr.__all__ if name != "DEVICES"
    }
    assert hsplit_flwr.DEVICES
