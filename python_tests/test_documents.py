"""What the documents tell a reader to type works."""

import re
import shlex
from pathlib import Path

import pytest

import prunepath

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "README.md").is_file():
    pytest.skip("needs the documents of the source tree", allow_module_level=True)
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_readmes_python_runs(llama, token_texts, small_config, ids, tmp_path, monkeypatch):
    convert = prunepath.convert
    monkeypatch.setattr(prunepath, "convert", lambda *arguments: convert(*arguments, small_config))
    names = {"model": llama, "tokenizer": None, "texts": token_texts, "inputs": {"input_ids": ids}, "out": tmp_path}
    for block in blocks(README):
        exec(block, names)
    assert prunepath.is_sparse(names["model"])
    assert names["mask"].shape == (2, 64)
    assert names["y"].shape == (2, 32)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_line_has_options_that_exist(document):
    from typer.main import get_command

    from prunepath.cli.app import app

    commands = get_command(app).commands
    lines = re.findall(r"^(?: {4}|\$ )prunepath ([a-z]+)(.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    assert lines or document.name != "README.md"
    for name, rest in lines:
        assert name in commands, f"{document.name} names the command {name}"
        known = {option for parameter in commands[name].params for option in parameter.opts}
        used = {word.partition("=")[0] for word in shlex.split(rest, comments=True) if word.startswith("--")}
        assert used <= known | {"--help"}, f"{document.name}: prunepath {name} has no {used - known}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file(document):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_every_folder_of_the_table_is_there():
    folders = re.findall(r"^\| `([^|]*)` \|", README, re.MULTILINE)
    assert len(folders) > 15
    missing = [name for cell in folders for name in re.split("`, `", cell) if not (ROOT / name).exists()]
    assert missing == []
