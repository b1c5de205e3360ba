"""PEM files for TLS, checked before a transport uses them: what is wrong is said with the file and its key."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hsplit_flwr.errors import ConfigError

TAIL = "tail-certificate", "tail-private-key"
CLIENT = "tail-client-certificate", "tail-client-private-key"
"""keys of a certificate chain and of its private key, in the run config or a node's config"""
TAIL_ROOTS = "tail-root-certificates"
CLIENT_ROOTS = "tail-client-root-certificates"


@dataclass(frozen=True)
class ClientTls:
    """What a client needs for TLS with the tail.

    Raises:
        ConfigError: `root_certificates` are none.
    """

    root_certificates: bytes
    """of the authority behind the tail's certificate, PEM"""
    identity: tuple[bytes, bytes] | None = None
    """the client's own certificate chain and private key, PEM, for a tail that asks for them"""

    def __post_init__(self) -> None:
        if problem := _not_certificates(self.root_certificates):
            raise ConfigError(f"Expected PEM certificates of the tail's authority ({TAIL_ROOTS}), found: {problem}.")

    @classmethod
    def from_files(
        cls, root_certificates: Path | None, certificate: Path | None = None, private_key: Path | None = None
    ) -> Self | None:
        """TLS by PEM files; None if none is given.

        Raises:
            ConfigError: a certificate without `root_certificates`, or as `read_pair`.
        """
        identity = read_pair(certificate, private_key, CLIENT)
        if root_certificates:
            return cls(_read(root_certificates, TAIL_ROOTS), identity)
        if identity:
            raise ConfigError(
                f"Expected the certificates of the tail's authority ({TAIL_ROOTS}) beside {CLIENT[0]}, found none: a "
                "client shows its own certificate within TLS only. Set both."
            )
        return None


def read_pair(
    certificate: Path | None, private_key: Path | None, keys: tuple[str, str] = TAIL
) -> tuple[bytes, bytes] | None:
    """The bytes of a certificate chain and of its private key; None if neither is given.

    Args:
        certificate: PEM file.
        private_key: PEM file, not encrypted.
        keys: what people typed for the two.

    Raises:
        ConfigError: one alone, a file that cannot be read, or files that do not hold what they should.
    """
    if certificate is None and private_key is None:
        return None
    if certificate is None or private_key is None:
        raise ConfigError(
            f"Expected both a certificate and a private key for TLS (run config: {', '.join(keys)}), found one. "
            "Give both or none."
        )
    chain = read_certificates(certificate, keys[0])
    key = _read(private_key, keys[1])
    try:  # an empty password, so that nobody is asked for one
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, private_key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"Expected the private key of {certificate.name}, in PEM and not encrypted, in {private_key} (run config: "
            f"{keys[1]}), found: {error}."
        ) from error
    return chain, key


def read_certificates(path: Path, key: str) -> bytes:
    """The bytes of the PEM file that was typed for `key`.

    Raises:
        ConfigError: it cannot be read, or holds no certificates.
    """
    pem = _read(path, key)
    if problem := _not_certificates(pem):
        raise ConfigError(f"Expected a PEM certificate chain in {path} (run config: {key}), found: {problem}.")
    return pem


def _not_certificates(pem: bytes) -> str | None:
    """Why `pem` holds no certificates; None: it does."""
    text = pem.decode("ascii", "ignore")  # what is not ASCII is a comment, or nothing of use
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError) as error:
        return str(error)
    return None


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"Expected readable TLS files, found for {path} (run config: {key}): {error.strerror}."
        ) from error
