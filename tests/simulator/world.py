# SPDX-License-Identifier: GPL-3.0-or-later
"""From a pool description, or a dump of a real pool's database, to the records of a pool."""

import hashlib
import re
import xml.etree.ElementTree

from . import disks, schema
from .database import Database, new_ref, new_uuid, now
from .schema import NULL

_PERCENT = re.compile("%([_%nrt])")
_PERCENT_MEANS = {"_": " ", "%": "%", "n": "\n", "r": "\r", "t": "\t"}

THICK = ("lvm", "lvmohba", "lvmoiscsi")     # types of SRs whose disks take their whole size

_OPERATIONS = {
    "Halted": ["changing_dynamic_range", "changing_shadow_memory", "changing_static_range",
               "migrate_send", "make_into_template", "destroy", "export", "start_on", "start",
               "clone", "copy", "snapshot"],
    "Running": ["changing_dynamic_range", "migrate_send", "pool_migrate", "changing_VCPUs_live",
                "suspend", "hard_reboot", "hard_shutdown", "clean_reboot", "clean_shutdown",
                "pause", "checkpoint", "snapshot"],
    "Suspended": ["resume_on", "resume", "hard_shutdown", "destroy", "export", "clone", "copy",
                  "checkpoint", "snapshot"],
    "Paused": ["unpause", "hard_shutdown", "hard_reboot", "checkpoint", "snapshot"],
}


def allowed_operations(record):
    """What may be done to a VM, as ``VM.allowed_operations`` says it."""
    if record["is_control_domain"]:
        return ["metadata_export"]
    if record["is_a_snapshot"]:
        operations = ["revert", "export", "destroy", "clone", "copy"]
    elif record["is_a_template"]:
        operations = ["export", "destroy", "clone", "copy", "provision"]
        if record["is_default_template"]:
            operations.remove("destroy")
    else:
        operations = _OPERATIONS[record["power_state"]]
    return [name for name in operations if name not in record["blocked_operations"]]


class World:
    """The pool: its database and what the protocol needs besides."""

    def __init__(self):
        self.db = Database()
        self.username = "root"
        self.password = ""
        self.hosts = []         # references, in the order of their listeners
        self.pool = None

    @property
    def master(self):
        """The index of the pool's master among the hosts."""
        return self.hosts.index(self.db.get("pool", self.pool)["master"])

    def sees(self, host, sr):
        """Whether the host (a reference) has the SR plugged."""
        db = self.db
        return any(
            db.get("PBD", pbd)["host"] == host and db.get("PBD", pbd)["currently_attached"]
            for pbd in db.get("SR", sr)["PBDs"])

    def srs_of(self, vm):
        """The SRs that a host must see for this VM: of all its non-empty VBDs, CDs too.

        KeyError where a record is missing.
        """
        db = self.db
        found = []
        for vbd in db.tables["VM"][vm]["VBDs"]:
            vdi = db.get("VBD", vbd)["VDI"]
            if vdi != NULL and not db.get("VBD", vbd)["empty"]:
                found.append(db.tables["VDI"][vdi]["SR"])
        return found

    def hosts_for(self, vm):
        """The hosts (references) that see all SRs of the VM."""
        srs = self.srs_of(vm)
        return [host for host in self.hosts if all(self.sees(host, sr) for sr in srs)]

    def content(self, vdi):
        """What is on a disk."""
        contents = self.db.contents
        if vdi not in contents:
            record = self.db.get("VDI", vdi)
            contents[vdi] = disks.content(None, record["virtual_size"], record["uuid"])
        return contents[vdi]

    def writable(self, vdi):
        """The same, as something to write to; snapshots keep what was there."""
        content = self.content(vdi)
        if not isinstance(content, disks.Written):
            record = self.db.get("VDI", vdi)
            content = self.db.contents[vdi] = disks.Written(record["virtual_size"], content)
        return content

    def grow(self, vdi, size):
        """Count what a disk takes of a thin SR; of a thick one it took all when it was made."""
        with self.db.lock:
            record = self.db.get("VDI", vdi)
            if self.db.get("SR", record["SR"])["type"] not in THICK:
                self._use(record["SR"], size)
                record["physical_utilisation"] += size

    def _use(self, sr, size):
        used = self.db.get("SR", sr)["physical_utilisation"]
        self.db.set("SR", sr, "physical_utilisation", max(0, used + size))

    def new_disk(self, record):
        """Make a disk of a record, empty; returns its reference."""
        with self.db.lock:
            ref = self.db.insert("VDI", record)
            self.db.set("VDI", ref, "location", record["uuid"])
            self.db.contents[ref] = disks.Written(record["virtual_size"])
            if self.db.get("SR", record["SR"])["type"] in THICK:
                self.db.set("VDI", ref, "physical_utilisation", record["virtual_size"])
                self._use(record["SR"], record["virtual_size"])
            return ref

    def forget_disk(self, vdi):
        """Remove a disk, and its VBDs; the SR has its space again."""
        with self.db.lock:
            record = self.db.get("VDI", vdi)
            for vbd in list(record["VBDs"]):
                self.db.delete("VBD", vbd)
            self.db.delete("VDI", vdi)
            self._use(record["SR"], -record["physical_utilisation"])

    def refresh_operations(self, vm):
        """Write ``VM.allowed_operations`` anew."""
        record = self.db.get("VM", vm)
        self.db.set("VM", vm, "allowed_operations", allowed_operations(record))


def from_dump(path):
    """The world of an XAPI database dump; its disks get a few MiB of content each."""
    world = World()
    world.password = "secret"  # noqa: S105
    tables = {cls: {} for cls in schema.TYPES}
    document = xml.etree.ElementTree.parse(path)  # noqa: S314 - the caller's own file
    for table in document.getroot().iter("table"):
        cls = table.get("name")
        if cls not in schema.TYPES or cls in ("session", "task"):
            continue
        for row in table:
            tables[cls][row.get("ref")] = _read_row(cls, row)
    for record in tables["VM"].values():
        if record["other_config"].get("default_template") == "true":
            record["is_default_template"] = True
    world.db.load(tables)
    world.pool = next(iter(tables["pool"]))
    master = tables["pool"][world.pool]["master"]
    world.hosts = sorted(tables["host"], key=lambda ref: ref != master)
    for ref, record in tables["VDI"].items():
        world.db.contents[ref] = disks.content(
            {"sparse": [0, 1, 5, 40]}, record["virtual_size"], record["uuid"])
    return world


def _read_row(cls, row):
    record = schema.new_record(cls)
    for name, text in row.items():
        field = schema.DB_NAMES[cls].get(name) or (name if name in record else None)
        if field is not None:
            text = _PERCENT.sub(lambda match: _PERCENT_MEANS[match.group(1)], text)
            record[field] = schema.from_db(schema.TYPES[cls][field], text)
    return record


class Builder:
    """Makes the records of a description (see ``pool.py``)."""

    def __init__(self, description):
        self.description = description
        self.world = World()
        self.db = self.world.db
        self.srs = {}
        self.networks = {}
        self.isos = {}
        self.counter = 0

    def uuid(self, given):
        """The given uuid, or one that is the same at every start."""
        self.counter += 1
        return given or new_uuid(hashlib.sha256(b"%d" % self.counter).digest()[:16])

    def build(self):
        """Make everything; returns the world."""
        description, world = self.description, self.world
        world.username = description.get("username", "root")
        world.password = description.get("password", "secret")
        world.hosts = [self.host(host) for host in description.get("hosts") or [{"name": "xen1"}]]
        for sr in description.get("srs", ()):
            self.sr(sr)
        default = next((self.srs[sr["name"]] for sr in description.get("srs", ())
                        if sr.get("default")), NULL)
        world.pool = self.db.insert(
            "pool", uuid=self.uuid(description.get("uuid")), name_label=description.get("name", ""),
            master=world.hosts[description.get("master", 0)], default_SR=default,
            suspend_image_SR=default, crash_dump_SR=default)
        for network in description.get("networks", ()):
            self.networks[network["name"]] = self.db.insert(
                "network", uuid=self.uuid(network.get("uuid")), name_label=network["name"],
                bridge=network.get("bridge", "xenbr0"), MTU=network.get("mtu", 1500))
            for k, host in enumerate(world.hosts) if network.get("plugged", True) else ():
                self.db.insert(
                    "PIF", network=self.networks[network["name"]], host=host,
                    device="eth%d" % (len(self.networks) - 1),
                    MAC="0a:00:00:00:%02x:%02x" % (k, len(self.networks)))
        for number, host in enumerate(world.hosts):
            self.control_domain(number, host)
        for vm in description.get("vms", ()):
            self.vm(vm)
        return world

    def host(self, host):
        metrics = self.db.insert("host_metrics", uuid=self.uuid(None), memory_total=64 << 30,
                                 memory_free=32 << 30, last_updated=now())
        return self.db.insert(
            "host", uuid=self.uuid(host.get("uuid")), name_label=host["name"],
            hostname=host["name"], metrics=metrics, edition="xcp-ng",
            API_version_vendor="XenSource", software_version={
                "product_version": "8.3.0", "product_version_text": "8.3",
                "platform_name": "XCP", "platform_version": "3.4.0", "product_brand": "XCP-ng",
                "build_number": "cloud", "hostname": "localhost", "date": "20260201",
                "dbv": "0.0.1", "xapi": "24.19", "xapi_build": "24.19.2", "xen": "4.17.5-3",
                "linux": "4.19.0+1", "network_backend": "openvswitch"},
            capabilities=["xen-3.0-x86_64", "hvm-3.0-x86_32", "hvm-3.0-x86_32p", "hvm-3.0-x86_64"],
            cpu_info={"cpu_count": "8", "socket_count": "1", "vendor": "GenuineIntel"})

    def sr(self, sr):
        sees, can = sr.get("hosts"), ["scan"]
        if sr.get("content_type") != "iso":
            can += ["vdi_create", "vdi_destroy", "vdi_resize", "update"]
            can += ["vdi_snapshot"] if sr.get("snapshot", True) else []
        ref = self.db.insert(
            "SR", uuid=self.uuid(sr.get("uuid")), name_label=sr["name"],
            type=sr.get("type", "nfs"), content_type=sr.get("content_type", "user"),
            shared=sr.get("shared", False),
            physical_size=sr.get("size", 1 << 40), physical_utilisation=sr.get("used", 0),
            allowed_operations=can)
        self.srs[sr["name"]] = ref
        if not sr.get("snapshot", True):
            self.db.no_snapshot.add(ref)
        for number, host in enumerate(self.world.hosts):
            self.db.insert("PBD", uuid=self.uuid(None), host=host, SR=ref,
                           currently_attached=sees is None or number in sees)

    def control_domain(self, number, host):
        name = self.db.get("host", host)["name_label"]
        ref = self.vm({
            "name": "Control domain on host: %s" % name, "is_control_domain": True,
            "power_state": "Running", "host": number, "memory": 4 << 30, "vcpus": 8,
            "description": "The domain which manages physical devices and manages other domains"})
        self.db.set("VM", ref, "domid", 0)
        self.db.set("host", host, "control_domain", ref)

    def vm(self, vm, snapshot_of=NULL):
        """Make a VM, template or (with snapshot_of) snapshot with all that belongs to it."""
        state = vm.get("power_state", "Halted")
        running = state in ("Running", "Paused")
        memory = vm.get("memory", 1 << 30)
        vcpus = vm.get("vcpus", 1)
        is_snapshot = snapshot_of != NULL
        other_config = {"mac_seed": self.uuid(None)}
        if vm.get("is_default_template"):
            other_config["default_template"] = "true"
        other_config.update(vm.get("other_config", {}))
        record = schema.new_record(
            "VM", uuid=self.uuid(vm.get("uuid")), name_label=vm["name"],
            name_description=vm.get("description", ""), power_state=state,
            is_a_template=vm.get("is_a_template", is_snapshot),
            is_default_template=vm.get("is_default_template", False),
            is_control_domain=vm.get("is_control_domain", False),
            tags=list(vm.get("tags", ())), other_config=other_config,
            blocked_operations=dict(vm.get("blocked_operations", {})),
            ha_restart_priority=vm.get("ha_restart_priority", ""),
            ha_always_run=vm.get("ha_always_run", False),
            memory_target=memory if running else 0, memory_static_max=memory,
            memory_dynamic_max=memory, memory_dynamic_min=memory, memory_static_min=memory // 2,
            VCPUs_max=vcpus, VCPUs_at_startup=vcpus, HVM_boot_policy="BIOS order",
            HVM_boot_params={"order": "cdn", "firmware": "bios"},
            platform={"acpi": "1", "apic": "true", "nx": "true", "pae": "true",
                      "viridian": "false", "vga": "std", "videoram": "8"},
            recommendations='<restrictions><restriction field="vcpus-max" max="32"/>'
                            "</restrictions>",
            bios_strings={"bios-vendor": "Xen", "system-manufacturer": "Xen",
                          "system-product-name": "HVM domU", "hp-rombios": ""},
            is_a_snapshot=is_snapshot, snapshot_of=snapshot_of,
            snapshot_time=vm.get("snapshot_time", schema.EPOCH),
            snapshot_info={"power-state-at-snapshot": "Halted",
                           "disk-snapshot-type": "crash_consistent"} if is_snapshot else {},
            resident_on=self.world.hosts[vm.get("host", 0)] if running else NULL,
            domid=self.counter if running else -1,
            metrics=self.db.insert("VM_metrics", uuid=self.uuid(None), memory_actual=memory,
                                   VCPUs_number=vcpus, hvm=True, current_domain_type="hvm"))
        if "os_version" in vm:
            version = vm["os_version"]
            if isinstance(version, str):
                version = {"name": version, "distro": version.split()[0].lower()}
            record["guest_metrics"] = self.db.insert(
                "VM_guest_metrics", uuid=self.uuid(None), os_version=version, last_updated=now(),
                networks={"0/ip": "192.0.2.10", "0/ipv4/0": "192.0.2.10"})
        record["allowed_operations"] = allowed_operations(record)
        ref = self.db.insert("VM", record)
        for number, entry in enumerate(vm.get("disks", ())):
            self.disk(ref, entry, number, running, is_snapshot)
        for number, entry in enumerate(vm.get("cds", ()), 3):
            self.cd(ref, entry, number, running and not is_snapshot)
        for number, entry in enumerate(vm.get("vifs", ())):
            self.vif(ref, entry, number, running and not is_snapshot)
        if "suspend_disk" in vm:
            vdi = self.vdi(dict({"type": "suspend", "name": "Suspend image"}, **vm["suspend_disk"]))
            self.db.set("VM", ref, "suspend_VDI", vdi)
        for entry in vm.get("snapshots", ()):
            self.snapshot(ref, vm, entry)
        return ref

    def snapshot(self, ref, vm, entry):
        """Make a snapshot that is there from the start; its disks are copies of the VM's."""
        copied = {key: vm[key] for key in ("description", "memory", "vcpus", "vifs", "os_version")
                  if key in vm}
        copied.update(entry)
        if not entry.get("disks"):
            copied["disks"] = [dict(one, uuid=None) for one in vm.get("disks", ())]
        made = self.vm(copied, snapshot_of=ref)
        originals = self.disks_of(ref)
        for device, vdi in self.disks_of(made).items():
            if device in originals:
                self.db.set("VDI", vdi, "snapshot_of", originals[device])
                self.db.contents[vdi] = self.db.contents[originals[device]]
        self.db.set("VM", ref, "parent", made)

    def disks_of(self, vm):
        vbds = [self.db.get("VBD", vbd) for vbd in self.db.get("VM", vm)["VBDs"]]
        return {vbd["userdevice"]: vbd["VDI"] for vbd in vbds if vbd["type"] == "Disk"}

    def vdi(self, entry, is_snapshot=False):
        name = entry.get("sr") or next(iter(self.srs), None)
        if name not in self.srs:
            raise ValueError("no such SR: %s" % name)
        uuid = self.uuid(entry.get("uuid"))
        ref = self.db.insert(
            "VDI", uuid=uuid, name_label=entry.get("name", "disk"),
            name_description=entry.get("description", ""), virtual_size=entry["size"],
            physical_utilisation=entry["size"], SR=self.srs[name], location=uuid,
            type=entry.get("type", "user"), sharable=entry.get("sharable", False),
            other_config=dict(entry.get("vdi_other_config", {})), is_a_snapshot=is_snapshot,
            sm_config={"vdi_type": "vhd"},
            allowed_operations=["clone", "copy", "destroy", "snapshot", "update", "resize"])
        self.db.contents[ref] = disks.content(entry.get("content"), entry["size"], uuid)
        return ref

    def disk(self, vm, entry, number, running, is_snapshot):
        attached = entry.get("attached", running) and not is_snapshot
        userdevice = entry.get("userdevice", str(number))
        other_config = {} if entry.get("owner") is False else {"owner": ""}
        other_config.update(entry.get("other_config", {}))
        self.db.insert(
            "VBD", uuid=self.uuid(None), VM=vm, VDI=self.vdi(entry, is_snapshot),
            userdevice=userdevice, device=entry.get("device", _device(userdevice)),
            bootable=entry.get("bootable", number == 0), mode=entry.get("mode", "RW"),
            type="Disk", other_config=other_config, currently_attached=attached,
            allowed_operations=["unplug"] if attached else ["attach"])

    def cd(self, vm, entry, number, running):
        vdi = NULL
        if entry.get("iso"):
            if entry["iso"] not in self.isos:
                name = entry.get("sr") or next(
                    sr["name"] for sr in self.description["srs"] if sr.get("content_type") == "iso")
                self.isos[entry["iso"]] = self.vdi({
                    "name": entry["iso"], "size": entry.get("size", 2 * disks.MIB), "sr": name,
                    "content": {"pattern": entry["iso"]}})
                self.db.set("VDI", self.isos[entry["iso"]], "read_only", True)
            vdi = self.isos[entry["iso"]]
        userdevice = entry.get("userdevice", str(number))
        self.db.insert(
            "VBD", uuid=self.uuid(None), VM=vm, VDI=vdi, empty=vdi == NULL, type="CD", mode="RO",
            userdevice=userdevice, device=entry.get("device", _device(userdevice)),
            currently_attached=entry.get("attached", running))

    def vif(self, vm, entry, number, running):
        name = entry.get("network") or next(iter(self.networks))
        digest = hashlib.sha256(b"%d" % (self.counter + 1)).hexdigest()
        self.db.insert(
            "VIF", uuid=self.uuid(entry.get("uuid")), VM=vm, network=self.networks[name],
            device=entry.get("device", str(number)), MTU=entry.get("mtu", 1500),
            MAC=entry.get("mac") or "02:%s" % ":".join(digest[k:k + 2] for k in range(0, 10, 2)),
            MAC_autogenerated="mac" not in entry, other_config=dict(entry.get("other_config", {})),
            currently_attached=entry.get("attached", running))


def _device(userdevice):
    return "xvd%s" % "abcdefghijklmnop"[int(userdevice)] if userdevice.isdigit() else userdevice


def take_snapshot(world, vm, name, ignored=(), disk_error=None):
    """Make the records of a new snapshot of a VM and return its reference.

    ``disk_error(vdi)`` may raise before a disk's snapshot is taken; those taken are then removed.
    """
    db = world.db
    source = db.get("VM", vm)
    record = dict(source)
    record.update(
        uuid="", name_label=name, is_a_snapshot=True, is_a_template=True,
        is_default_template=False, snapshot_of=vm, snapshot_time=now(),
        snapshot_info={"power-state-at-snapshot": source["power_state"],
                       "disk-snapshot-type": "crash_consistent"},
        snapshot_metadata=_metadata(source), power_state="Halted", resident_on=NULL, domid=-1,
        ha_always_run=False, is_vmss_snapshot=False, transportable_snapshot_id="",
        blocked_operations={}, appliance=NULL, protection_policy=NULL, snapshot_schedule=NULL,
        suspend_SR=NULL, start_delay=0, shutdown_delay=0, order=0, version=0, requires_reboot=False,
        current_operations={}, consoles=[], crash_dumps=[], VBDs=[], VIFs=[], VGPUs=[], VTPMs=[],
        snapshots=[], children=[], suspend_VDI=NULL)
    for field, value in record.items():
        if isinstance(value, (list, dict)):
            record[field] = value.copy()
    record["allowed_operations"] = allowed_operations(record)
    taken = {}
    try:
        for vbd in source["VBDs"]:
            vdi = db.get("VBD", vbd)["VDI"]
            if db.get("VBD", vbd)["type"] == "Disk" and vdi != NULL and vdi not in ignored:
                if disk_error is not None:
                    disk_error(vdi)
                taken[vdi] = take_vdi_snapshot(world, vdi)
    except Exception:
        for vdi in taken.values():
            db.delete("VDI", vdi)
        raise
    for cls, field in (("VM_metrics", "metrics"), ("VM_guest_metrics", "guest_metrics")):
        if db.get(cls, source[field]) is not None:
            record[field] = db.insert(cls, _copy(db.get(cls, source[field])))
    ref = db.insert("VM", record)
    for vbd in list(source["VBDs"]):
        fields = db.get("VBD", vbd)
        if fields["type"] == "Disk" and fields["VDI"] in ignored:
            continue
        copy = _copy(fields, VM=ref, currently_attached=False, current_operations={})
        if fields["type"] == "Disk":
            copy["VDI"] = taken.get(fields["VDI"], NULL)
            copy["other_config"]["owner"] = ""
        db.insert("VBD", copy)
    for vif in list(source["VIFs"]):
        db.insert("VIF", _copy(db.get("VIF", vif), VM=ref, currently_attached=False))
    db.set("VM", vm, "parent", ref)
    return ref


def take_vdi_snapshot(world, vdi):
    """Make the record of a new snapshot of a disk and return its reference."""
    db = world.db
    content = world.content(vdi)
    ref = new_ref()
    record = _copy(
        db.get("VDI", vdi), is_a_snapshot=True, snapshot_of=vdi, snapshot_time=now(), VBDs=[],
        snapshots=[], current_operations={}, physical_utilisation=1 << 20)
    db.insert("VDI", record, ref=ref)
    db.set("VDI", ref, "location", record["uuid"])
    db.contents[ref] = content
    return ref


def _copy(record, **changes):
    copy = {field: value.copy() if isinstance(value, (list, dict)) else value
            for field, value in record.items()}
    copy["uuid"] = ""
    copy.update(changes)
    return copy


def _metadata(record):
    fields = " ".join("('%s' %s)" % (name, "'%s'" % schema.to_db(kind, record[name]).replace(
        "\\", "\\\\").replace("'", "\\'"))
        for name, kind in schema.TYPES["VM"].items() if name != "snapshot_metadata")
    return "('struct' %s)" % fields
