"""Runs Triton kernels in Triton's interpreter, on CPU tensors."""

import os
import subprocess
import sys

import pytest
import torch

# Triton reads TRITON_INTERPRET when it is imported, so interpreted kernels need a process of their own. The package
# is loaded by its path: the kernels need torch and Triton alone.
PROGRAM = """
import importlib, importlib.util, sys
import torch

# As in the tests' own process: an output that is not written shows.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
spec = importlib.util.spec_from_file_location("kernels", sys.argv[1])
package = importlib.util.module_from_spec(spec)
sys.modules["kernels"] = package
spec.loader.exec_module(package)
results = []
for name, args, options in torch.load(sys.argv[2]):
    module = importlib.import_module("kernels." + {"select": "route"}.get(name, name))
    results.append(getattr(module, name)(*args, **options))
torch.save(results, sys.argv[3])
"""


@pytest.fixture
def interpret(tmp_path):
    """A function from a list of (operator, arguments, options) to what the Triton operator returns for each."""
    pytest.importorskip("triton", reason="needs the package triton")
    import prunepath.triton_kernels

    def run(calls):
        given, returned = tmp_path / "calls.pt", tmp_path / "results.pt"
        torch.save(calls, given)
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, prunepath.triton_kernels.__file__, given, returned],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return torch.load(returned)

    return run
