# SPDX-License-Identifier: GPL-3.0-or-later
"""What the tests of restore share: a pool, a backup of it, and what may have changed since."""
import hashlib
import os
import re

from simulator.pool import MIB, Pool, cd, disk, vif

from support import forks
from support.harness import Result, vmbackup

MAC = "02:00:00:00:00:01"
VM = "web server"


def a_pool(hosts=1):
    pool = Pool(hosts=hosts)
    pool.sr("Thick", type="lvm", size=60 * MIB)
    pool.sr("Elsewhere", shared=False, hosts=[hosts - 1])
    pool.network("DMZ", bridge="xenbr7")
    pool.vm(VM, vifs=[vif(mac=MAC), vif("DMZ")], description="Größe & <Art>", memory=1 << 30,
            ha_restart_priority="restart", cds=[cd("debian.iso")], tags=["a"],
            other_config={"auto_poweron": "true"},
            disks=[disk(4 * MIB, "root", seed="a"), disk(14 * MIB, "data", seed="b"),
                   disk(12 * MIB, "sparse", seed="c", sparse=[0, 7]),
                   disk(3 * MIB + 512, "odd", seed="d"), disk(2 * MIB, "no", content="zeros")])
    pool.vm("other", disks=[disk(2 * MIB, "other", seed="x")])
    return pool


class Here:
    """A Site with a backup, and what was on the pool before the restore."""

    def __init__(self, site):
        self.site, self.sim = site, site.sim

    def back_up(self, line="vm-export=" + VM, *more):
        self.site.configure(line, *more)
        result = self.site.run()
        assert result.status == 0, result
        (self.folder,) = self.site.folders(VM)
        self.file = next(path for path in self.folder.iterdir()
                         if re.search(r"\.(xva|xva\.gz|xva\.zst|raw|vhd)$", path.name))
        self.remember()
        return self

    def make_old(self):
        """As 3.25 left a backup: no sums, and nothing in its marker."""
        (self.folder / "SHA256SUMS").unlink()
        (self.folder / "success").write_bytes(b"")

    def remember(self):
        self.before = {cls: self.sim.records(cls) for cls in ("VM", "VDI", "network", "VBD", "VIF")}

    def restore(self, *words, source=None, constants=None, **options):
        first = [self.site.config, VM] if source is None else [source, "host=" + self.sim.url]
        words = ["restore", self.sim.password] + first + list(words)
        if options:
            return vmbackup(*words, **options)
        constants = dict({"ELSEWHERE": str(self.site.path), "UNUSED_ENDS": 0.3}, **constants or {})
        return Result(*forks.run(words, constants))

    def new(self, cls):
        """{ref: record} of what was not there before."""
        return {ref: record for ref, record in self.sim.records(cls).items()
                if ref not in self.before[cls]}

    def assert_untouched(self):
        """All that was there before is there, and as it was."""
        now = {cls: self.sim.records(cls) for cls in self.before}
        for cls, records in self.before.items():
            for ref, record in records.items():
                for field in set(record) - {"VBDs", "VIFs", "allowed_operations"}:
                    assert now[cls][ref][field] == record[field], (cls, field)
        methods = {call["method"] for call in self.sim.calls()}
        assert not methods & {"VM.start", "VM.start_on", "VM.resume"}

    def assert_nothing_new(self):
        self.assert_untouched()
        for cls in self.before:
            assert self.new(cls) == {}, cls
        self.assert_clean()

    def assert_clean(self):
        """No task, session, note, lock is left."""
        self.site.assert_pool_is_clean()
        for place in (self.site.backups, self.site.path):
            assert [name for name in os.listdir(str(place)) if name.startswith(".")
                    and ("restore-" in name or "lock" in name)] == []

    def the_vm(self, of=VM):
        """(ref, record) of the one new VM; its disks are those of the original, byte for byte."""
        ((ref, record),) = self.new("VM").items()
        old = {one["name_label"]: one for _, one in self.sim.disks_of(of)}
        new = {one["name_label"]: one for _, one in self.sim.disks_of(record["uuid"])}
        assert sorted(old) == sorted(new)
        for name, one in old.items():
            assert self.sum_of(new[name], one["virtual_size"]) == self.sum_of(one), name
        return ref, record

    def sum_of(self, vdi, size=None):
        """The SHA-256 of a disk's first bytes; behind them stand zeros."""
        path = self.site.path / "disk.image"
        self.sim.disk_bytes_to(vdi["uuid"], path)
        data = path.read_bytes()
        assert not data[size or len(data):].strip(b"\0")
        return hashlib.sha256(data[:size]).hexdigest()
