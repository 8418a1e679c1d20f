"""Output folders appear whole or not at all, and what is finished is never deleted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import prunepath
from prunepath.checkpoint.folders import check_output_folder, whole_folder
from prunepath.errors import PrunePathError


def write(out, resume=None):
    with whole_folder(out, resume) as folder:
        (folder / "config.json").write_text("config")
        (folder / "model.safetensors").write_text("model")
        (folder / "more").mkdir()
        (folder / "more" / "file").write_text("more")


def content(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


WHOLE = ["config.json", "model.safetensors", "more", "more/file"]


@pytest.mark.parametrize("resume", [None, "work"])
def test_new_folders_and_their_parents_appear(resume, tmp_path):
    write(tmp_path / "new" / "folder", resume)
    assert content(tmp_path) == ["new", "new/folder", *(f"new/folder/{name}" for name in WHOLE)]


@pytest.mark.parametrize("out", [".", "", "./", "../out"])
@pytest.mark.parametrize("resume", [None, "work"])
def test_the_working_folder_stays_and_is_filled(out, resume, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    before = Path(".").stat().st_ino
    write(out, resume)
    assert content(".") == content(tmp_path / "out") == WHOLE
    assert Path(".").stat().st_ino == before == (tmp_path / "out").stat().st_ino


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "link") == content(tmp_path / "real") == WHOLE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_link_to_nothing_leads_to_a_new_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "real") == WHOLE


def test_an_empty_mount_point_is_filled(tmp_path, monkeypatch):
    """A folder of another file system cannot be replaced, nor take the name of one beside it."""
    mount = tmp_path / "mount"
    mount.mkdir()
    (mount / "lost+found").mkdir()
    replace = Path.replace

    def refused_across_file_systems(self, target):
        if Path(target) == mount or (mount in self.parents) != (mount in Path(target).parents):
            raise OSError(16, "Device or resource busy")
        return replace(self, target)

    monkeypatch.setattr(Path, "is_mount", lambda self: self == mount)
    monkeypatch.setattr(Path, "replace", refused_across_file_systems)
    write(mount)
    assert content(mount) == sorted([*WHOLE, "lost+found"])
    assert list(tmp_path.iterdir()) == [mount]


def test_a_real_mount_point_is_filled(tmp_path):
    """The same in a mount namespace of its own, where the system lets tests make one."""
    script = f'mount -t tmpfs none {tmp_path} && exec {sys.executable} -c "$0"'
    python = (
        "from prunepath.checkpoint.folders import whole_folder\n"
        f"with whole_folder({str(tmp_path)!r}) as folder:\n"
        "    (folder / 'config.json').write_text('config')\n"
        "import os\n"
        f"print(os.listdir({str(tmp_path)!r}))\n"
    )
    try:
        probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if probe.returncode:
        pytest.skip("mount namespaces are not allowed here")
    result = subprocess.run(["unshare", "-rm", "sh", "-c", script, python], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "['config.json']", result.stderr


def test_a_folder_in_a_place_that_cannot_be_written_is_filled(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    write(out)
    assert content(tmp_path) == ["out", *(f"out/{name}" for name in WHOLE)]
    with pytest.raises(PrunePathError, match="in a place that can be written"):
        check_output_folder(tmp_path / "other")


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing(stays, error, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    if stays:
        monkeypatch.chdir(out)
    with pytest.raises(error), whole_folder(out) as folder:
        (folder / "half").write_text("half")
        raise error
    assert content(tmp_path) == ["out"]


@pytest.mark.parametrize("stays", [False, True])
def test_work_survives_errors_until_it_is_whole(stays, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    if stays:
        monkeypatch.chdir(out)
    with pytest.raises(ValueError), whole_folder(out, resume="this work") as folder:
        (folder / "state").write_text("half")
        raise ValueError
    check_output_folder(out)
    with whole_folder(out, resume="this work") as folder:
        assert (folder / "state").read_text() == "half"
        (folder / "config.json").write_text("config")
    assert content(tmp_path) == ["out", "out/config.json", "out/state"]


def test_other_work_begins_anew(tmp_path):
    with pytest.raises(ValueError), whole_folder(tmp_path / "out", resume="this work") as folder:
        (folder / "state").write_text("half")
        raise ValueError
    with whole_folder(tmp_path / "out", resume="other work") as folder:
        assert not (folder / "state").exists()
    assert content(tmp_path) == ["out"]


@pytest.mark.parametrize("resume", [None, "work"])
def test_what_cannot_take_its_name_survives_and_says_where_it_is(resume, tmp_path, monkeypatch):
    def fails(self, target):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(PrunePathError, match=r"Device or resource busy; it is .*\.out\.partial\.$"):
        write(tmp_path / "out", resume)
    assert set(content(tmp_path / ".out.partial")) >= set(WHOLE)
    if resume:
        monkeypatch.undo()
        with whole_folder(tmp_path / "out", resume) as folder:
            assert (folder / "config.json").read_text() == "config", "the work goes on from there"


def test_what_is_in_the_way_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (
        ("full", "has files in it"),
        ("file", "is a file"),
        ("loop", "cannot"),
        ("file/in", "cannot"),
    ):
        with pytest.raises(PrunePathError, match=message):
            write(tmp_path / name)
    assert content(tmp_path) == ["file", "full", "full/notes.txt", "loop"]


def test_two_processes_do_not_write_one_folder(tmp_path):
    with whole_folder(tmp_path / "out") as folder:
        (folder / "mine").write_text("mine")
        with pytest.raises(PrunePathError, match="another process"), whole_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_a_failed_save_leaves_nothing(llama, tmp_path, monkeypatch):
    def fails_half_way(folder):
        (folder / "half").write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(llama, "save_pretrained", fails_half_way)
    with pytest.raises(prunepath.PrunePathError, match="No space left"):
        prunepath.save(llama, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_saved_folders_have_ordinary_permissions(llama, tmp_path):
    prunepath.save(llama, None, tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
