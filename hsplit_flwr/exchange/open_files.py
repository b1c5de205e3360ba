"""How many connections a server's process may hold: each is an open file to the system."""

import sys
from contextlib import suppress

MOST = 65_536
"""beyond it a process would spend its time on files"""


def allow_connections() -> None:
    """Let this process open as many files as it may allow itself, up to `MOST`.

    Most systems begin with a soft limit of 1024, for programs that wait by ``select``. At that limit a server takes no
    connection at all, and some thousand that say nothing would keep everybody out.
    """
    if sys.platform == "win32":
        return  # has no such limit
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # a system's own, lower limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
