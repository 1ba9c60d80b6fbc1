# SPDX-License-Identifier: GPL-3.0-or-later
"""Descriptions of pools, for tests: what ``--pool FILE.json`` reads.

    pool = Pool()
    pool.vm("web", power_state="Running", disks=[disk(3 * MIB + 512, seed=1), disk(8 * MIB)])
    pool.vm("db", disks=[disk(64 * MIB, sparse=[0, 9, 63])], cds=[cd("guest-tools.iso")])
    pool.dump(path)

A description is plain JSON.  Its keys:

name, username, password   of the pool and its administrator
hosts       list of {name, uuid}; the first is the master unless "master" gives another index
srs         list of {name, uuid, type, content_type, shared, snapshot, hosts, default, size,
            used}: ``snapshot`` false for one that cannot, ``hosts`` the indexes of the hosts that
            see it (default all)
networks    list of {name, uuid, bridge, mtu, plugged}
vms         list of VMs, see ``Pool.vm``
settings    see ``faults.py``
faults      list of {"name": ..., options}: faults that are there from the start, see ``faults.py``
"""

import json

MIB = 1 << 20
GIB = 1 << 30


def _given(**values):
    return {key: value for key, value in values.items() if value is not None}


def disk(size, name="disk", description="", seed=None, content=None, sparse=None, device=None,
         userdevice=None, bootable=None, mode=None, type=None, sharable=None, sr=None, uuid=None,
         other_config=None, attached=None, owner=None):
    """A disk of ``size`` bytes.

    ``seed``: random bytes by that seed; ``sparse``: the MiBs that are not zeros; ``content``:
    "zeros", {"pattern": text} or {"file": path}.  ``device`` "" is that of a VM that never ran.
    ``type`` is the VDI's ("user", "system" ...), ``sr`` the name of its SR, ``attached`` whether
    the VBD is (default: when the VM runs), ``owner`` false leaves the key out of other_config.
    """
    if content is None and (seed is not None or sparse is not None):
        content = _given(random=seed, sparse=sparse)
    return _given(
        size=size, name=name, description=description, content=content, device=device,
        userdevice=userdevice, bootable=bootable, mode=mode, type=type, sharable=sharable, sr=sr,
        uuid=uuid, other_config=other_config, attached=attached, owner=owner)


def cd(iso=None, sr=None, size=None, device=None, userdevice=None, attached=None):
    """A CD drive: empty, or with the ISO of that name on an ISO SR (made when it is new)."""
    return _given(iso=iso, sr=sr, size=size, device=device, userdevice=userdevice,
                  attached=attached)


def vif(network=None, mac=None, mtu=None, device=None, other_config=None, uuid=None,
        attached=None):
    """A network interface, on the network of that name (default: the first)."""
    return _given(network=network, mac=mac, mtu=mtu, device=device, other_config=other_config,
                  uuid=uuid, attached=attached)


class Pool:
    """A pool under construction: one host, one local SR, one ISO SR, one network."""

    def __init__(self, name="pool", password="secret", hosts=1, username="root"):  # noqa: S107
        self.description = {
            "name": name,
            "username": username,
            "password": password,
            "hosts": [{"name": "xen%d" % (number + 1)} for number in range(hosts)],
            "srs": [
                {"name": "Storage", "type": "nfs" if hosts > 1 else "ext", "shared": hosts > 1,
                 "default": True},
                {"name": "ISOs", "type": "iso", "content_type": "iso", "shared": True},
            ],
            "networks": [{"name": "Pool-wide network associated with eth0", "bridge": "xenbr0"}],
            "vms": [],
            "settings": {},
            "faults": [],
        }

    def sr(self, name, type="nfs", content_type="user", shared=True, snapshot=True, hosts=None,
           uuid=None, size=None, used=None):
        """Add a storage repository; ``size`` and ``used`` are bytes (default 1 TiB and none)."""
        self.description["srs"].append(_given(
            name=name, type=type, content_type=content_type, shared=shared, snapshot=snapshot,
            hosts=hosts, uuid=uuid, size=size, used=used))

    def network(self, name, bridge="xenbr1", mtu=1500, uuid=None, plugged=None):
        """Add a network; one that is not ``plugged`` has no PIFs."""
        self.description["networks"].append(_given(
            name=name, bridge=bridge, mtu=mtu, uuid=uuid, plugged=plugged))

    def vm(self, name, disks=(), cds=(), vifs=(), snapshots=(), **fields):
        """Add a VM and return its description.

        Fields: uuid, description, power_state, is_a_template, is_default_template,
        is_control_domain, tags, other_config, blocked_operations, ha_restart_priority,
        ha_always_run, memory (bytes), vcpus, os_version (a map, or a name), host (index of the
        one it runs on), suspend_disk (a ``disk``).  ``snapshots`` are VMs again, with
        snapshot_time; one without ``disks`` gets copies of the VM's.
        """
        vm = dict(fields, name=name, disks=list(disks), cds=list(cds), vifs=list(vifs),
                  snapshots=list(snapshots))
        self.description["vms"].append(vm)
        return vm

    def template(self, name, default=False, **fields):
        """Add a template, by default a custom one."""
        return self.vm(name, is_a_template=True, is_default_template=default, **fields)

    def fault(self, name, **options):
        """Add a fault that is there from the start."""
        self.description["faults"].append(dict(options, name=name))

    def setting(self, **settings):
        """Set settings of the simulator (see ``faults.py``)."""
        self.description["settings"].update(settings)

    def dump(self, path):
        """Write the description to a file."""
        with open(str(path), "w", encoding="utf-8") as file:
            json.dump(self.description, file)


def snapshot(name, snapshot_time="20260102T03:04:05Z", **fields):
    """A snapshot that is there from the start, for ``Pool.vm(snapshots=[...])``."""
    return dict(fields, name=name, snapshot_time=snapshot_time)


def demo():
    """A nice small pool to look at."""
    pool = Pool("demo")
    pool.template("Debian Bookworm 12", default=True)
    pool.template("Windows Server 2022 (64-bit)", default=True)
    pool.template("our golden image", disks=[disk(2 * MIB, "golden", seed="golden")])
    pool.vm(
        "web server", description="Apache, and the shop", power_state="Running", memory=2 * GIB,
        vcpus=2, tags=["production"], os_version="Debian GNU/Linux 12 (bookworm)",
        other_config={"base_template_name": "Debian Bookworm 12"},
        disks=[disk(6 * MIB, "web root", "the system", seed="web", bootable=True, type="system"),
               disk(10 * MIB + 512, "web data", seed="data", sparse=[0, 3, 4])],
        vifs=[vif()],
        snapshots=[snapshot("before the upgrade")])
    pool.vm(
        "database", description="PostgreSQL\nstopped at night", memory=4 * GIB, vcpus=4,
        disks=[disk(5 * MIB, "pg", seed="pg", bootable=True)], vifs=[vif(), vif()])
    pool.vm(
        "new-vm", description="never ran", disks=[disk(3 * MIB, "new", content="zeros", device="")],
        cds=[cd("debian-12.iso")], vifs=[vif()])
    return pool


def many(count, disks=1, size=4 * MIB):
    """A pool of ``count`` VMs called vm00000 ..., every tenth of them running."""
    pool = Pool("large")
    for number in range(count):
        name = "vm%05d" % number
        pool.vm(
            name, power_state="Running" if number % 10 == 0 else "Halted",
            disks=[disk(size, "%s disk %d" % (name, k), seed=name) for k in range(disks)],
            vifs=[vif()])
    return pool
