"""The simulator's way back, judged by curl and XenAPI: /import, /import_raw_vdi, disks."""
import contextlib
import hashlib
import http.client
import shutil
import socket
import subprocess
import time
import urllib.parse
import xmlrpc.client

import pytest
import XenAPI

from simulator.client import Simulator
from simulator.pool import MIB, Pool, cd, disk, vif

pytestmark = pytest.mark.newest

MAC = "02:00:00:00:00:01"


def a_pool():
    pool = Pool(hosts=2)
    pool.sr("Thick", type="lvm", hosts=[0], size=20 * MIB)
    pool.sr("Second", shared=False, hosts=[1])
    pool.network("DMZ", bridge="xenbr7")
    pool.vm("web", vifs=[vif(mac=MAC), vif("DMZ")], os_version="Debian 12", tags=["a"],
            ha_restart_priority="restart", cds=[cd("debian.iso")],
            other_config={"auto_poweron": "true"}, blocked_operations={"destroy": "no"},
            disks=[disk(4 * MIB, "root", seed="a"), disk(12 * MIB, "data", seed="b", sparse=[0, 7]),
                   disk(6 * MIB + 512, "odd", seed="c"), disk(2 * MIB, "empty", content="zeros")])
    pool.vm("small", disks=[disk(2 * MIB, "one", seed=4)])
    pool.vm("running", power_state="Running", disks=[disk(2 * MIB, "busy", seed=5)])
    return pool


@pytest.fixture(scope="module")
def running():
    with Simulator.start(a_pool()) as simulator:
        yield simulator


@pytest.fixture
def sim(running):
    running.load(a_pool())
    return running


@pytest.fixture
def api(sim):
    session = XenAPI.Session(sim.http)
    session.login_with_password(sim.username, sim.password, "1.0", "test")
    yield session
    with contextlib.suppress(XenAPI.Failure, OSError, http.client.HTTPException,
                             xmlrpc.client.Fault):
        session.xenapi.session.logout()


@pytest.fixture
def archive(sim, api, tmp_path):
    """archive(vm, compression) is the path of an export of it."""
    def make(vm="web", compression=None):
        path = tmp_path / "vm.xva"
        query = {"session_id": api.handle, "ref": sim.ref("VM", vm)}
        if compression:
            query["use_compression"] = compression
        curl(sim, "/export", query, "-o", str(path))
        return path

    return make


def curl(sim, path, query, *more, https=True, host=0):
    member = sim.hosts[host]
    where = ["--cacert", member["certificate"]] if https else []
    url = (member["url"] if https else member["http"]) + path + "?" + urllib.parse.urlencode(query)
    return subprocess.run(["curl", "-sS"] + where + list(more) + [url],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)


class Put:
    """A PUT by curl with a task of its own: its head and body, the task's end, what was made."""

    def __init__(self, sim, api, path, file, *more, https=True, host=0, **query):
        before = set(sim.records("VM")) | set(sim.records("VDI")) | set(sim.records("network"))
        self.task = api.xenapi.task.create("restore", "")
        query.update(session_id=api.handle, task_id=self.task)
        done = curl(sim, path, query, "-i", "-T", str(file), *more, https=https, host=host)
        self.answer, self.curl = done.stdout.decode("utf-8", "replace"), done.returncode
        deadline = time.monotonic() + 20
        record = api.xenapi.task.get_record(self.task)
        while record["status"] == "pending" and "302" not in self.answer \
                and time.monotonic() < deadline:
            time.sleep(0.02)
            record = api.xenapi.task.get_record(self.task)
        self.record, self.ended = record, (record["status"], record["error_info"])
        self.made = {cls: [ref for ref in sim.records(cls) if ref not in before]
                     for cls in ("VM", "VDI", "network")}

    @property
    def vm(self):
        assert self.ended[0] == "success", (self.ended, self.answer)
        (ref,) = self.made["VM"]
        assert self.record["result"] == \
            "<value><array><data><value>%s</value></data></array></value>" % ref
        return ref


def sums(sim, vm):
    """(name, SHA-256 up to its recorded size) of a VM's disks by the order of their devices."""
    return [(record["name_label"], sim.disk_sha256(record["uuid"]))
            for _, record in sim.disks_of(vm)]


def failure(function, *arguments):
    with pytest.raises(XenAPI.Failure) as caught:
        function(*arguments)
    return caught.value.details


def rest(path, offset):
    data = path.read_bytes()
    return data[:offset], data[offset:]


# --- /import --------------------------------------------------------------------------------------

@pytest.mark.parametrize("https", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
def test_what_was_exported_comes_back_as_another_vm(sim, api, archive, compression, https):
    if compression == "zstd" and not shutil.which("zstd"):
        pytest.skip("no zstd here")
    sim.setting(round_disks=False)
    put = Put(sim, api, "/import", archive(compression=compression), https=https)
    assert put.answer.startswith("HTTP/1.1 200 OK\r\nConnection: close\r\n")
    assert "task-id:" + put.task in put.answer
    old, new = sim.record("VM", sim.ref("VM", "web")), sim.records("VM")[put.vm]
    assert sums(sim, put.vm) == sums(sim, old["uuid"])
    assert new["uuid"] != old["uuid"]
    assert (new["name_label"], new["power_state"], new["tags"]) == ("web", "Halted", ["a"])
    assert new["other_config"]["mac_seed"] != old["other_config"]["mac_seed"]
    assert new["other_config"]["import_task"] == put.task
    assert new["other_config"]["auto_poweron"] == "true"
    assert (new["ha_restart_priority"], new["blocked_operations"]) == ("restart", {})
    assert new["current_operations"] == {}
    assert api.xenapi.VM_guest_metrics.get_os_version(new["guest_metrics"])["name"] == "Debian 12"
    assert api.xenapi.VM_metrics.get_start_time(new["metrics"]).value == "19700101T00:00:00Z"
    for ref in put.made["VDI"]:
        assert api.xenapi.VDI.get_sm_config(ref) == {"import_task": put.task}
    assert put.record["other_config"]["object_creation"] == "complete"
    vifs = [api.xenapi.VIF.get_record(ref) for ref in new["VIFs"]]
    assert MAC not in [one["MAC"] for one in vifs]
    assert [api.xenapi.network.get_name_label(one["network"]) for one in vifs] == [
        "Pool-wide network associated with eth0", "DMZ"]
    assert put.made["network"] == []
    cds = [one for one in map(api.xenapi.VBD.get_record, new["VBDs"]) if one["type"] == "CD"]
    assert [api.xenapi.VDI.get_name_label(one["VDI"]) for one in cds] == ["debian.iso"]


def test_disks_are_rounded_up_to_two_mib(sim, api, archive):
    put = Put(sim, api, "/import", archive())
    (odd,) = [one for _, one in sim.disks_of(put.vm) if one["name_label"] == "odd"]
    assert odd["virtual_size"] == 8 * MIB


def test_the_head_comes_before_a_byte_of_the_body(sim, api):
    task = api.xenapi.task.create("x", "")
    with socket.create_connection(tuple(sim.http[7:].split(":"))) as line:
        line.sendall(("PUT /import?session_id=%s&task_id=%s HTTP/1.1\r\nHost: x\r\n"
                      "Content-Length: 99999999\r\n\r\n" % (api.handle, task)).encode())
        assert line.recv(15) == b"HTTP/1.1 200 OK"
    deadline = time.monotonic() + 10
    while api.xenapi.task.get_status(task) == "pending":
        assert time.monotonic() < deadline
    assert api.xenapi.task.get_error_info(task) == ["IMPORT_ERROR_PREMATURE_EOF"]


def test_a_plain_tar_is_not_read_behind_its_last_chunk(sim, api, archive):
    path = archive("small")
    path.write_bytes(path.read_bytes() + b"anything" * 2 * MIB)
    put = Put(sim, api, "/import", path, https=False)
    assert put.vm
    (entry,) = [call for call in sim.calls() if call["method"] == "PUT /import"]
    assert entry["bytes"] < 2 * MIB + 100000
    assert put.curl in (0, 55, 56)  # a reset, or none: whoever asks the task knows


def cut(data):
    return data[:3 * MIB]


def flip(data):
    return data[:-1200000] + bytes([data[-1200000] ^ 1]) + data[-1199999:]


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("damage, code", [
    (cut, "IMPORT_ERROR_PREMATURE_EOF"), (flip, "IMPORT_ERROR"),
    (lambda data: b"", "IMPORT_ERROR_PREMATURE_EOF"),
    (lambda data: b"garbage" * 1000, "IMPORT_ERROR_PREMATURE_EOF")])
def test_a_damaged_archive_leaves_nothing(sim, api, archive, damage, code, compression):
    path = archive(compression=compression)
    path.write_bytes(damage(path.read_bytes()))
    put = Put(sim, api, "/import", path)
    assert put.ended[0] == "failure"
    assert put.ended[1][0] == code or compression and put.ended[1][0].startswith("IMPORT_ERROR")
    assert put.made == {"VM": [], "VDI": [], "network": []}


def test_a_wrong_hash_is_an_error_of_the_task_behind_a_200(sim, api, archive):
    sim.fault("wrong_hash", vdi="root", chunk=1)
    put = Put(sim, api, "/import", archive())
    assert put.answer.startswith("HTTP/1.1 200")
    assert "Invalid_checksum" in put.answer
    assert put.ended[1][0] == "IMPORT_ERROR"
    assert "Invalid_checksum" in put.ended[1][1]
    forced = Put(sim, api, "/import", archive(), force="true")
    assert forced.vm


def test_old_hashes_and_keep_alive_members_are_understood(sim, api, archive):
    sim.setting(round_disks=False)
    sim.fault("sha1_checksums")
    sim.fault("keepalive_members", vdi="data", chunk=[7])
    put = Put(sim, api, "/import", archive())
    assert sums(sim, put.vm) == sums(sim, sim.ref("VM", "web"))


@pytest.mark.parametrize("options, head, ended", [
    ({"session_id": "x"}, "HTTP/1.1 401 ", "pending"),
    ({"sr_uuid": "x"}, "HTTP/1.1 500 ", "failure"),
    ({"sr": "ISOs"}, "HTTP/1.1 400 ", "failure"),
    ({"sr": "Second"}, "HTTP/1.1 302 ", "pending")])
def test_refusals_before_the_body(sim, api, archive, options, head, ended):
    path, task = archive("small"), api.xenapi.task.create("x", "")
    query = {"session_id": api.handle, "task_id": task}
    if "sr" in options:
        options = {"sr_id": sim.ref("SR", options["sr"])}
    done = curl(sim, "/import", dict(query, **options), "-i", "-T", str(path))
    assert done.stdout.decode().startswith(head)
    assert api.xenapi.task.get_status(task) == ended


def test_a_redirect_leads_to_a_host_that_sees_the_sr(sim, api, archive):
    path = archive("small")
    sr = sim.ref("SR", "Second")
    first = Put(sim, api, "/import", path, sr_id=sr)
    assert "Location: " + sim.hosts[1]["url"] + "/import?" in first.answer
    second = Put(sim, api, "/import", path, host=1, sr_id=sr)
    assert {one["SR"] for _, one in sim.disks_of(second.vm)} == {sr}


def test_chunked_bodies_are_refused(sim, api, archive):
    path = archive("small")
    put = Put(sim, api, "/import", path, "-H", "Transfer-Encoding: chunked")
    assert put.answer.startswith("HTTP/1.1 403 Forbidden")
    assert put.ended == ("failure", ["IMPORT_ERROR_CANNOT_HANDLE_CHUNKED"])


def test_during_an_upgrade_it_is_400(sim, api, archive):
    sim.fault("import_400")
    put = Put(sim, api, "/import", archive("small"))
    assert put.answer.startswith("HTTP/1.1 400 ")
    assert put.ended == ("failure", ["NOT_SUPPORTED_DURING_UPGRADE"])


def test_a_thick_sr_without_space(sim, api, archive):
    sr = sim.ref("SR", "Thick")
    put = Put(sim, api, "/import", archive(), sr_id=sr)
    assert put.ended[1][0] == "SR_BACKEND_FAILURE_44"
    assert put.made["VM"] == put.made["VDI"] == []
    assert api.xenapi.SR.get_physical_utilisation(sr) == "0"
    assert Put(sim, api, "/import", archive("small"), sr_id=sr).vm
    assert api.xenapi.SR.get_physical_utilisation(sr) == str(2 * MIB)


@pytest.mark.parametrize("fault, options, ended", [
    ("export_fail", {"error_info": ["VDI_IO_ERROR", "x"]}, ("failure", ["VDI_IO_ERROR", "x"])),
    ("export_cancel", {}, ("cancelled", [])),
    ("export_reset", {}, ("failure", ["IMPORT_ERROR_PREMATURE_EOF"])),
    ("vdi_create_error", {"skip": 2}, ("failure", None))])
def test_what_fails_on_the_host_is_cleared_away_and_the_task_ends_after_that(
        sim, api, archive, fault, options, ended):
    path = archive()
    sim.fault("import_slow_cleanup", seconds=0.5)
    if fault.startswith("export"):
        options = dict(options, path="/import", after=5 * MIB)
    sim.fault(fault, **options)
    start = time.monotonic()
    put = Put(sim, api, "/import", path)
    assert time.monotonic() - start > 0.5
    assert put.ended[0] == ended[0]
    assert ended[1] is None or put.ended[1] == ended[1]
    assert put.made == {"VM": [], "VDI": [], "network": []}


def test_a_cancelled_import(sim, api, archive):
    path = archive()
    sim.fault("export_silence", path="/import", after=4 * MIB, seconds=1)
    task = api.xenapi.task.create("x", "")
    query = {"session_id": api.handle, "task_id": task}
    process = subprocess.Popen(
        ["curl", "-sS", "-T", str(path), sim.http + "/import?" + urllib.parse.urlencode(query)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while "object_creation" not in api.xenapi.task.get_other_config(task):
        time.sleep(0.01)
    (vm,) = [ref for ref, one in sim.records("VM").items()
             if one["other_config"].get("import_task") == task]
    assert sim.records("VM")[vm]["current_operations"] == {task: "import"}
    api.xenapi.task.cancel(task)
    process.wait(20)
    assert api.xenapi.task.get_status(task) == "cancelled"
    assert vm not in sim.records("VM")


def test_a_toolstack_that_dies_leaves_a_vm_that_nothing_marks_as_broken(sim, api, archive):
    path = archive()
    sim.fault("xapi_restart", path="/import", after=5 * MIB)
    task = api.xenapi.task.create("x", "")
    curl(sim, "/import", {"session_id": api.handle, "task_id": task}, "-T", str(path))
    time.sleep(0.2)
    assert task not in sim.tasks()
    (vm,) = [one for one in sim.records("VM").values()
             if one["other_config"].get("import_task") == task]
    assert (vm["power_state"], vm["current_operations"]) == ("Halted", {})
    assert len([one for one in sim.records("VDI").values()
                if one["sm_config"].get("import_task") == task]) == 4


def test_clean_up_may_leave_a_disk(sim, api, archive):
    path = archive()
    sim.fault("import_leaves")
    sim.fault("export_fail", path="/import", after=5 * MIB)
    put = Put(sim, api, "/import", path)
    assert (len(put.made["VM"]), len(put.made["VDI"])) == (0, 4)


def test_networks_by_name_then_by_bridge_else_new(sim, api, archive):
    path = archive()
    dmz, first = sim.ref("network", "DMZ"), sim.ref("network", "Pool-wide network associated with "
                                                    "eth0")
    sim.set("network", dmz, "name_label", "other")
    put = Put(sim, api, "/import", path)
    assert put.made["network"] == []
    sim.set("network", dmz, "bridge", "xenbr8")
    put = Put(sim, api, "/import", path)
    (new,) = put.made["network"]
    record = api.xenapi.network.get_record(new)
    assert (record["name_label"], record["PIFs"]) == ("DMZ", [])
    assert record["other_config"]["import_task"] == put.task
    for vif_ref in record["VIFs"]:
        assert failure(api.xenapi.network.destroy, new)[0] == "NETWORK_CONTAINS_VIF"
        api.xenapi.VIF.destroy(vif_ref)
    api.xenapi.network.destroy(new)
    assert failure(api.xenapi.network.destroy, first)[0] == "NETWORK_CONTAINS_VIF"
    assert failure(api.xenapi.network.destroy, dmz)[0] in (
        "NETWORK_CONTAINS_VIF", "NETWORK_CONTAINS_PIF")
    sim.fault("export_fail", path="/import", after=5 * MIB)
    assert Put(sim, api, "/import", path).made["network"] == []


def test_restore_keeps_macs_and_refuses_what_is_there(sim, api, archive):
    path = archive()
    put = Put(sim, api, "/import", path, restore="true")
    assert put.ended[1][0] == "VM_TO_IMPORT_IS_NOT_NEWER_VERSION"
    api.xenapi.VM.snapshot(sim.ref("VM", "web"), "copy of web")
    query = {"session_id": api.handle, "ref": sim.ref("VM", "copy of web")}
    curl(sim, "/export", query, "-o", str(path))
    assert Put(sim, api, "/import", path, restore="true").ended[1][0] == "DUPLICATE_MAC_SEED"
    uuid = sim.record("VM", "copy of web")["uuid"]
    sim.delete_vm("copy of web")
    sim.delete_vm("web")
    put = Put(sim, api, "/import", path, restore="true")
    assert sim.records("VM")[put.vm]["uuid"] == uuid
    assert MAC in [one["MAC"] for one in sim.records("VIF").values() if one["VM"] == put.vm]


def test_a_newer_archive_is_refused(sim, api, archive):
    sim.setting(archive_version="24.20")
    assert Put(sim, api, "/import", archive("small")).ended[1] == ["IMPORT_INCOMPATIBLE_VERSION"]


def test_the_end_may_come_late(sim, api, archive):
    sim.fault("import_slow_end", seconds=1)
    start = time.monotonic()
    assert Put(sim, api, "/import", archive("small")).vm
    assert time.monotonic() - start > 1


# --- /import_raw_vdi, disks -----------------------------------------------------------------------

def a_disk(sim, api, size=4 * MIB, sr="Storage", **more):
    return api.xenapi.VDI.create(dict({
        "name_label": "new", "name_description": "", "SR": sim.ref("SR", sr),
        "virtual_size": str(size), "type": "user", "sharable": False, "read_only": False,
        "other_config": {"vmbackup": "x"}}, **more))


def a_file(tmp_path, size=4 * MIB):
    path = tmp_path / "disk.raw"
    data = hashlib.shake_128(b"disk").digest(size)
    path.write_bytes(data)
    return path, hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("https", [True, False])
def test_a_raw_disk_is_written(sim, api, tmp_path, https):
    vdi = a_disk(sim, api)
    path, told = a_file(tmp_path)
    put = Put(sim, api, "/import_raw_vdi", path, https=https, vdi=vdi)
    assert put.answer.startswith("HTTP/1.1 200 OK")
    assert put.ended[0] == "success"
    assert put.record["result"] == "<value>%s</value>" % vdi
    assert sim.disk_sha256(vdi) == told
    assert sim.attached() == {}


def test_the_size_is_rounded_and_a_short_file_is_taken(sim, api, tmp_path):
    vdi = a_disk(sim, api, 4 * MIB + 512)
    assert api.xenapi.VDI.get_virtual_size(vdi) == str(6 * MIB)
    path, _ = a_file(tmp_path)
    assert Put(sim, api, "/import_raw_vdi", path, vdi=vdi).ended[0] == "success"
    assert sim.disk_sha256(vdi) == hashlib.sha256(path.read_bytes() + bytes(2 * MIB)).hexdigest()


@pytest.mark.parametrize("problem", ["long", "cut", "reset", "write"])
def test_what_goes_wrong_leaves_the_disk_half_written(sim, api, tmp_path, problem):
    vdi = a_disk(sim, api, 2 * MIB if problem == "long" else 4 * MIB)
    path, _ = a_file(tmp_path)
    more = []
    if problem == "cut":
        more = ["--max-time", "1", "--limit-rate", "1M"]
    elif problem != "long":
        sim.fault({"reset": "export_reset", "write": "export_fail"}[problem],
                  path="/import_raw_vdi", after=MIB)
    put = Put(sim, api, "/import_raw_vdi", path, *more, https=False, vdi=vdi)
    assert put.ended[0] == "failure"
    assert put.ended[1][0] in ("VDI_IO_ERROR", "IMPORT_ERROR_PREMATURE_EOF")
    assert vdi in sim.records("VDI")
    api.xenapi.VDI.destroy(vdi)


def test_refusals_of_a_disk(sim, api, tmp_path):
    path, _ = a_file(tmp_path)
    vdi = a_disk(sim, api)
    assert Put(sim, api, "/import_raw_vdi", path).ended[1] == ["VDI_MISSING"]
    assert Put(sim, api, "/import_raw_vdi", path, vdi="x").ended[1][0] == "HANDLE_INVALID"
    put = Put(sim, api, "/import_raw_vdi", path, vdi=vdi, format="zip")
    assert put.answer.startswith("HTTP/1.0 404")
    put = Put(sim, api, "/import_raw_vdi", path, "-H", "Transfer-Encoding: chunked", vdi=vdi)
    assert put.answer.startswith("HTTP/1.0 404")
    busy = sim.disks_of("running")[0][1]["uuid"]
    before = sim.disk_sha256(busy)
    assert Put(sim, api, "/import_raw_vdi", path, vdi=busy).ended[1][0] == "VDI_IN_USE"
    assert sim.disk_sha256(busy) == before


def test_a_new_disk_of_the_right_size(sim, api, tmp_path):
    path, told = a_file(tmp_path)
    put = Put(sim, api, "/import_raw_vdi", path, sr_id=sim.ref("SR", "Storage"))
    (vdi,) = put.made["VDI"]
    assert api.xenapi.VDI.get_name_label(vdi) == "Imported VDI"
    assert sim.disk_sha256(vdi) == told


def test_a_vhd_comes_back(sim, api, tmp_path):
    path = tmp_path / "disk.vhd"
    (source,) = [one for _, one in sim.disks_of("web") if one["name_label"] == "data"]
    curl(sim, "/export_raw_vdi", {"session_id": api.handle, "vdi": source["uuid"],
                                  "format": "vhd"}, "-o", str(path))
    vdi = a_disk(sim, api, 12 * MIB)
    assert Put(sim, api, "/import_raw_vdi", path, vdi=vdi, format="vhd").ended[0] == "success"
    assert sim.disk_sha256(vdi) == sim.disk_sha256(source["uuid"])
    small = a_disk(sim, api, 4 * MIB)
    put = Put(sim, api, "/import_raw_vdi", path, vdi=small, format="vhd")
    assert put.ended[1][0] == "VDI_IO_ERROR"


def test_a_disk_stays_in_use_for_a_moment(sim, api, tmp_path):
    vdi = a_disk(sim, api)
    sim.fault("slow_detach", path="/import_raw_vdi", seconds=1)
    assert Put(sim, api, "/import_raw_vdi", a_file(tmp_path)[0], vdi=vdi).ended[0] == "success"
    assert failure(api.xenapi.VDI.destroy, vdi) == ["VDI_IN_USE", vdi, "destroy"]
    time.sleep(1.2)
    api.xenapi.VDI.destroy(vdi)


def test_making_disks(sim, api):
    assert failure(api.xenapi.VDI.create, {"name_label": "x"})[0] == "FIELD_TYPE_ERROR"
    with pytest.raises(XenAPI.Failure) as caught:
        a_disk(sim, api, sr="ISOs")
    assert caught.value.details[0] == "SR_OPERATION_NOT_SUPPORTED"
    with pytest.raises(XenAPI.Failure) as caught:
        a_disk(sim, api, 21 * MIB, sr="Thick")
    assert caught.value.details[0] == "SR_BACKEND_FAILURE_44"
    vdi = a_disk(sim, api, 3 * MIB)
    assert api.xenapi.VDI.get_other_config(vdi) == {"vmbackup": "x"}
    api.xenapi.VDI.resize(vdi, str(6 * MIB))
    assert api.xenapi.VDI.get_virtual_size(vdi) == str(6 * MIB)


def test_attaching_disks(sim, api):
    vdi, vm = a_disk(sim, api), sim.ref("VM", "small")

    def attach(userdevice):
        return api.xenapi.VBD.create({
            "VM": vm, "VDI": vdi, "userdevice": userdevice, "bootable": False, "mode": "RW",
            "type": "Disk", "empty": False, "other_config": {}, "qos_algorithm_type": "",
            "qos_algorithm_params": {}})

    assert failure(attach, "0") == ["DEVICE_ALREADY_EXISTS", "0"]
    vbd = attach("autodetect")
    assert api.xenapi.VBD.get_userdevice(vbd) == "1"
    api.xenapi.VM.start(vm, False, False)
    assert failure(api.xenapi.VDI.destroy, vdi)[0] == "VDI_IN_USE"
    assert failure(api.xenapi.VBD.destroy, vbd)[0] == "OPERATION_NOT_ALLOWED"
    metrics = api.xenapi.VM.get_metrics(vm)
    assert api.xenapi.VM_metrics.get_start_time(metrics).value > "2020"
    api.xenapi.VM.hard_shutdown(vm)
    api.xenapi.VBD.destroy(vbd)
    api.xenapi.VDI.destroy(vdi)


def test_calls_of_a_far_host_take_longer(sim, api):
    sim.setting(delay_ms=200)
    start = time.monotonic()
    api.xenapi.VM.get_all()
    assert time.monotonic() - start > 0.2
