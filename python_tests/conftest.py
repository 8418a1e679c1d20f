"""Settings of every test: poisoned allocations, few threads, and the `gpu` marker."""

import importlib.util
import os

# OpenMP's threads spin while they wait, which starves the other workers' threads. Read when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# xdist runs one worker a core. Two threads each still exercise the parallel code.
torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def _poisoned_allocations():
    """Fills every uninitialised tensor that Python makes with NaN (integers: their maximum), so that reading it shows.

    The C++ operators allocate their results below the layer where this happens; their tests hand poisoned tensors to
    the `.out` overloads instead.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU: torch.cuda.is_available() is False")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


def pytest_report_header():
    spec = importlib.util.find_spec("prunepath")
    return f"prunepath under test: {spec and spec.origin}; torch {torch.__version__}; CPU kernel: {_cpu_kernel()}"


def _cpu_kernel() -> str:
    from prunepath import errors, ops

    try:
        return ops.cpu_kernel()
    except errors.PrunePathError as error:
        return str(error)
