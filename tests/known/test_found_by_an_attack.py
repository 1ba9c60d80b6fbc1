# SPDX-License-Identifier: GPL-3.0-or-later
"""Kinds of faults that an attack found: data lost, what is another's destroyed, false success."""
import contextlib
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from simulator.pool import MIB, Pool, disk, snapshot
from support.forks import Forks
from support.harness import ROOT, finish, vmbackup
from support.tally import is_good, tree
from support.world import IMPATIENT, old_backup, one_vm, pool_of, wait_until

pytestmark = pytest.mark.newest  # nothing here depends on the Python

ENOLCK = "37"
PAIRS = int(os.environ.get("VMBACKUP_PAIRS", "12"))
ELSEWHERE = "filer7,6f6b4a51-0000-4000-8000-00000000000a.4026531836,%d,%d," + "0123456789abcdef" * 2


def old_folder(site, name="backup-2021-03-04-(02:00:00)", vm="web"):
    """A folder of a run that is not over, or never came to its end."""
    folder = site.backups / vm / name
    folder.mkdir(parents=True)
    (folder / (vm + ".xva.partial")).write_bytes(b"the first bytes")
    return folder


def age(path, minutes):
    moment = time.time() - 60 * minutes
    os.utime(str(path), (moment, moment))


# --- two runs into one folder ---------------------------------------------------------------------

@pytest.mark.newest
@pytest.mark.parametrize("kind", ["vm-export", "vdi-export"])
def test_two_runs_in_one_second_where_no_lock_reaches(turn, tmp_path, shim, kind):
    """Two servers' cron at 02:00. Whatever becomes of each run: what one of them has published and
    called a success is there afterwards, whole, and so is what was there before."""
    site = turn(one_vm(MIB + 512))
    site.configure(kind + "=web", "max_backups=1000")
    old_backup(site, "web", 1)
    before = tree(site.folders("web")[0])
    lost, successes = [], 0
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    with Forks(tmp_path / "a", shim) as first, Forks(tmp_path / "b", shim) as second:
        for pair in range(PAIRS // 2):
            env = {"SHIM_TREE": str(site.backups), "SHIM_CALL": "flock", "SHIM_ERRNO": ENOLCK,
                   "SHIM_TIME": str(1700000000 + 60 * pair), "SHIM_STANDS": "1"}
            there = set(site.folders("web"))
            runs = [forks.start(site, env=env) for forks in (first, second)]
            other = threading.Thread(target=runs[0].go)
            other.start()
            time.sleep(pair * 0.06)  # from the same moment to half a run later
            runs[1].go()
            other.join()
            good = sum("web - ***Success***" in run.out or "web - ***WARNING***" in run.out
                       for run in runs)
            new = set(site.folders("web")) - there
            if len(new) != good or not all(map(is_good, new)) or there - set(site.folders("web")):
                lost.append((pair, good, sorted(new), runs))
            assert "this file system has no locks" in runs[0].out + runs[1].out
            successes += good
    assert not lost
    assert successes
    assert tree(site.folders("web")[0]) == before
    assert site.run().status in (0, 1)
    site.assert_pool_is_clean()
    assert not [folder for folder in site.folders("web", marked=False) if not is_good(folder)]


@pytest.mark.parametrize("touched, stays", [(0, True), (14, True), (16, False), (600, False)])
def test_what_another_machine_writes_is_left_while_it_is_fresh(turn, touched, stays):
    site = turn(one_vm())
    site.configure("vm-export=web")
    folder = old_folder(site)
    (folder / "unfinished.partial").write_text(ELSEWHERE % (os.getpid(), 1) + "\n")
    age(folder / "unfinished.partial", touched)
    result = site.run()
    assert result.status == (1 if stays else 0), result
    assert folder.exists() == stays
    assert result.has("filer7" if stays else "removing the unfinished backup " + folder.name)
    assert len(site.folders("web")) == 1


def test_what_another_machine_writes_is_judged_by_the_file_servers_clock(turn, shim):
    """This machine's clock is an hour ahead."""
    site = turn(one_vm())
    site.configure("vm-export=web")
    folder = old_folder(site)
    (folder / "unfinished.partial").write_text(ELSEWHERE % (os.getpid(), 1) + "\n")
    env = {"LD_PRELOAD": str(shim), "SHIM_TIME": str(int(time.time()) + 3600)}
    assert site.run(env=env).status == 1
    assert folder.exists()


def own_token(site, pid):
    """The token of a living run, as another process of this machine would have it."""
    silence = site.sim.fault("export_silence", vm="web", after=MIB, seconds=3600)
    process = site.start()
    (path,) = until(lambda: list(site.backups.glob("web/backup-*/web.xva.partial")))
    token = (path.parent / "unfinished.partial").read_text()
    process.kill()
    process.communicate()
    site.sim.clear_faults(silence)
    start = Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()[19]
    mine = re.sub(r",%d,\d+," % process.pid, ",%d,%s," % (pid, start), token)
    assert mine != token
    return mine, path.parent


def until(look):
    """What look() gives once it gives something."""
    wait_until(look)
    return look()


def test_a_run_of_this_machine_is_left_while_its_process_lives(turn):
    """However long ago it touched its file; one whose process is dead goes at once."""
    site = turn(one_vm())
    site.configure("vm-export=web")
    token, killed = own_token(site, os.getpid())
    folder = old_folder(site)
    (folder / "unfinished.partial").write_text(token)
    age(folder / "unfinished.partial", 3000)
    result = site.run()
    assert result.status == 1, result
    assert folder.exists() and not (killed / "web.xva.partial").exists()
    assert result.has(str(os.getpid()))


def test_a_folder_with_a_marker_is_never_taken_for_unfinished(turn):
    """Nor does a failure take it away: somebody else's file system put this one in its place."""
    site = turn(one_vm())
    site.configure("vm-export=web")
    for day in (1, 2):
        old_backup(site, "web", day)
    for folder in site.folders("web"):
        (folder / "unfinished.partial").write_text("left by a mirror\n")
    before = tree(site.backups / "web")
    site.sim.fault("export_fail", after=1000)
    assert site.run(constants=IMPATIENT).status == 2
    assert tree(site.backups / "web") == before


def test_a_folder_that_is_anothers_by_now_is_neither_published_nor_deleted(turn):
    """Another run took the folder away and made one of its name: it publishes its own alone."""
    site = turn(one_vm())
    site.configure("vm-export=web")
    silence = site.sim.fault("export_silence", vm="web", after=MIB, seconds=3600)
    process = site.start()
    (partial,) = until(lambda: list(site.backups.glob("web/backup-*/web.xva.partial")))
    folder = partial.parent
    shutil.rmtree(str(folder))
    shutil.copytree(str(made_elsewhere(site)), str(folder))
    before = tree(folder)
    site.sim.clear_faults(silence)
    result = finish(process)
    assert result.status == 2, result
    assert result.has("web - ***ERROR***")
    assert tree(folder) == before


def made_elsewhere(site):
    """A backup as another run has just published it."""
    folder = site.path / "elsewhere" / "backup"
    folder.mkdir(parents=True)
    content = b"the other run's"
    (folder / "web.xva").write_bytes(content)
    (folder / "SHA256SUMS").write_text(hashlib.sha256(content).hexdigest() + "  web.xva\n")
    (folder / "success").write_text("created=1700000000\n")
    return folder


# --- links that are swapped in --------------------------------------------------------------------

class Stopped:
    """A run that stops before a step on disk (see shim.py) until the test lets it go on; a context
    manager."""

    def __init__(self, forks, site, step):
        log = site.path / "log"
        log.write_text("")
        self.run = forks.start(site, env={"SHIM_TREE": str(site.backups), "SHIM_STOP": str(step),
                                          "SHIM_LOG": str(log)})
        self._thread = threading.Thread(target=self.run.go)
        self._thread.start()
        # The log tells it from the stop in which every run of `forks` begins.
        wait_until(lambda: not self._thread.is_alive()
                   or len(log.read_text().splitlines()) >= step and self._state() == "T")
        assert self._thread.is_alive(), self.run

    def _state(self):
        with contextlib.suppress(OSError):
            stat = Path("/proc/%d/stat" % self.run.pid).read_text()
            return stat.rpartition(")")[2].split()[0]
        return ""

    def go_on(self):
        os.kill(self.run.pid, signal.SIGCONT)
        self._thread.join()
        return self.run

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._thread.is_alive():
            os.kill(self.run.pid, signal.SIGKILL)
            self._thread.join()


def steps_of(forks, site):
    """What a run changes below backup_dir, in order: (call, path)."""
    log = site.path / "steps"
    assert forks.run(site, env={"SHIM_TREE": str(site.backups), "SHIM_LOG": str(log)}).status == 0
    return [line.split(" ", 1) for line in log.read_text().splitlines()]


def swap(folder, victim):
    """What somebody does who may write in the folder above."""
    os.rename(str(folder), str(folder) + " aside")
    os.symlink(str(victim), str(folder))


@pytest.mark.parametrize("above", [False, True])
def test_no_link_leads_a_deletion_elsewhere(turn, tmp_path, shim, above):
    """At each step of deleting an old backup its folder, or the VM's, is swapped for a link."""
    site = turn(one_vm(MIB))
    site.configure("vm-export=web", "max_backups=1")
    victim = tmp_path / "victim"
    with Forks(tmp_path, shim) as forks:
        old_backup(site, "web", 1)
        steps = steps_of(forks, site)
        at = [number for number, (_, path) in enumerate(steps, 1) if "backup-2020-01-01" in path]
        assert len(at) > 5
        swapped = 0
        for step in at:
            for path in (site.backups, victim):
                shutil.rmtree(str(path), ignore_errors=True)
            site.backups.mkdir()
            old_backup(site, "web", 1)
            old = site.backups / "web" / "backup-2020-01-01-(02:00:00)"
            shutil.copytree(str(site.backups / "web"), str(victim))
            before = tree(victim)
            with Stopped(forks, site, step) as run:
                if above:
                    swap(site.backups / "web", victim)
                elif old.exists():  # the number of steps may vary by one
                    swap(old, victim / old.name)
                    swapped += 1
                result = run.go_on()
            assert tree(victim) == before, (steps[step - 1], result)
        assert above or swapped > 3


@pytest.mark.parametrize("above", [False, True])
def test_no_link_leads_a_backup_elsewhere(turn, tmp_path, shim, above):
    """The same with the new backup's folder, at each step of writing it; the link leads to an empty
    folder. The run must not call it a success either."""
    site = turn(one_vm(MIB))
    site.configure("vm-export=web")
    victim = tmp_path / "victim"
    new = re.compile(re.escape(str(site.backups / "web") + "/backup-") + "[^/]*/")
    with Forks(tmp_path, shim) as forks:
        steps = steps_of(forks, site)
        at = [number for number, (_, path) in enumerate(steps, 1) if new.match(path)]
        assert len(at) > 15
        for step in at:
            for path in (site.backups, victim):
                shutil.rmtree(str(path), ignore_errors=True)
            site.backups.mkdir()
            victim.mkdir()
            with Stopped(forks, site, step) as run:
                (folder,) = [path for path in (site.backups / "web").iterdir()
                             if path.name.startswith("backup-")]
                swap(site.backups / "web" if above else folder, victim)
                result = run.go_on()
            assert not list(victim.iterdir()), (steps[step - 1], result)
            good = [path for path in site.backups.glob("*/*/success") if path.is_file()]
            assert good or result.status == 2, (steps[step - 1], result)


# --- the pool -------------------------------------------------------------------------------------

def test_a_snapshot_that_inherited_a_key_is_the_administrators(turn):
    """The VM bore vmbackup=weekly when he took it, and bears another one now."""
    pool = Pool()
    pool.vm("web", other_config={"vmbackup": "monthly"}, disks=[disk(MIB, "root", seed=1)],
            snapshots=[snapshot("before the upgrade", other_config={"vmbackup": "weekly"}),
                       snapshot("and after", other_config={"vmbackup": "snapshot=nobody's"})])
    site = turn(pool)
    (vdi,) = [ref for ref, record in site.sim.records("VDI").items()
              if record["name_label"] == "root" and not record["is_a_snapshot"]]
    for ref, record in site.sim.records("VDI").items():
        if record["is_a_snapshot"]:
            site.sim.set("VDI", ref, "other_config", {"vmbackup": "weekly"})
    site.sim.set("VDI", vdi, "other_config", {"vmbackup": "monthly"})
    for kind in ("vm-export=web", "vdi-export=web"):
        site.configure(kind)
        result = site.run()
        assert result.status == 0, result
        site.assert_pool_is_clean(["and after", "before the upgrade"])
    assert len([1 for record in site.sim.records("VDI").values() if record["is_a_snapshot"]]) == 2


WRONG = {"a live VM": "db", "the VM itself": "web", "a snapshot of another": "of db",
         "an older one of its own": "of web"}


@pytest.mark.newest
@pytest.mark.parametrize("what", sorted(WRONG))
@pytest.mark.parametrize("kind", ["vm-export", "vdi-export"])
def test_a_wrong_ref_for_a_new_snapshot_is_not_believed(turn, kind, what):
    """Nothing of what it leads to is changed, and the snapshot that was taken goes."""
    pool = Pool()
    for name in ("web", "db"):
        pool.vm(name, power_state="Running", ha_restart_priority="restart",
                disks=[disk(MIB, name + " disk", seed=name)],
                snapshots=[snapshot("of " + name, disks=[disk(MIB, "of %s disk" % name)])])
    site = turn(pool)
    site.configure(kind + "=web")
    cls, to = ("VM", WRONG[what]) if kind == "vm-export" else ("VDI", WRONG[what] + " disk")
    for name in ("web", "db"):
        vdi = site.sim.record("VDI", "of %s disk" % name)
        site.sim.set("VDI", vdi["uuid"], "snapshot_of", site.sim.ref("VDI", name + " disk"))
        site.sim.set("VDI", vdi["uuid"], "is_a_snapshot", True)
    before = {each: site.sim.records(each) for each in ("VM", "VDI")}
    site.sim.fault("snapshot_wrong_ref", to=to)
    result = site.run(constants=IMPATIENT)
    assert result.status == 2, result
    after = {each: site.sim.records(each) for each in ("VM", "VDI")}
    fields = ("name_label", "other_config", "ha_restart_priority", "is_a_template")
    for each in ("VM", "VDI"):
        assert set(after[each]) == set(before[each]), result
        for ref, record in before[each].items():
            assert [after[each][ref].get(field) for field in fields] == [
                record.get(field) for field in fields], (cls, ref)
    assert not site.folders("web", marked=False)


# --- retention ------------------------------------------------------------------------------------

def backup_of(site, day, uuid, content=b"a backup", vm="web"):
    old_backup(site, vm, day)
    folder = site.backups / vm / ("backup-2020-01-%02d-(02:00:00)" % day)
    (folder / "vm.cfg").write_text("name_label=%s\norig_uuid=%s\n" % (vm, uuid))
    (folder / (vm + ".xva")).write_bytes(content)
    return folder


OTHER, THIRD = "8d1bd05c-0000-4000-8000-00000000000%d" % 1, "8d1bd05c-0000-4000-8000-000000000002"


def test_a_vm_made_anew_does_not_cost_its_predecessors_last_backup(turn):
    site = turn(one_vm(MIB))
    site.configure("vm-export=web", "max_backups=2")
    older, newest = (backup_of(site, day, OTHER) for day in (1, 2))
    for _ in range(4):
        result = site.run()
        assert result.status == 0, result
    assert newest.exists() and not older.exists()
    assert len(site.folders("web")) == 3
    (told,) = [line for line in result.lines if newest.name in line and "NOTE" in line]
    assert "by hand" in told


def test_preview_tells_that_too_and_what_would_go(turn):
    site = turn(one_vm(MIB))
    site.configure("vm-export=web", "max_backups=2")
    mine = site.sim.record("VM", "web")["uuid"]
    for day, uuid in enumerate((THIRD, OTHER, OTHER, mine, mine), 1):
        backup_of(site, day, uuid)
    names = [folder.name for folder in site.folders("web")]
    result = site.run("preview")
    told = " ".join(line for line in result.lines if "would delete" in line)
    assert [name for name in names if name in told] == names[:2] + names[3:4]
    assert result.has("NOTE - " + names[2])
    assert site.run().status == 0
    assert [folder.name for folder in site.folders("web")][:-1] == [names[2], names[4]]


@pytest.mark.parametrize("keep", [1, 2])
def test_pre_clean_does_not_delete_the_only_whole_backup(turn, keep):
    """The newest ones have no byte in their export, or no export; and the export fails."""
    site = turn(one_vm(MIB))
    site.configure("vm-export=web", "pre_clean=True", "max_backups=%d" % keep)
    mine = site.sim.record("VM", "web")["uuid"]
    whole = backup_of(site, 1, mine)
    backup_of(site, 2, mine, b"")
    (backup_of(site, 3, mine) / "web.xva").unlink()
    site.sim.fault("export_fail", after=1000)
    assert site.run(constants=IMPATIENT).status == 2
    assert (whole / "web.xva").read_bytes() == b"a backup"
    site.sim.clear_faults()
    assert site.run().status == 0
    assert (site.file("web")).stat().st_size > MIB


# --- verify ---------------------------------------------------------------------------------------

@pytest.fixture
def verified(turn):
    """verified(): a good backup of web and of db; the Site."""
    site = turn(pool_of("web", "db"))
    site.configure("vm-export=web", "vm-export=db")
    assert site.run().status == 0
    return site


def verify(site, status, told):
    result = vmbackup("verify", site.backups)
    assert result.status == status, result
    assert result.has("db/" + site.folders("db")[0].name + " - ***Success***")
    (line,) = [line for line in result.lines if re.match("VmBackup verify web/", line)]
    assert re.search(r"\*\*\*ERROR\*\*\*.*(%s)" % told, line), line
    return result


def test_a_mirror_copied_during_a_run_is_no_success(verified):
    (folder,) = verified.folders("web")
    (folder / "unfinished.partial").write_text("whatever\n")
    os.truncate(str(folder / "web.xva"), 5000)
    verify(verified, 2, "unfinished.partial")


@pytest.mark.newest
@pytest.mark.parametrize("gone", ["vm-metadata.xml", "vm.cfg", "DISK-xvda", "DISK-xvda/vdi.cfg"])
def test_metadata_that_is_gone_with_its_line_is_missed(verified, gone):
    (folder,) = verified.folders("web")
    sums = (folder / "SHA256SUMS").read_text().splitlines(True)
    (folder / "SHA256SUMS").write_text("".join(
        line for line in sums if not line.split("  ")[1].startswith(gone)))
    shutil.rmtree(str(folder / gone)) if (folder / gone).is_dir() else (folder / gone).unlink()
    verify(verified, 2, "vm|DISK")


AS_NOBODY = """
import os, sys, vmbackup, xmlrpc.client, xxhash
os.setgroups([]), os.setgid(65534), os.setuid(65534)
sys.exit(vmbackup.main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_backup_that_cannot_be_read_is_no_success(verified, tmp_path_factory):
    for path in [verified.backups] + list(verified.backups.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    verified.folders("web")[0].chmod(0)
    top = Path("/tmp") / ("vmbackup-test-%d" % os.getpid())  # where nobody else may look, too
    try:
        shutil.copytree(str(verified.backups), str(top), copy_function=shutil.copy2)
        top.chmod(0o755)
        done = subprocess.run([sys.executable, "-c", AS_NOBODY, "verify", str(top)], cwd=str(ROOT),
                              stdout=subprocess.PIPE)
    finally:
        shutil.rmtree(str(top))
    text = done.stdout.decode("utf-8")
    assert done.returncode == 2, text
    assert re.search(r"verify web/.*\*\*\*ERROR\*\*\*.*Permission denied", text), text
    assert re.search(r"verify db/.*\*\*\*Success", text), text


ODD_SUMS = {
    "NUL": lambda path: path.write_bytes(b"a" * 64 + b"  web\0.xva\n"),
    "bytes": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a large file": lambda path: os.truncate(str(path), 3000 * MIB),
    "outside": lambda path: path.write_text("a" * 64 + "  ../../db/x\n"),
    "absolute": lambda path: path.write_text("a" * 64 + "  /etc/passwd\n"),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.newest
@pytest.mark.parametrize("what", sorted(ODD_SUMS))
def test_odd_sums_end_no_other_backups_turn(verified, what):
    path = verified.folders("web")[0] / "SHA256SUMS"
    if what != "a large file":
        path.unlink()
    ODD_SUMS[what](path)
    verify(verified, 2, ".")


def test_a_link_in_place_of_a_file_is_not_followed(verified):
    (folder,) = verified.folders("web")
    (folder / "vm.cfg").rename(verified.path / "vm.cfg")
    (folder / "vm.cfg").symlink_to(verified.path / "vm.cfg")
    verify(verified, 2, "vm.cfg|link")


# --- no proof, no backup --------------------------------------------------------------------------

def test_an_export_that_cannot_be_proved_prunes_nothing(turn, tmp_path):
    """No command zstd: no first zstd export pushes a proved one out."""
    site = turn(one_vm(MIB))
    site.configure("vm-export=web", "max_backups=1")
    assert site.run().status == 0
    before = tree(site.backups)
    (tmp_path / "bin").mkdir()
    result = site.run("compress=zstd", env={"PATH": str(tmp_path / "bin")})
    assert result.status == 3, result
    assert "zstd" in result.lines[-1]
    assert tree(site.backups) == before


@pytest.mark.parametrize("size, status", [(MIB // 2, 0), (MIB + 8192, 2)])
def test_zeros_without_end_behind_an_archive(turn, size, status):
    site = turn(one_vm(MIB))
    site.configure("vm-export=web")
    site.sim.fault("trailing_text", text="\0" * size)
    result = site.run(constants=IMPATIENT)
    assert result.status == status, result
    assert len(site.folders("web", marked=False)) == (not status)


# --- names that meet ------------------------------------------------------------------------------

def test_long_names_that_could_meet_in_one_folder(turn):
    """One is spelled as the other's folder: two backups, or an error of both."""
    long = "x" * 230
    cut = "%s~%s" % (long[:191], hashlib.sha256(long.encode()).hexdigest()[:8])
    site = turn(pool_of(long, cut, "web"))
    site.configure("vm-export=x.*", "vm-export=web", "max_backups=1")
    result = site.run()
    made = list(site.backups.glob("x*/*/success"))
    good = [line for line in result.lines if re.match(r"VmBackup vm-export x.*Success", line)]
    assert len(made) == len(good) and len(good) in (0, 2), result
    assert len(site.folders("web")) == 1


# --- deletions that fail --------------------------------------------------------------------------

@pytest.mark.skipif(shutil.which("chattr") is None, reason="no command chattr here")
def test_what_fails_to_go_stays_whole(turn):
    """An immutable file in the expired backup, as some file servers protect them."""
    site = turn(one_vm(MIB))
    site.configure("vm-export=web", "max_backups=1")
    assert site.run().status == 0
    (old,) = site.folders("web")
    before = tree(old)
    if subprocess.run(["chattr", "+i", str(old / "web.xva")], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no file can be made immutable here")
    try:
        for _ in range(2):
            result = site.run()
            assert result.status == 1, result
            assert tree(old) == before
    finally:
        subprocess.run(["chattr", "-i", str(old / "web.xva")], check=True)
    assert is_good(old)
    assert site.run().status == 0
    assert len(site.folders("web")) == 1


def test_foreign_folders_get_no_line_each(turn):
    site = turn(one_vm(MIB))
    site.configure("vm-export=web")
    for number in range(300):
        (site.backups / "web" / ("of others %d" % number)).mkdir(parents=True)
    result = site.run()
    assert result.status == 0, result
    assert len(result.lines) < 60
    assert result.has("and 295 more")
    assert len(list((site.backups / "web").iterdir())) == 301


# --- what was told to whom ------------------------------------------------------------------------

SECRET = "correct-horse-battery"


@pytest.fixture
def swapped(turn):
    """A site whose password could be a file's name, and a folder with a file of that name."""
    pool = Pool(password=SECRET)
    pool.vm("web", disks=[disk(MIB)])
    site = turn(pool)
    site.configure("vm-export=web")
    return site


def test_swapped_arguments_show_neither_word_nor_file(swapped):
    """The password, and a file that holds it, in the second place; the config file in the first."""
    word = swapped.path / "pass"
    assert vmbackup(SECRET, "create-password-file=%s" % word).status == 0
    plain = swapped.path / "plain"
    plain.write_text(SECRET + "\n")
    for words in ([swapped.config, SECRET], [swapped.config, word], [swapped.config, plain],
                  [swapped.config, SECRET, "preview"], ["vm-export=web", SECRET],
                  ["preview", SECRET], [word, plain], [word, word], [swapped.config, plain, "x=1"]):
        result = vmbackup(*words)
        assert result.status == 3, result
        for text in (SECRET, word.read_text().strip()):
            assert text not in result.out + result.err, words
    assert not swapped.sim.calls()


def test_a_password_that_is_also_a_files_name_is_not_shown(swapped):
    (swapped.path / SECRET).write_text("this is what the file holds")
    result = vmbackup(SECRET, swapped.config, cwd=swapped.path)
    assert result.status == 3, result
    assert SECRET not in result.out + result.err
    assert "this is what" not in result.out + result.err
    result = vmbackup("-", swapped.config, cwd=swapped.path, input=SECRET.encode() + b"\n")
    assert result.status == 0, result


def test_an_internal_error_names_a_line_of_this_program(turn):
    site = turn(one_vm(MIB))
    site.configure("vm-export=web")
    code = ("import shutil, sys, vmbackup\n" + "\n" * 20000 + "def usage(path):\n"
            "    return {}[path]\nshutil.disk_usage = usage\nsys.exit(vmbackup.main())")
    done = subprocess.run([sys.executable, "-c", code, site.sim.password, str(site.config)],
                          cwd=str(ROOT), stdout=subprocess.PIPE)
    text = done.stdout.decode("utf-8")
    told = re.search(r"please report it: KeyError at line (\d+)", text)
    lines = (ROOT / "vmbackup.py").read_text(encoding="utf-8").splitlines()
    assert told and "disk_usage" in lines[int(told.group(1)) - 1], text


# --- where a host leads ---------------------------------------------------------------------------

@pytest.fixture
def listener():
    """Where nobody may connect to: (port of 127.0.0.1, function: whether somebody did)."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(5)

        def called():
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.accept()
                return True
            return False

        yield sock.getsockname()[1], called


@pytest.mark.parametrize("proof", ["tls_fingerprint", "tls_ca"])
def test_a_host_that_proved_itself_leads_no_export_into_clear_text(turn, listener, proof):
    site = turn(one_vm(MIB))
    port, called = listener
    site.configure("vm-export=web", proof_of(site, proof))
    site.sim.fault("export_302", location="http://127.0.0.1:%d/export?x=1" % port)
    site.sim.fault("export_302", location="http://127.0.0.1:%d/x" % port, path="/export_metadata")
    result = site.run()
    assert result.status == 2, result
    assert not called()
    assert result.has("http://127.0.0.1:%d" % port)


def proof_of(site, proof):
    value = site.sim.fingerprint if proof == "tls_fingerprint" else site.sim.certificate
    return "%s=%s" % (proof, value)


@pytest.mark.newest
@pytest.mark.parametrize("master", ["http://127.0.0.1:{port}", "{socket}", "127.0.0.1:{port}"])
@pytest.mark.parametrize("proof", ["tls_fingerprint", "tls_ca"])
def test_a_host_that_proved_itself_names_no_master_that_cannot(turn, listener, master, proof):
    """The password would go there: as clear text, to a socket, or to a stranger's certificate."""
    site = turn(one_vm(MIB))
    port, called = listener
    path = str(site.path / "xapi")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path)
        unix.listen(5)
        unix.setblocking(False)
        site.configure("vm-export=web", proof_of(site, proof))
        told = master.format(port=port, socket=path)
        site.sim.fault("login_error", error_info=["HOST_IS_SLAVE", told])
        if "{port}" in master and "http" not in master:
            with stranger() as (port, heard):
                site.sim.clear_faults()
                site.sim.fault("login_error", error_info=["HOST_IS_SLAVE", "127.0.0.1:%d" % port])
                result = site.run()
            assert b"secret" not in b"".join(heard)
        else:
            result = site.run()
        assert result.status == 3, result
        assert not called()
        with pytest.raises(BlockingIOError):
            unix.accept()


@contextlib.contextmanager
def stranger():
    """A server of this machine that has no certificate of the host's: (port, what it heard)."""
    heard = []
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(5)

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    client = sock.accept()[0]
                    client.settimeout(5)
                    with client, contextlib.suppress(OSError):
                        heard.append(client.recv(4096))
                        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        yield sock.getsockname()[1], heard
        sock.shutdown(socket.SHUT_RDWR)
