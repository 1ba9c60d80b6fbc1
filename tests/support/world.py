# SPDX-License-Identifier: GPL-3.0-or-later
"""What many tests need of pools, hosts and backups: each helper once.

The fixtures clock, refused and small_disk come to the tests through conftest.py.
"""
import hashlib
import io
import os
import socket
import subprocess
import tarfile
import time

import pytest
import XenAPI
from simulator.pool import MIB, Pool, disk, snapshot, vif

from support.harness import vmbackup
from support.tally import Ledger, is_good, tree

SERVER = socket.gethostname().split(".")[0]  # as status log and reports call this machine
WRONG = "00" * 32  # the fingerprint of no certificate
IMPATIENT = {"TASK_ENDS": 0.5, "FAILURE_ENDS": 0.5, "DETACH_PAUSES": (0.1, 0.2), "RECOVERY": 1}


def wait_until(condition):
    """Waits for what has to come, and fails if it does not."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def set_clock(path, seconds):
    """Puts the clocks of the runs that read this file (see shim.py) ahead of the real one."""
    (path.parent / "new").write_text(str(seconds))
    os.rename(str(path.parent / "new"), str(path))


class Clock:
    """The clock of a run that is started with `env`; nothing but the test moves it on."""

    def __init__(self, shim, path):
        self.path, self.ahead = path, 0
        self.env = {"LD_PRELOAD": str(shim), "SHIM_JUMP": str(path)}
        set_clock(path, 0)

    def go_on(self, seconds=60):
        self.ahead += seconds
        set_clock(self.path, self.ahead)

    def go_on_until(self, condition, seconds=60, calls=None):
        """Moves it on step by step until something happens; with calls(), their number so far, each
        step waits for another one."""
        while not condition():
            before = calls() if calls else 0
            self.go_on(seconds)
            if calls:
                wait_until(lambda before=before: condition() or calls() > before)
            else:
                time.sleep(0.1)


@pytest.fixture
def clock(shim, tmp_path):
    return Clock(shim, tmp_path / "jump")


def refused_port():
    """A port of this machine where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def one_vm(size=2 * MIB, hosts=1):
    """A pool with the one halted VM web."""
    pool = Pool(hosts=hosts)
    pool.vm("web", disks=[disk(size, seed=1)])
    return pool


def pool_of(*names, size=MIB, power_state="Running", **fields):
    """A pool of VMs with one disk each, xvda, which has the VM's name and bytes of its own."""
    pool, fields = Pool(), dict(fields, power_state=power_state)
    for name in names:
        pool.vm(name, disks=[disk(size, name, seed=name, device="xvda")], **fields)
    return pool


def numbered_vms(count):
    """A pool with the running VMs vm00, vm01, ..., each with a snapshot that is somebody else's."""
    pool = Pool()
    for number in range(count):
        pool.vm("vm%02d" % number, power_state="Running", vifs=[vif()],
                disks=[disk(8192, "root", seed=number)], snapshots=[snapshot("mine")])
    pool.setting(progress_interval=0.05)
    return pool


def old_backup(site, vm, day):
    """A good backup of 2020, as an earlier version of this program could have made it."""
    folder = site.backups / vm / ("backup-2020-01-%02d-(02:00:00)" % day)
    (folder / "DISK-xvda").mkdir(parents=True)
    (folder / "DISK-xvda" / "vdi.cfg").write_text("orig_uuid=none\n")
    (folder / "vm.cfg").write_text("name_label=%s\n" % vm)
    content = ("%s of day %d" % (vm, day)).encode("ascii")
    (folder / (vm + ".xva")).write_bytes(content)
    (folder / "SHA256SUMS").write_text(
        "%s  %s.xva\n" % (hashlib.sha256(content).hexdigest(), vm))
    (folder / "success").write_bytes(b"")


def furnish(site, vms):
    """Two backups of each VM, and what is not ours, beside them; returns the Ledger."""
    for vm in vms:
        old_backup(site, vm, 1)
        old_backup(site, vm, 2)
        (site.backups / vm / "notes.txt").write_text("mine")
    (site.backups / "of another program").mkdir()
    (site.backups / "of another program" / "file.partial.txt").write_text("mine")
    return Ledger(site)


def assert_whole(site, ledger, vm, least):
    """All that bears a marker is whole, and there is enough of it."""
    folders = site.folders(vm)
    assert len(folders) >= least, (vm, folders)
    for folder in folders:
        files = tree(folder)
        before = {name[len(folder.name) + 1:]: value for name, value in ledger.trees[vm].items()
                  if name.startswith(folder.name + "/")}
        assert files == before or (is_good(folder) and len(files) > 3), (vm, folder)


def assert_as_if_nothing_had_happened(site, vms, backups=2):
    """Each VM has its backups and nothing else; what is not ours is all there."""
    for vm in vms:
        assert len(site.folders(vm)) == backups
        assert len(list((site.backups / vm).iterdir())) == backups + 1
        assert (site.backups / vm / "notes.txt").read_text() == "mine"
    assert (site.backups / "of another program" / "file.partial.txt").exists()
    assert len(list(site.backups.iterdir())) == len(vms) + 1


def the_host_forgets(site):
    """Sessions and tasks of a client that was killed are the host's to collect, and it does."""
    site.sim.fault("session_lost")
    site.sim.fault("task_vanish")


def unprovable(methods):
    """Whether a run had taken a VDI snapshot and not tagged it: it still bears the disk's name, as
    anybody's snapshot does, so nobody may destroy it."""
    return "Async.VDI.snapshot" in methods and "VDI.add_to_other_config" not in methods


def destroy_as_an_administrator(site, vdis):
    """Without the program: nothing of it can know these snapshots."""
    session = XenAPI.Session(site.sim.http)
    session.login_with_password(site.sim.username, site.sim.password)
    for ref in vdis:
        session.xenapi.VDI.destroy(ref)
    session.xenapi.session.logout()


def lone_vdi_snapshots(site):
    """{VDI snapshot that belongs to no VM: the VM whose disk it is one of}"""
    vbds = site.sim.records("VBD").values()
    owners = {vbd["VDI"]: vbd["VM"] for vbd in vbds}
    vms = site.sim.records("VM")
    return {ref: vms[owners[vdi["snapshot_of"]]]["name_label"]
            for ref, vdi in site.sim.records("VDI").items()
            if vdi["is_a_snapshot"] and ref not in owners}


def disks_in(xva):
    """{folder: bytes} of the disks in an XVA, put together by the rules of the format."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(xva)) as archive:
        for member in archive:
            folder, _, name = member.name.partition("/")
            if name.isdigit():
                data = found.setdefault(folder, bytearray())
                data.extend(bytes(int(name) * MIB - len(data)))
                data.extend(archive.extractfile(member).read())
    return found


def source_hashes(sim, name):
    """The SHA-256 of each disk of a VM, sorted."""
    (ref,) = [ref for ref, vm in sim.records("VM").items()
              if vm["name_label"] == name and not vm["is_a_snapshot"]]
    vdis = [vbd["VDI"] for vbd in sim.records("VBD").values()
            if vbd["VM"] == ref and vbd["type"] == "Disk"]
    return sorted(sim.disk_sha256(sim.records("VDI")[vdi]["uuid"]) for vdi in vdis)


def cfg(path):
    """The pairs of a .cfg file of a backup, read as the contract says."""
    text = path.read_bytes().decode("utf-8")
    pairs = dict(line.split("=", 1) for line in text.split("\n")[:-1])
    return {key: value.replace("\\\\", "\0").replace("\\n", "\n").replace("\\r", "\r")
            .replace("\0", "\\") for key, value in pairs.items()}


def everything_below(top):
    """Everything below a folder: kind, mode, owner, size, times of change, content."""
    found = {}
    for base, folders, files in os.walk(str(top)):
        for name in folders + files + ["."]:
            path = os.path.join(base, name)
            info = os.lstat(path)
            content = None
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    content = file.read()
            found[path] = (info.st_mode, info.st_uid, info.st_ino, info.st_size,
                           info.st_mtime_ns, info.st_ctime_ns, content)
    return found


@pytest.fixture
def refused(tmp_path):
    """refused(words...): the one line of a run that ends with status 3 and did nothing."""
    def run(*words, **options):
        before = sorted(tmp_path.rglob("*"))
        result = vmbackup(*words, cwd=tmp_path, **options)
        assert result.status == 3, result
        assert result.err == ""
        assert len(result.lines) == 1, result
        assert sorted(tmp_path.rglob("*")) == before
        return result.lines[0]
    return run


@pytest.fixture
def small_disk(turn, tmp_path):
    """small_disk(pool, size): a site whose backup_dir is a file system of so many MiB."""
    mounted = []

    def make(pool, size):
        site = turn(pool)
        command = ["mount", "-t", "tmpfs", "-o", "size=%dm" % size, "tmpfs", str(site.backups)]
        if os.geteuid() or subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
            pytest.skip("only root may mount a small file system, and not everywhere")
        mounted.append(site.backups)
        return site

    yield make
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)
