"""The file tree of ARCHITECTURE.md: every file once, with a comment that people may improve.

``python -m tests.helpers.file_tree`` (`make tree`) brings it up to date: lines of files that are gone go, new files get
the first sentence of their docstring, all other lines stay as they are.
"""

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "ARCHITECTURE.md"
BLOCK = re.compile(r"(?<=<!-- tree -->\n```\n).*?(?=```)", re.DOTALL)
COMMENT_COLUMN = 31
Tree = dict[str, "str | Tree"]
"""name -> comment of a file, or what is in a folder (whose name ends with a slash)"""


def files() -> list[str]:
    """The files that belong into the tree, as git knows them."""
    patterns = ["*.py", "*.toml", "*.ipynb", "Makefile"]
    listing = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    left_out = re.compile(r"(.*/)?__init__\.py|tests/apps/.*")
    return [path for path in listing.stdout.split() if not left_out.fullmatch(path) and (ROOT / path).is_file()]


def read(text: str) -> Tree:
    """The tree that `write` wrote."""
    tree: Tree = {}
    folders = [tree]
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, comment = line.strip().partition("  ")
        del folders[depth + 1 :]
        if name in folders[-1]:
            raise ValueError(f"Expected every file once in its folder, found {name} twice.")
        if name.endswith("/"):
            inside: Tree = {}
            folders[-1][name] = inside
            folders.append(inside)
        else:
            folders[-1][name] = comment.strip()
    return tree


def updated(tree: Tree, paths: Iterable[str], folder: str = "") -> Tree:
    """`tree` with exactly `paths` (relative to `folder`); lines of new files come last."""
    by_name: dict[str, list[str]] = {}
    for path in paths:
        first, slash, rest = path.partition("/")
        by_name.setdefault(first + slash, []).append(rest)
    result: Tree = {}
    for name in [*(name for name in tree if name in by_name), *(name for name in by_name if name not in tree)]:
        known = tree.get(name, {} if name.endswith("/") else "")
        if isinstance(known, dict):
            result[name] = updated(known, by_name[name], folder + name)
        else:
            result[name] = known or first_sentence(ROOT / folder / name)
    return result


def write(tree: Tree, depth: int = 0) -> Iterator[str]:
    """The lines of `tree`: of a folder first its files, then its folders."""
    for name, content in sorted(tree.items(), key=lambda item: item[0].endswith("/")):
        indented = "  " * depth + name
        if isinstance(content, dict):
            yield indented
            yield from write(content, depth + 1)
        else:
            yield f"{indented:{COMMENT_COLUMN - 2}}  {content}"


def first_sentence(path: Path) -> str:
    """What a file says about itself: its docstring or first comment, up to the first full stop or colon."""
    text = path.read_text(encoding="utf-8")
    without_marks = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
    about = ast.get_docstring(ast.parse(text)) if path.suffix == ".py" else without_marks
    sentence = re.split(r"[.:]\s|\.$|\n\n", about or "", maxsplit=1)[0]
    return " ".join(sentence.split())


def main() -> None:
    """Bring ARCHITECTURE.md up to date."""
    text = DOCUMENT.read_text(encoding="utf-8")
    tree = updated(read(BLOCK.findall(text)[0]), files())
    DOCUMENT.write_text(BLOCK.sub(lambda _: "\n".join(write(tree)) + "\n", text), encoding="utf-8")


if __name__ == "__main__":
    main()
