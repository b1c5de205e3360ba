"""docs/models.md, from the figures of models.py."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from hsplit_flwr.common.tables import format_table

COLUMNS = ("cut", "gradients", "folder", "plan", "export")
MARKS = {"works": "yes", "refused": "refused", "differs": "DIFFERS", "raw error": "ERROR"}
_PREFACE = """# Models

Which architectures can be split: the decoders of transformers {transformers}, each tried on a tiny model with random
weights against transformers and PEFT {peft} in one piece. Written by
`python simulations/benchmarks/models.py --json simulations/evidence/models.json --table docs/models.md`
at {commits}; `simulations/evidence/models.json` has every figure.

**Of {total} model types {works} work in every column, {refused} are refused before a run, {partly} in one column.**
{silent} compute wrong numbers without a word, {raw} end in anything but a refusal that names the reason.
{without} of the refused ones transformers itself does not run on tokens alone either{not_run}.

* *cut*: logits and losses of head and tail equal the whole model's at every cut; rows full, padded right, padded left
  (1e-5 of the largest)
* *gradients*: of all adapters at every cut, while importance is measured, equal PEFT's (1e-4 of each one's largest)
* *folder*: head and tail each read their own tensors from a folder; fused experts are put together from single ones
* *plan*: `hsplit-flwr plan` knows the costs, and plans for the layers that a run adapts
* *export*: merged model and adapter, read by transformers and PEFT, give the logits of PEFT in one piece (1e-4)

Adapters go on the linear layers of the blocks that a model calls with every position, and that PEFT can load again.
Fused experts, routers, gates of width 1 and layers whose weights are used without a call stay frozen. A model with
parts for images or sound is trained on text; those parts stay as they are, with the tail. BERT-like models are tried
with `is_decoder=True`. Where *plan* alone is refused, configure cuts and ranks.

"""
_LARGEST = "largest difference"


def document(figures: Mapping[str, Any]) -> str:
    """The whole document."""
    rows = figures["rows"]
    preface = _PREFACE.format(
        transformers=figures["versions"]["transformers"],
        peft=figures["versions"]["peft"],
        commits=_commits(figures),
        works=figures["works"],
        total=len(rows),
        refused=figures["refused"],
        partly=figures["partly_refused"],
        silent=figures["silent_differences"],
        raw=figures["raw_errors"],
        without=sum(bool(row["not_run"]) for row in rows if row["cells"]),
        not_run=f"; {figures['not_run']} more were not run for that, and say nothing" if figures["not_run"] else "",
    )
    tried = [row for row in rows if row["cells"]]
    whole = [row for row in tried if not _same_refusal(row)]
    header = ["model type", *COLUMNS, _LARGEST]
    table = format_table(header, [_cells(row) for row in whole], markdown=True, left_aligned=1 + len(COLUMNS))
    parts = {"Tried": table, "Refused, and why": _reasons(tried), "Not run": _not_run(rows)}
    return preface + "\n".join(f"## {title}\n\n{part}\n" for title, part in parts.items() if part)


def _commits(figures: Mapping[str, Any]) -> str:
    """The commit that the rows were made at, or each one with its rows."""
    made = Counter(str(row.get("commit", figures["commit"]))[:7] for row in figures["rows"])
    if len(made) == 1:
        return f"commit {next(iter(made))}"
    return " and ".join(f"commit {commit} ({number} rows)" for commit, number in made.items())


def _same_refusal(row: Mapping[str, Any]) -> bool:
    return all(cell["status"] == "refused" for cell in row["cells"].values())


def _cells(row: Mapping[str, Any]) -> list[str]:
    found = [cell["difference"] for cell in row["cells"].values() if "difference" in cell]
    marks = [MARKS[row["cells"][name]["status"]] for name in COLUMNS]
    return [f"`{row['model_type']}`", *marks, f"{max(found):.0e}" if found else "-"]


def _reasons(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each kind of refusal, with the model types it is for."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for name, cell in row["cells"].items():
            if cell["status"] != "works":
                where = "" if _same_refusal(row) else f" ({name})"
                kinds[_kind(cell["detail"], row)].append(f"`{row['model_type']}`{where}")
                break
    return "\n".join(f"* {reason}: {', '.join(names)}" for reason, names in sorted(kinds.items()))


def _kind(detail: str, row: Mapping[str, Any]) -> str:
    """What was found, without what is peculiar to one model."""
    found = detail.partition(", found ")[2] or detail
    found = found.replace(f"'{row['model_type']}'", "...").replace(row.get("class", "..."), "...")
    return found.partition(". ")[0].replace("|", "\\|").replace("<", "&lt;")


def _not_run(rows: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"* `{row['model_type']}`: {row['not_run']}" for row in rows if not row["cells"])
