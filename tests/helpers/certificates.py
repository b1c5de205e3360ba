"""An authority of our own and certificates by it, made by the commands that docs/deployment.md shows."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "deployment.md"
LIMIT_S = 30.0


class Certificates(NamedTuple):
    """PEM files of a deployment on this machine."""

    authority: Path
    certificate: Path
    """for localhost, 127.0.0.1 and ::1"""
    private_key: Path

    @classmethod
    def make(cls, folder: Path) -> "Certificates":
        """As the guide says; skips the test where there is no OpenSSL 3."""
        script(folder, 'authority\nissue server "DNS:localhost,IP:127.0.0.1,IP:::1"')
        return cls(folder / "ca.pem", folder / "server.pem", folder / "server.key")

    def client(self, name: str) -> tuple[Path, Path]:
        """Another certificate of the same authority, and its key."""
        script(self.authority.parent, f'issue {name} "DNS:{name}"')
        return self.authority.with_name(f"{name}.pem"), self.authority.with_name(f"{name}.key")


def script(folder: Path, commands: str) -> None:
    """Run `commands` in `folder` after the functions of the guide."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make certificates with")
    folder.mkdir(parents=True, exist_ok=True)
    found = re.search(r"<!-- file: certificates.sh -->\n```bash\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    assert found, "docs/deployment.md has no certificates.sh"
    (folder / "certificates.sh").write_text(found[1])
    code = f". ./certificates.sh\n{commands}\n"
    done = subprocess.run(["bash", "-eu", "-c", code], cwd=folder, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-2000:]
