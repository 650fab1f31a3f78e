"""Files of text -> lines: compressed files, encodings, line ends. All readers of text files begin here."""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib.util
import io
import lzma
import os
import re
import select
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from data.errors import DataError, ErrorList
from data.formats.encodings import check_encoding, describe_bad_encoding, find_wide_encoding
from data.formats.options import FileOptions
from data.notes import count_of

MAX_LINE = 1_000_000  # characters; a longer line is a broken file, not a text
MAX_LINE_BYTES = 1 << 26  # a file with a longer line is refused before the line has been read
MAX_WHOLE = 1 << 30  # bytes, unpacked, of a file that has to be in memory as a whole
MAX_PACKING = 200  # compression ratio of a text of more than MAX_WHOLE bytes; real texts reach 20
PIPE_SECONDS = 60
CHUNK = 1 << 20  # bytes read at a time
BOM = "\ufeff"
SAMPLED = 500  # lines with control characters that are kept for a guess of the encoding
CONTROLS = re.compile(rb"[\x80-\x9f]")  # in Latin-1

COMPRESSED = {".gz", ".bz2", ".xz"}
OPENERS: dict[bytes, Callable[[BinaryIO], BinaryIO]] = {
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream),  # type: ignore[dict-item, return-value]
    b"BZh": bz2.BZ2File,  # type: ignore[dict-item]
    b"\xfd7zXZ\0": lzma.LZMAFile,  # type: ignore[dict-item]
}
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, OSError)  # an OSError without a number is that of a damaged file
UNPACK = "unpack it, and name a file in it"
SAVE = "save its sheet as csv in UTF-8, and name that file"
# What is not text, by the first bytes and by the end of the name.
NOT_TEXT = {
    b"PK\x03\x04": f"a zip archive, or a table of Excel or LibreOffice; {UNPACK}, or {SAVE}",
    b"\xd0\xcf\x11\xe0": f"a table of Excel; {SAVE}",
    b"PAR1": 'a parquet file; data.format = "parquet" reads it',
    b"\x28\xb5\x2f\xfd": f"compressed by zstd; {UNPACK}",
    b"7z\xbc\xaf": f"a 7z archive; {UNPACK}",
    b"Rar!": f"a rar archive; {UNPACK}",
    b"%PDF": "a PDF; text has to be taken out of it first",
}
NOT_READ = {
    **dict.fromkeys((".zip", ".7z", ".rar", ".tar", ".tgz", ".zst"), f"an archive; {UNPACK}"),
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".xlsm"), f"a spreadsheet; {SAVE}"),
    **dict.fromkeys((".pkl", ".pickle"), "a pickle, which can run code; save it as .jsonl or .parquet"),
}


def locate(name: str) -> Path:
    """Return the path of a file: a local one, or `package:NAME/FILE` inside an installed package."""
    if not name.startswith("package:"):
        return Path(name)
    package, _, rest = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{name}: the package {package!r} is not installed")
    return Path(spec.submodule_search_locations[0]) / rest


def suffix_of(path: Path) -> str:
    """Return the end of a name that says its format, in lower case: ".csv" of a.csv and of a.csv.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in COMPRESSED else path.suffix.lower()


def clean_lines(path: Path, errors: ErrorList, options: FileOptions = FileOptions()) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text without its line end) of each line that can be read; others are added to `errors`.

    DataError for a file that is no text in this encoding as a whole. See TextFile.
    """
    for number, text in TextFile(path, options).lines(errors):
        if text is not None:
            yield number, text


class TextFile:
    """A file of text, perhaps compressed, whose encoding has been checked. Raises DataError where it is another one.

    - The encoding is data.encoding, else UTF-8. A file is refused, with a guess of its encoding, if it has a byte order
      mark of UTF-16 or UTF-32, or if more of its lines are not UTF-8 than lines that show UTF-8.
    - A byte order mark at the beginning of any line is no text: joined files have them.
    - Lines end in a line feed, perhaps with a carriage return before it; in carriage returns if there is no line feed.
    """

    def __init__(self, path: Path, options: FileOptions = FileOptions()):
        check_encoding(options.encoding)
        self.path, self.options = path, options
        name = codecs.lookup(options.encoding or "utf-8").name
        self.encoding = "utf-8" if name == "utf-8-sig" else name
        self.notes: list[str] = []
        self._content = None if path.is_file() or path.is_dir() else read_whole(path)  # a pipe can be read once only
        self.is_wide = "\n".encode(self.encoding)[-1:] != b"\n" or len("\n".encode(self.encoding)) > 1
        self.line_end = b"\n"
        self.is_checked = False  # whether the bad lines have been counted
        self._inspect()

    def lines(self, errors: ErrorList, is_whole: bool = False) -> Iterator[tuple[int, str | None]]:
        """Yield (number from 1, text without its line end) of each line; None for a line that was added to `errors`.

        is_whole: whether a line may be the whole file, and not only MAX_LINE characters.
        The notes about the file are added to errors.notes at its end.
        """
        marks, controls = [], list[tuple[int, bytes]]()
        encoding, longest = self.encoding, MAX_WHOLE if is_whole else MAX_LINE
        is_latin = encoding in ("iso8859-1", "iso8859-15")
        for number, raw in enumerate(self._raw_lines(is_whole), start=1):
            if number == 1 and isinstance(raw, bytes) and encoding == "utf-8":
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                text = raw if isinstance(raw, str) else raw.decode(encoding).rstrip("\r\n")
            except UnicodeDecodeError as error:
                self._check_bad_lines()
                errors.add(self.path, number, self._describe(error))
                yield number, None
                continue
            if is_latin and isinstance(raw, bytes) and CONTROLS.search(raw):
                controls.append((number, raw if len(controls) < SAMPLED else b""))
            if BOM in text and text.startswith(BOM):
                text = text.lstrip(BOM)
                marks += [number] if number > 1 else []
            if "\0" in text:
                errors.add(self.path, number, "a NUL character")
            elif len(text) > longest:
                errors.add(self.path, number, f"{len(text):,} characters in one line; at most {longest:,} are read")
            else:
                yield number, text
                continue
            yield number, None
        if marks:
            what = f"this and {len(marks) - 1:,} more lines begin" if len(marks) > 1 else "this line begins"
            errors.notes.append(f"line {marks[0]}: {what} with a byte order mark, as in joined files: left out")
        if controls:
            errors.notes.append(self._describe_controls(controls))
        errors.notes += self.notes

    def _describe_controls(self, lines: list[tuple[int, bytes]]) -> str:
        """Return a warning for lines with control characters, which are quotes, dashes and the euro in cp1252."""
        number, raw = lines[0]
        byte = CONTROLS.search(raw)[0][0]  # type: ignore[index]
        what = f"a control character ({byte:#04x}), which no text has, by data.encoding = {self.options.encoding!r}"
        more = f"this and {count_of(len(lines) - 1, 'more line')} have" if len(lines) > 1 else "this line has"
        hint = describe_bad_encoding([raw for _, raw in lines[:SAMPLED]])
        return f"warning: line {number}: {more} {what}; {hint}"

    def text(self) -> str:
        """Return the text of the file, with its lines ended by line feeds; DataError for bytes that are not text.

        DataError too for a file of more than MAX_WHOLE bytes (no more are read).
        """
        errors = ErrorList()
        if self._content is None and self.path.stat().st_size > MAX_WHOLE:
            raise DataError(f"{self.path}: {describe_too_large()}")
        lines = [text or "" for _, text in self.lines(errors, is_whole=True)]
        errors.raise_if_any()
        self.notes = errors.notes
        return "\n".join(lines)

    def _open(self) -> BinaryIO:
        """Open the file, unpacked where it is compressed; DataError for a file that is no text by its first bytes."""
        stream: BinaryIO = self.path.open("rb") if self._content is None else io.BytesIO(self._content)
        head = stream.read(8)
        for magic, what in NOT_TEXT.items():
            if head.startswith(magic):
                stream.close()
                raise DataError(f"{self.path}: this is {what}")
        stream.seek(0)
        opener = next((opener for magic, opener in OPENERS.items() if head.startswith(magic)), None)
        return opener(stream) if opener else stream

    def _raw_lines(self, is_whole: bool = False) -> Iterator[bytes | str]:
        """Yield the lines without their ends, as bytes, or as text where the encoding has ends that bytes do not show.

        is_whole: as in `_split`.
        """
        with _explain_damage(self.path), self._open() as stream:
            if self.is_wide:
                yield from self._decode_whole(_read_at_most(stream, self.path)).split("\n")
            else:
                yield from self._split(stream, is_whole)

    def _split(self, stream: BinaryIO, is_whole: bool) -> Iterator[bytes]:
        """Yield the lines of a stream, which is read by chunks, so that a line that is too long is never in memory.

        is_whole: whether a line may be the whole file, of MAX_WHOLE bytes. DataError for a longer line, and for a
        compressed file that unpacks to far more than a text does.
        """
        packed = self.path.stat().st_size if self._content is None else len(self._content)
        most = MAX_WHOLE if is_whole and packed <= MAX_WHOLE else MAX_LINE_BYTES
        number, total, size = 1, 0, 0
        begun: list[bytes] = []  # the parts of the line that has not ended yet
        while chunk := stream.read(CHUNK):
            lines = chunk.split(self.line_end)
            begun.append(lines[0])
            if len(lines) > 1:
                yield b"".join(begun)
                yield from lines[1:-1]
                begun, size = [lines[-1]], 0
                number += len(lines) - 1
            total, size = total + len(chunk), size + len(lines[-1])
            if size > most:
                long = f"more than {most:,} bytes without a line end, where a row should be a line of its own"
                raise DataError(f"{self.path}:{number}: {describe_too_large() if most == MAX_WHOLE else long}")
            if total > max(MAX_WHOLE, MAX_PACKING * packed):
                raise DataError(f"{self.path}: unpacks to more than {MAX_PACKING} times its size; {UNPACK}")
        if size:
            yield b"".join(begun)

    def _decode_whole(self, content: bytes) -> str:
        try:
            text = content.decode(self.encoding)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: {self._describe(error, 'file')}") from None
        return text.replace("\r\n", "\n") if "\n" in text else text.replace("\r", "\n")

    def _describe(self, error: UnicodeDecodeError, part: str = "line") -> str:
        byte = error.object[error.start]
        return f"not {self.encoding.upper()} at byte {error.start} of the {part} ({byte:#04x})"

    # The check of the file as a whole. One that should be UTF-8 is read again only if a line of it is not.

    def _inspect(self) -> None:
        with _explain_damage(self.path), self._open() as stream:
            head = stream.read(CHUNK)
            self._check_wide(find_wide_encoding(head))
            is_utf8 = self.encoding != "utf-8" and _is_utf8(head, stream)
        if self.is_wide:
            self._check_wide_text(is_utf8 and b"\0" not in head)
            return
        if b"\r" in head and b"\n" not in head and head.strip(b"\r"):
            self.line_end = b"\r"
            self.notes.append("its lines end in carriage returns alone, as on old Macs")
        if is_utf8 and not head.isascii():
            self._note_utf8(head)

    def _check_wide(self, found: str) -> None:
        if found and not self.encoding.startswith(found[:6]):
            expected = f"data.encoding is {self.encoding}" if self.options.encoding else "UTF-8 is expected"
            raise DataError(f'{self.path}: this is {found[:6].upper()}, and {expected}: data.encoding = "{found}"')

    def _check_wide_text(self, is_utf8: bool) -> None:
        """Read a file of UTF-8, in which nothing looks like UTF-16, as UTF-8."""
        if is_utf8:
            self.encoding, self.is_wide = "utf-8", False
            self.notes.append(f"read as UTF-8, which it is, not by data.encoding = {self.options.encoding!r}")

    def _note_utf8(self, head: bytes) -> None:
        """Read a file as UTF-8 whose mark says so, or say that it may well be UTF-8."""
        given = f"data.encoding = {self.options.encoding!r}"
        if head.startswith(codecs.BOM_UTF8):
            self.encoding = "utf-8"
            self.notes.append(f"read as UTF-8, as its byte order mark says, not by {given}")
        else:
            self.notes.append(f"warning: every line of it is UTF-8, yet it is read by {given}")

    def _check_bad_lines(self) -> None:
        """Raise DataError if the file is in another encoding, rather than UTF-8 with some bad lines.

        It is UTF-8 if more lines show that (they are UTF-8 and not ASCII) than do not. With data.bad_rows = skip, a
        file of which at least half the lines can be read counts as UTF-8, too. Nothing is checked a second time.
        """
        if self.is_checked or self.encoding != "utf-8":
            return
        self.is_checked = True
        bad: list[tuple[int, bytes, UnicodeDecodeError]] = []
        shown = total = 0
        for raw in self._raw_lines():
            total += 1
            if isinstance(raw, str) or raw.isascii():
                continue
            try:
                raw.decode()
                shown += 1
            except UnicodeDecodeError as error:
                bad.append((total, raw, error))
        if len(bad) <= shown or (self.options.bad_rows == "skip" and len(bad) <= total / 2):
            return
        number, _, fault = bad[0]
        more = f", one of {len(bad):,} such lines" if len(bad) > 1 else ""
        hint = describe_bad_encoding([raw for _, raw, _ in bad])
        raise DataError(f"{self.path}:{number}: {self._describe(fault)}{more}; {hint}")


@contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    """Raise DataError in the place of an error of unpacking; other errors of the system are raised as they are."""
    try:
        yield
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{path}: the compressed file is damaged: {error}") from None


def describe_too_large() -> str:
    """Return the reason why a file cannot be read as a whole, with what would work."""
    return (
        f"more than {MAX_WHOLE:,} bytes, too many for a file that is read as a whole; in UTF-8 as .jsonl, with an "
        "object a line, it can have any size"
    )


def _read_at_most(stream: BinaryIO, path: Path) -> bytes:
    """Return the rest of a stream; DataError if it has more than MAX_WHOLE bytes (no more are read)."""
    content = stream.read(MAX_WHOLE + 1)
    if len(content) > MAX_WHOLE:
        raise DataError(f"{path}: {describe_too_large()}")
    return content


def read_whole(path: Path) -> bytes:
    """Return the content of a file or a pipe.

    Raises DataError if it has more than MAX_WHOLE bytes (no more are read), and for a pipe into which nothing is
    written for PIPE_SECONDS, for which a run would wait for ever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer opens at once, too
    with open(descriptor, "rb") as stream:
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(PIPE_SECONDS * 1000):
                raise DataError(f"{path}: a pipe into which nothing was written in {PIPE_SECONDS} s")
        os.set_blocking(descriptor, True)
        return _read_at_most(stream, path)


def _is_utf8(chunk: bytes, stream: BinaryIO) -> bool:
    """Return whether `chunk` and the rest of the stream are UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while chunk:
            decoder.decode(chunk)
            chunk = stream.read(CHUNK)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def read_first_line(path: Path, options: FileOptions) -> str:
    """Return the first line of a file that is not empty, to recognise its format; "" where it cannot be read."""
    try:
        with path.open("rb") as stream:
            wide = find_wide_encoding(stream.read(CHUNK))
        file = TextFile(path, replace(options, encoding=wide or options.encoding))
        return next((text for _, text in file.lines(ErrorList()) if text and text.strip()), "")
    except (OSError, DataError):
        return ""
