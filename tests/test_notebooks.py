"""The notebooks run from top to bottom, and what is committed is small, executed and free of noise."""

import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
TIME_LIMIT_S = 400
"""for a notebook of about a minute, beside another worker's Ray cluster"""
MOST_BYTES = 300_000
MACHINE_PATH = re.compile(r"/(?:home|root|tmp|work|Users|usr|opt|var|private)/|[A-Za-z]:\\|site-packages")
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


class ThisInterpreter(AsyncKernelManager):
    """Starts the kernel with the interpreter of the tests, whatever ``python3`` means to the Jupyter around."""

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def read(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def output_texts(notebook: Any) -> list[str]:
    """Everything that a reader sees as text: streams, errors and the text forms of results."""
    return [text for cell in code_cells(notebook) for text in cell_texts(cell)]


def cell_texts(cell: Any) -> list[str]:
    texts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            texts.append(output.text)
        elif output.output_type == "error":
            texts.append("\n".join(output.traceback))
        else:
            texts += [text for mime, text in output.data.items() if mime.startswith("text/")]
    return texts


def execute(notebook: Any, folder: Path, time_limit_s: float = TIME_LIMIT_S) -> None:
    """Run `notebook` in `folder`; a cell that raises, or the time limit, raises here. The kernel is always ended."""
    deadline = time.monotonic() + time_limit_s
    NotebookClient(
        notebook,
        kernel_manager_class=ThisInterpreter,
        timeout_func=lambda cell: max(1, math.ceil(deadline - time.monotonic())),
        resources={"metadata": {"path": str(folder)}},
    ).execute()


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@every_notebook
def test_committed_notebook_is_small_executed_and_clean(path: Path) -> None:
    assert path.stat().st_size < MOST_BYTES
    notebook = read(path)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    texts = output_texts(notebook)
    assert texts
    assert [text for text in texts if "Traceback" in text or "Warning" in text or MACHINE_PATH.search(text)] == []


@pytest.mark.slow
@pytest.mark.timeout(TIME_LIMIT_S + 60)
@every_notebook
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # nobody's start-up files
    notebook = read(path)
    committed = [bool(cell_texts(cell)) for cell in code_cells(notebook)]
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    notebook.cells.append(nbformat.v4.new_code_cell("import sys; print(sys.executable)"))  # type: ignore[no-untyped-call]
    execute(notebook, path.parent)
    *texts, executable = output_texts(notebook)
    assert executable.strip() == sys.executable
    assert any(committed)
    assert [text for text in texts if "Traceback" in text] == []
    for cell in code_cells(notebook):  # libraries' notices: bitsandbytes has one as it is imported, where it is there
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    # By cell: how many lines of progress a run prints depends on how fast the machine is.
    assert [bool(cell_texts(cell)) for cell in code_cells(notebook)[:-1]] == committed


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_failing_cell_and_a_hanging_cell_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The net itself: without this, a notebook test that swallows errors would pass for ever."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    failing = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])  # type: ignore[no-untyped-call]
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(failing, tmp_path)
    hanging = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("while True: pass")])  # type: ignore[no-untyped-call]
    with pytest.raises(CellTimeoutError, match="while True"):
        execute(hanging, tmp_path, time_limit_s=5)
