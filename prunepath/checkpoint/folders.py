"""Output folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from prunepath.errors import PrunePathError


def check_output_folder(out: str | os.PathLike) -> Path:
    """`out` as a path, if a folder can appear there: it does not exist or is empty, and its parent can be written."""
    out = Path(out)
    try:
        if out.is_dir() and any(out.iterdir()):
            raise PrunePathError(f"Expected an output folder that is new or empty, but {out} has files in it.")
        if out.exists() and not out.is_dir():
            raise PrunePathError(f"Expected an output folder, but {out} is a file.")
        existing = next(parent for parent in out.absolute().parents if parent.exists())
    except OSError as error:
        raise PrunePathError(f"Expected an output folder, but {out} cannot be read: {error}.") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PrunePathError(f"Expected an output folder in a place that can be written, but {existing} cannot.")
    return out


@contextlib.contextmanager
def whole_folder(out: str | os.PathLike, resume: str | None = None) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends without an error, and else vanishes.

    What a killed process left there is removed. With `resume`, a text that names the work, the folder stays after an
    error too, and a later block of the same text finds what is in it.
    """
    out = check_output_folder(out)
    temporary = out.absolute().with_name(f".{out.name}.partial")
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
            work = temporary / ".work"
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
            work.unlink(missing_ok=True)
            os.replace(temporary, out)
        except BaseException:
            if resume is None:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
