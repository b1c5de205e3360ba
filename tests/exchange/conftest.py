"""Fixtures of the exchange: certificates."""

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

LOOPBACK = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))


@pytest.fixture(scope="session")
def certificate_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of self-signed certificates and their keys.

    ``tail`` and ``other`` are for 127.0.0.1, ``expired`` was, and ``elsewhere`` is for another host.
    """
    folder = tmp_path_factory.mktemp("tls")
    for name in ("tail", "other"):
        _write(folder, name, LOOPBACK, days=2)
    _write(folder, "expired", LOOPBACK, days=-1)
    _write(folder, "elsewhere", x509.DNSName("elsewhere.example"), days=2)
    return folder


@pytest.fixture(scope="session")
def certificates(certificate_files: Path) -> tuple[Path, Path, bytes]:
    """A self-signed certificate for 127.0.0.1, its key, and the certificate of somebody else."""
    folder = certificate_files
    return folder / "tail.pem", folder / "tail.key", (folder / "other.pem").read_bytes()


def _write(folder: Path, name: str, host: x509.GeneralName, days: int) -> None:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=3))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([host]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / f"{name}.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
