# SPDX-License-Identifier: GPL-3.0-or-later
"""The contract of the main job, as a user meets it: texts, files, exit statuses, what is left."""
import gzip
import hashlib
import io
import subprocess
import tarfile

import pytest
from simulator.pool import MIB, Pool, cd, disk, snapshot, vif
from support.harness import vmbackup
from support.world import disks_in, source_hashes


def small_pool(**settings):
    pool = Pool()
    pool.vm("web", power_state="Running", description="two\nlines", vifs=[vif()], cds=[cd()],
            os_version="Debian 12", other_config={"base_template_name": "Debian"},
            ha_restart_priority="restart", snapshots=[snapshot("mine")],
            disks=[disk(3 * MIB + 512, "root", seed=1), disk(2 * MIB, "data", seed=2)])
    pool.vm("db", disks=[disk(5 * MIB, sparse=[1], device="")])
    pool.vm("a.b", disks=[disk(MIB, seed=3)])
    pool.vm("RESTORE_web", disks=[disk(MIB, seed=4)])
    pool.template("web template")
    pool.setting(**settings)
    return pool


@pytest.mark.parametrize("compress, suffix", [
    ("False", "xva"), ("True", "xva.gz"), ("gzip", "xva.gz"), ("zstd", "xva.zst")])
def test_the_disks_in_the_archive_are_the_vms(site, compress, suffix):
    here = site(small_pool(first_id=8))
    here.configure("vm-export=web", "compress=" + compress)
    result = here.run()
    assert result.status == 0, result
    data = here.file("web", suffix).read_bytes()
    if suffix.endswith("gz"):
        data = gzip.decompress(data)
    elif suffix.endswith("zst"):
        data = subprocess.check_output(["zstd", "-dc", str(here.file("web", suffix))])
    found = sorted(hashlib.sha256(item).hexdigest() for item in disks_in(data).values())
    assert found == source_hashes(here.sim, "web")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        ova = archive.extractfile("ova.xml").read().decode()
    assert "<name>is_a_template</name><value><boolean>0</boolean>" in ova
    assert "<name>ha_restart_priority</name><value></value>" in ova.replace("<value/>",
                                                                            "<value></value>")
    here.assert_pool_is_clean(["mine"])
    assert vmbackup("verify", here.config).status == 0


def test_the_folder_holds_what_the_contract_lists(site):
    here = site(small_pool())
    here.configure("vm-export=web", "vm-export=db")
    assert here.run().status == 0
    (folder,) = here.folders("web")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["DISK-xvda/vbd.cfg", "DISK-xvda/vdi.cfg", "DISK-xvdb/vbd.cfg",
                     "DISK-xvdb/vdi.cfg", "RESTORE.txt", "SHA256SUMS", "VIFs/vif-0.cfg", "success",
                     "vm-metadata.xml", "vm.cfg", "web.xva"]
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=str(folder), check=True)
    records = here.sim.records("VM").values()
    (vm,) = [vm for vm in records if vm["name_label"] == "web"]
    lines = (folder / "vm.cfg").read_text(encoding="utf-8").splitlines()
    assert lines == ["name_label=web", "name_description=two\\nlines",
                     "memory_dynamic_max=%s" % vm["memory_dynamic_max"],
                     "VCPUs_max=%s" % vm["VCPUs_max"],
                     "VCPUs_at_startup=%s" % vm["VCPUs_at_startup"],
                     "base_template_name=Debian", "os_version=Debian 12", "orig_uuid=" + vm["uuid"]]
    vdis = here.sim.records("VDI").values()
    originals = {vdi["uuid"] for vdi in vdis if not vdi["is_a_snapshot"]}
    for name in ("xvda", "xvdb"):
        cfg = dict(line.split("=", 1) for line in
                   (folder / ("DISK-" + name) / "vdi.cfg").read_text().splitlines())
        assert set(cfg) == {"name_label", "name_description", "virtual_size", "type", "sharable",
                            "read_only", "orig_uuid", "orig_sr_uuid"}
        assert cfg["orig_uuid"] in originals
    assert (here.folders("db")[0] / "DISK-0" / "vdi.cfg").exists()
    for path in folder.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("pattern", ["%F_%T", "nightly %Y%m%d-%H%M", "%F"])
def test_runs_in_the_same_second_minute_or_day_have_folders_of_their_own(turn, pattern):
    """Each counts, and the oldest goes, even where a later one takes its name again."""
    here = turn(small_pool())
    here.configure("vm-export=db", "max_backups=2", "backup_dir_pattern=" + pattern)
    made = []
    for _ in range(4):
        before = {folder.name: folder.stat().st_ino for folder in here.folders("db")}
        assert here.run().status == 0
        after = {folder.name: folder.stat().st_ino for folder in here.folders("db", marked=False)}
        made += [item for item in after.items() if item not in before.items()]
        assert set(after.items()) == set(made[-2:])
    assert len(made) == 4


OTHERS = "snapshot=8d1bd05c-0000-4000-8000-000000000001"


def test_a_key_proves_only_the_snapshot_that_it_names(turn):
    """A VM that was imported from a backup bears its snapshot's key, and so do those that somebody
    else takes of it: they are not ours."""
    pool = Pool()
    marks = {"a uuid": "8d1bd05c-0000-4000-8000-000000000002", "one": "1", "nothing": None,
             "another's": OTHERS, "ours": OTHERS}
    for name, own in (("web", None), ("db", "1"), ("mail", OTHERS)):
        pool.vm(name, other_config={"vmbackup": own} if own else {},
                disks=[disk(MIB, name, seed=name)],
                snapshots=[snapshot("%s of %s" % (what, name), other_config={"vmbackup": key})
                           if key else snapshot("%s of %s" % (what, name))
                           for what, key in marks.items()])
    here = turn(pool)
    for ref, record in here.sim.records("VDI").items():
        if record["is_a_snapshot"]:
            here.sim.set("VDI", ref, "other_config", {"vmbackup": OTHERS})
    for name in ("web", "db", "mail"):
        record = here.sim.record("VM", "ours of " + name)
        here.sim.set("VM", record["uuid"], "other_config", {
            "vmbackup": "snapshot=" + record["uuid"]})
    here.configure("vm-export=.*")
    before = here.snapshots()
    assert len(before) == 15
    result = here.run()
    assert result.status == 0, result
    ours = ["ours of web", "ours of db", "ours of mail"]
    left = sorted(set(before) - set(ours))
    assert here.snapshots() == left
    assert sum("removing the leftover snapshot" in line for line in result.lines) == len(ours)
    assert not result.has("VDI snapshot")
    here.assert_pool_is_clean(left)
    for name in ("web", "db", "mail"):
        assert len(here.sim.disks_of("nothing of " + name)) == 1
    # A second run finds nothing to remove, and again leaves these.
    assert not here.run().has("removing the leftover")
    here.assert_pool_is_clean(left)


# --- a VM whose snapshot the host refuses ---------------------------------------------------------

NO_SPACE = {"error_info": ["SR_BACKEND_FAILURE_44", "", "There is insufficient space", ""]}


def pool_state(sim):
    """What an administrator could see of VMs and disks, but for what is under way there."""
    hidden = ("allowed_operations", "current_operations")
    return {cls: {ref: {key: value for key, value in record.items() if key not in hidden}
                  for ref, record in sim.records(cls).items()} for cls in ("VM", "VBD", "VDI")}


def test_a_halted_vm_whose_snapshot_is_refused_is_exported_as_it_is(turn):
    pool = Pool()
    pool.vm("web", disks=[disk(MIB + 512, "root", seed=1), disk(MIB, "data", seed=2)])
    here = turn(pool)
    here.configure("vm-export=web")
    here.sim.fault("snapshot_error", **NO_SPACE)
    before = pool_state(here.sim)
    result = here.run()
    assert result.status == 0, result
    assert result.lines[-1] == "VmBackup ended - Success - S:1 W:0 E:0"
    at = [number for number, line in enumerate(result.lines) for text in (
        "web: NOTE - ", "web: vm-export begins", "web: the export of the VM itself has ended")
        if line.startswith(text)]
    assert len(at) == 3 and at == sorted(at), result
    assert "SR_BACKEND_FAILURE_44" in result.lines[at[0]] and "start" in result.lines[at[0]]
    found = disks_in(here.file("web").read_bytes()).values()
    assert sorted(hashlib.sha256(data).hexdigest() for data in found) == source_hashes(
        here.sim, "web")
    assert pool_state(here.sim) == before
    assert not {item["class"] for item in here.sim.destroyed()} & {"VM", "VBD", "VDI"}
    here.assert_pool_is_clean()
    assert vmbackup("verify", here.config).status == 0


@pytest.mark.parametrize("fields, disks", [
    ({"power_state": "Running"}, ["root"]), ({"power_state": "Suspended"}, ["root"]),
    ({}, ["root", "[NOBAK] scratch"]), ({"blocked_operations": {"export": "by Jo"}}, ["root"])])
def test_no_other_vm_is_exported_without_a_snapshot(turn, fields, disks):
    pool = Pool()
    pool.vm("web", disks=[disk(MIB, name, seed=name) for name in disks], **fields)
    here = turn(pool)
    here.configure("vm-export=web")
    here.sim.fault("snapshot_error", **NO_SPACE)
    result = here.run()
    assert result.status == 2, result
    assert result.has("VmBackup vm-export web - ***ERROR*** ")
    assert "GET /export" not in here.sim.methods()
    assert not here.folders("web", marked=False)


@pytest.mark.parametrize("power_state, status", [("Halted", 0), ("Running", 2)])
@pytest.mark.parametrize("code", ["SR_OPERATION_NOT_SUPPORTED", "VDI_IS_SHARABLE",
                                  "VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION"])
def test_preview_foretells_what_the_records_tell_of_it(turn, power_state, status, code):
    pool = Pool()
    pool.sr("cannot", type="iscsi", snapshot=False)
    pool.vm("web", power_state=power_state, disks=[disk(
        MIB, "root", seed=1, sharable=code == "VDI_IS_SHARABLE",
        **({"sr": "cannot"} if code.startswith("SR") else {}))])
    here = turn(pool)
    if "ON_BOOT" in code:
        here.sim.set("VDI", "root", "on_boot", "reset")
    here.configure("vm-export=web")
    for words in (["preview"], []):
        result = here.run(*words)
        assert result.status == status, result
        assert result.has(code), result
    assert len(here.folders("web")) == (status == 0)
    here.assert_pool_is_clean()
