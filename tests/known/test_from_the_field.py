# SPDX-License-Identifier: GPL-3.0-or-later
"""What 30 nights with a fault of each kind, and reports from the field, showed."""
import os
import re
import subprocess
import sys
import unicodedata

import pytest
from simulator.pool import MIB, Pool, disk, snapshot
from support.forks import Forks
from support.harness import finish, hasty, vmbackup
from support.mail_server import MailServer
from support.tally import is_good, tree
from support.world import IMPATIENT, lone_vdi_snapshots, one_vm, pool_of, wait_until

KINDS = {"vm-export": "VM", "vdi-export": "VDI"}

# --- xapi restarts between a snapshot and its mark ------------------------------------------------


def administrators(site):
    """A VM with a snapshot of the administrator's, and its refs."""
    return {ref for cls in ("VM", "VDI") for ref, record in site.sim.records(cls).items()
            if record["is_a_snapshot"]}


def running(name="web"):
    pool = Pool()
    pool.vm(name, power_state="Running", disks=[disk(MIB, "root", seed=1)],
            snapshots=[snapshot("mine")])
    pool.vm("zdb", power_state="Running", disks=[disk(MIB, "zdb", seed=2)])
    return pool


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("method, moment", [
    ("{}.add_to_other_config", "before"), ("{}.get_record", "before"), ("{}.snapshot", "after"),
    ("task.get_record", "before"), ("{}.get_snapshots", "after")])
def test_xapi_restarts_beside_a_snapshot(turn, kind, method, moment):
    """It is away for a while. Nothing stays behind, whatever becomes of that VM; the next one has
    its turn."""
    site = turn(running())
    site.configure(kind + "=web", kind + "=zdb")
    there = administrators(site)
    method = method.format(KINDS[kind])
    skip = 1 if method == "task.get_record" else 0
    site.sim.fault("xapi_restart", method=method, moment=moment, skip=skip)
    process = hasty(site, RECOVERY=30)
    result = finish(process)
    assert administrators(site) == there, result
    assert result.has("%s zdb - ***Success***" % kind), result
    assert not site.sim.sessions()


def goes_away(site, method, moment, logins):
    """The host restarts at a call, and refuses so many logins after it (None: all)."""
    site.sim.fault("xapi_restart", method=method, moment=moment)
    site.sim.fault("login_error", error_info=["HOST_STILL_BOOTING"], times=logins, skip=1)


@pytest.mark.newest
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("method, moment", [("{}.add_to_other_config", "before"),
                                            ("{}.snapshot", "after")])
def test_it_is_away_for_some_logins(turn, kind, method, moment):
    """The look-up that cleans up fails at first, for nobody can log in."""
    site = turn(running())
    site.configure(kind + "=web", kind + "=zdb")
    there = administrators(site)
    goes_away(site, method.format(KINDS[kind]), moment, 3)
    result = finish(hasty(site, RECOVERY=60))
    assert administrators(site) == there, result
    assert result.status in (1, 2), result


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("method, moment", [("{}.add_to_other_config", "before"),
                                            ("{}.snapshot", "after")])
def test_what_could_not_be_looked_for_is_told(turn, kind, method, moment):
    """It does not come back in time. The log says so and where to look; and no promise is made that
    cannot be kept: a VDI snapshot without a mark is found by no next run."""
    site = turn(running())
    site.configure(kind + "=web")
    there = administrators(site)
    goes_away(site, method.format(KINDS[kind]), moment, None)
    result = finish(hasty(site, RECOVERY=1))
    assert result.status == 2, result
    left = administrators(site) - there
    assert left
    if kind == "vdi-export":
        (ref,) = left
        uuid = site.sim.records("VDI")[ref]["uuid"]
        told = [line for line in result.lines if "web" in line and (
            uuid in line or "could not be looked up" in line)]
        assert told, result
        if "add_to" in method:
            assert any(uuid in line for line in told), result
            assert not any("next run" in line for line in told), result
        assert lone_vdi_snapshots(site) == {ref: "web"}
    else:
        assert [line for line in result.lines if "snapshot" in line and "could not" in line], result
        site.sim.clear_faults()
        assert site.run().status == 0
        assert administrators(site) == there


def test_an_administrators_snapshot_of_the_same_moment_stays(turn):
    """Nobody can tell it from the one whose reference got lost: both are left, and told of."""
    site = turn(running())
    site.configure("vdi-export=web")
    site.sim.fault("snapshot_slow", seconds=2, times=1)
    site.sim.fault("xapi_restart", method="VDI.snapshot", moment="after")
    process = hasty(site, RECOVERY=30)
    wait_until(lambda: "Async.VDI.snapshot" in site.sim.methods())
    mine = site.sim.take_snapshot("web", "another of mine")
    vdis = {vbd["VDI"] for vbd in site.sim.records("VBD").values() if vbd["VM"] == mine}
    assert finish(process).status == 2
    assert vdis and vdis <= set(site.sim.records("VDI"))
    assert site.snapshots() == ["another of mine", "mine"]


# --- what file servers and desktops strew about ---------------------------------------------------

STREWN = [".DS_Store", "._web.xva", "Thumbs.db", "desktop.ini", "@eaDir/SYNOFILE", ".@__thumb/x",
          ".AppleDouble/web.xva", ".nfs0000000000a1b2c300000001", "DISK-xvda/.DS_Store",
          "VIFs/@eaDir/vif-0.cfg@SynoEAStream", "DISK-xvda/._vdi.cfg"]


def strew(folder, name):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\0\0\0\1Bud1")


def test_six_nights_on_a_share_that_desktops_look_at(turn):
    """Two backups stay, verify proves them, and no night warns."""
    pool = Pool()
    pool.vm("web", disks=[disk(MIB, seed=1, device="xvda")], vifs=[{}])
    site = turn(pool)
    site.configure("vm-export=web", "max_backups=2")
    for _ in range(6):
        result = site.run()
        assert result.status == 0, result.out
        for name in STREWN:
            strew(site.folders("web")[-1], name)
            strew(site.backups, name.split("/")[-1])
            strew(site.backups / "web", name.split("/")[-1])
    assert len(site.folders("web", marked=False)) == 2
    assert vmbackup("verify", site.config).status == 0


@pytest.mark.parametrize("name", ["#recycle/web.xva", ".snapshot/x", "@Recycle/x", "notes.txt",
                                  "web (copy).xva", "DISK-xvda/disk.img"])
def test_what_may_be_a_users_stays_and_is_told(turn, name):
    site = turn(one_vm(MIB))
    site.configure("vm-export=web", "max_backups=1")
    assert site.run().status == 0
    (old,) = site.folders("web")
    strew(old, name)
    before = tree(old)
    for words in (["preview"], [], []):
        result = site.run(*words)
        assert result.status == 1, result
        assert result.has(name.split("/")[0])
    assert tree(old) == before


# --- names ----------------------------------------------------------------------------------------

LISTS = "import os, sys; print(ascii(os.listdir(os.open(sys.argv[1], os.O_RDONLY))))"


@pytest.mark.parametrize("name", ["Büro", "Ångström é", "가나다"])
def test_a_file_server_that_gives_names_in_another_unicode_form(turn, tmp_path, shim, name):
    """It stores NFD and finds NFC all the same: night after night one folder, and it is pruned."""
    site = turn(pool_of(name, power_state="Running"))
    site.configure("vm-export=" + name, "max_backups=2")
    listed = unicodedata.normalize("NFD", name)
    env = {"LD_PRELOAD": str(shim), "SHIM_NFD": "%s/%s" % (name, listed)}
    for _ in range(3):
        result = site.run(env=env)
        assert result.status == 0, result.out
    (folder,) = site.backups.iterdir()
    assert folder.name == name and len(list(folder.iterdir())) == 2
    done = subprocess.run([sys.executable, "-c", LISTS, str(site.backups)],
                          env=dict(os.environ, **env), stdout=subprocess.PIPE)
    assert done.stdout.decode().strip() == ascii([listed]), "the library does not do it"
    result = site.run("preview", env=env)
    assert result.status == 0 and result.has("would delete"), result.out
    for words in (["verify", site.config], ["verify", site.config, name], ["list", site.config],
                  ["list", site.config, name], ["check", site.config]):
        assert vmbackup(*words, env=env).status == 0, words
    assert all(map(is_good, folder.iterdir()))


# --- mail, space ----------------------------------------------------------------------------------

def test_a_mail_server_with_a_ca_of_ones_own(turn, tmp_path):
    server = MailServer(tls=tmp_path)
    try:
        site = turn(one_vm(MIB))
        site.configure("vm-export=web", *server.settings(
            smtp_starttls=True, smtp_ca=server.certificate))
        result = site.run()
        assert result.status == 0, result
        assert server.encrypted == [True]
    finally:
        server.stop()


def test_a_file_system_that_tells_no_size(turn, shim):
    """0 of 0 free is no reason to fail: one note instead."""
    site = turn(one_vm())
    site.configure("vm-export=web")
    env = {"LD_PRELOAD": str(shim), "SHIM_NOSIZE": "1"}
    for words in (["preview"], []):
        result = site.run(*words, env=env)
        assert result.status == 0, result
    assert [line for line in result.lines if "NOTE" in line and "size" in line], result.out
    assert not result.has("total 0")
    assert len(site.folders("web")) == 1


# --- a halted VM that cannot be snapshotted -------------------------------------------------------

REASONS = {
    "USB passed through": ["VM_HAS_VUSBS", "OpaqueRef:x"],
    "a thick SR that is full": ["SR_BACKEND_FAILURE_44", "", "There is insufficient space", ""],
    "a chain too long": ["SR_BACKEND_FAILURE_109", "", "The snapshot chain is too long", ""],
    "an SR without snapshots": ["SR_OPERATION_NOT_SUPPORTED", "OpaqueRef:x"],
    "a shared disk": ["VDI_IS_SHARABLE", "OpaqueRef:x"],
    "a disk that is reset": ["VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION"],
}


def cannot_be_snapshotted(turn, state, names=("root",)):
    pool = Pool()
    pool.vm("web", power_state=state, disks=[disk(MIB, name, seed=name, device="xvd" + letter)
                                             for name, letter in zip(names, "abc")])
    site = turn(pool)
    site.configure("vm-export=web")
    return site


@pytest.mark.parametrize("reason", sorted(REASONS))
def test_a_halted_vm_is_exported_as_it_is(turn, reason):
    """Nothing of it is changed; a Success with a NOTE that tells why and what that means."""
    site = cannot_be_snapshotted(turn, "Halted")
    before = site.sim.records("VM"), site.sim.records("VDI")
    site.sim.fault("snapshot_error", error_info=REASONS[reason])
    result = site.run()
    assert result.status == 0, result
    assert [line for line in result.lines if "NOTE" in line and REASONS[reason][0] in line]
    assert is_good(site.folders("web")[0])
    assert (site.sim.records("VM"), site.sim.records("VDI")) == before
    assert not site.sim.destroyed() or not [
        item for item in site.sim.destroyed() if item["class"] in ("VM", "VDI")]
    site.assert_pool_is_clean()
    assert vmbackup("verify", site.config).status == 0


@pytest.mark.parametrize("state, names, error", [
    ("Running", ("root",), "VM_HAS_VUSBS"), ("Halted", ("root", "swap [NOBAK]"), "VM_HAS_VUSBS"),
    ("Suspended", ("root",), "SR_OPERATION_NOT_SUPPORTED"), ("Halted", ("root",), "VDI_IO_ERROR"),
    ("Halted", ("root",), "OPERATION_BLOCKED")])
def test_and_no_other(turn, state, names, error):
    site = cannot_be_snapshotted(turn, state, names)
    site.sim.fault("snapshot_error", error_info=[error, "x"])
    result = site.run(constants=IMPATIENT)
    assert result.status == 2, result
    assert error in result.out
    assert not site.folders("web", marked=False)
    assert "GET /export" not in site.sim.methods()


@pytest.mark.parametrize("state", ["Halted", "Running"])
@pytest.mark.parametrize("field, cls", [("sharable", "VDI"), ("on_boot", "VDI"),
                                        ("VUSBs", "VM"), ("blocked", "VM")])
def test_preview_ends_as_the_run_does(turn, state, field, cls):
    site = cannot_be_snapshotted(turn, state)
    if field == "VUSBs":
        site.sim.set("VM", "web", "VUSBs", ["OpaqueRef:usb"])
        site.sim.fault("snapshot_error", error_info=REASONS["USB passed through"])
    elif field == "blocked":
        site.sim.set("VM", "web", "blocked_operations", {"snapshot": "true"})
    else:
        site.sim.set("VDI", "root", field, "reset" if field == "on_boot" else True)
    preview, run = site.run("preview"), site.run(constants=IMPATIENT)
    expected = 0 if state == "Halted" and field != "blocked" else 2
    assert (preview.status, run.status) == (expected, expected), (preview, run)
    if not expected:
        assert [line for line in preview.lines if "NOTE" in line and "web" in line]


# --- a month of nights ----------------------------------------------------------------------------

NIGHTS = {
    2: ("export_cut", {"vm": "web", "after": 5000}, 2),
    4: ("snapshot_error", {"vm": "db"}, 2),
    6: ("xapi_restart", {"method": "VM.add_to_other_config"}, 2),
    8: ("session_lost", {"method": "VM.get_snapshots"}, 0),
    10: ("rpc_drop", {"method": "VM.destroy", "moment": "after", "times": 1}, 0),
    12: ("vdi_in_use", {"times": 3}, 0),
    14: ("flip_bit", {"vm": "db"}, 2),
    16: ("export_fail_after_whole", {"vm": "web"}, 2),
}


@pytest.mark.newest
def test_a_month_of_nights(turn, tmp_path, shim):
    """A fault every other night, two changes of the clock; what stays is what the rules say, whole;
    nothing is left on the pool."""
    pool = Pool()
    for name in ("web", "db", "mail"):
        pool.vm(name, power_state="Running", disks=[disk(MIB // 4, name, seed=name)])
    site = turn(pool)
    site.configure("vm-export=.*", "max_backups=3", "keep_weekly=2")
    begin, ends = 1774922400, []  # 31 March 2026, 02:00 UTC
    with Forks(tmp_path, shim) as forks:
        for night in range(18):
            name, options, status = NIGHTS.get(night, (None, {}, 0))
            if name:
                site.sim.fault(name, **options)
            moment = begin + 86400 * night - (7200 if night == 9 else 0)
            run = forks.run(site, env={"SHIM_TIME": str(moment), "TZ": "UTC"})
            ends.append((night, run.status, status))
            site.sim.clear_faults()
            site.assert_pool_is_clean()
            for vm in ("web", "db", "mail"):
                assert all(map(is_good, site.folders(vm, marked=False))), (night, vm, run)
    assert [(night, found) for night, found, _ in ends] == [
        (night, expected) for night, _, expected in ends]
    for vm in ("web", "db", "mail"):
        assert 3 <= len(site.folders(vm)) <= 5
    result = vmbackup("verify", site.config)
    assert result.status == 0, result
    days = [re.search(r"2026-(\d\d-\d\d)", folder.name).group(1) for folder in site.folders("mail")]
    assert days[-3:] == ["04-15", "04-16", "04-17"]
