"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import uuid


def write(place: str, data: bytes) -> None:
    """Write beside the place, and move there when all is on the disk.

    Whatever goes wrong before (a full disk, Ctrl-C), what stood there stays and nothing is left beside it; a process
    that is killed may leave the file beside it (see `remove_leftovers`).

    Parameters
    ----------
    place : str
        A real path (no link, which would be replaced). The permissions of a file that stands there are kept.
    data : bytes

    Raises
    ------
    OSError
        As the system says.
    """
    temporary = os.path.join(os.path.dirname(place), f".{os.path.basename(place)}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(place, temporary)
        os.replace(temporary, place)
    except BaseException:  # Ctrl-C, too
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    # The name is in the folder, which has to reach the disk, too. Not every system can be told.
    with contextlib.suppress(OSError):
        folder = os.open(os.path.dirname(place), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(place: str) -> None:
    """Remove what killed writers of this place have left beside it. There must be no other writer."""
    folder, name = os.path.split(place)
    for leftover in glob.glob(f".{glob.escape(name)}.{'[0-9a-f]' * 32}.tmp", root_dir=folder):
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(folder, leftover))
