"""PEP 517 backend: setuptools, which asks for torch only where the host has no usable torch headers.

The native libraries need torch's headers and link libraries, never a running torch. Under pip's build
isolation `import torch` fails even where torch is installed, and listing torch in `build-system.requires`
would download a second one, so the host's is looked for as a folder.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that this file does not change)

MIN_TORCH = (2, 11)


def find_torch() -> Path | None:
    """Folder of an installed torch package with stable-ABI headers of at least MIN_TORCH, or None.

    $PRUNEPATH_TORCH_DIR, when set, is the only place looked at; a folder that does not serve ends the build.
    """
    chosen = os.environ.get("PRUNEPATH_TORCH_DIR")
    if chosen:
        version = torch_header_version(Path(chosen))
        if version is None or version < MIN_TORCH:
            came = "no stable-ABI headers" if version is None else "torch " + ".".join(map(str, version))
            raise SystemExit(
                f"PRUNEPATH_TORCH_DIR must be the folder of a torch package of version 2.11 or newer (the "
                f"one with include/ and lib/ in it), but {chosen} has {came}."
            )
        return Path(chosen).resolve()
    for folder in _site_folders():
        torch_dir = Path(folder) / "torch"
        version = torch_header_version(torch_dir)
        if version is not None and version >= MIN_TORCH:
            return torch_dir.resolve()
    return None


def torch_header_version(torch_dir: Path) -> tuple[int, int, int] | None:
    """(major, minor, patch) of the headers in a torch package's folder; None without stable-ABI headers."""
    include = torch_dir / "include" / "torch"
    try:
        text = (include / "headeronly" / "version.h").read_text()
    except OSError:
        return None
    parts = [re.search(rf"#define TORCH_VERSION_{part} (\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    if not all(parts) or not (include / "csrc" / "stable" / "library.h").exists():
        return None
    return tuple(int(part.group(1)) for part in parts)


def find_cxx() -> str:
    """The C++ compiler's path: $CXX, else the first of c++, g++ and clang++. Without one, ends the build."""
    chosen = os.environ.get("CXX")
    for name in [shlex.split(chosen)[0]] if chosen else ["c++", "g++", "clang++"]:
        path = shutil.which(name)
        if path:
            return path
    came = f"CXX is {chosen!r}, which is not a program" if chosen else "none of c++, g++, clang++ is on PATH"
    raise SystemExit(
        f"PrunePath's native libraries need a C++20 compiler, but {came}; install one (Debian, Ubuntu: "
        f"apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install) or point CXX at it."
    )


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    find_cxx()  # before torch is downloaded for a build that cannot succeed
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    return requires if find_torch() else [*requires, f"torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}"]


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return get_requires_for_build_wheel(config_settings)


def _site_folders() -> Iterator[str]:
    yield from sys.path
    # pip's isolated build runs this interpreter with site-packages off sys.path; sysconfig still names it.
    yield from {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # `build` and uv isolate with a virtual environment of their own: the active one and the base interpreter
    # are where the user's torch is. uv replaces VIRTUAL_ENV, and leaves the active one's programs on PATH.
    on_path = [Path(folder).parent for folder in os.get_exec_path() if Path(folder).is_absolute()]
    active = [str(prefix) for prefix in on_path if (prefix / "pyvenv.cfg").is_file()]
    for prefix in (os.environ.get("VIRTUAL_ENV"), *active, sys.base_prefix):
        if prefix:
            scheme = "venv" if "venv" in sysconfig.get_scheme_names() else sysconfig.get_default_scheme()
            for key in ("purelib", "platlib"):
                yield sysconfig.get_path(key, scheme, vars={"base": prefix, "platbase": prefix})
    yield from site.getsitepackages()
    yield site.getusersitepackages()
