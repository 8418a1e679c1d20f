"""Who may import whom: nothing imports to its right in LAYERS, and some third parties have one home."""

import ast
import subprocess
import sys
from pathlib import Path

import prunepath.triton_kernels
import pytest

import prunepath

PACKAGE = Path(prunepath.__file__).parent
TRITON = Path(prunepath.triton_kernels.__file__).parent

# The package itself stands just above what it re-exports.
LAYERS = [
    ("prunepath.triton_kernels",),
    ("prunepath.ops",),
    ("prunepath.nn",),
    ("prunepath.families",),
    ("prunepath.checkpoint.description",),
    ("prunepath.budgets",),
    ("prunepath.checkpoint",),
    ("prunepath.calibration", "prunepath.train"),
    ("prunepath.conversion",),
    ("prunepath.memory", "prunepath.integrations", "prunepath.train.finetune"),
    ("prunepath",),
    ("prunepath.eval",),
    ("prunepath.demo",),
    ("prunepath.cli",),
]
# Anyone may import these; they import none but each other. `_host` is compiled.
LEAVES = ("prunepath.errors", "prunepath.config", "prunepath.native", "prunepath.data", "prunepath._host")
# Module prefix -> the third parties it may import; the first match holds.
THIRD_PARTIES = {
    "prunepath.triton_kernels": {"torch", "triton"},
    "prunepath.ops.reference": {"torch"},
    "prunepath.ops": {"torch"},
    "prunepath.native": {"torch"},
    "prunepath.demo.corpus": set(),
    "prunepath.errors": set(),
    "prunepath.config": set(),
}


def modules() -> dict[str, tuple[Path, bool]]:
    """Every module's name -> (file, whether it is a package)."""
    found = {}
    for root, name in ((PACKAGE, "prunepath"), (TRITON, "prunepath.triton_kernels")):
        for path in sorted(root.rglob("*.py")):
            parts = [name, *path.relative_to(root).with_suffix("").parts]
            package = parts[-1] == "__init__"
            found[".".join(parts[:-1] if package else parts)] = (path, package)
    return found


MODULES = modules()


def imports(name: str, source: str, is_package: bool) -> set[str]:
    """Names of all that a module imports, in functions too; `from a import b` is a.b if that is a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                anchor = parts[: len(parts) - node.level + is_package]
                base = ".".join([*anchor, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in MODULES or full in LEAVES else base)
    return found


def rank(name: str) -> int:
    best = max(
        ((len(layer), i) for i, layers in enumerate(LAYERS) for layer in layers if within(name, layer)),
        default=None,
    )
    assert best is not None and (best[1] != LAYERS.index(("prunepath",)) or name == "prunepath"), (
        f"{name} has no place in LAYERS"
    )
    return best[1]


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def violations(name: str, source: str, is_package: bool) -> list[str]:
    found = []
    imported = imports(name, source, is_package)
    for other in sorted(imported):
        if within(other, "prunepath"):
            if other in LEAVES:
                continue
            if name in LEAVES:
                found.append(f"{name} is a leaf and imports {other}")
            elif rank(other) > rank(name):
                found.append(f"{name} imports {other}, which is to its right")
            continue
        package = other.split(".")[0]
        if package in sys.stdlib_module_names:
            continue
        allowed = next((names for prefix, names in THIRD_PARTIES.items() if within(name, prefix)), None)
        if allowed is not None and package not in allowed:
            found.append(f"{name} imports {package}")
        if package == "matplotlib" and name.split(".")[-1] != "plots":
            found.append(f"{name} imports matplotlib, which is for plots alone")
        if package in ("transformers", "safetensors") and within(name, "prunepath.nn"):
            found.append(f"{name} imports {package}, which is not for layers below families")
    if name == "prunepath.ops.reference":
        found += [f"{name} imports {other}" for other in imported if within(other, "prunepath")]
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_keep_to_the_layers(name):
    path, is_package = MODULES[name]
    assert violations(name, path.read_text(encoding="utf-8"), is_package) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("prunepath.nn.router", "import prunepath.budgets"),
        ("prunepath.nn.router", "from prunepath import budgets"),
        ("prunepath.nn.router", "from ..conversion.convert import convert"),
        ("prunepath.nn.router", "import safetensors"),
        ("prunepath.budgets", "from prunepath.checkpoint import loading"),
        ("prunepath.checkpoint.loading", "from prunepath.train import router"),
        ("prunepath.train.router", "from prunepath.train import finetune"),
        ("prunepath.nn.router", "from prunepath import set_budget"),
        ("prunepath.nn.router", "def lazy():\n    import transformers"),
        ("prunepath.errors", "import prunepath.ops"),
        ("prunepath.ops.reference", "from prunepath import native"),
        ("prunepath.triton_kernels.route", "import prunepath.ops"),
        ("prunepath.ops", "import numpy"),
        ("prunepath.eval.perplexity", "import matplotlib.pyplot"),
        ("prunepath.eval.perplexity", "import prunepath.cli"),
    ],
)
def test_a_forbidden_import_is_seen(name, source):
    assert violations(name, source, is_package=False) != []


HEAVY = ("torch", "transformers", "numpy", "matplotlib", "datasets", "rich")


@pytest.mark.parametrize("code", ["import prunepath", "from prunepath.cli.app import app"])
def test_what_every_command_imports_is_light(code, tmp_path):
    code = f"import sys; {code}; print(sorted({set(HEAVY)} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout == "[]\n", result.stderr
