# SPDX-License-Identifier: GPL-3.0-or-later
"""What a VM's folder holds, and the one place that deletes: by descriptors, in an order that leaves
no half backup, and never what is not ours."""
import contextlib
import os
import shutil
import subprocess
import threading
import time
import unicodedata

import pytest

import vmbackup
from vmbackup import BackupError, judge, open_folder, opened, remove_folder, scan

PATTERNS = [vmbackup.DEFAULT_PATTERN]
NIGHT = "backup-2026-01-%02d-(02:00:00)"


def leave(top, day=1, vm="web", marker="success", size=7, uuid="ab-1", pattern=NIGHT):
    """A backup of a night, complete."""
    folder = top / (pattern % day)
    (folder / "DISK-xvda").mkdir(parents=True)
    (folder / "VIFs").mkdir()
    for name in ("vm-metadata.xml", "RESTORE.txt", "SHA256SUMS", "DISK-xvda/vbd.cfg",
                 "DISK-xvda/vdi.cfg", "VIFs/vif-0.cfg"):
        (folder / name).write_text("of this program")
    (folder / (vm + ".xva")).write_bytes(b"x" * size)
    (folder / "vm.cfg").write_text("name_label=%s\norig_uuid=%s\n" % (vm, uuid))
    if marker:
        (folder / marker).write_text("created=%d\ntoken\n" % (1767232800 + 86400 * day))
    return folder


def look(top, vm="web", patterns=PATTERNS):
    with opened(str(top)) as fd:
        return {item.name: item for item in scan(fd, patterns, vm)}


def remove(top, name, vm="web"):
    with opened(str(top)) as fd:
        remove_folder(fd, name, vm)


def foreign(folder, vm="web"):
    with opened(str(folder)) as fd:
        try:
            judge(fd, vm)
        except BackupError as error:
            return str(error)[len("it holds ") : -len(", which is not ours")]
    return None


# --- what is there ---

def test_a_backup_is_seen_whole(tmp_path):
    folder = leave(tmp_path, 3)
    found = look(tmp_path)[folder.name]
    assert vmbackup.whole(found)
    assert found == vmbackup.Folder(
        folder.name, 1767232800.0 + 3 * 86400, "success", False, False, "web.xva", 7, "ab-1",
        found.date, "", None, "web", made=1767232800.0 + 3 * 86400)
    assert str(found.date) == "2026-01-03"


@pytest.mark.parametrize("files, expected", [
    ([], "unfinished"),
    (["unfinished.partial"], "unfinished"),
    (["web.xva.partial", "vm.cfg"], "unfinished"),
    ([".DS_Store", "@eaDir/", "._x.partial"], "unfinished"),  # an emptied one
    (["keep"], "pinned"),
    (["unfinished.partial", "keep"], "pinned"),
    (["vm.cfg"], ""),
    (["notes.txt", "._x.partial"], ""),
    (["success", "unfinished.partial"], "marker"),
    (["success/", "web.xva.partial"], "unfinished"),
    (["success_compress", "success_restore"], "marker"),
    (["success", "keep"], "marker pinned"),
])
def test_what_a_folder_is(tmp_path, files, expected):
    folder = tmp_path / (NIGHT % 1)
    folder.mkdir()
    for name in files:
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("")
    found = look(tmp_path)[folder.name]
    told = [name for name in ("marker", "unfinished", "pinned") if getattr(found, name)]
    assert told == expected.split()


def test_only_folders_count_and_links_are_none(tmp_path):
    leave(tmp_path / "elsewhere", 1)
    top = tmp_path / "web"
    top.mkdir()
    (top / "notes").mkdir()
    (top / (NIGHT % 2)).write_text("a file")
    (top / (NIGHT % 1)).symlink_to(tmp_path / "elsewhere" / (NIGHT % 1))
    os.mkfifo(str(top / (NIGHT % 3)))
    assert look(top) == {"notes": vmbackup.Folder("notes")}


@pytest.mark.parametrize("make", [
    lambda path: os.mkfifo(str(path)), lambda path: path.mkdir(),
    lambda path: path.symlink_to("vm.cfg"), lambda path: path.symlink_to("nowhere"),
])
def test_a_marker_is_a_regular_file(tmp_path, make):
    folder = leave(tmp_path, marker=None)
    make(folder / "success")
    assert look(tmp_path)[folder.name].marker is None


@pytest.mark.parametrize("name", ["vm.cfg", "web.xva"])
def test_pipes_in_place_of_files_are_no_wait(tmp_path, name):
    folder = leave(tmp_path)
    (folder / name).unlink()
    os.mkfifo(str(folder / name))
    found = look(tmp_path)[folder.name]
    assert found.marker == "success" and found.size == (0 if name == "web.xva" else 7)
    assert found.uuid == ("" if name == "vm.cfg" else "ab-1")
    assert foreign(folder) == name


@pytest.mark.parametrize("text", [
    "", "created=99999999999999\n", "created=-1\n", "created=12", "x" * 5000, "created=1e9\n"])
def test_odd_markers_date_by_the_name(tmp_path, text):
    folder = leave(tmp_path, 5)
    (folder / "success").write_text(text)
    found = look(tmp_path)[folder.name]
    assert found.marker == "success"
    assert time.strftime("%d %H:%M", time.localtime(found.created)) == "05 02:00"


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    for day in (1, 2):
        leave(tmp_path, day)
    real = os.listdir

    def listdir(fd):
        if os.readlink("/proc/self/fd/%d" % fd).endswith(NIGHT % 1):
            raise OSError(5, "Input/output error")
        return real(fd)

    monkeypatch.setattr(os, "listdir", listdir)
    bad, good = (look(tmp_path)[NIGHT % day] for day in (1, 2))
    assert vmbackup.whole(good)
    assert (bad.error, bad.marker, bad.unfinished) == ("Input/output error", None, False)
    assert bad.created is not None


def test_exports_bear_the_name_of_the_vms_folder(tmp_path):
    folder = leave(tmp_path, size=0)
    (folder / "unpacked.raw").write_text("what a user unpacked")
    assert look(tmp_path)[folder.name].size == 0
    assert look(tmp_path)[folder.name].foreign == "unpacked.raw" == foreign(folder)
    assert look(tmp_path, None)[folder.name].export == "unpacked.raw"


def test_another_form_of_unicode_is_the_same_name(tmp_path):
    """As HFS+ and some SMB servers give names back."""
    composed = unicodedata.normalize("NFC", "k\u00fcche")
    folder = leave(tmp_path, vm=unicodedata.normalize("NFD", composed))
    assert vmbackup.whole(look(tmp_path, composed)[folder.name])
    assert foreign(folder, composed) is None
    remove(tmp_path, folder.name, composed)
    assert not folder.exists()


def test_without_patterns_the_marker_dates(tmp_path):
    leave(tmp_path, 1)
    own, old = leave(tmp_path, 2, pattern="night %d"), leave(tmp_path, 3, pattern="old %d")
    (old / "success").write_text("")
    assert [item.created is None for item in look(tmp_path).values()].count(True) == 2
    found = look(tmp_path, patterns=None)
    assert found[own.name].created == 1767232800.0 + 2 * 86400 and found[old.name].created is None


@pytest.mark.parametrize("name", [
    "web", "a/b", "..", ".x", "", "%", "100%", "%41", "new\nline", "k\u00fcche", "\udcff", "C++"])
def test_a_folders_name_tells_the_vms(name):
    assert vmbackup.vm_name(vmbackup.folder_name(name)) == name


@pytest.mark.parametrize("name, told", [("100%", "100%"), ("50%FF", "50%FF"), ("a b", "a b")])
def test_names_of_folders_that_3_25_made(name, told):
    assert vmbackup.vm_name(name) == told


def test_a_cfg_file_is_read_back(tmp_path):
    (tmp_path / "vm.cfg").write_text("name_label=a\\nb\\\\nc=d\nother=\\x\n")
    with opened(str(tmp_path)) as fd:
        found = vmbackup.read_cfg("vm.cfg", fd)
    assert found["name_label"] == "a\nb\\nc=d" and found["other"] == "\\x"


# --- deletion ---

STREWN = [".DS_Store", "._web.xva", "Thumbs.db", "thumbs.db", "Desktop.ini", ".nfs000012ab00000001",
          ".smbdeleteAAA1b", ".fuse_hidden0001", ".apdisk",
          "@eaDir/web.xva@SynoEAStream", "@eaDir/DISK-xvda/SYNOINDEX_MEDIA_INFO", ".AppleDouble/x",
          ".@__thumb/s800web.jpg", "DISK-xvda/.DS_Store", "VIFs/@eaDir/x"]
USERS = ["notes.txt", "#recycle/web.xva", "@Recycle/x", ".snapshot/x", "$RECYCLE.BIN/x",
         ".Trashes/x", "DS_Store", "DISK-xvda/extra", "DISK-xvda/VIFs/vif-0.cfg", "other.xva",
         "DISK-xvda/web.xva",
         "restore/@eaDir/x", "Thumbs.db/x", ".nfs-mine/x", "success_or_not", "VIFs/vdi.cfg"]


def put(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("strewn")


@pytest.mark.parametrize("name", STREWN)
def test_what_servers_strew_goes_with_the_folder(tmp_path, name):
    folder = leave(tmp_path)
    put(folder, name)
    assert foreign(folder) is None and look(tmp_path)[folder.name].foreign is None
    remove(tmp_path, folder.name)
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize("name", USERS)
def test_what_may_be_a_users_stays(tmp_path, name):
    folder = leave(tmp_path)
    put(folder, name)
    assert foreign(folder) in (name, name.split("/")[0], "/".join(name.split("/")[:2]))
    with pytest.raises(BackupError, match="which is not ours"):
        remove(tmp_path, folder.name)
    assert vmbackup.whole(look(tmp_path)[folder.name]) and (folder / name).exists()


@pytest.mark.parametrize("name, target", [
    ("DISK-xvdb", "outside"), ("VIFs", "outside"), ("@eaDir", "outside"),
    (".DS_Store", "outside/x"), ("web.xva", "outside/x"), ("vm.cfg", "outside/x"),
    ("success", "outside/x")])
def test_links_are_foreign(tmp_path, name, target):
    put(tmp_path, "outside/x")
    folder = leave(tmp_path / "web")
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(str(folder / name)) if (folder / name).is_dir() else (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / target)
    assert foreign(folder) == name
    with pytest.raises(BackupError):
        remove(tmp_path / "web", folder.name)
    assert (tmp_path / "outside" / "x").exists() and (folder / "vm-metadata.xml").exists()


def test_a_nest_without_end_is_foreign(tmp_path):
    folder = leave(tmp_path)
    put(folder, "@eaDir" + "/x" * 300)
    assert foreign(folder).count("/") == vmbackup.DEEPEST
    with pytest.raises(BackupError):
        remove(tmp_path, folder.name)


def test_a_link_in_place_of_the_folder(tmp_path):
    outside = leave(tmp_path / "outside")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / outside.name).symlink_to(outside)
    with pytest.raises(BackupError, match="symbolic link"):
        remove(tmp_path / "web", outside.name)
    assert vmbackup.whole(look(tmp_path / "outside")[outside.name])


def test_a_pinned_one_stays(tmp_path):
    folder = leave(tmp_path)
    (folder / "keep").write_text("")
    with pytest.raises(BackupError, match="pins it"):
        remove(tmp_path, folder.name)
    assert vmbackup.whole(look(tmp_path)[folder.name])


@pytest.mark.parametrize("marker", vmbackup.MARKERS + (None,))
def test_backups_and_unfinished_ones_go(tmp_path, marker):
    folder = leave(tmp_path, marker=marker)
    (folder / "web.xva.partial").write_text("")
    if marker == "success":
        (folder / "success_restore").write_text("")
        (folder / "unfinished.partial").write_text("")
    remove(tmp_path, folder.name)
    assert os.listdir(str(tmp_path)) == []


class Killed(BaseException):
    """In place of SIGKILL."""


STEPS = ("rename", "unlink", "rmdir")


def steps(monkeypatch, act):
    """Calls act(number, name of the function, its arguments) before each change of the disk."""
    count = [0]

    def wrap(name):
        real = getattr(os, name)

        def step(*args, **options):
            count[0] += 1
            act(count[0], name, args)
            return real(*args, **options)

        monkeypatch.setattr(os, name, step)

    for name in STEPS:
        wrap(name)
    return count


@pytest.mark.parametrize("marker", ["success", "success_compressing", None])
def test_killed_at_every_step(tmp_path, monkeypatch, marker):
    """Whatever it leaves is a whole backup, or known as unfinished and removed the next time."""
    last = 0
    for at in range(1, 40):
        top = tmp_path / str(at)
        folder = leave(top, marker=marker)
        if not marker:
            (folder / "unfinished.partial").write_text("")

        def act(number, _name, _args, at=at):
            if number == at:
                raise Killed

        with monkeypatch.context() as patch:
            steps(patch, act)
            try:
                remove(top, folder.name)
                break
            except Killed:
                last = at
        found = look(top)[folder.name]
        assert vmbackup.whole(found) and foreign(folder) is None if found.marker else (
            found.unfinished)
        assert not found.marker or (folder / "vm.cfg").exists()
        remove(top, folder.name)
        assert not folder.exists()
    assert last >= 13


def test_an_error_at_every_step(tmp_path, monkeypatch):
    """The export goes first: what fails on it fails whole."""
    for at in range(1, 40):
        top = tmp_path / str(at)
        folder = leave(top)

        def act(number, name, _args, at=at):
            if number == at:
                raise PermissionError(1, "Operation not permitted")

        with monkeypatch.context() as patch:
            steps(patch, act)
            try:
                remove(top, folder.name)
                break
            except PermissionError:
                pass
        found = look(top)[folder.name]
        assert vmbackup.whole(found) if at <= 2 else found.unfinished
    assert at > 12 and not folder.exists()


def immutable(path):
    done = subprocess.call(["chattr", "+i", str(path)], stderr=subprocess.DEVNULL) == 0
    if not done:
        pytest.skip("this file system knows no immutable files, or this is not root")


@pytest.mark.parametrize("inside", ["web.xva", "success", ""])
def test_an_immutable_file_keeps_the_backup_whole(tmp_path, inside):
    folder = leave(tmp_path)
    before = sorted(os.listdir(str(folder)))
    immutable(folder / inside)
    try:
        with pytest.raises(OSError):
            remove(tmp_path, folder.name)
        assert sorted(os.listdir(str(folder))) == before
        assert vmbackup.whole(look(tmp_path)[folder.name])
    finally:
        subprocess.check_call(["chattr", "-i", str(folder / inside)])


def test_links_swapped_in_between_look_and_deed(tmp_path, monkeypatch):
    """Before each step somebody puts a link in the place of the folder, or of one inside it."""
    for at in range(1, 16):
        for victim in ("", "DISK-xvda", "VIFs"):
            top, outside = tmp_path / ("%d%s" % (at, victim)), tmp_path / ("o%d%s" % (at, victim))
            folder = leave(top)
            other = leave(outside, marker=None)
            (other / "vbd.cfg").write_text("mine")
            (other / "vif-0.cfg").write_text("mine")
            before = sorted(str(path) for path in outside.rglob("*"))

            def act(number, _name, _args, at=at, folder=folder, victim=victim, other=other):
                if number == at and (folder / victim).exists():
                    (folder / victim).replace(folder.parent / "moved away")
                    (folder / victim).symlink_to(other)

            with monkeypatch.context() as patch:
                steps(patch, act)
                with contextlib.suppress(OSError, BackupError):
                    remove(top, folder.name)
            assert sorted(str(path) for path in outside.rglob("*")) == before


def test_a_race_with_links(tmp_path):
    """Another process swaps the folder for a link and back all the time; nothing beyond the link
    is touched."""
    outside = leave(tmp_path / "outside")
    before = sorted(str(path) for path in outside.rglob("*"))
    top, stop = tmp_path / "web", threading.Event()
    top.mkdir()
    (top / "link").symlink_to(outside)

    def swap():
        while not stop.is_set():
            for one, two in ((NIGHT % 1, "aside"), ("link", NIGHT % 1), (NIGHT % 1, "link"),
                             ("aside", NIGHT % 1)):
                with contextlib.suppress(OSError):
                    os.rename(str(top / one), str(top / two))

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(200):
            with contextlib.suppress(OSError, BackupError):
                leave(top)
            with contextlib.suppress(OSError, BackupError):
                remove(top, NIGHT % 1)
    finally:
        stop.set()
        thread.join()
    assert sorted(str(path) for path in outside.rglob("*")) == before


def test_what_comes_in_meanwhile_stays(tmp_path, monkeypatch):
    folder = leave(tmp_path)

    def act(number, _name, _args):
        if number == 3:
            put(folder, "notes.txt")
            put(folder, "VIFs/vif-7.cfg")

    with monkeypatch.context() as patch:
        steps(patch, act)
        with pytest.raises(OSError):
            remove(tmp_path, folder.name)
    assert (folder / "notes.txt").exists() and (folder / "VIFs" / "vif-7.cfg").exists()


def test_no_descriptor_is_left_open(tmp_path):
    before = os.listdir("/proc/self/fd")
    for name in ("", "notes.txt", "@eaDir/x/y", "keep"):
        folder = leave(tmp_path / ("top" + name.replace("/", "-")))
        if name:
            put(folder, name)
        look(folder.parent)
        with contextlib.suppress(BackupError):
            remove(folder.parent, folder.name)
    with pytest.raises(OSError):
        open_folder("nothing there")
    assert len(os.listdir("/proc/self/fd")) == len(before)
