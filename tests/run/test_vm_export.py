# SPDX-License-Identifier: GPL-3.0-or-later
"""The contract of the main job, as a user meets it: texts, files, exit statuses, what is left."""
import gzip
import hashlib
import io
import shutil
import subprocess
import tarfile

import pytest
from simulator.pool import MIB, Pool, cd, disk, snapshot, vif
from support.harness import ROOT, vmbackup
from support.world import disks_in, source_hashes

DUMP = ROOT.parent / "shared" / "data" / "real-pool-database.xml"


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
                     "DISK-xvdb/vdi.cfg", "SHA256SUMS", "VIFs/vif-0.cfg", "success",
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


def test_upstreams_block_to_the_letter_and_preview_changes_nothing(site):
    here = site(small_pool())
    here.configure("vm-export=w.*", "vm-export=db:2", "exclude=a[.]b", "max_backups=3")
    classes = ("VM", "VDI", "VBD", "SR")
    state = {kind: here.sim.records(kind) for kind in classes}
    result = here.run("preview")
    assert result.status == 0, result
    begin = result.lines.index("VmBackup.py running with these settings:")
    assert result.lines[begin + 1:begin + 13] == [
        "  backup_dir        = %s" % here.backups, "  status_log        = %s" % here.status_log,
        "  compress          = False", "  max_backups       = 3", "  vdi_export_format = raw",
        "  pool_db_backup    = 0", "  exclude (cnt)= 1", "  exclude: a.b", "  vdi-export (cnt)= 0",
        "  vdi-export:", "  vm-export (cnt)= 2", "  vm-export: db:2, web"]
    assert result.lines[-1] == "SUCCESS preview parameters"
    assert "VMs-not-in-backup: RESTORE_web, a.b" in result.lines
    assert not any(here.backups.iterdir())
    assert not here.status_log.exists()
    assert {kind: here.sim.records(kind) for kind in classes} == state


@pytest.mark.parametrize("lines, status, text", [
    (["vm-export=ghost", "vm-export=db"], 2, "ERROR - vm(s) List does not exist: ghost"),
    (["vm-export=db", "exclude=ghost"], 1, "***WARNING - vm(s) Exclude does not exist: ghost"),
    (["vm-export=db", "vm-export=gh.*:3"], 1, "***WARNING - vm not found: vm-export=gh.*:3"),
    (["vm-export=db", "vm-export=a[b"], 3, "***ERROR - invalid regex: vm-export=a[b"),
    (["vm-export=db", "max_backups=0"], 3, "max_backups=0"),
    (["vm-export=db", "compress=lzma"], 3, "compress=lzma"),
    (["vm-export=db", "colour=red"], 3, "unknown setting colour"),
    (["vm-export=db:0"], 3, "vm-export=db:0"),
    (["vm-export=db", "max_backups=2", "max_backups=3"], 1, "max_backups is given twice"),
    (["vm-export=db", "colour=red", "ignore_extra_keys=True"], 0, "ignoring config key: colour"),
    (["vm-export=db", "vdi-export="], 1, "***WARNING - empty vdi-export="),
    ([], 3, "no VMs loaded"),
])
def test_mistakes_and_warnings_end_as_the_contract_says(site, lines, status, text):
    here = site(small_pool())
    here.configure(*lines)
    result = here.run("preview")
    assert result.status == status, result
    assert result.has(text), result
    assert here.run().status == status
    assert bool(here.folders("db")) == (status < 3)


def test_two_vms_of_one_name_fail_and_the_others_go_on(site):
    pool = small_pool()
    pool.vm("db", disks=[disk(MIB)])
    here = site(pool)
    here.configure("vm-export=.*")
    result = here.run()
    assert result.status == 2
    assert "*** ERROR: duplicate VM name found: db" in result.lines
    assert result.lines[-1] == "VmBackup ended - **ERRORS DETECTED** - S:3 W:0 E:1"
    assert here.folders("web")
    assert not here.folders("db", marked=False)


def test_the_log_and_the_status_log(site):
    here = site(small_pool())
    here.configure("vm-export=db")
    here.sim.fault("snapshot_error", times=1)
    assert here.run().status == 2
    result = here.run()
    assert "VmBackup vm-export db - ***Success*** t:0" in result.lines
    texts = [line.split(",", 1)[1] for line in here.status_log.read_text().splitlines()]
    server = texts[0].split(",")[1]
    assert texts == [
        "vmbackup.py,%s,begin" % server, "vm-export,%s,begin,db" % server,
        "vm-export,%s,end,SNAPSHOT-FAIL db" % server,
        "vmbackup.py,%s,end,ERROR,S:0 W:0 E:1" % server,
        "vmbackup.py,%s,begin" % server, "vm-export,%s,begin,db" % server,
        "vm-export,%s,end,SUCCESS db,elapse:0 size:0G" % server,
        "vmbackup.py,%s,end,SUCCESS,S:1 W:0 E:0" % server]


def test_retention_keeps_the_newest_and_touches_nothing_else(site):
    here = site(small_pool())
    top = here.backups / "db"
    for day in (1, 2, 3):
        old = top / ("backup-2026-01-0%d-(02:00:00)" % day)
        old.mkdir(parents=True)
        (old / "db.xva").write_text("old")
        (old / ("success_compress" if day == 1 else "success")).touch()
    for stray in ("@keep", "backup-2025-01-01", "backup-2020-01-01-(00:00:00)", "pre-upgrade"):
        (top / stray).mkdir()
        (top / stray / "precious").write_text("mine")
    here.configure("vm-export=db:2")
    assert here.run().status == 0
    names = [item.name for item in here.folders("db", marked=False)]
    good = [item.name for item in here.folders("db")]
    assert good[0] == "backup-2026-01-03-(02:00:00)"
    assert len(good) == 2
    assert "backup-2026-01-01-(02:00:00)" not in names
    for stray in ("@keep", "backup-2025-01-01", "backup-2020-01-01-(00:00:00)", "pre-upgrade"):
        assert (top / stray / "precious").read_text() == "mine"


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


def test_what_a_killed_run_left_is_removed_and_nothing_of_others(site):
    here = site(small_pool())
    here.configure("vm-export=web")
    process = here.start()
    here.sim.fault("kill_client_at", pid=process.pid, method="GET /export", moment="after")
    process.wait(60)
    process.communicate()
    assert process.returncode == -9
    assert "RESTORE_web" in here.snapshots()
    assert not here.folders("web")
    assert here.run().status == 0
    assert len(here.folders("web", marked=False)) == 1
    assert here.snapshots() == ["mine"]
    assert "RESTORE_web" in [vm["name_label"] for vm in here.sim.records("VM").values()]


def test_a_task_that_is_gone_leaves_the_verdict_to_the_archive(site):
    here = site(small_pool())
    here.configure("vm-export=web")
    here.sim.fault("task_vanish", path="/export", after=MIB)
    result = here.run()
    assert result.status == 1, result
    assert result.has("VmBackup vm-export web - ***WARNING***")
    assert here.folders("web")


def test_the_disk_in_use_is_destroyed_later(site):
    here = site(small_pool())
    here.configure("vm-export=web")
    here.sim.fault("vdi_in_use", times=2)
    assert here.run().status == 0
    here.assert_pool_is_clean(["mine"])


def test_a_lost_session_is_renewed_once(site):
    here = site(small_pool())
    here.configure("vm-export=db", "vm-export=web")
    here.sim.fault("session_lost", method="VM.snapshot")
    result = here.run()
    assert result.status == 0, result
    here.assert_pool_is_clean(["mine"])


def test_a_call_that_got_no_answer_is_not_sent_again(site):
    here = site(small_pool())
    here.configure("vm-export=db")
    here.sim.fault("rpc_drop", method="VM.snapshot", moment="after", times=1)
    assert here.run().status == 2
    assert [name for name in here.sim.methods() if name.endswith("VM.snapshot")] == [
        "Async.VM.snapshot"]
    assert here.run().status == 0
    here.assert_pool_is_clean(["mine"])


def test_trust_in_the_host(site, tmp_path):
    here = site(small_pool())
    here.configure("vm-export=db")
    assert here.run("tls_fingerprint=" + here.sim.fingerprint).status == 0
    assert here.run("tls_ca=" + here.sim.certificate).status == 0
    result = here.run("tls_fingerprint=" + "0" * 64)
    assert result.status == 3
    assert result.has("tls_fingerprint=" + here.sim.fingerprint)
    assert not here.sim.sessions()


def test_the_socket_of_dom0_needs_no_password(site):
    here = site(small_pool())
    result = vmbackup("local", "db", "backup_dir=%s" % here.backups, "host=" + here.sim.socket)
    assert result.status == 0, result
    assert here.folders("db")


def test_a_slave_leads_to_the_master_and_a_redirect_to_a_member(site):
    pool = Pool(hosts=2)
    pool.vm("web", disks=[disk(2 * MIB, seed=1)])
    here = site(pool)
    here.configure("vm-export=web")
    slave = next(host for host in here.sim.hosts if not host["master"])
    assert here.run("host=" + slave["url"]).status == 0
    here.sim.fault("export_302", to=1, host=0)
    result = here.run("tls_fingerprint=" + here.sim.fingerprint)
    assert result.status == 0, result
    assert result.has("***Success***")


@pytest.mark.skipif(not DUMP.exists(), reason="the real pool database is not there")
def test_the_real_pool_database(site):
    here = site(database=DUMP)
    here.configure("vm-export=.*")
    result = here.run("preview")
    assert result.has("  vm-export (cnt)= 2"), result
    assert here.run().status in (0, 2)
    assert not [name for name in here.snapshots() if name.startswith("RESTORE_")]


@pytest.mark.skipif(not shutil.which("xva-img"), reason="xva-img is not installed")
def test_xva_img_unpacks_the_disk(site, tmp_path):
    pool = Pool()
    pool.vm("web", disks=[disk(2 * MIB, seed=1)])
    here = site(pool)
    here.sim.fault("sha1_checksums")
    here.configure("vm-export=web")
    assert here.run().status == 0
    subprocess.run(["tar", "xf", str(here.file("web"))], cwd=str(tmp_path), check=True)
    (folder,) = tmp_path.glob("Ref:*")
    folder.chmod(0o700)
    subprocess.run(["chmod", "-R", "u+rw", str(folder)], check=True)
    subprocess.run(["xva-img", "-p", "disk-export", "%s/" % folder, "disk.raw"],
                   cwd=str(tmp_path), check=True)
    found = hashlib.sha256((tmp_path / "disk.raw").read_bytes()).hexdigest()
    assert [found] == source_hashes(here.sim, "web")
