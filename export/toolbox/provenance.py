"""provenance.intoto.jsonl: what a signed artifact was made from, as SLSA has it, told from its manifest alone.

A DSSE envelope of an in-toto statement, by the key that signs the folder: policy engines read it without the folder
(https://slsa.dev/spec/v1.0/provenance). Its subjects are the files; the signature of the folder covers it in turn.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from export import manifest
from export.checkpoints.origin import is_public
from export.host import disk
from export.manifest import PROVENANCE, Manifest

from . import signature

_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://slsa.dev/provenance/v1"
_PAYLOAD = "application/vnd.in-toto+json"
_PROJECT = "llama-on-device"
_BUILD_TYPE = f"urn:{_PROJECT}:export:v1"
"""Another layout of `statement` is another version."""
_BUILDER = f"urn:{_PROJECT}:signer"
"""The machine of whoever holds the key: no hosted builder vouches for it."""
_MOST_DIFFERENCES = 10


def statement(folder: Path, described: Manifest) -> dict[str, Any]:
    """What `sign` tells of a folder whose files are as its manifest says. Equal folders have equal statements."""
    plan, code = described.plan, described.source
    hashed = {name: info.sha256 for name, info in described.files.items()}
    beside = (folder / name for name in (manifest.FILE, manifest.CARD))
    hashed |= {path.name: manifest.file_info(path).sha256 for path in beside if path.is_file()}
    return {
        "_type": _STATEMENT,
        "subject": [_named(name, sha256=digest) for name, digest in sorted(hashed.items())],
        "predicateType": _PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD_TYPE,
                "externalParameters": {
                    "name": described.id,
                    "model": plan.model.name,
                    "recipe": plan.quant.name,
                    "target": plan.target.name,
                    "context": plan.model.context_length,
                    **({"cache": plan.cache} if plan.cache else {}),
                    **({"policy": plan.policy} if plan.policy else {}),
                },
                "internalParameters": {"code": code.sha256, "localChanges": code.dirty},
                "resolvedDependencies": list(_dependencies(described)),
            },
            "runDetails": {"builder": {"id": _BUILDER}},
        },
    }


def _dependencies(described: Manifest) -> Iterator[dict[str, Any]]:
    """The checkpoint's files, an adapter's among them; calibration texts; our code; packages."""
    checkpoint, commit = described.checkpoint, described.source.commit
    if is_public(checkpoint.origin):
        yield {"uri": quote(checkpoint.origin, safe=":/@")}
    yield from (_named(f"checkpoint/{name}", sha256=digest) for name, digest in checkpoint.sha256.items())
    yield from (_named(f"configs/calibration/{name}", sha256=digest) for name, digest in described.texts.items())
    if commit != manifest.UNKNOWN:
        yield _named(_PROJECT, gitCommit=commit)
    for name, version in described.tools.items():
        if version != "not installed":
            yield {"uri": f"pkg:pypi/{quote(name, safe='')}@{quote(version, safe='')}"}


def _named(name: str, **digest: str) -> dict[str, Any]:
    return {"name": name, "digest": digest}


def sign(folder: Path, described: Manifest, private_key: Path) -> Path:
    """Write the provenance of an admitted folder and replace an older one. Raises ExportError: no such key."""
    key = signature.key(private_key, "private")
    from securesystemslib.dsse import Envelope  # comes with model-signing
    from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # public by its docs, not by __all__

    envelope = Envelope(_payload(folder, described), _PAYLOAD, {})
    envelope.sign(CryptoSigner(key))
    disk.write_text(folder / PROVENANCE, json.dumps(envelope.to_dict()) + "\n")
    return folder / PROVENANCE


def _payload(folder: Path, described: Manifest) -> bytes:
    return json.dumps(statement(folder, described)).encode()


def differences(folder: Path, described: Manifest, public_key: Path) -> Iterator[str]:
    """Every way in which a folder's provenance, if it has one, tells of something else than its manifest and files.

    The files are as the manifest says. Raises ExportError: no such key.
    """
    path = folder / PROVENANCE
    if not path.is_file():
        return
    key = signature.key(public_key, "public")
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined]  # as above

    try:
        envelope = Envelope.from_dict(json.loads(signature.content(path)))
        envelope.verify([SSlibKey.from_crypto(key)], threshold=1)
        told = json.loads(envelope.payload)
    except VerificationError:
        yield f"{path}: not made with the private half of {public_key}, or changed since"
        return
    except signature.UNREADABLE as error:
        yield f"{path}: not a provenance ({type(error).__name__}); sign the folder again"
        return
    if (envelope.payload_type, envelope.payload) != (_PAYLOAD, _payload(folder, described)):
        yield from (f"{path}: {reason}; sign the folder again" for reason in _reasons(told, folder, described))


def _reasons(told: Any, folder: Path, described: Manifest) -> list[str]:
    """Why a statement is not the folder's, first of all that it is another artifact's."""
    expected = statement(folder, described)
    try:
        found = manifest.flat(_by_name(told))
    except (LookupError, TypeError, AttributeError, RecursionError):
        return ["not a statement"]
    wanted = manifest.flat(_by_name(expected))
    differing = [name for name in [*wanted, *(found.keys() - wanted.keys())] if wanted.get(name) != found.get(name)]
    if f"subject.{manifest.FILE}.digest.sha256" in differing:
        return [f"tells of another artifact, or of this one before its {manifest.FILE} changed"]
    return [
        f"{name} is {str(found.get(name, 'missing'))[:80]!r}, expected {str(wanted.get(name, 'missing'))[:80]!r}"
        for name in differing[:_MOST_DIFFERENCES]
    ] or ["not as `sign` writes it"]


def _by_name(value: Any) -> Any:
    """A statement with dictionaries for its lists of things that have a name or an address."""
    if isinstance(value, list):
        return {str(item.get("name", item.get("uri"))): _by_name({**item, "name": None}) for item in value}
    return {key: _by_name(item) for key, item in value.items()} if isinstance(value, dict) else value
