"""Fixtures of the exchange: certificates."""

import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bytes]:
    """A self-signed certificate for 127.0.0.1, its key, and the certificate of somebody else."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("tail", "other"):
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "2", "-subj", f"/CN={name}"]
        command += ["-addext", "subjectAltName=IP:127.0.0.1"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=10)
        except FileNotFoundError:
            pytest.skip("no openssl to make a certificate with")
    return folder / "tail.pem", folder / "tail.key", (folder / "other.pem").read_bytes()
