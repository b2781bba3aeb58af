"""Tensors of a file that `torch.save` wrote, memory-mapped. Its pickle is read as a list of names before it is run.

`torch.load(weights_only=True)` runs nothing of ours or theirs, but lets a pickle ask for any amount of memory
(`bytearray(2**40)`); a checkpoint needs a dictionary of tensors and nothing else, so nothing else is let through.
"""

import pickletools
import struct
import zipfile
from pathlib import Path

import torch

from ..errors import ExportError

MAX_DIRECTORY_BYTES = 2**24
"""Of the archive's list of records; 1024 layers take a tenth."""
MAX_PICKLE_BYTES = 2**21
STORAGES = {f"torch {kind}Storage" for kind in ("BFloat16", "Half", "Float", "Double")}
GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", *STORAGES}
FORBIDDEN = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "BYTEARRAY8"}
"""Opcodes that make objects otherwise; `torch.save` of tensors writes none."""
END, END64_LOCATOR, END64 = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"
END_BYTES, LOCATOR_BYTES, END64_BYTES = 22, 20, 56


DAMAGE = (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError)
"""What `zipfile` raises where bytes are wrong. It says NotImplementedError where they name a version of the format or a
compression that it cannot read, which `torch.save` never writes: one flipped bit does (tests/test_bad_gguf.py)."""


class BrokenError(Exception):
    """What is wrong with the file."""


def check(path: Path) -> None:
    """Refuse what is not a plain dictionary of float tensors, before torch opens it."""
    try:
        if directory_bytes(path) > MAX_DIRECTORY_BYTES:
            raise BrokenError(f"its list of records is longer than {MAX_DIRECTORY_BYTES} bytes")
        with zipfile.ZipFile(path) as archive:
            check_pickle(pickle_of(archive))
    except (BrokenError, *DAMAGE) as error:
        raise damaged(path, error) from None


def load(path: Path) -> dict[str, torch.Tensor]:
    """Name → tensor in mapped memory, which stays mapped as long as one of them lives. `check` comes first."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever the damaged bytes lead to
        raise damaged(path, error) from None
    if not isinstance(tensors, dict) or not tensors:
        raise damaged(path, "it holds no dictionary of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise damaged(path, f"its entry {name!r:.60} is no tensor")
    return tensors


def directory_bytes(path: Path) -> int:
    """Size of the zip archive's central directory, as the end of the file states it (APPNOTE.TXT 4.3.14 to 4.3.16)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - END_BYTES - LOCATOR_BYTES))
        tail = file.read()
        end, locator = tail[-END_BYTES:], tail[: -END_BYTES or None]
        if not end.startswith(END) or len(end) < END_BYTES:
            raise BrokenError("it does not end as a zip archive of torch.save does")
        if not locator.startswith(END64_LOCATOR):
            return int(struct.unpack_from("<I", end, 12)[0])
        at = struct.unpack_from("<Q", locator, 8)[0]
        file.seek(min(at, size))
        end64 = file.read(END64_BYTES)
        if not end64.startswith(END64):
            raise BrokenError("the end of its zip archive is damaged")
        return int(struct.unpack_from("<Q", end64, 40)[0])


def pickle_of(archive: zipfile.ZipFile) -> bytes:
    """The one pickle inside; records must lie there as they are, to be mapped."""
    for record in archive.infolist():
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise BrokenError(f"record {record.filename!r:.60} is compressed")
    found = [record for record in archive.infolist() if record.filename.endswith("/data.pkl")]
    if len(found) != 1 or found[0].file_size > MAX_PICKLE_BYTES:
        raise BrokenError(f"it holds {len(found)} pickles data.pkl of at most {MAX_PICKLE_BYTES} bytes, expected one")
    for record in archive.infolist():
        if record.filename.endswith("/byteorder") and (record.file_size > 16 or archive.read(record) != b"little"):
            raise BrokenError("its numbers are not little-endian")
    return archive.read(found[0])


def check_pickle(data: bytes) -> None:
    """Only what names and tensors need; the opcodes are listed, not run."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in FORBIDDEN or (opcode.name == "GLOBAL" and argument not in GLOBALS):
            asked = ".".join(str(argument).split(" ")) if opcode.name == "GLOBAL" else opcode.name
            raise BrokenError(f"its pickle asks for {asked:.60}, which no dictionary of float tensors needs")


def damaged(path: Path, reason: object) -> ExportError:
    """One line about the file."""
    text = " ".join(str(reason).split())[:200] or type(reason).__name__
    return ExportError(f"{path}: not a checkpoint that is loaded ({text}); download it again or give safetensors")
