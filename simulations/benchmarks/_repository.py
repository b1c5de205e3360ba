"""Lets a benchmark use `tests/helpers`: a script's own folder is on the path, the checkout that it is in is not."""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))
