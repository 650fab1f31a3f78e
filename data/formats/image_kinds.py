"""Formats of image files, by the ends of their names and by their first bytes: those that are read, and others."""

from __future__ import annotations

import re
from pathlib import Path

from data.formats.tar_index import TarMember

# File formats, by Pillow's names. The content decides: a PNG named .jpg is read. Other formats run programs (EPS) or
# rarely have photos.
READ = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}
SUFFIXES |= {".ppm", ".pgm", ".pbm", ".pnm"}
# Images in kinds of files that are not read. Camera files are TIFFs by their first bytes, with a small preview.
UNREAD_SUFFIXES = {
    *(".heic", ".heif", ".avif", ".svg", ".svgz", ".jxl", ".jp2", ".j2k", ".jpx", ".jxr", ".psd", ".xcf", ".ico"),
    *(".tga", ".exr", ".hdr", ".pfm", ".dds", ".pcx", ".qoi", ".eps", ".pdf", ".ai", ".wmf", ".emf", ".djvu"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".raw", ".dcm", ".nii", ".npy", ".npz", ".mat"),
}
_READ_STARTS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM....\0\0\0\0|RIFF....WEBP|II[*+]\0|MM\0[*+]|P[1-6]\s+[#\d]", re.DOTALL
)
_UNREAD_STARTS = {
    "HEIC": rb"....ftyp(hei|hev|mif1|msf1)",
    "AVIF": rb"....ftypavi",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "SVG": rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg",
    "Photoshop": rb"8BPS",
    "OpenEXR": rb"\x76\x2f\x31\x01",
    "DICOM": rb".{128}DICM",
    "PDF": rb"%PDF-",
    "PostScript": rb"%!PS",
}
HEAD = 512  # bytes that are enough to know a kind


def is_image_start(head: bytes) -> bool:
    """Return whether a file that starts so is an image of a kind that is read."""
    return _READ_STARTS.match(head) is not None


def unread_kind(head: bytes) -> str:
    """Return the kind of an image file that is not read, by its first bytes; "" for any other file."""
    return next((kind for kind, start in _UNREAD_STARTS.items() if re.match(start, head, re.DOTALL)), "")


def read_head(source: Path | TarMember | bytes) -> bytes:
    """Return the first bytes of a file."""
    if isinstance(source, bytes):
        return source[:HEAD]
    with source.open("rb") as stream:
        return stream.read(HEAD)


def describe_unread(source: Path | TarMember | bytes) -> str:
    """Return the reason why a file is no image that can be read, with what to do."""
    head = read_head(source)
    kind = unread_kind(head)
    if not kind and not isinstance(source, bytes) and source.suffix.lower() in UNREAD_SUFFIXES:
        kind = f"the kind {source.suffix}"
    if kind:
        return f"an image of {kind}, which is not read; save it as PNG or JPEG"
    text = "; it is a web page" if re.match(rb"\s*<(!doctype )?html", head, re.IGNORECASE) else ""
    return f"not an image of a kind that is read: {', '.join(READ)}{text}"
