"""Hashed identities: the secret salt, the ids that leave it, and the split that follows from the patient."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import NamedTuple

from place.config import UsageError

PHANTOM_SALT = b"phantoms are made up: the same ids everywhere"
SPLITS = ("train", "val", "test")
_MIN_SALT_BYTES = 16


class IdHasher(NamedTuple):
    """Keyed hashes (HMAC-SHA256) of identities; without the salt nobody can try out known ids."""

    salt: bytes

    def digest(self, kind: str, text: str) -> bytes:
        """32 bytes; the kind keeps a patient and a study of the same number apart."""
        return hmac.new(self.salt, f"{kind}:{text}".encode("utf-8", "surrogatepass"), hashlib.sha256).digest()

    def code(self, kind: str, text: str) -> str:
        """16 hexadecimal digits."""
        return self.digest(kind, text).hex()[:16]

    def number(self, kind: str, text: str) -> int:
        """Positive 63-bit integer."""
        return int.from_bytes(self.digest(kind, text)[:8], "big") >> 1 or 1


def read_salt(salt_file: str | None) -> bytes:
    """The secret of `salt_file`, or of ~/.config/place/salt, which is made (mode 600) if there is none.

    Raises:
        UsageError: the file cannot be read or made, or is too short to be a secret.
    Source: ours.
    """
    path = Path(salt_file) if salt_file else default_salt_path()
    try:
        if not salt_file and not path.exists():
            _make_salt(path)
        salt = path.read_bytes().strip()
    except OSError as error:
        hint = "give the path of a file with a secret" if salt_file else "give one with --salt-file"
        raise UsageError(f"salt file {path}: {error.strerror}; {hint}") from None
    if len(salt) < _MIN_SALT_BYTES:
        raise UsageError(f"salt file {path}: {len(salt)} bytes, expected at least {_MIN_SALT_BYTES} random ones")
    return salt


def default_salt_path() -> Path:
    """$XDG_CONFIG_HOME/place/salt, or ~/.config/place/salt."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "place" / "salt"


def _make_salt(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f"salt.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32) + "\n")
    try:
        os.link(draft, path)  # fails if another process was first: its salt stays
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def compute_split(patient: str, seed: int, shares: tuple[float, float, float]) -> str:
    """Split of a patient by hash: it hangs on nothing but the patient, the seed and the shares.

    Source: ours; style.md 24.
    """
    digest = hashlib.sha256(f"{seed}:{patient}".encode("utf-8", "surrogatepass")).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64 * sum(shares)
    if position < shares[0]:
        return "train"
    return "val" if position < shares[0] + shares[1] else "test"


def describe_hash_split(seed: int, shares: tuple[float, float, float]) -> str:
    """The rule of `compute_split` in words, for the data card."""
    return f"by hash of the patient, {'/'.join(f'{share:g}' for share in shares)} train/val/test, seed {seed}"
