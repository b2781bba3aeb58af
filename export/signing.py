"""model.sig: who made an artifact folder. Elliptic-curve keys through OpenSSF's model-signing, without any network.

The signature is a Sigstore bundle over the sha256 of every file in the folder, manifest and card too, so the
`model_signing` command verifies it as well (https://github.com/sigstore/model-transparency).
"""

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import artifact, manifest
from .errors import ExportError
from .manifest import SIGNATURE

if TYPE_CHECKING:
    from model_signing import hashing

CURVES = ("secp256r1", "secp384r1", "secp521r1")
LARGEST_BYTES = 2**24
"""A signature has a line for every file."""


def sign(folder: Path, private_key: Path) -> Path:
    """Write `model.sig`, over everything else in the folder; an older one is replaced.

    `private_key`: PEM, P-256, P-384 or P-521. Raises ExportError: the package is missing, or no such key.
    """
    signing = library("signing")
    require_key(private_key, "private")
    signer = signing.Config().use_elliptic_key_signer(private_key=private_key).set_hashing_config(everything())
    finished, unfinished = folder / SIGNATURE, artifact.beside(folder.resolve(), "sig")
    try:
        signer.sign(folder, unfinished)
        unfinished.replace(finished)
    finally:
        unfinished.unlink(missing_ok=True)
    return finished


def differences(folder: Path, public_key: Path) -> Iterator[str]:
    """Every way the folder is not what the holder of the key signed; nothing when it is.

    Raises ExportError: the package is missing, or no such key.
    """
    verifying = library("verifying")
    require_key(public_key, "public")
    signature = folder / SIGNATURE
    if not signature.is_file():
        yield f"{signature}: missing; nobody signed this folder"
        return
    try:
        signed = signed_files(signature)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        yield f"{signature}: not a signature ({type(error).__name__}); sign the folder again"
        return
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key).set_hashing_config(everything())
    try:
        verifier.verify(folder, signature)
        proven = True
    except Exception as error:  # cryptography's and the library's own, which say it in many ways
        proven = False
        if not str(error).startswith("Signature mismatch"):  # of the files; all else is of the signature itself
            yield f"{signature}: not made with the private half of {public_key}, or changed since"
            return
    found = list(unlike(folder, signed))
    if not proven and not found:
        found = [f"{signature}: made with another kind of digest; sign with `python -m export sign`"]
    yield from found


def unlike(folder: Path, signed: dict[str, str]) -> Iterator[str]:
    """Files that are missing, changed, or beside those signed; a signature may leave files out, ours never do."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    del found[SIGNATURE]
    for name, digest in signed.items():
        if name not in found:
            yield f"{folder / name}: signed, but missing"
        elif manifest.file_info(found[name]).sha256 != digest:
            yield f"{folder / name}: changed since it was signed"
    for name in sorted(found.keys() - signed.keys()):
        yield f"{folder / name}: not signed"


def signed_files(signature: Path) -> dict[str, str]:
    """File name → sha256, as the bundle's in-toto statement says; believed only once the signature is verified."""
    if signature.stat().st_size > LARGEST_BYTES:
        raise ValueError
    bundle = json.loads(signature.read_bytes())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    return {str(one["name"]): str(one["digest"]) for one in statement["predicate"]["resources"]}


def everything() -> "hashing.Config":
    """sha256 of every file but the signature; the library would leave out git's."""
    config: hashing.Config = library("hashing").Config()
    return config.use_file_serialization(hashing_algorithm="sha256").set_ignored_paths(
        paths=[SIGNATURE], ignore_git_paths=False
    )


def library(name: str) -> ModuleType:
    """A module of the optional package."""
    import importlib

    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise ExportError(
            f"signatures need the package model-signing ({error}); pip install -c constraints.txt -e '.[sign]'"
        ) from None


def require_key(path: Path, half: str) -> None:
    """One clear line unless the file holds that half of a key on a supported curve."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

    loaders: dict[str, Callable[[bytes], Any]] = {
        "private": lambda data: load_pem_private_key(data, None),
        "public": load_pem_public_key,
    }
    try:
        key = loaders[half](path.read_bytes())
    except TypeError:
        raise ExportError(f"{path}: the key has a passphrase; `openssl pkey -in {path}` writes it without") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ExportError(f"{path}: not a {half} key in PEM; see docs/inspect.md for how to make one") from None
    if not isinstance(key, EllipticCurvePrivateKey | EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise ExportError(
            f"{path}: not an elliptic-curve key on P-256, P-384 or P-521; see docs/inspect.md for how to make one"
        )
