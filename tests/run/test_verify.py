# SPDX-License-Identifier: GPL-3.0-or-later
"""verify: every backup on disk is proved again, by its files alone, and nothing is changed."""
import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from simulator.client import Simulator
from simulator.pool import MIB, Pool, disk, vif
from support.harness import SCRIPT, Site, finish, start, vmbackup
from support.upstream import folder_name, leave_backup
from support.world import everything_below, wait_until

FORMS = {"xva": [], "xva.gz": ["compress=gzip"], "xva.zst": ["compress=zstd"],
         "raw": ["vdi_export_format=raw"], "vhd": ["vdi_export_format=vhd"]}
VMS = ["web", "db"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{form: backup_dir with a backup of each VM}, made once by real runs, and left alone."""
    pool, found = Pool(), {}
    for name in VMS:
        pool.vm(name, vifs=[vif()], disks=[disk(2 * MIB + 512, "root", seed=name, device="xvda"),
                                           disk(MIB, "data", seed=2, device="xvdb")])
    with Simulator.start(pool) as sim:
        for form, words in FORMS.items():
            folder = tmp_path_factory.mktemp("form")
            kind = "vdi-export" if form in ("raw", "vhd") else "vm-export"
            here = Site(sim, folder)
            here.configure(*[kind + "=" + name for name in VMS])
            result = here.run(*words)
            assert result.status == 0, result
            found[form] = here.backups
    return found


@pytest.fixture
def backups(made, tmp_path):
    """backups(form) is a backup_dir of one's own."""
    def copy(form):
        top = tmp_path / "backups"
        shutil.copytree(str(made[form]), str(top))
        return top

    return copy


def of(top, vm="web"):
    (folder,) = (top / vm).iterdir()
    return folder


def export_in(folder):
    (path,) = [path for path in folder.iterdir() if re.search(r"\.(xva(\.gz|\.zst)?|raw|vhd)$",
                                                              path.name)]
    return path


def flip(path, at):
    """Changes one bit."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def checked(*words, **options):
    """Runs verify and returns its Result, having seen that it changed nothing."""
    top = str(options.pop("top", words[0]))
    before = everything_below(top)
    result = vmbackup("verify", *words, **options)
    assert everything_below(top) == before
    return result


def verdicts(result):
    """{VM: text after its verdict} and the verdicts, from the lines of verify."""
    line = re.compile(r"VmBackup verify (.*)/backup-[^/]* - \*\*\*(Success|ERROR)\*\*\* (.*)\Z")
    found = map(line.match, result.lines)
    return {match.group(1): match.groups()[1:] for match in found if match}


# --- good trees -----------------------------------------------------------------------------------

@pytest.mark.parametrize("form, proved", [
    ("xva", ["archive (2 disks", "chunk hashes"]), ("xva.gz", ["gzip", "archive (2 disks"]),
    ("xva.zst", ["zstd", "archive (2 disks"]), ("raw", ["size (%d bytes)" % (2 * MIB + 512)]),
    ("vhd", ["VHD (footers"])])
def test_a_good_tree(made, form, proved):
    result = checked(made[form])
    assert (result.status, result.err) == (0, ""), result
    told = verdicts(result)
    assert sorted(told) == sorted(VMS)
    for vm in VMS:
        verdict, text = told[vm]
        assert verdict == "Success"
        folder = of(made[form], vm)
        files = sum(path.is_file() for path in folder.rglob("*")) - 2  # its sums and the marker
        assert text.startswith("sha256 of %d files" % files)
        assert all(words in text for words in proved), text
        assert "NOT" not in text
    assert result.lines[-1] == "VmBackup verify ended - Success - S:2 W:0 E:0"


def test_what_may_be_named(made, tmp_path):
    """A config file, backup_dir, a VM's folder, one backup; and of the first two one VM alone."""
    top = made["xva"]
    config = tmp_path / "weekend.cfg"
    config.write_text("backup_dir=/nonexistent\nvm-export=db\nhost=nobody.invalid\n"
                      "backup_dir=%s\n" % top)
    for words, found in (
            ([config], VMS), ([top], VMS), ([top / "web"], ["web"]), ([of(top)], ["web"]),
            ([config, "db"], ["db"]), ([top, "db"], ["db"])):
        result = checked(*words, top=top)
        assert result.status == 0, result
        assert sorted(verdicts(result)) == sorted(found)
    result = vmbackup("verify", os.path.relpath(str(top), str(tmp_path)), cwd=tmp_path)
    assert sorted(verdicts(result)) == sorted(VMS)


@pytest.mark.parametrize("words, told", [
    ([], "Missing: "), (["a", "b", "c"], "invalid parameter c"),
    (["nothing"], "no such config file or folder: "),
])
def test_words_that_name_nothing(words, told, tmp_path):
    result = vmbackup("verify", *words, cwd=tmp_path)
    assert result.status == 3
    assert told in result.out + result.err
    assert len(result.lines) <= 1


def test_no_backup_is_no_proof(made, tmp_path):
    result = checked(made["xva"], "nobody")
    assert result.status == 2
    assert result.has("no marked backup of nobody in %s" % made["xva"])
    assert checked(tmp_path).status == 2


def test_it_needs_neither_network_nor_password_nor_a_package(made, tmp_path):
    """The host of the config file is a listener that nobody calls, and XenAPI and requests cannot
    be imported."""
    (tmp_path / "XenAPI.py").write_text("raise ImportError('not here')\n")
    (tmp_path / "requests.py").write_text("raise ImportError('not here')\n")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        config = tmp_path / "weekend.cfg"
        config.write_text("backup_dir=%s\nvm-export=.*\nhost=127.0.0.1:%d\n" % (
            made["xva"], listener.getsockname()[1]))
        result = checked(config, top=made["xva"], env={"PYTHONPATH": str(tmp_path)})
        assert result.status == 0, result
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_names_with_other_characters(site):
    here = site(Pool())
    names = ["a/b", ".web", "50%", "Büro 東京", "success"]
    for name in names:
        here.sim.add_vm({"name": name, "disks": [disk(4096)]})
    here.configure("vm-export=")
    assert here.run().status == 0
    assert len(verdicts(checked(here.config, top=here.path))) == len(names)
    for name in names:
        result = checked(here.backups, name)
        assert result.status == 0, result
        assert result.lines[-1].endswith("S:1 W:0 E:0")


# --- damage ---------------------------------------------------------------------------------------

def remove_line(name):
    def damage(folder):
        path = folder / "SHA256SUMS"
        lines = path.read_text().splitlines(True)
        kept = [line for line in lines if not line.endswith("  %s\n" % name)]
        assert len(kept) == len(lines) - 1
        path.write_text("".join(kept))
    return damage


def cut(count):
    def damage(folder):
        path = export_in(folder)
        os.truncate(str(path), path.stat().st_size - count)
    return damage


def another_export(folder):
    shutil.copy(str(export_in(folder)), str(folder / "copy.xva"))


DAMAGE = {
    "a bit of the export": (lambda folder: flip(export_in(folder), MIB), "."),
    "its first byte": (lambda folder: flip(export_in(folder), 0), "."),
    "its last byte": (lambda folder: flip(export_in(folder), export_in(folder).stat().st_size - 1),
                      "."),
    "its last byte is missing": (cut(1), "."),
    "its last block is missing": (cut(512), "."),
    "a MiB of it is missing": (cut(MIB), "."),
    "no byte of it is left": (lambda folder: os.truncate(str(export_in(folder)), 0), "."),
    "no export": (lambda folder: export_in(folder).unlink(), "0 exports"),
    "two exports": (another_export, "2 exports"),
    "a bit of vm.cfg": (lambda folder: flip(folder / "vm.cfg", 3), "vm.cfg does not match"),
    "a bit of a disk's": (lambda folder: flip(folder / "DISK-xvda" / "vbd.cfg", 3),
                          "DISK-xvda/vbd.cfg does not match"),
    "a bit of a network's": (lambda folder: flip(folder / "VIFs" / "vif-0.cfg", 3),
                             "VIFs/vif-0.cfg does not match"),
    "no vm-metadata.xml": (lambda folder: (folder / "vm-metadata.xml").unlink(), "vm-metadata.xml"),
    "no vm.cfg": (lambda folder: (folder / "vm.cfg").unlink(), "vm.cfg"),
    "a bit of a sum": (lambda folder: flip(folder / "SHA256SUMS", 5), "SHA256SUMS|does not match"),
    "no sums at all": (lambda folder: (folder / "SHA256SUMS").unlink(),
                       "not listed in SHA256SUMS"),
    "half of the sums": (lambda folder: os.truncate(
        str(folder / "SHA256SUMS"), (folder / "SHA256SUMS").stat().st_size // 2), "SHA256SUMS"),
    "no sum of the export": (lambda folder: remove_line(export_in(folder).name)(folder),
                             "SHA256SUMS does not list"),
    "no sum of vm.cfg": (remove_line("vm.cfg"), "vm.cfg is not listed"),
}


@pytest.mark.parametrize("form", sorted(FORMS))
def test_damage_is_found_and_named_and_the_others_are_proved_all_the_same(made, tmp_path, form):
    """Each damage has a VM of its own, in one tree."""
    top = tmp_path / "backups"
    for what, (damage, _) in DAMAGE.items():
        shutil.copytree(str(made[form] / "web"), str(top / what))
        damage(of(top, what))
    shutil.copytree(str(made[form] / "db"), str(top / "good"))
    result = checked(top)
    assert result.status == 2, result
    told = verdicts(result)
    assert told.pop("good")[0] == "Success"
    wrong = {what: told.get(what) for what, (_, why) in DAMAGE.items()
             if what not in told or told[what][0] != "ERROR" or not re.search(why, told[what][1])}
    assert not wrong
    assert len(told) == len(DAMAGE)
    assert result.lines[-1] == "VmBackup verify ended - **ERRORS DETECTED** - S:1 W:0 E:%d" % len(
        DAMAGE)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_each_damage_alone_costs_the_exit_status(backups, form):
    top = backups(form)
    flip(export_in(of(top)), MIB)
    result = checked(top)
    assert result.status == 2
    assert {vm: verdict for vm, (verdict, _) in verdicts(result).items()} == {
        "web": "ERROR", "db": "Success"}
    assert checked(top, "db").status == 0


def test_the_archive_is_checked_too_and_not_the_sums_alone(backups):
    """Sums that fit a damaged export, as of a backup that was damaged before it was summed."""
    for form in ("xva", "xva.gz", "vhd"):
        top = backups(form)
        path = export_in(of(top))
        before = hashlib.sha256(path.read_bytes()).hexdigest()
        flip(path, 1000 if form == "vhd" else MIB)
        sums = of(top) / "SHA256SUMS"
        after = hashlib.sha256(path.read_bytes()).hexdigest()
        sums.write_text(sums.read_text().replace(before, after))
        result = checked(top)
        assert verdicts(result)["web"][0] == "ERROR", (form, result)
        assert "SHA256SUMS" not in verdicts(result)["web"][1]
        shutil.rmtree(str(top))


def test_what_bears_no_marker_is_no_backup(backups):
    top = backups("xva")
    (of(top) / "success").unlink()
    export_in(of(top)).write_bytes(b"whatever")
    result = checked(top)
    assert result.status == 0, result
    assert list(verdicts(result)) == ["db"]


# --- backups of 3.25 ------------------------------------------------------------------------------

@pytest.mark.parametrize("marker", ["success", "success_restore", "success_compress",
                                    "success_compressing"])
def test_a_backup_without_sums_gets_the_check_of_its_structure(made, tmp_path, marker):
    top = tmp_path / "backups"
    suffix = "xva.gz" if "compress" in marker else "xva"
    for vm in ("good", "bad"):
        folder = leave_backup(top, vm, 5, marker, suffix)
        shutil.copy(str(export_in(of(made[suffix]))), str(folder / ("%s.%s" % (vm, suffix))))
    os.truncate(str(export_in(of(top, "bad"))), MIB)
    result = checked(top)
    assert result.status == 2, result
    told = verdicts(result)
    assert told["good"][0] == "Success"
    assert "NOT sha256 (no SHA256SUMS)" in told["good"][1]
    assert "archive (2 disks" in told["good"][1]
    assert told["bad"][0] == "ERROR"
    assert checked(top / "good").status == 0


def test_a_disk_of_325_has_the_size_that_its_vdi_cfg_tells(tmp_path):
    for vm, data in (("good", bytes(MIB)), ("rounded", bytes(2 * MIB)), ("short", bytes(MIB - 512)),
                     ("long", b"x" * (MIB + 512))):
        (leave_backup(tmp_path, vm, 5, suffix="raw") / (vm + ".raw")).write_bytes(data)
    told = verdicts(checked(tmp_path))
    assert {vm: verdict for vm, (verdict, _) in told.items()} == {
        "good": "Success", "rounded": "Success", "short": "ERROR", "long": "ERROR"}
    (tmp_path / "good" / folder_name(5) / "DISK-xvda" / "vdi.cfg").unlink()
    assert "NOT its size" in verdicts(checked(tmp_path))["good"][1]


# --- beside a run ---------------------------------------------------------------------------------

def test_verify_while_a_run_is_going_on(site):
    here = site(Pool())
    for name in VMS:
        here.sim.add_vm({"name": name, "disks": [disk(3 * MIB, content={"random": 1})]})
    here.configure("vm-export=web", "vm-export=db", "max_backups=1", "parallel=2")
    assert here.run().status == 0
    fault = here.sim.fault("export_silence", after=MIB, seconds=3600)
    process = here.start()
    try:
        while len(list(here.backups.glob("[!.]*/*/*.xva.partial"))) < 2:
            assert process.poll() is None
        result = vmbackup("verify", here.config)
        assert result.status == 0, result
        assert sorted(verdicts(result)) == sorted(VMS)
        assert result.lines[-1].endswith("S:2 W:0 E:0")
    finally:
        here.sim.clear_faults(fault)
        assert finish(process).status == 0
    assert checked(here.config, top=here.path).status == 0


@pytest.mark.parametrize("signum", [2, 15])
def test_a_signal_ends_verify(tmp_path, signum):
    with (tmp_path / "web.raw").open("wb") as file:
        file.truncate(1 << 42)
    process = start("verify", tmp_path / "web.raw")
    wait_until(lambda: "web.raw" in open_files(process.pid))
    process.send_signal(signum)
    result = finish(process, timeout=20)
    assert result.status == 128 + signum, result


def open_files(pid):
    """Names of what a process has open."""
    found = []
    for item in Path("/proc/%d/fd" % pid).iterdir():
        with contextlib.suppress(OSError):
            found.append(os.path.basename(os.readlink(str(item))))
    return found


# --- what may lie in a folder, and what may not ---------------------------------------------------

def resum(folder, *gone):
    """Deletes files and folders and their lines in SHA256SUMS."""
    sums = folder / "SHA256SUMS"
    lines = sums.read_text(encoding="utf-8").splitlines(True)
    for name in gone:
        path = folder / name
        shutil.rmtree(str(path)) if path.is_dir() else path.unlink()
        lines = [line for line in lines if not line[66:].startswith(name)]
    sums.write_text("".join(lines), encoding="utf-8")


def add_line(text):
    return lambda folder: (folder / "SHA256SUMS").open("a").write(text) and None


def instead(name, make):
    """Something else lies in place of a file."""
    def damage(folder):
        path = folder / name if name else export_in(folder)
        path.unlink()
        make(path)
    return damage


def fifo(path):
    os.mkfifo(str(path))


def link_to(target):
    return lambda path: path.symlink_to(target)


def a_linked_export(folder):
    path = export_in(folder)
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


HASH = "0" * 64
WRONG = {
    "unfinished": (lambda f: (f / "unfinished.partial").write_text("x"), "beside the marker"),
    "a truncated export beside": (lambda f: (f / "web.xva.partial").write_text("x"), "not listed"),
    "foreign file": (lambda f: (f / "notes.txt").write_text("x"), "notes.txt is not listed"),
    "foreign file below": (lambda f: (f / "VIFs" / "x.cfg").write_text("x"), "VIFs/x.cfg is not"),
    "foreign folder": (lambda f: (f / "a").mkdir() or (f / "a" / "b").write_text(""), "a/b is"),
    "foreign link": (lambda f: (f / "a").symlink_to("/etc"), "a is not listed"),
    "no vm.cfg nor its line": (lambda f: resum(f, "vm.cfg"), "does not list vm.cfg"),
    "no metadata nor its line": (lambda f: resum(f, "vm-metadata.xml"), "does not list vm-meta"),
    "no disk nor its lines": (lambda f: resum(f, "DISK-xvdb"), "of 2 folders DISK-. 1 are missing"),
    "no vdi.cfg nor its line": (
        lambda f: resum(f, "DISK-xvda/vdi.cfg"), "of 2 folders DISK-. 1 are missing"),
    "a FIFO as sums": (instead("SHA256SUMS", fifo), "no regular file"),
    "a FIFO as vm.cfg": (instead("vm.cfg", fifo), "no regular file"),
    "a FIFO as export": (instead("", fifo), "no regular file"),
    "a FIFO as marker": (instead("success", fifo), "no marker"),
    "a link as marker": (instead("success", link_to("vm.cfg")), "."),
    "a device as sums": (instead("SHA256SUMS", link_to("/dev/zero")), "."),
    "a device as vm.cfg": (instead("vm.cfg", link_to("/dev/zero")), "."),
    "a link as export": (a_linked_export, "."),
    "sums without end": (instead("SHA256SUMS", lambda p: os.truncate(
        str(p), 1 << 40) if p.write_text("x") else None), "SHA256SUMS: larger than"),
    "NUL in the sums": (add_line("%s  a\0b\n" % HASH), "SHA256SUMS is damaged"),
    "an absolute name": (add_line("%s  /etc/passwd\n" % HASH), "outside the folder"),
    "a name outside": (add_line("%s  ../x\n" % HASH), "outside the folder"),
    "a name outside by a detour": (add_line("%s  VIFs/../../x\n" % HASH), "outside the folder"),
    "a device by name": (add_line("%s  /dev/zero\n" % HASH), "outside the folder"),
    "a name twice": (add_line("%s  vm.cfg\n" % HASH), "twice"),
    "a file that is not there": (add_line("%s  gone.cfg\n" % HASH), "gone.cfg is missing"),
    "no line break at the end": (add_line("%s  x" % HASH), "."),
}
FINE = {
    "keep": lambda f: (f / "keep").write_text(""),
    "no RESTORE.txt": lambda f: (f / "RESTORE.txt").exists() and resum(f, "RESTORE.txt"),
    "strewn": lambda f: (f / ".DS_Store").write_text("x") and (f / "VIFs" / "Thumbs.db").write_text(
        "x") and (f / "._web.xva").write_text("x"),
    "strewn folder": lambda f: (f / "@eaDir" / "a").mkdir(parents=True) or (
        f / "@eaDir" / "a" / "b").write_text("x"),
}


@pytest.mark.parametrize("form", ["xva", "raw"])
def test_odd_folders_are_named_and_the_others_are_proved_all_the_same(made, tmp_path, form):
    top = tmp_path / "backups"
    for what in list(WRONG) + list(FINE):
        shutil.copytree(str(made[form] / "web"), str(top / what))
        WRONG[what][0](of(top, what)) if what in WRONG else FINE[what](of(top, what))
    result = vmbackup("verify", top, timeout=60)
    assert result.status == 2, result
    told = verdicts(result)
    assert {vm for vm in told if told[vm][0] == "Success"} == set(FINE)
    wrong = {what: told.get(what) for what, (_, why) in WRONG.items()
             if what not in told or not re.search(why, told[what][1])}
    assert not wrong
    assert result.lines[-1].endswith("S:%d W:0 E:%d" % (len(FINE), len(WRONG)))


def test_a_stray_file_called_success_hides_no_backup(backups):
    top = backups("xva")
    (top / "success").write_text("")
    (top / "web" / "success").write_text("")
    assert sorted(verdicts(checked(top))) == sorted(VMS)
    assert list(verdicts(checked(top / "web"))) == ["web"]


def test_a_folder_that_cannot_be_read_is_an_error(backups):
    """Root may read all, so it loses that right first."""
    top = backups("xva")
    (top / "lost+found").mkdir(mode=0)
    of(top).chmod(0)
    try:
        told = subprocess.run([sys.executable, str(SCRIPT), "verify", str(top)], timeout=60,
                              stdout=subprocess.PIPE, preexec_fn=drop_rights).stdout.decode()
    finally:
        of(top).chmod(0o700)
    assert "VmBackup verify web/" in told
    assert "Permission denied" in told
    assert told.endswith("S:1 W:0 E:1\n")


LIBC = ctypes.CDLL(None, use_errno=True)
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


def drop_rights():
    for right in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        LIBC.prctl(PR_CAPBSET_DROP, right)    # fails where there was none


def test_a_backup_whose_metadata_could_not_be_fetched(made, tmp_path):
    """The run warned and told it in vm.cfg; without that word it is damage."""
    for vm, word in (("good", "vm_metadata=none\n"), ("bad", "")):
        folder = tmp_path / vm / of(made["xva"]).name
        shutil.copytree(str(of(made["xva"])), str(folder))
        resum(folder, "vm-metadata.xml", "vm.cfg")
        text = (of(made["xva"]) / "vm.cfg").read_bytes() + word.encode()
        (folder / "vm.cfg").write_bytes(text)
        add_line("%s  vm.cfg\n" % hashlib.sha256(text).hexdigest())(folder)
    result = checked(tmp_path)
    told = verdicts(result)
    assert (told["good"][0], told["bad"][0]) == ("Success", "ERROR"), result
    assert "NOT vm-metadata.xml (it could not be fetched)" in told["good"][1]
    assert told["bad"][1] == "SHA256SUMS does not list vm-metadata.xml"


def test_without_the_command_zstd_it_is_an_error(made):
    result = vmbackup("verify", made["xva.zst"], env={"PATH": "/nonexistent"})
    assert result.status == 2
    assert all("install the command zstd" in text for _, text in verdicts(result).values())


# --- a lone file ----------------------------------------------------------------------------------

@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_lone_export_is_proved_by_itself(made, tmp_path, form):
    path = tmp_path / ("copy." + form)
    shutil.copy(str(export_in(of(made[form]))), str(path))
    result = checked(path, top=tmp_path)
    assert result.status == 0, result
    assert "Success*** NOT sha256" in result.lines[0]
    assert ("NOT its size" in result.lines[0]) == (form == "raw")
    if form != "raw":
        os.truncate(str(path), path.stat().st_size - 512)
        result = checked(path, top=tmp_path)
        assert result.status == 2, result
        assert "copy.%s - ***ERROR***" % form in result.lines[0]
        assert result.lines[-1].endswith("S:0 W:0 E:1")
