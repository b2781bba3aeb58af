"""`python -m export sign` and `verify --key`: a signed folder passes, and everything else is one line."""

import base64
import json
import os
import shutil
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from export import manifest
from export.errors import ExportError
from export.toolbox import signature as signing
from export.toolbox import verification
from tests.support.artifacts import add_companions, reseal, write_key
from tests.support.reliability import MOVED_ARTIFACT

pytestmark = pytest.mark.usefixtures("no_child")
CURVES = {"P-256": ec.SECP256R1, "P-384": ec.SECP384R1, "P-521": ec.SECP521R1}


@pytest.fixture
def signed(artifact, keys):
    """A signed copy to break."""
    signing.sign(artifact, keys[0])
    return artifact


def test_a_signed_folder_passes_and_without_a_key_nobody_is_believed(command, artifact, keys):
    private, public = keys
    assert command("verify", artifact) == (0, [f"{artifact}: as its manifest says"], [])
    written = [f"{artifact}/{name}: signed with {private}" for name in ("provenance.intoto.jsonl", "model.sig")]
    assert command("sign", artifact, "--key", private) == (0, written, [])
    whole = f"{artifact}: as its manifest says"
    assert command("verify", artifact, "--key", public) == (0, [f"{whole}, and as signed with {public}"], [])
    assert command("verify", artifact) == (0, [f"{whole}; model.sig was not checked (give --key)"], [])
    assert not {"model.sig", "provenance.intoto.jsonl"} & manifest.read(artifact).files.keys()


@pytest.mark.parametrize("curve", CURVES)
def test_every_curve_and_a_folder_under_another_name(artifact, tmp_path, curve):
    private, public = write_key(tmp_path, curve, ec.generate_private_key(CURVES[curve]()))
    signing.sign(artifact, private)
    moved = artifact.rename(tmp_path / "moved")
    assert list(signing.differences(moved, public)) == []


def test_signing_again_replaces_the_signature_and_leaves_nothing_else(signed, keys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    (signed / manifest.CARD).write_text("measured anew")
    assert list(signing.differences(signed, keys[1])) == [f"{signed}/README.md: changed since it was signed"]
    signing.sign(signed, keys[0])
    assert list(signing.differences(signed, keys[1])) == []
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.hostile("local user", "links planted where we write", "replaced or refused, never followed")
def test_a_link_where_a_signature_might_be_written_is_not_followed(artifact, keys, tmp_path):
    (tmp_path / "precious").write_text("mine")
    for place in (f".{artifact.name}.sig", f"{artifact.name}/model.sig.tmp"):
        (tmp_path / place).symlink_to(tmp_path / "precious")
    (artifact / "model.sig.tmp").unlink()
    before = os.umask(0)
    try:
        signing.sign(artifact, keys[0])
    finally:
        os.umask(before)
    assert (tmp_path / "precious").read_text() == "mine"
    assert (artifact / "model.sig").stat().st_mode & 0o777 == 0o644
    assert list(signing.differences(artifact, keys[1])) == []


DAMAGE = {
    "changed": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json: changed since it was"),
    "added": (lambda folder: (folder / "more.py").write_text("x"), "more.py: not signed"),
    "removed": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: signed, but missing"),
    "manifest": (lambda folder: (folder / manifest.FILE).write_text("{}"), "manifest.json: changed since it was"),
    "card": (lambda folder: (folder / manifest.CARD).write_text("rm -rf"), "README.md: changed since it was signed"),
    "no signature": (lambda folder: (folder / "model.sig").unlink(), "model.sig: missing; nobody signed this folder"),
}


@pytest.mark.hostile("artifact", "signatures that do not fit", "one line")
@pytest.mark.reliability("signed folders changed, signatures forged or broken", "one line")
@pytest.mark.parametrize("what", DAMAGE)
def test_each_difference_is_one_line(command, signed, keys, what):
    change, words = DAMAGE[what]
    change(signed)
    code, out, err = command("verify", signed, "--key", keys[1])
    assert (code, len(out)) == (1, 1)
    assert out[0].startswith(f"{signed}/{words}")
    assert err == [f"error: {signed}: 1 found wrong"]


@MOVED_ARTIFACT
@pytest.mark.parametrize("companions_first", [True, False])
def test_a_folder_that_went_through_a_hub_is_still_as_signed(artifact, keys, companions_first):
    steps = [lambda: add_companions(artifact), lambda: signing.sign(artifact, keys[0])]
    for step in steps if companions_first else reversed(steps):
        step()
    assert verification.verify(artifact, 100, keys[1]) == []


def test_a_folder_changed_and_sealed_again_is_only_caught_by_the_signature(signed, keys):
    """The twin of what `verify` cannot know without a key."""
    path = signed / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    reseal(signed)
    assert verification.verify(signed, 100) == []
    found = verification.verify(signed, 100, keys[1])
    assert found == [
        f"{signed}/manifest.json: changed since it was signed",
        f"{signed}/tokenizer.json: changed since it was signed",
    ]


def test_another_key_and_another_folders_signature(signed, keys, tmp_path):
    other = write_key(tmp_path, "other", ec.generate_private_key(ec.SECP256R1()))
    words = f"{signed}/model.sig: not made with the private half of {other[1]}, or changed since"
    assert list(signing.differences(signed, other[1])) == [words]
    beside = shutil.copytree(signed, tmp_path / "beside", ignore=shutil.ignore_patterns("model.sig"))
    (beside / "tokenizer.json").write_text("{}")
    signing.sign(beside, keys[0])
    shutil.copy(beside / "model.sig", signed / "model.sig")
    assert list(signing.differences(signed, keys[1])) == [f"{signed}/tokenizer.json: changed since it was signed"]


def forged(signature, change):
    """The bundle with another statement, under the old signature."""
    bundle = json.loads(signature.read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(bundle, statement)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    signature.write_text(json.dumps(bundle))


FORGERIES = {
    "a digest": lambda bundle, statement: statement["predicate"]["resources"][0].update(digest="00" * 32),
    "a file less": lambda bundle, statement: statement["predicate"]["resources"].pop(),
    "more is ignored": lambda bundle, statement: statement["predicate"]["serialization"].update(ignore_paths=["*"]),
    "no signatures": lambda bundle, statement: bundle["dsseEnvelope"].update(signatures=[]),
    "another hint": lambda bundle, statement: bundle["verificationMaterial"].update(publicKey={"hint": "00"}),
}


@pytest.mark.reliability("signed folders changed, signatures forged or broken", "one line")
@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_signature(signed, keys, what):
    forged(signed / "model.sig", FORGERIES[what])
    (only,) = signing.differences(signed, keys[1])
    assert only.startswith(f"{signed}/model.sig: not made with the private half of")


NO_SIGNATURES = [b"", b"{", b"[]", b"\xff", b"null", b"{}", b'{"a": ' * 100_000, b"1" * (2**24 + 1)]


@pytest.mark.reliability("signed folders changed, signatures forged or broken", "one line")
@pytest.mark.parametrize("content", NO_SIGNATURES, ids=lambda content: content[:8])
def test_a_signature_that_is_none(signed, keys, content):
    (signed / "model.sig").write_bytes(content)
    (only,) = signing.differences(signed, keys[1])
    assert only.startswith(f"{signed}/model.sig: not a signature")


def test_what_a_signature_leaves_out_is_named(artifact, keys):
    """Signed with the right key, by someone who told the library to ignore a file."""
    stock("sign", artifact, "--private_key", keys[0], "--ignore-paths", artifact / "tokenizer.json")
    assert list(signing.differences(artifact, keys[1])) == [f"{artifact}/tokenizer.json: not signed"]


def stock(verb, folder, *options):
    """The library's own command."""
    command = [
        sys.executable,
        "-m",
        "model_signing",
        verb,
        "key",
        folder,
        "--signature",
        folder / "model.sig",
        *options,
    ]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100, check=False)


def test_the_stock_command_verifies_ours_and_we_verify_its(artifact, signed, keys):
    assert stock("verify", signed, "--public_key", keys[1]).returncode == 0
    (signed / "more").write_text("x")
    assert stock("verify", signed, "--public_key", keys[1]).returncode != 0
    (signed / "more").unlink()
    (signed / "model.sig").unlink()
    assert stock("sign", artifact, "--private_key", keys[0]).returncode == 0
    assert verification.verify(artifact, 100, keys[1]) == []


def unusable(tmp_path):
    """Key files that are none, and the words each ends in."""
    p256 = ec.generate_private_key(ec.SECP256R1())
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    curve = "not an elliptic-curve key on P-256, P-384 or P-521"
    yield *write_key(tmp_path, "rsa", rsa_key), curve
    yield *write_key(tmp_path, "ed25519", ed25519.Ed25519PrivateKey.generate()), curve
    yield *write_key(tmp_path, "k1", ec.generate_private_key(ec.SECP256K1())), curve
    private, public = write_key(tmp_path, "halves", p256)
    yield public, private, "key in PEM"
    (tmp_path / "none").write_bytes(b"\xff" * 100)
    yield tmp_path / "none", tmp_path / "none", "key in PEM"


def test_a_key_that_is_none_is_one_line(command, signed, tmp_path):
    (signed / "model.sig").unlink()
    for private, public, words in unusable(tmp_path):
        for verb, key in (("sign", private), ("verify", public)):
            code, out, (error,) = command(verb, signed, "--key", key)
            assert (code, out) == (1, []), key
            assert error.startswith(f"error: {key}: "), error
            assert words in error
    locked, _ = write_key(tmp_path, "locked", ec.generate_private_key(ec.SECP256R1()), b"secret")
    assert "has a passphrase" in command("sign", signed, "--key", locked)[2][0]
    assert command("sign", signed, "--key", tmp_path / "nowhere.pem")[0] == 2
    assert command("sign", signed)[0] == 2
    assert command("sign", signed / "tokenizer.json", "--key", locked)[0] == 2
    assert not (signed / "model.sig").exists()


def test_a_damaged_folder_is_not_signed(command, artifact, keys):
    (artifact / "tokenizer.json").write_text("{}")
    code, _, (error,) = command("sign", artifact, "--key", keys[0])
    assert code == 1
    assert "tokenizer.json: 2 bytes, manifest.json says" in error
    (artifact / "tokenizer.json").unlink()
    (artifact / "tokenizer.json").symlink_to("/etc/hostname")
    assert "tokenizer.json: a link" in command("sign", artifact, "--key", keys[0])[2][0]
    assert not (artifact / "model.sig").exists()


def test_without_the_package_one_line_says_which_extra(signed, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing.verifying", None)
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    with pytest.raises(ExportError, match=r"model-signing.*'\.\[sign\]'"):
        list(signing.differences(signed, keys[1]))
    with pytest.raises(ExportError, match=r"model-signing.*'\.\[sign\]'"):
        signing.sign(signed, keys[0])
