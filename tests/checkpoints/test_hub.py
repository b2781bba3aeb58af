"""A hub that drops the line, lies about sizes or gives other bytes: one line, and the next run gets the model."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType

import huggingface_hub.constants as hub
import pytest

from export import checkpoints
from export.checkpoints.origin import parse_origin
from export.errors import ExportError
from tests.support.checkpoints import LLAMA, write_folder
from tests.support.processes import within

COMMIT = "c" * 40
REPO = "nobody/small"


def digest(path):
    """sha256 of a large file, git's blob id of a small one."""
    data = path.read_bytes()
    large = path.suffix == ".safetensors"
    return (hashlib.sha256(data) if large else hashlib.sha1(b"blob %d\0" % len(data) + data)).hexdigest()


def entry(path):
    """One file in the answer to `tree`."""
    about = {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": digest(path)}
    if path.suffix == ".safetensors":
        about |= {"oid": "0" * 40, "lfs": {"oid": digest(path), "size": about["size"], "pointerSize": 134}}
    return about


@contextmanager
def serving(folder, fault):
    """The parts of the hub's HTTP interface that a snapshot needs; `fault` may change each body."""

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, *, body):
            if self.path.startswith("/api/"):
                files = [path for path in sorted(folder.iterdir()) if path.is_file()]
                about = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": path.name} for path in files]}
                data = json.dumps(list(map(entry, files)) if "/tree/" in self.path else about).encode()
                data = fault.get("api", lambda whole: whole)(data)
                self.begin(200, len(data), {"Content-Type": "application/json"})
                self.wfile.write(data if body else b"")
                return
            path = folder / Path(self.path.partition("?")[0]).name
            if not path.is_file():
                self.begin(404, 0, {"X-Error-Code": "EntryNotFound"})
                return
            data = path.read_bytes()
            length = fault.get(f"length of {path.name}", len)(data)
            self.begin(200, length, {"ETag": f'"{digest(path)}"', "X-Repo-Commit": COMMIT})
            if body:
                sent = fault.get(path.name, lambda whole: whole)(data)[:length]
                self.wfile.write(sent)
                self.close_connection = True

        def begin(self, code, length, headers):
            self.send_response(code)
            for name, value in {"Content-Length": str(length), "Connection": "close", **headers}.items():
                self.send_header(name, value)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads the model of a hub with the given fault, through a cache of this test alone."""
    folder = write_folder(tmp_path / "served")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)  # between the library's own tries

    def load(fault=MappingProxyType({})):
        with serving(folder, fault) as endpoint:
            monkeypatch.setattr(hub, "ENDPOINT", endpoint)
            monkeypatch.setattr(
                hub, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            )
            with within(60):
                return checkpoints.load(LLAMA, parse_origin(f"hub:{REPO}"))

    return load


def flip(data):
    return data[:-1] + bytes([data[-1] ^ 1])


FAULTS = {
    "answers against the protocol": ({"api": lambda data: b'{"a": 1}'.ljust(len(data))}, "cannot be downloaded"),
    "answers no JSON": ({"api": lambda data: b"<".ljust(len(data))}, "cannot be downloaded"),
    "drops after the half": ({"model.safetensors": lambda data: data[: len(data) // 2]}, "cannot be downloaded"),
    "lies about a size": ({"length of model.safetensors": lambda data: len(data) - 100}, "that the hub promised"),
    "gives nothing": ({"model.safetensors": lambda data: b""}, "cannot be downloaded"),
    "drops config.json": ({"config.json": lambda data: data[:10]}, "cannot be downloaded"),
    "other bytes of the same size": ({"model.safetensors": flip}, "not the bytes that the hub promised"),
    "other bytes of a small file": (
        {"config.json": lambda data: data[:-1] + b" "},
        "not the bytes that the hub promised",
    ),
}


@pytest.mark.reliability("a hub that drops the line, lies about a size or gives other bytes", "one line; mended later")
@pytest.mark.parametrize("fault_name", FAULTS)
def test_a_download_that_fails_is_one_line_and_the_next_is_whole(load, tmp_path, fault_name):
    fault, words = FAULTS[fault_name]
    with pytest.raises(ExportError, match=words) as caught:
        load(fault)
    assert "\n" not in str(caught.value)
    if "promised" in words:  # the line says which file to remove
        Path(str(caught.value).split("remove ")[1].split(" and run")[0]).unlink()
    assert load().sha256


def test_a_good_hub_gives_the_model_and_its_cache_is_checked_again(load, tmp_path):
    """The twin; then a bit of the cache flips on the disk."""
    assert load().sha256
    (blob,) = [path for path in (tmp_path / "cache").rglob("blobs/*") if len(path.name) == 64]
    blob.write_bytes(flip(blob.read_bytes()))
    with pytest.raises(ExportError, match="not the bytes that the hub promised"):
        load()
