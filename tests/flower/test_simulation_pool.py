"""How many clients run at a time: as many as Flower's own pool has, by cores and by shares of a GPU."""

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(180)

SHARES = [(1, 0.0), (1, 0.2), (1, 0.1), (2, 0.3), (1, 1.0), (3, 0.7), (1, 0.34)]
"""cores and GPUs of a client"""
COUNT = """
import json, sys, ray
from flwr.simulation.ray_transport.ray_actor import pool_size_from_resources
from hsplit_flwr.flower.client_node import _simulation_concurrency

ray.init(num_cpus=12, num_gpus=1, include_dashboard=False, log_to_driver=False)  # Ray takes the GPU's word for it
found = []
for cores, gpus in json.loads(sys.argv[1]):
    ours = ray.remote(num_cpus=cores, num_gpus=gpus)(_simulation_concurrency)
    found.append((ray.get(ours.remote()), pool_size_from_resources({"num_cpus": cores, "num_gpus": gpus})))
print(json.dumps(found))
"""


def test_clients_at_a_time_are_flowers_pool() -> None:
    """Five clients with a fifth of a GPU each were taken for four: the fifth trained alone, after the others."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT, json.dumps(SHARES)], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    assert [ours for ours, _ in found] == [flowers for _, flowers in found] == [12, 5, 10, 3, 1, 1, 2]
