"""Text files: unpacked and decoded, or refused with the kind of file that they really are."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from batchnorm.errors import DataError
from batchnorm.lab.data.sources import kind_of

__all__ = ["read_text", "refusal"]

PACKED: dict[bytes, tuple[str, Callable[[bytes], bytes]]] = {
    b"\x1f\x8b": ("gzip", gzip.decompress),
    b"BZh": ("bzip2", bz2.decompress),
    b"\xfd7zXZ\x00": ("xz", lzma.decompress),
}

OTHER_FORMATS = {
    b"PAR1": "a Parquet file; give it the ending .parquet",
    b"\x93NUMPY": "a single NumPy array; save it with numpy.savez as .npz",
    b"\xd0\xcf\x11\xe0": "an Excel workbook; save its sheet as CSV (UTF-8)",
    b"%PDF": "a PDF file; export the table as CSV",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard; unpack it first",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it first",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
    b"ARROW1": "a Feather file; save it as Parquet",
    b"\x89HDF": "an HDF5 file; save it as Parquet or CSV",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file with git lfs pull",
}
"""First bytes of formats that are no text, or no table."""

MARKUP = (
    (r"<!doctype html|<html", "a web page; download the file itself"),
    (r"<\?xml|<svg", "an XML file; export the table as CSV"),
    (r"[\[{]\s*[\[{\"]", "a JSON file; save it as CSV or Parquet"),
    (r"@relation\s", "an ARFF file; save it as CSV"),
)

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

CONTROL = re.compile("[\x00-\x08\x0e-\x1f]")


def read_text(path: Path) -> tuple[str, list[str]]:
    r"""Return the text of a file, with "\n" at the end of its lines, and notes on how it was read.

    UTF-8, UTF-16 and UTF-32 are recognized; bytes that are no UTF-8 are read as Windows-1252, a superset of Latin-1.

    Raises
    ------
    DataError
        The file is not a text.
    """
    notes: list[str] = []
    content = path.read_bytes()
    for start, (name, unpack) in PACKED.items():
        if content.startswith(start):
            try:
                content = unpack(content)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise refusal(path, f"it is compressed by {name} and damaged: {error}") from error
            notes.append(f"{path.name} is compressed by {name}, and was unpacked")
    _check_format(path, content)
    text = _decoded(path, content, notes).replace("\r\n", "\n").replace("\r", "\n").removesuffix("\x1a")
    for pattern, kind in MARKUP:
        if re.match(rf"\s*(?:{pattern})", text, re.IGNORECASE):
            raise refusal(path, f"it is {kind}")
    found = CONTROL.search(text)
    if found:
        line = text.count("\n", 0, found.start()) + 1
        kind = "a NUL byte" if found[0] == "\0" else f"the control character {found[0]!r}"
        raise refusal(path, f"line {line} has {kind}, which no text has; it may be damaged or be no text file")
    return text, notes


def refusal(path: Path, reason: str) -> DataError:
    """Return the error about a file that is no table."""
    return DataError(f"data must be a table; {str(path)!r} can't be read as {kind_of(path)}: {reason}")


def _check_format(path: Path, content: bytes) -> None:
    for start, kind in OTHER_FORMATS.items():
        if content.startswith(start):
            raise refusal(path, f"it is {kind}")
    if content.startswith(b"PK\x03\x04"):
        try:
            names = zipfile.ZipFile(io.BytesIO(content)).namelist()
        except zipfile.BadZipFile:
            names = []
        kind = "a ZIP archive; unpack it first"
        if any(name.startswith("xl/") for name in names):
            kind = "an Excel workbook; save its sheet as CSV (UTF-8)"
        elif any(name.endswith(".ods") or name == "content.xml" for name in names):
            kind = "an OpenDocument spreadsheet; save its sheet as CSV (UTF-8)"
        elif names and all(name.endswith(".npy") for name in names):
            kind = "an archive of NumPy arrays; give it the ending .npz"
        raise refusal(path, f"it is {kind}")


def _decoded(path: Path, content: bytes, notes: list[str]) -> str:
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), None)
    encoding = encoding or _utf16_without_mark(content)
    try:
        if encoding is not None:
            return content.decode(encoding)
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if encoding not in (None, "utf-8-sig"):
            raise refusal(path, f"it begins as {encoding.upper()} and is none: {error.reason}") from error
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
    text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="batchnorm.windows-1252")
    notes.append(
        f"{path.name} is not in UTF-8 (line {line} has the byte 0x{byte:02X}); it was read as Windows-1252, "
        "so names and texts with accents can be wrong"
    )
    return text


def _utf16_without_mark(content: bytes) -> str | None:
    """Return the encoding of a text in which every other byte is 0, as those of English letters are in UTF-16."""
    start = content[:2000]
    for encoding, zeros in (("utf-16-le", start[1::2]), ("utf-16-be", start[::2])):
        if len(start) > 3 and zeros.count(0) > 0.7 * len(zeros) and start.count(0) < 1.2 * zeros.count(0):
            return encoding
    return None


def _windows_1252(error: UnicodeError) -> tuple[str, int]:
    """Decode the bytes that are no UTF-8."""
    assert isinstance(error, UnicodeDecodeError)
    wrong = error.object[error.start : error.end]
    return "".join(bytes([byte]).decode("cp1252", errors="replace") for byte in wrong), error.end


codecs.register_error("batchnorm.windows-1252", _windows_1252)
