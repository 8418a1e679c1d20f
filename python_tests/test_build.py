"""The build: what a wheel holds, which torch it is built against, how a build that cannot succeed says so."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
TORCH = Path(torch.__file__).parent


def run(code: str, source: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Runs `code` in a new interpreter in the source folder, no build variable set but by the test."""
    own = ("PRUNEPATH_TORCH_DIR", "PRUNEPATH_CUDA", "PRUNEPATH_BUILD_DIR", "CMAKE_ARGS", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, '.')\n{code}"],
        cwd=source,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


def last_line(result: subprocess.CompletedProcess) -> str:
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source tree with the leavings of other builds in it."""
    copy = tmp_path_factory.mktemp("source") / "prunepath"
    skipped = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "dist", "prunepath-demo")
    shutil.copytree(ROOT, copy, ignore=skipped)
    stale = next(iter((copy / "prunepath").glob("*.py"))).read_bytes()
    for path in (
        f"prunepath/_C_stale{SUFFIX}",
        f"prunepath/_C_cuda{SUFFIX}",
        "build/lib/prunepath/stale.py",
        f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/prunepath/stale.py",
    ):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes(stale)
    return copy


def test_wheel_holds_the_package_and_nothing_else(source, tmp_path):
    result = run(
        f"import build_backend; build_backend.build_wheel({str(tmp_path)!r})",
        source,
        PRUNEPATH_CUDA="0",
        CMAKE_ARGS="-DCMAKE_CXX_FLAGS_RELEASE=-O0",
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if ".dist-info/" not in name}

    libraries = {name for name in packed if name.endswith(".so")}
    assert libraries == {f"prunepath/_C{SUFFIX}", f"prunepath/_host{SUFFIX}"}
    expected = {
        f"prunepath/{path.relative_to(ROOT / 'prunepath').as_posix()}"
        for pattern in ("*.py", "demo/model/*", "eval/*.jinja")
        for path in (ROOT / "prunepath").rglob(pattern)
    } | {
        f"prunepath/triton_kernels/{path.relative_to(ROOT / 'triton_kernels').as_posix()}"
        for path in (ROOT / "triton_kernels").rglob("*.py")
    }
    assert packed - libraries == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_sdist_holds_what_a_build_needs(source, tmp_path):
    result = run(f"import build_backend; build_backend.build_sdist({str(tmp_path)!r})", source)
    assert result.returncode == 0, result.stderr[-5000:]
    (sdist,) = tmp_path.glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    folders = ("csrc", "prunepath", "triton_kernels", "python_tests")
    patterns = (".cpp", ".h", ".cu", ".cuh", ".py", ".jinja")
    needed = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in patterns
    } | {"pyproject.toml", "setup.py", "build_backend.py", "CMakeLists.txt", "README.md", "LICENSE"}
    assert needed <= names
    assert not {name for name in names if name.endswith(".so")}


def test_isolated_build_finds_the_hosts_torch():
    # As in pip's isolated builds: this interpreter, whose site-packages are off sys.path.
    result = run(
        "from setuptools import build_meta\n"
        "build_meta.get_requires_for_build_wheel = lambda settings: []\n"
        "sys.path = [path for path in sys.path if not path.endswith('-packages')]\n"
        "import build_backend\n"
        "print(build_backend.find_torch(), build_backend.get_requires_for_build_wheel())",
    )
    assert result.returncode == 0, result.stderr
    found, requires = result.stdout.splitlines()[-1].split(" ", 1)
    assert Path(found) == TORCH.resolve()
    assert "torch" not in requires


def test_isolated_build_finds_the_torch_of_an_environment_on_the_path(tmp_path):
    # As in uv's builds: an interpreter of another environment, which is the active one, too.
    version = "#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 12\n#define TORCH_VERSION_PATCH 0\n"
    (tmp_path / "pyvenv.cfg").touch()
    site = sysconfig.get_path("purelib", "venv", vars={"base": str(tmp_path), "platbase": str(tmp_path)})
    include = Path(site) / "torch" / "include" / "torch"
    (include / "headeronly").mkdir(parents=True)
    (include / "csrc" / "stable").mkdir(parents=True)
    (include / "csrc" / "stable" / "library.h").touch()
    (include / "headeronly" / "version.h").write_text(version)
    code = (
        "import build_backend, sysconfig\n"
        "sys.path = [path for path in sys.path if not path.endswith('-packages')]\n"
        "own = sysconfig.get_path\n"
        "sysconfig.get_path = lambda name, *rest, **more: own(name, *rest, **more) if rest else '/nowhere'\n"
        "print(build_backend.find_torch())"
    )
    path = os.pathsep.join(["/usr/bin", str(tmp_path / "bin"), os.environ["PATH"]])
    result = run(code, PATH=path, VIRTUAL_ENV=str(tmp_path / "another"))
    assert result.stdout.strip() == str((Path(site) / "torch").resolve()), result.stderr


def test_torch_is_asked_for_where_there_is_none():
    result = run(
        "import build_backend\n"
        "build_backend._site_folders = lambda: []\n"
        "wheel = build_backend.get_requires_for_build_wheel()\n"
        "editable = build_backend.get_requires_for_build_editable()\n"
        "print('\\n', wheel, editable)"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == " ['torch>=2.11'] ['torch>=2.11']"


def test_old_torch_is_passed_over(tmp_path):
    include = tmp_path / "torch" / "include" / "torch"
    (include / "headeronly").mkdir(parents=True)
    (include / "csrc" / "stable").mkdir(parents=True)
    (include / "csrc" / "stable" / "library.h").touch()
    version = "#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 10\n#define TORCH_VERSION_PATCH 1\n"
    (include / "headeronly" / "version.h").write_text(version)
    code = (
        "import build_backend\n"
        f"build_backend._site_folders = lambda: [{str(tmp_path)!r}, {str(TORCH.parent)!r}]\n"
        "print(build_backend.find_torch())"
    )
    assert run(code).stdout.strip() == str(TORCH.resolve())
    result = run(code, PRUNEPATH_TORCH_DIR=str(tmp_path / "torch"))
    assert result.returncode != 0
    assert last_line(result).endswith(f"{tmp_path / 'torch'} has torch 2.10.1.")


def test_torch_dir_that_is_none_is_one_sentence(tmp_path):
    result = run("import build_backend; build_backend.find_torch()", PRUNEPATH_TORCH_DIR=str(tmp_path))
    assert result.returncode != 0
    assert last_line(result).startswith("PRUNEPATH_TORCH_DIR must be the folder of a torch package")
    assert "Traceback" not in result.stderr


def test_missing_compiler_is_one_sentence(tmp_path):
    hook = "import build_backend; build_backend.get_requires_for_build_wheel()"
    arguments = ["setup.py", "build_ext", "--build-lib", str(tmp_path)]
    build = f"sys.argv = {arguments}; __file__ = 'setup.py'; exec(open('setup.py').read())"
    for code in (hook, build):
        result = run(code, CXX="/nonexistent", PRUNEPATH_CUDA="0")
        assert result.returncode != 0
        assert last_line(result).startswith(
            "PrunePath's native libraries need a C++20 compiler, but CXX is '/nonexistent'"
        )
        assert "Traceback" not in result.stderr


def test_no_compiler_on_the_path_is_one_sentence(tmp_path):
    result = run("import build_backend; build_backend.find_cxx()", PATH=str(tmp_path), CXX="")
    assert result.returncode != 0
    assert "none of c++, g++, clang++ is on PATH" in last_line(result)


def test_unknown_cuda_setting_is_one_sentence():
    code = "__file__ = 'setup.py'; sys.argv = ['setup.py', '--version']; exec(open('setup.py').read())"
    result = run(code, PRUNEPATH_CUDA="yes")
    assert result.returncode != 0
    assert last_line(result) == "PRUNEPATH_CUDA must be 0, 1 or auto, got 'yes'."
