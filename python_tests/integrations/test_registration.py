"""Sparse checkpoints load sparse, whichever of prunepath and transformers is imported first."""

import subprocess
import sys

import pytest


@pytest.fixture
def run(tmp_path):
    """Runs a script in a process of its own, away from the source folder, and returns what it prints."""

    def run(script):
        result = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True
        )
        return result.stdout.strip()

    return run


def test_importing_prunepath_does_not_import_transformers(run):
    assert run("import sys, prunepath; print('transformers' in sys.modules)") == "False"


@pytest.mark.parametrize("first", ["prunepath", "transformers", "transformers.quantizers"])
def test_the_quantizer_is_registered_in_either_order(run, first):
    script = (
        f"import {first}, prunepath, transformers, torch\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING\n"
        "print(AUTO_QUANTIZER_MAPPING['prunepath'].__name__, AUTO_QUANTIZATION_CONFIG_MAPPING['prunepath'].__name__)\n"
        "print(torch.ops.prunepath.route(torch.zeros(1, 4), 0.5)[2].tolist())"
    )
    assert run(script).splitlines() == ["PrunePathQuantizer PrunePathQuantizationConfig", "[2]"]


def test_without_lm_eval_its_integration_says_what_to_install(run):
    script = (
        "import runpy, sys\n"
        "sys.modules['lm_eval'] = None\n"
        "for name in ('module', '__main__'):\n"
        "    try:\n"
        "        runpy.run_module('prunepath.integrations.lm_eval', run_name=name)\n"
        "    except BaseException as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    messages = run(script).splitlines()
    assert [message.split()[0] for message in messages] == ["PrunePathError", "SystemExit"]
    assert all(message.endswith("pip install 'prunepath[eval]'.") for message in messages)
