"""PrunePath in other libraries, connected to each when it is imported."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys

# A module of transformers -> ours that connects to it.
_CONNECTED = {
    "transformers.quantizers.auto": "prunepath.checkpoint.quantizer",
    "transformers.modeling_utils": "prunepath.checkpoint.saving",
}


class _Registration(importlib.abc.MetaPathFinder):
    """Imports a module of ours right after transformers has loaded its own.

    Importing transformers for it would triple the time of `import prunepath`, also for those who need only operators.
    """

    def __init__(self, theirs: str) -> None:
        self._theirs = theirs

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self._theirs:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_register(module) -> None:
            execute(module)
            importlib.import_module(_CONNECTED[fullname])

        spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Lets transformers' models load and save sparse checkpoints, now or once transformers is imported."""
    for theirs, ours in _CONNECTED.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
        else:
            sys.meta_path.insert(0, _Registration(theirs))
