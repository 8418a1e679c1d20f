import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import prunepath
from prunepath import native

PACKAGE = Path(prunepath.__file__).parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def run_python(code: str, folder: Path) -> str:
    """Standard output of `code` in a new interpreter that finds its packages in `folder` first."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def loader_only(tmp_path):
    """A package of the loader and the errors alone, without any library."""
    package = tmp_path / "prunepath"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("native.py", "errors.py"):
        shutil.copy(PACKAGE / name, package)
    return package


def break_missing(path):
    path.unlink(missing_ok=True)


def break_empty(path):
    path.touch()


def break_not_a_library(path):
    path.write_text("not a library")


def break_undefined_symbol(path):
    source = path.with_suffix(".c")
    source.write_text("extern int prunepath_no_such_symbol; int *use = &prunepath_no_such_symbol;\n")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler to make a library with an undefined symbol")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", path], check=True)


def test_library_loads():
    assert native.error() is None
    native.require()
    assert torch.ops.prunepath.route.default is not None


def test_cuda_library_is_explained_where_torch_has_no_cuda():
    if torch.version.cuda is not None:
        pytest.skip("this torch is a CUDA build")
    assert native.cuda_error() == (
        f"PrunePath's library _C_cuda needs a CUDA build of torch, got torch {torch.__version__}."
    )


@pytest.mark.gpu
def test_cuda_library_loads_with_a_gpu():
    assert native.cuda_error() is None


@pytest.mark.parametrize(
    ("break_library", "expected"),
    [
        (break_missing, "_C is missing: expected"),
        (break_empty, "_C does not load (/"),
        (break_not_a_library, "_C does not load (/"),
        (break_undefined_symbol, "undefined symbol: prunepath_no_such_symbol"),
    ],
)
def test_library_that_does_not_load_is_one_sentence(loader_only, break_library, expected):
    break_library(loader_only / f"_C{SUFFIX}")
    output = run_python(
        "from prunepath import native\n"
        "from prunepath.errors import NativeLibraryError, PrunePathError\n"
        "print(native.error())\n"
        "try:\n    native.require()\n"
        "except RuntimeError as error:\n"
        "    print(error, type(error) is NativeLibraryError, isinstance(error, PrunePathError))\n",
        loader_only.parent,
    )
    sentence, raised = output.splitlines()
    assert expected in sentence and "pip install ." in sentence
    assert sentence.endswith(".")
    assert raised == f"{sentence} True True"


def test_old_torch_is_one_sentence(loader_only):
    output = run_python(
        "import torch; torch.__version__ = '2.10.1'\nfrom prunepath import native\nprint(native.error())\n",
        loader_only.parent,
    )
    assert output == "PrunePath's library _C needs torch 2.11 or newer, got torch 2.10.1.\n"


def test_prunepath_imports_without_its_library(tmp_path):
    skipped = shutil.ignore_patterns("_C*", "__pycache__", "model")
    shutil.copytree(PACKAGE, tmp_path / "prunepath", ignore=skipped)
    output = run_python("import prunepath\nfrom prunepath import native\nprint(native.error())\n", tmp_path)
    assert "_C is missing" in output


def test_allocations_are_poisoned():
    assert torch.empty(64).isnan().all()
    # The call that torch::stable::empty makes.
    assert torch.ops.aten.empty.memory_format([64], dtype=torch.bfloat16).isnan().all()
    assert torch.ops.aten.empty.memory_format([64], dtype=torch.int32).eq(torch.iinfo(torch.int32).max).all()


def test_host_module_describes_build_and_processor():
    from prunepath import _host

    info = _host.build_info()
    assert list(info) == ["compiler", "cxx_standard", "build_type", "torch_headers", "cuda"]
    assert info["cxx_standard"] >= 202002
    assert tuple(map(int, info["torch_headers"].split(".")[:2])) >= (2, 11)
    features = _host.cpu_features()
    assert all(type(present) is bool for present in features.values())
    flags = Path("/proc/cpuinfo")
    if "avx2" in features and flags.exists():
        words = set(flags.read_text().split())
        for name in ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"):
            assert features[name] == (name in words), name
