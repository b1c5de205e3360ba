"""One end of a plain TCP transfer, in a process of its own: ``receive ADDRESS`` or ``send ADDRESS PORT BYTES``."""

import json
import socket
import sys
import time

LIMIT_S = 60.0
"""of every wait"""
CHUNK = 1 << 16


def receive(address: str) -> None:
    """Print the port, take one connection, print the bytes and how long they took from the first chunk on."""
    with socket.create_server((address, 0)) as server:
        server.settimeout(LIMIT_S)
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
    with connection:
        connection.settimeout(LIMIT_S)
        first = len(connection.recv(CHUNK))
        started = ended = time.perf_counter()
        timed = 0
        while chunk := connection.recv(CHUNK):
            timed += len(chunk)
            ended = time.perf_counter()
    print(json.dumps({"bytes": first + timed, "timed_bytes": timed, "seconds": ended - started}), flush=True)


def send(address: str, port: str, count: str) -> None:
    """Send so many zeros."""
    with socket.create_connection((address, int(port)), timeout=LIMIT_S) as connection:
        connection.sendall(bytes(int(count)))


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(*sys.argv[2:])
    else:
        send(*sys.argv[2:])
