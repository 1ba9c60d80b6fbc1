# SPDX-License-Identifier: GPL-3.0-or-later
"""Everything that an export and a pool can do wrong, and what is left of the backups then.

Many faults are tried in one run, each on a VM of its own: that one VM's failure never stops the
others is shown on the way. What holds for all of them is in `night`.
"""
import collections
import gzip
import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import tarfile

import pytest
from simulator import server
from simulator.api import XapiError
from simulator.pool import MIB, Pool, disk, snapshot
from support.forks import Forks
from support.harness import finish, vmbackup
from support.tally import Ledger, is_good, tree
from support.world import (
    IMPATIENT,
    destroy_as_an_administrator,
    disks_in,
    furnish,
    lone_vdi_snapshots,
    numbered_vms,
    old_backup,
    the_host_forgets,
    wait_until,
)

pytestmark = pytest.mark.newest  # nothing here depends on the Python

SIZE = MIB + 512  # of each disk: two chunks
GOOD, WARNED = "***Success***", "***WARNING***"
WITNESSES = ["a witness", "zz witness"]  # VMs without a fault: the first and the last of a run

# One fault of one VM: `kind` is its row in the table at the end. `ends` is GOOD, WARNED, or a
# regular expression for the reason that the ERROR has to give. An option `after` may be the name of
# a place in the body, see the landmarks.
Fault = collections.namedtuple("Fault", "kind name options ends")


def night(site, tally, chosen, words=(), landmarks=None, kind="vm-export", **options):
    """Good backups, a run with all the faults, a good run again; checks what each has to leave.

    chosen: {VM: Fault}, a VM's disk has its name. landmarks(vm): {place: byte}, by the VM's good
    backup. words: of all runs. options: of all faults. Returns the Result of the run with faults.
    """
    words = ["parallel=4"] + list(words)
    places = [vm for vm, fault in chosen.items() if isinstance(fault.options.get("after"), str)]
    if places:
        config = site.config.read_text()
        site.config.write_text(config + "exclude=(?!%s)\n" % "|".join(map("{}$".format, places)))
        assert site.run(*words).status == 0
        site.config.write_text(config)
    for vm in sorted(set(chosen) - set(places)) + WITNESSES:
        old_backup(site, vm, 1)
    ledger, numbers = Ledger(site), {}
    for vm, fault in chosen.items():
        given = dict(fault.options, **options)
        given["vdi" if kind == "vdi-export" or fault.name.startswith("vdi_") else "vm"] = vm
        if isinstance(given.get("after"), str):
            given["after"] = landmarks(vm)[given["after"]]
        numbers[site.sim.fault(fault.name, **given)] = vm
    result = site.run(*words, constants=IMPATIENT)
    fired = {numbers[fault["number"]]: fault["fired"] for fault in site.sim.faults()}

    wrong = {}
    for vm in ledger.trees:
        fault = chosen.get(vm)
        ends = fault.ends if fault else GOOD
        (line,) = [line for line in result.lines
                   if line.startswith("VmBackup %s %s - " % (kind, vm))]
        told = line.split(" - ", 1)[1]
        if ends in (GOOD, WARNED):
            good = told.startswith(ends) and not ledger.untouched(vm) and all(
                map(is_good, site.folders(vm, marked=False)))
        else:
            good = (told.startswith("***ERROR*** ") and re.search(ends, told[12:])
                    and ledger.untouched(vm))
        if not good or (fault and not fired[vm]):
            wrong[vm] = told
    assert not wrong, "\n".join("%s: %s" % item for item in sorted(wrong.items()))
    all_ends = {fault.ends for fault in chosen.values()}
    assert result.status == (2 if all_ends - {GOOD, WARNED} else 1 if WARNED in all_ends else 0)

    site.sim.clear_faults()
    again = site.run(*words)
    assert again.status == 0, again
    for name in sorted({fault.kind for fault in chosen.values()}):
        vms = [vm for vm, fault in chosen.items() if fault.kind == name]
        tally(name, sum(fired[vm] for vm in vms), ledger, vms=vms)
    return result


# --- exports --------------------------------------------------------------------------------------

CUT, FAILS, ANSWER, DAMAGED = (
    "export cut off silently", "export fails on the host", "another answer than an export",
    "damaged archive")
IO = ["VDI_IO_ERROR", "Device I/O errors"]
LOST = r"not whole: .*(cut off|arrived|does not end in its footer)"
# Whatever is exported, in whatever form.
ANY_EXPORT = {
    "cut at the start": Fault(CUT, "export_cut", {"after": 0, "task": "vanish"}, LOST),
    "cut at a byte": Fault(CUT, "export_cut", {"after": 1, "task": "success"}, LOST),
    "cut and pending": Fault(CUT, "export_cut", {"after": MIB}, LOST),
    "cut and failed": Fault(
        CUT, "export_cut", {"after": MIB, "task": "failure", "error_info": ["VDI_IO_ERROR", "x"]},
        LOST + ".*the host says: VDI_IO_ERROR x .*check its storage"),
    "reset": Fault(CUT, "export_reset", {"after": 1000}, "connection to the host broke|cut off"),
    "reset later": Fault(CUT, "export_reset", {"after": MIB}, "connection to the host|cut off"),
    "whole and pending": Fault(CUT, "task_never_completes", {},
                               "the export's task did not end within"),
    "whole and task gone": Fault(CUT, "export_cut", {"after": "end", "task": "vanish"}, WARNED),
    "fails at the start": Fault(FAILS, "export_fail", {}, "the host says: VDI_IO_ERROR"),
    "fails in the middle": Fault(
        FAILS, "export_fail", {"after": MIB, "error_info": ["SR_BACKEND_FAILURE_46", "", "x"]},
        "the host says: SR_BACKEND_FAILURE_46 x .*SMlog"),
    "fails silently": Fault(FAILS, "export_fail_silent",
                            {"after": MIB, "error_info": ["INTERNAL_ERROR", "Not_found"]},
                            "the host says: INTERNAL_ERROR Not_found .*xensource.log"),
    "fails at the end": Fault(FAILS, "export_fail_after_whole", {}, "VDI_IO_ERROR"),
    "fails behind the end": Fault(FAILS, "export_fail_after_whole", {"text": True},
                                  "VDI_IO_ERROR"),
    "cancelled": Fault(FAILS, "export_cancel", {"after": MIB},
                       "TASK_CANCELLED"),
    "no answer": Fault(ANSWER, "export_empty_reply", {}, "NO_HOSTS_AVAILABLE .*vm-cd-eject"),
    "busy": Fault(ANSWER, "export_500", {
        "error_info": ["OTHER_OPERATION_IN_PROGRESS", "VM", "OpaqueRef:x", "clone", "x"]},
        "OTHER_OPERATION_IN_PROGRESS.*xe task-list"),
    "running": Fault(ANSWER, "export_500", {
        "error_info": ["VM_BAD_POWER_STATE", "x", "halted", "running"]},
        "VM_BAD_POWER_STATE x halted running"),
    "head too large": Fault(ANSWER, "export_431", {}, "the host answered 431"),
    "head too slow": Fault(ANSWER, "export_408", {}, "the host answered 408"),
    "never let in": Fault(ANSWER, "export_401", {}, "the host answered 401"),
    "let in at last": Fault(ANSWER, "export_401", {"times": 1}, GOOD),
    "sent elsewhere": Fault(ANSWER, "export_302", {"location": "ftp://127.0.0.1/export"},
                            "leads to 'ftp://127.0.0.1', which could not prove itself: refused"),
    "sent into clear text": Fault(ANSWER, "export_302", {
        "location": "http://192.0.2.1/export?session_id=x"}, "leads to 'http://192.0.2.1', which"),
    "sent to the void": Fault(ANSWER, "export_302", {"location": "https://127.0.0.1:1/export"},
                              "refused"),
    "sent in a circle": Fault(ANSWER, "export_302", {}, "in a circle"),
    "slow to begin": Fault("slow host", "export_slow_start", {"seconds": 0.3}, GOOD),
    "slow in between": Fault("slow host", "export_silence", {"after": MIB, "seconds": 0.3}, GOOD),
    "slow to let go": Fault("slow host", "slow_detach", {"seconds": 0.2}, GOOD),
}
NO_MATCH = "does not match its hash"
XVA = {
    "first missing": Fault(DAMAGED, "missing_chunk", {"chunk": 0}, "unexpected member"),
    "last missing": Fault(DAMAGED, "missing_last_chunk", {}, r"disk Ref:\d+ ends at .* bytes"),
    "all missing": Fault(DAMAGED, "missing_chunk", {"chunk": [0, 1]}, "disk Ref.* is missing"),
    "wrong first hash": Fault(DAMAGED, "wrong_hash", {"chunk": 0}, NO_MATCH),
    "wrong last hash": Fault(DAMAGED, "wrong_hash", {}, NO_MATCH),
    "first bit": Fault(DAMAGED, "flip_bit", {"chunk": 0}, NO_MATCH),
    "middle bit": Fault(DAMAGED, "flip_bit", {"chunk": 0, "byte": 77777}, NO_MATCH),
    "last bit": Fault(DAMAGED, "flip_bit", {"byte": -1}, NO_MATCH),
    "numbers restart": Fault(DAMAGED, "restart_numbers", {}, "out of order"),
    "no end": Fault(DAMAGED, "no_end_blocks", {}, "it is cut off at"),
    "text behind": Fault(DAMAGED, "trailing_text", {}, "data after the end"),
    "a byte behind": Fault(DAMAGED, "trailing_text", {"text": "x"}, "data after the end"),
    "joined": Fault(DAMAGED, "joined_twice", {}, "data after the end"),
    "keep-alive": Fault("unusual archive", "keepalive_members", {"chunk": [0, 1]}, GOOD),
    "old checksums": Fault("unusual archive", "sha1_checksums", {}, GOOD),
    "zeros": Fault("unusual archive", "zero_chunks", {}, GOOD),
    "success of a part": Fault(CUT, "export_cut", {"after": "last chunk", "task": "success"}, LOST),
    "fails before the end": Fault(FAILS, "export_fail", {"after": "end of disks"},
                                  "the host says: VDI_IO_ERROR"),
}
CUT_AT = ("first header", "ova header", "in ova", "end of ova", "chunk header", "in a chunk",
          "end of a chunk", "end of a hash", "last chunk", "last hash", "end of disks",
          "one end block", "last byte")
XVA.update({"cut at " + place: Fault(CUT, "export_cut", {"after": place, "task": task}, LOST)
            for place, task in zip(CUT_AT, ["vanish", "success"] * 9)})
# For a compressed export: the same in a stream that ends well, as xapi's compressor ends it ...
SOME = ("last missing", "wrong last hash", "middle bit", "no end", "a byte behind", "joined",
        "keep-alive", "fails before the end", "cut at in ova", "cut at end of a chunk",
        "cut at end of disks", "cut at last byte")
PACKED = {vm: fault for vm, fault in ANY_EXPORT.items() if fault.kind in (CUT, FAILS)}
PACKED.update({vm: XVA[vm] for vm in SOME})
# ... and a stream that does not; the counts are bytes of it.
PACKED.update({"packed cut at " + str(place): Fault(
    CUT, "raw_cut", {"after": place, "task": task}, LOST + "|stream is damaged|HTTP")
    for place, task in [(0, "vanish"), (1, "success"), (11, "vanish"), (200, "success"),
                        (MIB, "vanish"), (-100, "success"), (-1, "vanish")]})


def unpacked(path):
    """The XVA in a backup's file."""
    if path.suffix == ".zst":
        return subprocess.check_output(["zstd", "-dc", str(path)])
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def xva_landmarks(path):
    """{name: byte} of the places in an XVA where a cut could pass unnoticed, by tarfile."""
    data = unpacked(path)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        ova, chunk, one_hash, second = archive.getmembers()[:4]
        last, last_hash = archive.getmembers()[-2:]
    return {
        "first header": 300, "ova header": 512, "in ova": 512 + ova.size // 2,
        "end of ova": chunk.offset, "chunk header": chunk.offset_data,
        "in a chunk": chunk.offset_data + 70000, "end of a chunk": one_hash.offset,
        "end of a hash": second.offset, "last chunk": last.offset, "last hash": last_hash.offset,
        "end of disks": len(data) - 1024, "one end block": len(data) - 512,
        "last byte": len(data) - 1, "end": len(data),
    }


def pool_for(faults):
    """A VM for each fault, two that have none, and what must never be touched."""
    pool = Pool()
    for vm in WITNESSES + sorted(faults):
        pool.vm(vm, disks=[disk(SIZE, vm, seed=vm)], power_state="Running",
                snapshots=[snapshot("mine")] if vm in WITNESSES else [])
    pool.vm("RESTORE_a witness", disks=[disk(MIB)])
    pool.setting(first_id=1000)
    return pool


CHOOSE = ("vm-export=.*", "exclude=RESTORE_a witness", "max_backups=1", "pre_clean=True")


@pytest.mark.newest
@pytest.mark.parametrize("compress, suffix, rows, words", [
    ("False", "xva", dict(ANY_EXPORT, **XVA), ()),
    ("gzip", "xva.gz", PACKED, ("http",)),
    ("zstd", "xva.zst", PACKED, ("http",))])
def test_faults_of_a_vms_export(turn, tally, compress, suffix, rows, words):
    here = turn(pool_for(rows))
    here.configure("compress=" + compress, *CHOOSE)
    words = ["host=" + here.sim.http for _ in words]  # TLS in one of them will do
    night(here, tally, rows, words, lambda vm: xva_landmarks(here.file(vm, suffix)))
    for vm in WITNESSES + list(rows):
        found = disks_in(unpacked(here.file(vm, suffix)))
        hashes = [hashlib.sha256(data).hexdigest() for data in found.values()]
        assert hashes == [here.sim.disk_sha256(vm)]


def disk_landmarks(path):
    size = path.stat().st_size
    return {"end": size, "last byte": size - 1, "last footer": size - 512,
            "a page before the end": size - len(error_page())}


def error_page():
    """The HTTP 500 that the host appends to the body, as the simulator words it."""
    class Recorder(server.Connection):
        def __init__(self):
            self.sent = b""

        def send(self, data):
            self.sent += data

    recorder = Recorder()
    recorder.internal_error(None, XapiError(*IO))
    return recorder.sent


# In a VHD behind the first footer, the header, the table; before the last footer.
DISK_CUTS = (512, 1536, 2048, "last footer", "last byte")
DISK = {vm: fault for vm, fault in ANY_EXPORT.items()
        if fault.kind in (CUT, FAILS) or vm in ("busy", "no answer", "let in at last")}
DISK.update({"cut at " + str(place): Fault(CUT, "export_cut", {"after": place, "task": task}, LOST)
             for place, task in zip(DISK_CUTS, ["success", "vanish"] * 3)})
# The error page makes up for the bytes that are missing, to the byte.
DISK["page in place of the end"] = Fault(
    FAILS, "export_fail", {"after": "a page before the end", "error_info": IO}, "VDI_IO_ERROR")


@pytest.mark.newest
@pytest.mark.parametrize("form", ["raw", "vhd"])
def test_faults_of_a_disks_export(turn, tally, form):
    here = turn(pool_for(DISK))
    here.configure("vdi_export_format=" + form, CHOOSE[0].replace("vm-", "vdi-"), *CHOOSE[1:])
    night(here, tally, DISK, ["host=" + here.sim.http],
          lambda vm: disk_landmarks(here.file(vm, form)), "vdi-export", path="/export_raw_vdi")
    for vm in WITNESSES + list(DISK):
        path = here.file(vm, form)
        if form == "vhd":
            if not shutil.which("qemu-img"):
                continue
            raw = here.path / "disk"
            subprocess.run(["qemu-img", "convert", "-f", "vpc", "-O", "raw", str(path), str(raw)],
                           check=True)
            path = raw
        with path.open("rb") as file:
            data = file.read()[:SIZE]
        assert hashlib.sha256(data).hexdigest() == here.sim.disk_sha256(vm)


METADATA = {name: Fault("no or cut metadata", fault, options, WARNED) for name, fault, options in [
    ("cut at the start", "export_cut", {"after": 0}),
    ("cut in the header", "export_cut", {"after": 511, "task": "success"}),
    ("cut in the text", "export_cut", {"after": 2000, "task": "success"}),
    ("cut before the end", "export_cut", {"after": -1024, "task": "success"}),
    ("cut at the last byte", "export_cut", {"after": -1, "task": "success"}),
    ("reset", "export_reset", {"after": 2000}),
    ("fails", "export_fail", {"after": 2000}),
    ("fails behind the end", "export_fail_after_whole", {}),
    ("fails with a text behind the end", "export_fail_after_whole", {"text": True}),
    ("cancelled", "export_cancel", {"after": 2000}),
    ("no answer", "export_empty_reply", {}),
    ("refused", "export_500", {}),
    ("never let in", "export_401", {}),
]}


def test_faults_of_the_metadata_cost_a_warning_and_not_the_backup(turn, tally):
    here = turn(pool_for(METADATA))
    here.configure(*CHOOSE)
    result = night(here, tally, METADATA, ["host=" + here.sim.http], path="/export_metadata")
    for vm in METADATA:
        assert result.has("%s: WARNING no vm-metadata.xml: " % vm)


DATABASE = [
    ("export_fail", {}, "VDI_IO_ERROR"),
    ("export_fail", {"after": -12}, "VDI_IO_ERROR"),
    ("export_fail_after_whole", {}, "VDI_IO_ERROR"),
    ("export_fail_after_whole", {"text": True}, "VDI_IO_ERROR"),
    ("export_cut", {"after": 0, "task": "vanish"}, "the dump is damaged or lacks </database>"),
    ("export_cut", {"after": -12, "task": "vanish"}, "the dump is damaged or lacks </database>"),
    ("export_cut", {"after": -5, "task": "success"}, "the dump is damaged or lacks </database>"),
    ("export_reset", {"after": 5000}, "connection to the host broke"),
    ("export_500", {"error_info": ["INTERNAL_ERROR", "Not_found"]}, "INTERNAL_ERROR Not_found"),
    ("task_never_completes", {}, "task did not end within"),
    ("database_dummy", {}, "lists no VM: is a rolling pool upgrade under way"),
]


def test_faults_of_the_pool_database(turn, tally):
    here = turn(pool_for({}))
    here.configure("pool_db_backup=1", *CHOOSE)
    assert here.run().status == 0
    (folder,) = here.backups.glob("METADATA_*")
    ledger, before, injected = Ledger(here), tree(folder), 0
    for fault, options, reason in DATABASE:
        number = here.sim.fault(fault, path="/pool/xmldbdump", **options)
        result = here.run(constants=IMPATIENT)
        assert result.status == 2, result
        assert re.search("ERROR - pool database backup failed: .*" + reason, result.out), result
        assert tree(folder) == before, fault
        assert result.lines[-1] == "VmBackup ended - **ERRORS DETECTED** - S:2 W:0 E:1"
        injected += sum(item["fired"] for item in here.sim.faults())
        here.sim.clear_faults(number)
    assert here.run().status == 0
    assert len(tree(folder)) == 1 and tree(folder) != before
    tally("pool database fails or is cut off", injected, ledger)


# --- the pool -------------------------------------------------------------------------------------

NOT_TAKEN, NOT_GONE = "snapshot refused", "snapshot not destroyed"


def refused(*error_info):
    return {"error_info": list(error_info)}


SNAPSHOTS = {
    "no space": Fault(NOT_TAKEN, "snapshot_error", refused("SR_BACKEND_FAILURE_44", "", "x", ""),
                      "SR_BACKEND_FAILURE_44 x .*no space left for a snapshot"),
    "chain too long": Fault(NOT_TAKEN, "snapshot_error", refused("SR_BACKEND_FAILURE_109", "", "x"),
                            "SR_BACKEND_FAILURE_109 x .*chain of snapshots is too long"),
    "cannot": Fault(NOT_TAKEN, "snapshot_error", refused("SR_OPERATION_NOT_SUPPORTED", "x"),
                    "SR_OPERATION_NOT_SUPPORTED x .*cannot take snapshots"),
    "blocked": Fault(NOT_TAKEN, "snapshot_error", refused("OPERATION_BLOCKED", "x", "by Jo"),
                     "OPERATION_BLOCKED x by Jo .*an administrator blocked this"),
    "busy": Fault(NOT_TAKEN, "snapshot_error",
                  refused("OTHER_OPERATION_IN_PROGRESS", "VM", "x", "clone", "y"),
                  "OTHER_OPERATION_IN_PROGRESS VM x clone y .*xe task-list"),
    "busy in old words": Fault(NOT_TAKEN, "snapshot_error",
                               refused("OTHER_OPERATION_IN_PROGRESS", "VM.clone", "x"),
                               "OTHER_OPERATION_IN_PROGRESS VM.clone x .*xe task-list"),
    "other backend": Fault(NOT_TAKEN, "snapshot_error", refused("SR_BACKEND_FAILURE_1200", "x"),
                           "SR_BACKEND_FAILURE_1200 x .*/var/log/SMlog"),
    "new code": Fault(NOT_TAKEN, "snapshot_error", refused("OF_TOMORROW", "x"), "OF_TOMORROW x"),
    "slow": Fault("slow host", "snapshot_slow", {"seconds": 1}, GOOD),
    "disk refuses for ever": Fault(NOT_GONE, "vdi_destroy_error",
                                   refused("SR_BACKEND_FAILURE_46", "x"), WARNED),
    "in use for ever": Fault(NOT_GONE, "vdi_in_use", {}, WARNED),
    "in use for a while": Fault(NOT_GONE, "vdi_in_use", {"times": 2}, GOOD),
    "busy for a while": Fault(NOT_GONE, "vdi_destroy_error", dict(
        refused("OTHER_OPERATION_IN_PROGRESS", "VDI", "x", "destroy", "y"), times=2), GOOD),
}
OF_A_VM = {
    "refuses for ever": Fault(NOT_GONE, "vm_destroy_error", refused("INTERNAL_ERROR", "x"), WARNED),
}


@pytest.mark.parametrize("kind, rows", [
    ("vm-export", dict(SNAPSHOTS, **OF_A_VM)), ("vdi-export", SNAPSHOTS)])
def test_faults_of_snapshots(turn, tally, kind, rows):
    here = turn(pool_for(rows))
    here.configure(CHOOSE[0].replace("vm-export", kind), *CHOOSE[1:])
    result = night(here, tally, rows, ["host=" + here.sim.http], kind=kind)
    for vm, fault in rows.items():
        named = r"%s: WARNING the snapshot [0-9a-f-]{36} could not be destroyed, the next run" % vm
        assert bool(re.search(named, result.out)) == (fault.ends == WARNED), vm


def asked(here):
    """How often the host was asked how a task does."""
    return here.sim.methods().count("task.get_record")


def test_a_snapshot_that_hangs_is_given_up_and_removed_later(turn, clock, tally):
    here = turn(pool_for({}))
    here.configure(*CHOOSE)
    assert here.run().status == 0
    ledger = Ledger(here)
    here.sim.fault("snapshot_slow", vm="a witness", seconds=8)
    here.sim.reset_calls()
    process = here.start(env=clock.env)
    clock.go_on_until(lambda: here.sim.methods().count("Async.VM.snapshot") == 2, seconds=300,
                      calls=lambda: asked(here))
    result = finish(process)
    assert result.status == 2, result
    assert re.search(r"a witness - \*\*\*ERROR\*\*\* VM.snapshot did not end within \d+ s: "
                     "TASK_TIMEOUT", result.out), result
    assert result.has("zz witness - ***Success***")
    assert ledger.untouched("a witness")
    wait_until(lambda: "RESTORE_a witness" in here.snapshots())  # the host made it all the same
    here.sim.clear_faults()
    assert here.run().status == 0
    tally("snapshot hangs", 1, ledger)


# --- sessions, connections, hosts -----------------------------------------------------------------

LOGIN = "session.login_with_password"
NAMES = {"session_lost": "session lost at a call", "xapi_restart": "xapi restarted at a call",
         "rpc_drop": "connection dropped at a call"}


def methods_to_hit(calls, what, options):
    """The methods whose first call gets the fault: all that a run calls, where it can matter."""
    methods = list(dict.fromkeys(call["method"] for call in calls))
    if what == "rpc_drop":
        methods = [method for method in methods if not method.startswith("GET ")]
    if options.get("moment") == "before":
        methods = [method for method in methods if ".get_" not in method]
    return methods


@pytest.mark.newest
@pytest.mark.parametrize("kind, what, options", [
    ("vm-export", "session_lost", {}),
    ("vm-export", "xapi_restart", {}),
    ("vm-export", "rpc_drop", {"moment": "before"}),
    ("vm-export", "rpc_drop", {"moment": "after"}),
    ("vdi-export", "rpc_drop", {"moment": "after"}),
])
def test_the_host_lets_go_at_a_call(turn, tmp_path, tally, kind, what, options):
    """The session is gone, xapi starts anew, or the connection drops before or after the call was
    carried out. Where a session was lost there is one new login, and the backup is made; whatever
    happens, no snapshot is taken twice, and none is left behind by the next run."""
    here = turn(numbered_vms(30))
    ledger, nameless = furnish(here, ["vm%02d" % number for number in range(30)]), []
    with Forks(tmp_path) as forks:
        def run(vm):
            here.configure("%s=%s" % (kind, vm), "max_backups=2")
            here.sim.reset_calls()
            result = forks.run(here, constants=IMPATIENT)
            return result, here.sim.calls()

        result, calls = run("vm00")
        assert result.status == 0, result
        methods = methods_to_hit(calls, what, options)
        vms = ["vm%02d" % number for number in range(1, len(methods) + 1)]
        for vm, hit in zip(vms, methods):
            number = here.sim.fault(what, times=1, method=hit, **options)
            result, calls = run(vm)
            assert here.sim.faults()[0]["fired"] == 1, hit
            here.sim.clear_faults(number)
            carried_out = [call for call in calls if call["method"].endswith(".snapshot")
                           and call["outcome"] in ("Success", "dropped")]
            assert len(carried_out) <= 1, (hit, result)
            assert len(list(filter(is_good, here.folders(vm)))) == 2, (hit, result)
            logins = [call["method"] for call in calls].count(LOGIN)
            if what == "session_lost":
                again = hit not in (LOGIN, "session.logout")
                assert (result.status, logins) == (0, 1 + again), (hit, result)
            assert result.status != 0 or not ledger.untouched(vm)
            if not hit.startswith("Async."):  # else the host may make it when the run is over
                assert set(here.snapshots()) == {"mine"}, (hit, result)
                assert sorted(lone_vdi_snapshots(here).values()) == nameless, (hit, result)
            elif kind == "vdi-export":
                nameless = sorted(lone_vdi_snapshots(here).values())
                assert nameless in ([], [vm]), (hit, result)

    the_host_forgets(here)  # a task that was made, but whose reference never arrived
    here.configure("max_backups=2", *["%s=%s" % (kind, vm) for vm in vms])
    result = here.run("host=" + here.sim.http)
    assert result.status == 0, result
    # One that bears the disk's name still, as anybody's snapshot does, may not be destroyed.
    left = lone_vdi_snapshots(here)
    assert sorted(left.values()) == nameless
    destroy_as_an_administrator(here, left)
    tally(NAMES[what], len(vms) - len(nameless), ledger)


def test_the_host_lets_go_in_the_middle_of_an_export(turn, tally):
    here = turn(pool_for({}))
    here.configure(*CHOOSE)
    assert here.run().status == 0
    faults = {
        "session_lost": (0, GOOD), "task_vanish": (1, WARNED),
        "tasks_cancelled": (2, "***ERROR*** the export's task failed: TASK_CANCELLED"),
        "xapi_restart": (2, "***ERROR*** the export is not whole: ")}
    for what, (status, ends) in faults.items():
        ledger = Ledger(here)
        here.sim.fault(what, vm="a witness", after=MIB)
        result = here.run()
        assert result.status == status, result
        assert result.has("vm-export a witness - " + ends), result
        assert result.has("vm-export zz witness - " + GOOD), result
        assert ledger.untouched("a witness") == (status == 2)
    injected = [fault["fired"] for fault in here.sim.faults()]
    assert injected == [1, 1, 1, 1]
    here.sim.clear_faults()
    assert here.run().status == 0
    tally("session, task or host lost in an export", sum(injected), ledger)


def test_silence_is_no_error_while_the_host_answers(turn, clock):
    here = turn(pool_for({}))
    here.configure(*CHOOSE)
    silence = here.sim.fault("export_silence", vm="a witness", after=MIB, seconds=3600)
    process = here.start(env=clock.env)
    wait_until(lambda: "GET /export" in here.sim.methods())
    clock.go_on_until(lambda: clock.ahead >= 1800, calls=lambda: asked(here))
    here.sim.clear_faults(silence)
    result = finish(process)
    assert result.status == 0, result
    here.assert_pool_is_clean(["mine", "mine"])


def test_silence_for_an_hour_is_an_error(turn, clock, tally):
    here = turn(pool_for({}))
    here.configure(*CHOOSE)
    assert here.run().status == 0
    ledger = Ledger(here)
    here.sim.fault("task_vanish", vm="a witness", after=MIB)
    here.sim.fault("export_silence", vm="a witness", after=MIB, seconds=3600)
    here.sim.reset_calls()
    process = here.start(env=clock.env)
    wait_until(lambda: "GET /export" in here.sim.methods())

    def given_up():
        methods = here.sim.methods()
        return "task.destroy" in methods[methods.index("GET /export"):]

    clock.go_on_until(given_up, calls=lambda: asked(here))
    here.sim.fault("xapi_restart")  # or the disk would stay in use for an hour
    result = finish(process)
    assert result.status == 2, result
    assert result.has("a witness - ***ERROR*** the export is not whole: "
                      "for 1 h neither a byte came nor the task moved on")
    assert result.has("zz witness - ***Success***")
    assert ledger.untouched("a witness")
    here.sim.clear_faults()
    assert here.run().status == 0
    tally("silence for ever", 1, ledger)


def test_a_dead_host_is_noticed(site, clock, tally):
    here = site(pool_for({}))
    here.configure(*CHOOSE)
    assert here.run().status == 0
    ledger = Ledger(here)
    here.sim.fault("export_silence", vm="a witness", after=MIB, seconds=3600)
    here.sim.reset_calls()
    process = here.start("host=" + here.sim.http, env=clock.env)
    wait_until(lambda: list(here.backups.glob("a witness/*/*.partial"))
               and "GET /export" in here.sim.methods())
    os.kill(here.sim.pid, signal.SIGSTOP)
    try:
        clock.go_on_until(lambda: process.poll() is not None, seconds=120)
        result = finish(process)
    finally:
        os.kill(here.sim.pid, signal.SIGCONT)
    assert result.status == 2, result
    assert re.search(r"a witness - \*\*\*ERROR\*\*\* the export is not whole: "
                     r"the host sent nothing and did not answer for \d+ s", result.out), result
    assert result.has("zz witness - ***ERROR*** ")
    assert ledger.untouched("a witness") and ledger.untouched("zz witness")
    here.sim.clear_faults()
    here.sim.catch_up()  # with what was sent to it while it was dead
    here.sim.fault("xapi_restart")
    assert here.run().status == 0
    tally("host dies", 1, ledger)


def test_the_master_changes(site, tally):
    pool = Pool(hosts=2)
    for vm in ("web", "db"):
        pool.vm(vm, disks=[disk(SIZE, seed=vm)])
    here = site(pool)
    here.configure("vm-export=web", "vm-export=db", "max_backups=1")
    assert here.run().status == 0
    ledger, moments = Ledger(here), [
        {"method": "VM.snapshot"}, {"method": "VM.snapshot", "moment": "after"},
        {"method": "GET /export"}, {"after": MIB}, {"method": "VM.destroy"}]
    for number, moment in enumerate(moments):
        here.sim.fault("master_moves", to=(number + 1) % 2, **moment)
        result = here.run()
        assert result.status in (0, 1, 2), result
        assert result.has("***Success***"), result
        (fault,) = here.sim.faults()
        assert fault["fired"] == 1
        assert ledger.lost() == []
        here.sim.clear_faults()
    result = here.run()
    assert result.status == 0, result
    assert result.has("is not the pool master, going on to 127.0.0.2")
    tally("master changes", len(moments), ledger)


def test_vms_that_are_deleted_or_renamed(turn, tally):
    here = turn(pool_for({"b deleted before": 0, "c renamed": 0, "d deleted in its export": 0}))
    here.configure(*CHOOSE)
    assert here.run().status == 0
    ledger = Ledger(here)
    here.sim.fault("vm_deleted", target="b deleted before", method="GET /export")
    here.sim.fault("vm_renamed", target="c renamed", to="c2", method="GET /export")
    here.sim.fault("vm_deleted", after=MIB, target="d deleted in its export",
                   vm="d deleted in its export")
    result = here.run()
    assert result.status == 2, result
    assert result.has("b deleted before - ***ERROR*** the VM was deleted since this run began")
    assert ledger.untouched("b deleted before")
    assert result.has("c renamed - ***WARNING***") and result.has("the VM is now called c2")
    assert result.has("d deleted in its export - ***Success***")
    injected = sum(fault["fired"] for fault in here.sim.faults())
    result = here.run()
    assert result.status == 0, result
    assert len(here.folders("c2")) == 1
    tally("VM deleted or renamed", injected, ledger,
          by_others=("b deleted before", "d deleted in its export"))


def test_a_redirect_to_an_impostor_is_not_followed(site, tally):
    """It has an address of the pool, but not the certificate that the pool vouches for."""
    here, impostor = site(pool_for({})), site(pool_for({}))
    here.configure("tls_fingerprint=" + here.sim.fingerprint, *CHOOSE)
    assert here.run().status == 0
    ledger = Ledger(here)
    here.sim.fault("export_302", vm="a witness", location=impostor.sim.url + "/export?ref=x")
    result = here.run()
    assert result.status == 2, result
    assert re.search("a witness - [*]+ERROR[*]+ .*certificate of .* is not trusted", result.out)
    assert impostor.sim.methods() == []
    assert ledger.untouched("a witness")
    here.sim.clear_faults()
    assert here.run().status == 0
    tally(ANSWER, 1, ledger)


# --- a disk of the snapshot that is gone before or while it is exported ---------------------------

# XAPI leaves a VDI that was destroyed out of the export, which then is whole in itself (VDI.destroy
# takes the VBD with it); so nothing in the archive tells of it.


def three_disks():
    pool = Pool()
    pool.vm("web", power_state="Running", disks=[
        disk(2 * MIB, name, seed=name) for name in ("root", "data", "logs")])
    return pool


def destroy_snapshot_of(site, name):
    destroy_as_an_administrator(site, [
        ref for ref, vdi in site.sim.records("VDI").items()
        if vdi["is_a_snapshot"] and vdi["name_label"] == name])


@pytest.mark.parametrize("compress, suffix", [("False", "xva"), ("gzip", "xva.gz"),
                                              ("zstd", "xva.zst")])
@pytest.mark.parametrize("fault, seen", [
    (("rpc_hang", {"method": "VM.add_to_other_config"}), "VM.add_to_other_config"),
    (("export_slow_start", {"path": "/export_metadata"}), "GET /export_metadata")])
def test_a_disk_that_somebody_destroys_before_the_export(site, fault, seen, compress, suffix):
    if compress == "zstd" and not shutil.which("zstd"):
        pytest.skip("zstd is not installed")
    here = site(three_disks())
    here.configure("vm-export=web", "max_backups=1", "compress=" + compress)
    assert here.run().status == 0
    (good,) = here.folders("web")
    here.sim.reset_calls()
    number = here.sim.fault(fault[0], seconds=3600, times=1, **fault[1])
    process = here.start()
    wait_until(lambda: seen in here.sim.methods())
    destroy_snapshot_of(here, "data")
    here.sim.clear_faults(number)
    result = finish(process)
    assert result.status == 2, result
    assert result.has("a disk of the snapshot is not in it") or result.has("lacks the disk xvdb")
    assert here.folders("web", marked=False) == [good]
    here.assert_pool_is_clean()
    assert vmbackup("verify", here.config).status == 0
    assert (good / ("web." + suffix)).stat().st_size > 2 * MIB


def test_two_runs_into_two_places(site, tmp_path):
    """Each has a lock of its own. The second takes the snapshot of the first for a leftover; the
    first has to notice, and the second to leave it alone while it is being exported."""
    here = site(three_disks())
    here.configure("vm-export=web", "max_backups=1")
    assert here.run().status == 0
    (good,) = here.folders("web")
    other = tmp_path / "other"
    other.mkdir()
    here.sim.reset_calls()
    number = here.sim.fault("export_silence", vm="web", after=3 * MIB, seconds=3600, times=1)
    first = here.start()
    wait_until(lambda: "GET /export" in here.sim.methods())
    taken = {ref for ref, vdi in here.sim.records("VDI").items() if vdi["is_a_snapshot"]}
    second = here.run("backup_dir=%s" % other, constants={"DETACH_PAUSES": (0.1, 0.1)})
    assert second.status == 1, second
    assert second.has("could not be destroyed")
    assert taken <= set(here.sim.records("VDI")), "not even a disk that is already exported"
    here.sim.clear_faults(number)
    first = finish(first)
    assert first.status == 0, first
    assert here.folders("web") != [good]
    for top in (here.backups, other):
        assert vmbackup("verify", top).status == 0
        (folder,) = (top / "web").iterdir()
        assert len([name for name in os.listdir(str(folder)) if name.startswith("DISK-")]) == 3
    here.assert_pool_is_clean()
