"""The pictures of a folder and its subfolders, those behind links too."""

from __future__ import annotations

import os
from pathlib import Path

from graphs.records.progress import Note

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def picture_files(folder: Path, note: Note | None = None) -> list[Path]:
    """Every file with a picture's suffix, sorted. A folder that is reached twice, also in a circle, counts once.

    Folders that lie there themselves come before those behind links, so that a picture has the shorter of its names.
    A folder that cannot be opened is named and left out.
    """
    files: list[Path] = []
    seen: set[tuple[int, int]] = set()
    own, links = [folder], list[Path]()
    while own or links:
        place = own.pop() if own else links.pop(0)
        try:
            status = place.stat()
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                continue
            seen.add(identity)
            with os.scandir(place) as entries:
                for entry in sorted(entries, key=lambda path: path.name):
                    path = place / entry.name
                    if entry.is_dir():
                        (links if entry.is_symlink() else own).append(path)
                    elif path.suffix.lower() in PICTURE_SUFFIXES:
                        files.append(path)
        except OSError as error:
            if note is not None:
                note(f"skipped: {place}: {error.strerror}")
    return sorted(files)
