"""Why a client cannot connect to the tail, for people: what gRPC says, and what that means."""

import re

_CAUSES = {
    "certificate has expired": "the tail's certificate has expired (run config: tail-certificate)",
    "CERTIFICATE_VERIFY_FAILED": "no authority that this client trusts signed the tail's certificate (run config: "
    "tail-root-certificates)",
    "Hostname Verification": "the tail's certificate is for another host than that (run config: tail-address)",
    "WRONG_VERSION_NUMBER": "this client speaks TLS, and the tail does not (run config: tail-root-certificates)",
    "Connection refused": "nobody listens there",
    "resolv|lookup|DNS": "that name does not resolve",
    "Socket closed|reset": "the connection is closed at once; perhaps the tail speaks TLS (run config: "
    "tail-root-certificates), or asks for a certificate (tail-client-certificate)",
}
"""pattern of what gRPC says -> what it means"""
_FINAL = re.compile("CERTIFICATE_VERIFY_FAILED|Hostname Verification|WRONG_VERSION_NUMBER")


def is_final(cause: str) -> bool:
    """Whether waiting would not help."""
    return bool(_FINAL.search(cause))


def described(cause: str) -> str:
    """What `cause` means where that is known, and gRPC's own words."""
    meaning = next((words for pattern, words in _CAUSES.items() if re.search(pattern, cause, re.IGNORECASE)), None)
    return f"{meaning} ({cause})" if meaning else cause or "no answer"
