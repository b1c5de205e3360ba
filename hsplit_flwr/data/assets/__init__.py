"""The chats that need no download: a made-up library's desk, as ``python -m simulations.make_chat_set`` makes them."""

from importlib.resources import files
from pathlib import Path

DESK = Path(str(files(__name__) / "desk.jsonl"))
"""240 chats to train on"""
DESK_HELD_OUT = Path(str(files(__name__) / "desk_held_out.jsonl"))
"""the same facts, asked for in words that no training chat has"""
