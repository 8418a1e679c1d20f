"""PrunePath in other libraries, connected to each when it is imported."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys

_TRANSFORMERS = "transformers.quantizers.auto"


class _Registration(importlib.abc.MetaPathFinder):
    """Registers the quantizer right after transformers has loaded its own.

    Importing transformers for it would triple the time of `import prunepath`, also for those who need only operators.
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _TRANSFORMERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_register(module) -> None:
            execute(module)
            importlib.import_module("prunepath.checkpoint.quantizer")

        spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Lets transformers' `from_pretrained` load sparse checkpoints, now or once transformers is imported."""
    if _TRANSFORMERS in sys.modules:
        importlib.import_module("prunepath.checkpoint.quantizer")
    else:
        sys.meta_path.insert(0, _Registration())
