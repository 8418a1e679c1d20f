"""Texts for converting and evaluating, streamed from files, folders, JSON lines and `datasets` names."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from prunepath.errors import PrunePathError

# A longer text file is given in pieces of this many characters, each ending with a line where there is one,
# so that a corpus of any size is streamed.
PIECE_CHARACTERS = 1 << 20
_JSON_SUFFIXES = (".jsonl", ".json")
_FILE_SUFFIXES = (".txt", ".md", ".py", ".gz", *_JSON_SUFFIXES)


def load_texts(sources: Sequence[str | Path] | str | Path, *, text_column: str = "text") -> Texts:
    """Opens text sources for streaming.

    Args:
        sources: one or several of: a UTF-8 text file; a folder, whose UTF-8 text files are read recursively
            in sorted order (hidden ones, and with a warning those that are not text, are left out); a
            `.jsonl` or `.json` file with one JSON object a line; any of these files with `.gz` added; the
            name of a dataset for the `datasets` package as `name`, `name:split` or `name/config:split`, where
            the split is `train` unless named.
        text_column: the string field of a JSON object, or the column of a dataset, that holds the text.

    Returns:
        An iterable of non-empty strings. Every iteration starts from the beginning.

    Raises:
        PrunePathError: a source that does not exist, cannot be read, or holds no text; the sentence names it.
            What can only be seen further into a source is raised while iterating.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    return Texts([str(source) for source in sources], text_column)


class Texts:
    """The re-iterable that `load_texts` returns."""

    def __init__(self, sources: list[str], text_column: str) -> None:
        if not sources:
            raise PrunePathError("Expected at least one text file, folder, JSONL file or dataset name, got none.")
        self.sources = sources
        self.text_column = text_column
        self._warned: set[str] = set()
        # Every source gives its first text now, so that a mistake costs no work.
        for source in sources:
            next(self._read(source))

    def __iter__(self) -> Iterator[str]:
        for source in self.sources:
            yield from self._read(source)

    def _read(self, source: str) -> Iterator[str]:
        path = Path(source)
        empty = True
        for text in self._read_any(source, path):
            if text.strip():
                empty = False
                yield text
        if empty:
            kind = "the folder" if path.is_dir() else "the file" if path.is_file() else "the dataset"
            raise PrunePathError(f"Expected text in {source}, but {kind} holds none.")

    def _read_any(self, source: str, path: Path) -> Iterator[str]:
        try:
            if path.is_dir():
                yield from self._read_folder(path)
            elif path.is_file():
                yield from self._read_file(path, json_lines=_plain_suffix(path) in _JSON_SUFFIXES)
            elif path.exists():
                raise PrunePathError(f"Expected a file or a folder, but {source} is neither.")
            else:
                yield from _read_dataset(source, self.text_column)
        # A damaged gzip stream ends early (EOFError), or has a bad header or checksum (OSError, zlib.error).
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise PrunePathError(f"{source} cannot be read as text: {reason}.") from error

    def _read_folder(self, folder: Path) -> Iterator[str]:
        skipped = files = 0
        for path in _walk(folder):
            files += 1
            if _is_text(path):
                # In a folder a `.json` file is mostly one document; only `.jsonl` promises one a line.
                yield from self._read_file(path, json_lines=_plain_suffix(path) == ".jsonl")
            else:
                skipped += 1
        if files == 0:
            raise PrunePathError(f"Expected UTF-8 text files in the folder {folder}, but it has no files.")
        if skipped == files:
            raise PrunePathError(
                f"Expected UTF-8 text files in the folder {folder}, but none of its {files} files is one."
            )
        if skipped and str(folder) not in self._warned:
            self._warned.add(str(folder))
            warnings.warn(f"{skipped} of {files} files in {folder} are not UTF-8 text: skipped.", stacklevel=2)

    def _read_file(self, path: Path, *, json_lines: bool) -> Iterator[str]:
        try:
            with _open(path) as file:
                yield from _json_texts(path, file, self.text_column) if json_lines else _pieces(file)
        except UnicodeDecodeError as error:
            raise PrunePathError(
                f"Expected UTF-8 text in {path}, but it has the byte "
                f"0x{error.object[error.start]:02x} where no character can start or go on."
            ) from error


def _open(path: Path):
    # newline="" keeps line ends as they are; utf-8-sig drops a byte order mark.
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _plain_suffix(path: Path) -> str:
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return name.suffix.lower()


def _pieces(file) -> Iterator[str]:
    rest = ""
    while block := file.read(PIECE_CHARACTERS):
        text = rest + block
        cut = text.rfind("\n") + 1
        if len(text) < PIECE_CHARACTERS:
            rest = text
        elif 0 < cut:
            yield text[:cut]
            rest = text[cut:]
        else:
            yield text
            rest = ""
    if rest:
        yield rest


def _json_texts(path: Path, file, text_column: str) -> Iterator[str]:
    expected = f'Expected one JSON object a line with the string field "{text_column}"'
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PrunePathError(
                f"{expected}, but line {number} of {path} is not JSON: {error.msg} at column {error.colno}."
            ) from error
        if not isinstance(row, dict):
            raise PrunePathError(f"{expected}, but line {number} of {path} is a JSON {_json_type(row)}.")
        if not isinstance(row.get(text_column), str):
            fields = ", ".join(row) or "none"
            raise PrunePathError(f"{expected}, but line {number} of {path} has no such field; its fields: {fields}.")
        yield row[text_column]


def _json_type(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _walk(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _is_text(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as file:
        try:
            while block := file.read(1 << 20):
                if "\0" in decoder.decode(block):
                    return False
            decoder.decode(b"", final=True)
        except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile):
            return False
    return True


def _read_dataset(source: str, text_column: str) -> Iterator[str]:
    name, _, split = source.partition(":")
    # `corpus.txt`, `./corpus` and `/data/corpus` mean a path; only `name` or `owner/name` can be a dataset.
    if name.startswith((".", "/", "~")) or Path(name).suffix in _FILE_SUFFIXES:
        raise PrunePathError(f"Expected a text file, folder or JSONL file, but {source} does not exist.")
    try:
        import datasets
    except ImportError as error:
        raise PrunePathError(
            f"{source} is neither a file nor a folder; to read it as a dataset install the datasets package "
            "(pip install datasets)."
        ) from error

    candidates = [(name, None)]
    if "/" in name:
        candidates.append(tuple(name.rsplit("/", 1)))
    failures = []
    for dataset, config in candidates:
        try:
            rows = datasets.load_dataset(dataset, config, split=split or "train", streaming=True)
            break
        except Exception as error:  # the package has no class of its own for bad names, networks and files
            first_line = (str(error).strip() or "no reason given").splitlines()[0]
            failures.append(f"{type(error).__name__}: {first_line}")
    else:
        raise PrunePathError(
            f"{source} is neither a file nor a folder, and the datasets package cannot load it "
            f"({failures[0].rstrip('.')})."
        )
    for row in rows:
        if not isinstance(row.get(text_column), str):
            columns = ", ".join(row)
            raise PrunePathError(
                f"Expected the string column {text_column!r} in the dataset {source}; its columns: {columns}."
            )
        yield row[text_column]
