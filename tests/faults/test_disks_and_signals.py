# SPDX-License-Identifier: GPL-3.0-or-later
"""Disk exports, the pool database, signals, locks, a full disk."""
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest
from simulator.pool import MIB, Pool, cd, disk
from support.harness import finish, vmbackup

from vmbackup import Export, Interrupted, Stop


def pool_of(*names, size=3 * MIB):
    pool = Pool()
    for number, name in enumerate(names):
        pool.vm(name, power_state="Running", cds=[cd(userdevice="3")],
                disks=[disk(size, "root", seed=number), disk(MIB, "data", seed=9)])
    pool.setting(progress_interval=0.1)
    return pool


def until(condition):
    """Waits for something that another process does; gives up after a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


@pytest.mark.parametrize("form", ["raw", "vhd"])
def test_a_disk_export_equals_the_disk(site, tmp_path, form):
    here = site(pool_of("web one"))
    here.configure("vdi-export=web one", "vdi_export_format=" + form)
    result = here.run()
    assert result.status == 0, result
    assert result.has("VmBackup vdi-export web one - ***Success*** t:0")
    (vdi,) = [vdi for vdi in here.sim.records("VDI").values() if vdi["name_label"] == "root"]
    source = tmp_path / "source.raw"
    here.sim.disk_bytes_to(vdi["uuid"], str(source))
    export = here.file("web one", form)
    if form == "raw":
        assert export.read_bytes() == source.read_bytes()
    elif shutil.which("qemu-img"):
        subprocess.run(["qemu-img", "compare", "-f", "vpc", "-F", "raw", str(export), str(source)],
                       check=True)
    assert [call["args"][2] for call in here.sim.calls()
            if call.get("method") == "VDI.set_name_label"] == ["SNAP_web-one_root"]
    here.assert_pool_is_clean()
    assert vmbackup("verify", here.config).status == 0


@pytest.mark.parametrize("form", ["raw", "vhd"])
@pytest.mark.parametrize("fault, options", [
    ("export_fail", {"after": 0}), ("export_fail", {"after": MIB}), ("export_cut", {"after": MIB}),
    ("export_cut", {"after": MIB, "task": "success"}), ("export_fail_after_whole", {}),
    ("export_fail_after_whole", {"text": True})])
def test_no_damaged_disk_export_becomes_a_backup(site, form, fault, options):
    here = site(pool_of("web"))
    here.configure("vdi-export=web", "vdi_export_format=" + form)
    here.sim.fault(fault, path="/export_raw_vdi", **options)
    result = here.run(constants={"FAILURE_PAUSES": (0, 0.1)})
    assert result.status == 2, result
    assert not here.folders("web", marked=False)
    here.assert_pool_is_clean()


def test_the_pool_database(site):
    here = site(pool_of("web"))
    here.configure("vm-export=web", "pool_db_backup=1", "max_backups=2")
    for _ in range(3):
        assert here.run().status == 0
    (folder,) = here.backups.glob("METADATA_*")
    dumps = sorted(folder.iterdir())
    assert len(dumps) == 2
    assert dumps[-1].read_bytes().rstrip().endswith(b"</database>")
    assert dumps[-1].stat().st_mode & 0o777 == 0o600
    here.sim.fault("export_fail", path="/pool/xmldbdump", after=100)
    result = here.run()
    assert result.status == 2
    assert result.lines[-1] == "VmBackup ended - **ERRORS DETECTED** - S:1 W:0 E:1"
    assert sorted(folder.iterdir()) == dumps


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("parallel", ["1", "2"])
def test_a_signal_in_an_export_cleans_up(site, number, parallel):
    here = site(pool_of("web", "db", size=20 * MIB))
    here.configure("vm-export=.*", "parallel=" + parallel)
    here.sim.fault("export_rate", bytes=300000)  # more than a minute
    process = here.start()
    until(lambda: "GET /export" in here.sim.methods() and here.snapshots())
    until(lambda: list(here.backups.glob("*/*/*.xva.partial")))
    process.send_signal(number)
    result = finish(process)
    here.sim.clear_faults()  # not before: at full speed the export may end first
    assert result.status == 128 + number, result
    assert not here.folders("web", marked=False)
    assert not here.folders("db", marked=False)
    assert not here.snapshots()
    assert not here.sim.sessions()
    assert here.run().status == 0


def test_a_signal_while_an_export_connects_is_not_missed():
    """It finds no socket to shut down yet: the export itself has to look, once it has one."""
    stop = Stop()
    ours, theirs = socket.socketpair()

    class Xapi:
        handle = "OpaqueRef:session"

        def call(self, _method, *_args):
            return "OpaqueRef:task"

    class Connecting:
        def open_socket(self, _timeout):
            stop.handler(signal.SIGTERM, None)
            return ours

    with pytest.raises(Interrupted), Export(Xapi(), stop, "/export", {}, "web", 0, Connecting()):
        pass
    assert theirs.recv(1) == b""


def test_two_runs_at_once(site):
    here = site(pool_of("web", "db", size=20 * MIB))
    here.configure("vm-export=web")
    here.sim.fault("export_silence", vm="web", after=2 * MIB, seconds=3600, times=1)
    first = here.start()
    until(lambda: "GET /export" in here.sim.methods())
    assert here.run().status == 4
    here.configure("vm-export=web", "vm-export=db")
    second = here.run()
    assert second.status == 2
    assert second.has("another run holds the lock")
    assert here.folders("db")
    first.kill()
    first.communicate()
    here.sim.clear_faults()
    assert here.run().status == 0
    assert [item.name for item in here.backups.iterdir() if item.name.startswith(".")] == []


def test_too_little_space_is_told_before_the_snapshot(site):
    pool = Pool()
    pool.vm("huge", disks=[disk(2 << 40, sparse=[])])
    pool.vm("web", disks=[disk(MIB, seed=1)])
    here = site(pool)
    here.configure("vdi-export=huge", "vm-export=web")
    result = here.run()
    assert result.status == 2, result
    assert result.has("2.0 TiB to expect")
    assert not [name for name in here.sim.methods() if "VDI.snapshot" in name]
    assert here.folders("web")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_full_disk_fails_one_vm_and_leaves_nothing(site):
    here = site(pool_of("web", size=20 * MIB))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(here.backups)])
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        here.configure("vm-export=web", "space_check=False")
        result = here.run()
        assert result.status == 2, result
        assert result.has("No space left on device")
        assert not list(here.backups.iterdir())
        here.assert_pool_is_clean()
    finally:
        subprocess.run(["umount", str(here.backups)], check=True)


def test_a_link_in_place_of_a_folder_is_refused(site, tmp_path):
    here = site(pool_of("web"))
    (tmp_path / "elsewhere").mkdir()
    (here.backups / "web").symlink_to(tmp_path / "elsewhere")
    here.configure("vm-export=web")
    result = here.run()
    assert result.status == 2
    assert result.has("symbolic link")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_damage_on_disk_is_found_by_verify(site):
    here = site(pool_of("web"))
    here.configure("vm-export=web")
    assert here.run().status == 0
    with here.file("web").open("r+b") as file:
        file.seek(MIB)
        file.write(b"damage")
    result = vmbackup("verify", here.config)
    assert result.status == 2
    assert result.has("***ERROR***")


@pytest.mark.parametrize("name", [
    "a/b", "..", ".hidden", "50%", "%2E.", "two\nlines", "quo'te\"$(reboot)`x`", "-rf", "success",
    "n" * 300, "\u202eevil", "\U0001f600", "back\\slash", "METADATA_x"])
def test_any_name_stays_inside_backup_dir(site, name):
    pool = Pool()
    pool.vm(name, disks=[disk(MIB, name, seed=1)])
    here = site(pool)
    here.configure("vm-export=")
    result = here.run()
    assert result.status == 0, result
    (folder,) = here.backups.iterdir()
    (backup,) = folder.iterdir()
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=str(backup), check=True)
    assert all(line[:2] == "20" for line in result.out.splitlines())
    here.assert_pool_is_clean()
