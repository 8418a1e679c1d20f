"""Router training that was interrupted: a file to go on from."""

from __future__ import annotations

import io
import os
import pickle
import time
from pathlib import Path
from typing import Any

import torch

from prunepath.errors import PrunePathError

SAVE_SECONDS = 30.0
"""How much training an interruption costs at most."""


class RouterState:
    """Keeps the state of a router training in a file, which appears whole or not at all.

    Args:
        path: the file.
        fingerprint: of the model, the data and the configuration; another's state is refused.
    """

    def __init__(self, path: str | os.PathLike, fingerprint: str) -> None:
        self.path = Path(path).absolute()
        self.fingerprint = fingerprint
        self._saved = time.monotonic()

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """What was saved last; None if there is no file.

        Raises:
            PrunePathError: for a file that cannot be read, or of another conversion.
        """
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location=device, weights_only=True)
            fingerprint = state.pop("fingerprint")
        except (OSError, RuntimeError, EOFError, KeyError, AttributeError, pickle.UnpicklingError) as error:
            raise PrunePathError(f"Expected {self.path} to be an interrupted conversion, but: {error}.") from error
        if fingerprint != self.fingerprint:
            raise PrunePathError(
                f"Expected {self.path} to be from the same model, data and configuration, but it is from others: "
                "remove it to begin anew."
            )
        return state

    def is_due(self) -> bool:
        """Whether the last `save` was `SAVE_SECONDS` ago."""
        return time.monotonic() - self._saved >= SAVE_SECONDS

    def save(self, state: dict[str, Any]) -> None:
        """Replaces what was saved.

        Args:
            state: tensors, numbers, strings, and lists and dicts of them.
        """
        temporary = self.path.with_name(f"{self.path.name}.writing")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                # torch.save itself would turn a full disk into an error of its own.
                buffer = io.BytesIO()
                torch.save({**state, "fingerprint": self.fingerprint}, buffer)
                temporary.write_bytes(buffer.getbuffer())
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise PrunePathError(f"Expected to write the conversion's state {self.path}, but: {error}.") from error
        self._saved = time.monotonic()
