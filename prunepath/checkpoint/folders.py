"""Output folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from prunepath.errors import PrunePathError

_INSIDE = ".partial"
"""The temporary folder's name where it is inside the output folder."""
_IGNORED = {_INSIDE, "lost+found"}  # the latter is in a new file system's root


def check_output_folder(out: str | os.PathLike) -> Path:
    """`out` as a path, if a folder can appear there: it does not exist or is empty, and its place can be written."""
    out = Path(out)
    try:
        place = out.resolve()
        if place.is_dir() and any(entry.name not in _IGNORED for entry in place.iterdir()):
            raise PrunePathError(f"Expected an output folder that is new or empty, but {out} has files in it.")
        if place.exists() and not place.is_dir():
            raise PrunePathError(f"Expected an output folder, but {out} is a file.")
        existing = place if _must_stay(place) else next(parent for parent in place.parents if parent.exists())
    except (OSError, RuntimeError) as error:  # RuntimeError: a symbolic link that leads to itself
        raise PrunePathError(f"Expected an output folder, but {out} cannot be read: {error}.") from error
    if not existing.is_dir() or not _is_writable(existing):
        raise PrunePathError(f"Expected an output folder in a place that can be written, but {existing} cannot.")
    return out


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _must_stay(place: Path) -> bool:
    """Whether a folder cannot be replaced by another: a mount point, the working folder, a guest in another's place."""
    if not place.is_dir():
        return False
    return place.is_mount() or place == Path.cwd() or not _is_writable(place.parent)


@contextlib.contextmanager
def whole_folder(out: str | os.PathLike, resume: str | None = None) -> Iterator[Path]:
    """A temporary folder that takes the name `out` when the block ends without an error, and else vanishes.

    It lies beside `out`, or inside where an empty folder `out` has to stay, whose files then appear one by one, the
    configuration last. What a killed process left there is removed. With `resume`, a text that names the work, the
    folder stays after an error too, and a later block of the same text finds what is in it.
    """
    out = check_output_folder(out)
    place = out.resolve()
    stays = _must_stay(place)
    temporary = place / _INSIDE if stays else place.with_name(f".{place.name}.partial")
    work = temporary / ".work"
    with contextlib.ExitStack() as stack:
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir(exist_ok=True)
            handle = os.open(temporary, os.O_RDONLY)
            stack.callback(os.close, handle)
            # The system gives the lock up with its process, however that ends.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(handle), os.stat(temporary)):
                raise BlockingIOError
            if resume is None or not work.is_file() or work.read_text(encoding="utf-8") != resume:
                for entry in temporary.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                if resume is not None:
                    work.write_text(resume, encoding="utf-8")
        except (BlockingIOError, FileNotFoundError):
            raise PrunePathError(f"Expected to be alone in writing {out}, but another process does as well.") from None
        except OSError as error:
            raise PrunePathError(f"Expected a place where the folder {out} can be written, but: {error}.") from error
        try:
            yield temporary
        except BaseException:
            if resume is None:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        try:
            if stays:
                entries = [entry for entry in temporary.iterdir() if entry != work]
                for entry in sorted(entries, key=lambda entry: entry.name == "config.json"):
                    entry.replace(place / entry.name)
                shutil.rmtree(temporary)
            else:
                temporary.replace(place)
                (place / work.name).unlink(missing_ok=True)
        except OSError as error:
            raise PrunePathError(
                f"Expected to give a finished folder the name {out}, but: {error.strerror or error}; it is {temporary}."
            ) from error
