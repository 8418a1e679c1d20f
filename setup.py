"""Builds the native libraries with CMake and Ninja; the metadata is in pyproject.toml. Never imports torch.

Environment: PRUNEPATH_TORCH_DIR (folder of a torch package), PRUNEPATH_CUDA (0: no CUDA library, 1: must be),
PRUNEPATH_BUILD_DIR (keeps CMake's folder, for incremental builds), CXX, CUDACXX, CUDAARCHS, CMAKE_ARGS.
"""

import atexit
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # setuptools runs this file as text: its folder need not be on sys.path

from build_backend import find_cxx, find_torch  # noqa: E402


def temporary_folder(prefix: str) -> str:
    folder = tempfile.mkdtemp(prefix=prefix)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def find_nvcc() -> str | None:
    """nvcc's path, or None where the CUDA library is not to be built."""
    wanted = os.environ.get("PRUNEPATH_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"PRUNEPATH_CUDA must be 0, 1 or auto, got {wanted!r}.")
    if wanted == "0" or not any((ROOT / "csrc" / "cuda").glob("*.cu")):
        return None
    homes = filter(None, [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")])
    names = [
        os.environ.get("CUDACXX"),
        *(f"{home}/bin/nvcc" for home in homes),
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
    ]
    nvcc = next(filter(None, map(shutil.which, filter(None, names))), None)
    if nvcc is None and wanted == "1":
        raise SystemExit(
            "PRUNEPATH_CUDA=1 asks for the CUDA library, but nvcc was found neither in $CUDACXX, $CUDA_HOME "
            "nor on PATH; install the CUDA toolkit (12 or newer) or point CUDACXX at its nvcc."
        )
    return nvcc


def find_tool(name: str, bin_dir_attribute: str) -> str:
    """Path of cmake or ninja: the Python package's, which is recent, before the system's."""
    try:
        package = __import__(name)
        path = shutil.which(name, path=getattr(package, bin_dir_attribute))
    except (ImportError, AttributeError):
        path = None
    path = path or shutil.which(name)
    if path is None:
        raise SystemExit(f"Building PrunePath needs {name}, which is not installed: pip install {name}.")
    return path


class CMakeBuild(build_ext):
    """Builds every declared extension in one CMake run."""

    def build_extensions(self) -> None:
        cxx = find_cxx()
        torch_dir = find_torch()
        if torch_dir is None:
            raise SystemExit(
                "Building PrunePath needs torch's headers (2.11 or newer), and no installed torch was found; "
                "install torch, point PRUNEPATH_TORCH_DIR at its folder, or let pip isolate the build."
            )
        python_include = sysconfig.get_path("include")
        if not Path(python_include, "Python.h").exists():
            raise SystemExit(
                f"Building PrunePath needs Python's headers, but {python_include}/Python.h does not exist; "
                f"install them (Debian, Ubuntu: apt install python3-dev)."
            )
        import pybind11

        nvcc = find_nvcc()
        # A folder left in the tree caches the path of an isolated build's Ninja, which is deleted with it.
        build_dir = os.environ.get("PRUNEPATH_BUILD_DIR") or temporary_folder("prunepath-cmake-")
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        configure = [
            *(cmake, "-S", str(ROOT), "-B", build_dir, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'BIN_DIR')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPRUNEPATH_TORCH_DIR={torch_dir}",
            f"-DPRUNEPATH_PYBIND11_INCLUDE={pybind11.get_include()}",
            f"-DPRUNEPATH_PYTHON_INCLUDE={python_include}",
            f"-DPRUNEPATH_CUDA={'ON' if nvcc else 'OFF'}",
            *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
            *([] if os.environ.get("CXX") else [f"-DCMAKE_CXX_COMPILER={cxx}"]),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        hint = " PRUNEPATH_CUDA=0 builds without CUDA." if nvcc else ""
        for step in (configure, [cmake, "--build", build_dir]):
            print(shlex.join(step), flush=True)
            if subprocess.run(step).returncode != 0:
                raise SystemExit(f"PrunePath's native libraries did not build: CMake's output above says why.{hint}")
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # A new file, not new bytes in the old one: a process that has it mapped keeps what it loaded.
            staged = target.with_suffix(".new")
            shutil.copy2(Path(build_dir, extension.name.rpartition(".")[2] + ".so"), staged)
            staged.replace(target)


class CleanBuild(build):
    """Assembles wheels in a temporary folder: what earlier builds left in build/ would be packed too."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_base = temporary_folder("prunepath-build-")


names = ["_C", "_host", *(["_C_cuda"] if find_nvcc() else [])]

setup(
    packages=[
        *find_packages(include=["prunepath", "prunepath.*"]),
        "prunepath.triton_kernels",
        *(f"prunepath.triton_kernels.{name}" for name in find_packages("triton_kernels")),
    ],
    package_dir={"prunepath.triton_kernels": "triton_kernels"},
    include_package_data=False,  # else libraries built in place, of other settings, would be packed
    package_data={"prunepath.demo": ["model/*"], "prunepath.eval": ["*.jinja"]},
    # Declared one by one, so that an editable install keeps them. The sources are CMakeLists.txt's affair.
    ext_modules=[Extension(f"prunepath.{name}", sources=[]) for name in names],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
