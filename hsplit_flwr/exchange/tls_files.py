"""PEM files for TLS, checked before a transport uses them: what is wrong is said with the file and its key."""

import ssl
from pathlib import Path

from hsplit_flwr.errors import ConfigError


def read_pair(certificate: Path | None, private_key: Path | None) -> tuple[bytes, bytes] | None:
    """The bytes of the tail's certificate chain and private key; None if neither is given.

    Raises:
        ConfigError: one alone, a file that cannot be read, or files that do not hold what they should.
    """
    if certificate is None and private_key is None:
        return None
    if certificate is None or private_key is None:
        raise ConfigError(
            "Expected both a certificate and a private key for TLS (run config: tail-certificate, tail-private-key), "
            "found one. Give both or none."
        )
    chain = _read(certificate, "tail-certificate")
    key = _read(private_key, "tail-private-key")
    if problem := not_certificates(chain):
        raise ConfigError(
            f"Expected a PEM certificate chain in {certificate} (run config: tail-certificate), found: {problem}."
        )
    try:  # an empty password, so that nobody is asked for one
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, private_key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"Expected the private key of {certificate.name}, in PEM and not encrypted, in {private_key} (run config: "
            f"tail-private-key), found: {error}."
        ) from error
    return chain, key


def not_certificates(pem: bytes) -> str | None:
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
