"""Seeds that depend on what they are for and on nothing else."""

import hashlib


def tail_seed(seed: int, round_number: int) -> int:
    """Decides the tail's fresh adapters in a round of the run of `seed`."""
    return derive_seed(seed, "tail", round_number)


def head_seed(seed: int, round_number: int, client: str, common_start: bool) -> int:
    """Decides the fresh adapters of a client's head; with a common start they are those of every other head and tail.

    Stacked adapters may start anywhere, and learn more from different starts. What is averaged must start alike, or the
    average is of unrelated things.
    """
    return tail_seed(seed, round_number) if common_start else derive_seed(seed, "head", round_number, client)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any parts: equal parts, equal seed, on every machine."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
