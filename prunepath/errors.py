"""Errors whose message is one sentence meant for the user: what was expected, and what came."""


class PrunePathError(ValueError):
    """An input that PrunePath cannot work with. The command line prints it and exits with code 2."""


class NativeLibraryError(PrunePathError, RuntimeError):
    """A compiled library (`_C`, `_C_cuda`, `_host`) is missing or does not load."""


class BackendError(PrunePathError, RuntimeError):
    """A backend that was asked for is not available on this machine or device."""


class CheckpointError(PrunePathError):
    """A checkpoint that is truncated, inconsistent, or of a format this version does not know."""
