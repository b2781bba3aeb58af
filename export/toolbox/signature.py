"""model.sig: who made an artifact folder. Elliptic-curve keys through OpenSSF's model-signing, offline.

The signature is a Sigstore bundle over the sha256 of every file of the artifact, manifest and card too, so the
`model_signing` command verifies it as well (https://github.com/sigstore/model-transparency). Companions are not signed:
a folder that went through a hub or a file manager stays as it was signed.
"""

import base64
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from export import manifest
from export.errors import ExportError
from export.host import digests
from export.manifest import SIGNATURE

if TYPE_CHECKING:
    from model_signing import hashing

_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_LARGEST_BYTES = 2**24
"""A signature has a line for every file."""
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading JSON that is something else ends in."""


def sign(folder: Path, private_key: Path) -> Path:
    """Write `model.sig` over everything else in the folder and replace an older one.

    `private_key`: PEM, P-256, P-384 or P-521. Raises ExportError: the package is missing, or no such key.
    """
    signing = _library("signing")
    key(private_key, "private")
    signer = signing.Config().use_elliptic_key_signer(private_key=private_key).set_hashing_config(_everything(folder))
    finished = folder / SIGNATURE
    with tempfile.TemporaryDirectory(dir=folder.resolve().parent, prefix=".sign-") as private:
        unfinished = Path(private) / SIGNATURE
        signer.sign(folder, unfinished)
        unfinished.chmod(0o644)
        unfinished.replace(finished)
    return finished


def differences(folder: Path, public_key: Path) -> Iterator[str]:
    """Every way in which the folder is not what the holder of the key signed.

    Raises ExportError: the package is missing, or no such key.
    """
    verifying = _library("verifying")
    key(public_key, "public")
    signature = folder / SIGNATURE
    if not signature.is_file():
        yield f"{signature}: missing; nobody signed this folder"
        return
    try:
        signed = _signed_files(signature)
    except UNREADABLE as error:
        yield f"{signature}: not a signature ({type(error).__name__}); sign the folder again"
        return
    verifier = (
        verifying.Config().use_elliptic_key_verifier(public_key=public_key).set_hashing_config(_everything(folder))
    )
    try:
        verifier.verify(folder, signature)
        valid = True
    except Exception as error:  # cryptography's and the library's own types, of which there are many
        valid = False
        if not str(error).startswith("Signature mismatch"):  # of the files; all others are of the signature itself
            yield f"{signature}: not made with the private half of {public_key}, or changed since"
            return
    changes = list(_changes(folder, signed))
    if not valid and not changes:
        changes = [f"{signature}: made with another kind of digest; sign with `python -m export sign`"]
    yield from changes


def _changes(folder: Path, signed: dict[str, str]) -> Iterator[str]:
    """Files that are missing, changed or not signed; a signature may leave files out, ours never do."""
    present = {path.relative_to(folder).as_posix(): path for path in manifest.files(folder)}
    del present[SIGNATURE]
    for name, digest in signed.items():
        if name not in present:
            yield f"{folder / name}: signed, but missing"
        elif digests.sha256(present[name]) != digest:
            yield f"{folder / name}: changed since it was signed"
    for name in sorted(present.keys() - signed.keys()):
        yield f"{folder / name}: not signed"


def _signed_files(signature: Path) -> dict[str, str]:
    """File name → sha256 in the bundle's in-toto statement; to be trusted only once the signature is verified."""
    bundle = json.loads(content(signature))
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    return {str(file["name"]): str(file["digest"]) for file in statement["predicate"]["resources"]}


def content(path: Path) -> bytes:
    """Of a signature or a provenance. Raises ValueError: larger than any."""
    if path.stat().st_size > _LARGEST_BYTES:
        raise ValueError
    return path.read_bytes()


def _everything(folder: Path) -> "hashing.Config":
    """sha256 of every file except the signature and companions."""
    config: hashing.Config = _library("hashing").Config()
    return config.use_file_serialization(hashing_algorithm="sha256").set_ignored_paths(
        paths=[SIGNATURE, *(path.relative_to(folder) for path in manifest.companions(folder))], ignore_git_paths=False
    )


def _library(name: str) -> ModuleType:
    """A module of the optional package."""
    import importlib

    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise ExportError(
            f"signatures need the package model-signing ({error}); pip install -c constraints.txt -e '.[sign]'"
        ) from None


def key(path: Path, half: Literal["private", "public"]) -> Any:
    """Half of a key pair on a supported curve. Raises ExportError: the package is missing, or the file holds none."""
    _library("signing")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

    try:
        data = path.read_bytes()
        read = load_pem_private_key(data, None) if half == "private" else load_pem_public_key(data)
    except TypeError:
        raise ExportError(f"{path}: the key has a passphrase; `openssl pkey -in {path}` writes it without") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ExportError(f"{path}: not a {half} key in PEM; see docs/inspect.md for how to make one") from None
    if not isinstance(read, EllipticCurvePrivateKey | EllipticCurvePublicKey) or read.curve.name not in _CURVES:
        raise ExportError(
            f"{path}: not an elliptic-curve key on P-256, P-384 or P-521; see docs/inspect.md for how to make one"
        )
    return read
