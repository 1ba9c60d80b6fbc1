"""The simulator, judged by tools that are not ours: tar, xva-img, qemu-img, gzip, zstd, XenAPI."""
import contextlib
import hashlib
import http.client
import io
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tarfile
import time
import urllib.parse
import xml.etree.ElementTree
import xmlrpc.client
from pathlib import Path

import pytest
import XenAPI

from simulator.client import Simulator
from simulator.pool import MIB, Pool, cd, disk, many, snapshot, vif

pytestmark = pytest.mark.newest

DUMP = Path(__file__).resolve().parents[3] / "shared" / "data" / "real-pool-database.xml"
NAMES = ("diskless", "elsewhere", "halted", "no cd seen", "stuck", "tiny", "web")


def a_pool():
    pool = Pool(hosts=2)
    pool.sr("Local", shared=False, hosts=[1])
    pool.sr("No snapshots", snapshot=False)
    pool.sr("Unplugged ISOs", content_type="iso", hosts=[])
    pool.vm("web", power_state="Running", os_version="Debian 12",
            vifs=[vif(mac="02:00:00:00:00:01")],
            ha_restart_priority="restart", other_config={"folder": "/Ümlaut & <co>"},
            snapshots=[snapshot("before the upgrade")],
            disks=[disk(3 * MIB + 512, "root", seed="a"),
                   disk(12 * MIB, "data", seed="b", sparse=[0, 7]),
                   disk(5 * MIB, "empty", content="zeros")])
    pool.vm("halted", disks=[disk(2 * MIB, seed="c")], cds=[cd(), cd("debian.iso")], vifs=[vif()])
    pool.vm("elsewhere", disks=[disk(MIB, sr="Local")])
    pool.vm("stuck", disks=[disk(MIB, sr="No snapshots")])
    pool.vm("no cd seen", disks=[disk(MIB)], cds=[cd("x.iso", sr="Unplugged ISOs")])
    pool.vm("tiny", disks=[disk(700, seed=5)])
    pool.vm("diskless")
    pool.template("default", default=True)
    return pool


@pytest.fixture(scope="module")
def running():
    with Simulator.start(a_pool()) as simulator:
        yield simulator


@pytest.fixture
def sim(running):
    running.clear_faults()
    running.reset_calls()
    return running


@pytest.fixture
def api(sim):
    with login(sim) as session:
        yield session


@contextlib.contextmanager
def login(sim, host=0):
    session = XenAPI.Session(sim.hosts[host]["url"],
                             transport=xmlrpc.client.SafeTransport(context=trust(sim, host)))
    session.login_with_password(sim.username, sim.password, "1.0", "test")
    yield session
    with contextlib.suppress(XenAPI.Failure, OSError, http.client.HTTPException,
                             xmlrpc.client.Fault):
        session.xenapi.session.logout()


def trust(sim, host=0):
    return ssl.create_default_context(cafile=sim.hosts[host]["certificate"])


def failure(function, *arguments):
    with pytest.raises(XenAPI.Failure) as caught:
        function(*arguments)
    return caught.value.details


def finished(api, task):
    """The record of a task that has ended."""
    deadline = time.monotonic() + 20
    while api.xenapi.task.get_status(task) == "pending":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return api.xenapi.task.get_record(task)


def raw_get(sim, path, head="", host=0):
    """Everything that comes back for a GET, byte for byte."""
    request = "GET %s HTTP/1.1\r\nHost: x\r\n%s\r\n" % (path, head)
    member = sim.hosts[host]
    plain = socket.create_connection((member["address"], member["port"]))
    with trust(sim, host).wrap_socket(plain, server_hostname=member["address"]) as connection:
        connection.sendall(request.encode())
        parts = []
        while True:
            data = connection.recv(1 << 20)
            if not data:
                return b"".join(parts)
            parts.append(data)


class Get:
    """A GET with a session and a task of its own: status line, headers, body, the task's record."""

    def __init__(self, sim, api, path, host=0, task=True, **query):
        self.task = api.xenapi.task.create("test", "") if task else None
        query.setdefault("session_id", api.handle)
        if task:
            query["task_id"] = self.task
        self.answer = raw_get(sim, path + "?" + urllib.parse.urlencode(query), host=host)
        head, _, self.body = self.answer.partition(b"\r\n\r\n")
        self.status, *self.headers = head.decode().split("\r\n")
        self.record = None
        if task and self.task in sim.tasks():
            self.record = api.xenapi.task.get_record(self.task)

    @property
    def ended(self):
        return self.record["status"], self.record["error_info"]


def export(sim, api, vm, path="/export", **query):
    return Get(sim, api, path, ref=sim.ref("VM", vm), **query)


def take_snapshot(sim, api, vm="web"):
    return api.xenapi.VM.snapshot(sim.ref("VM", vm), "snap of " + vm)


def disks_of(sim, ref):
    return [record for _, record in sim.disks_of(ref)]


def members(archive):
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return [(member.name, member.size) for member in tar]


def ova(archive):
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return xmlrpc_value(tar.extractfile("ova.xml").read())


def xmlrpc_value(text):
    document = b"<methodResponse><params><param>" + text + b"</param></params></methodResponse>"
    return xmlrpc.client.loads(document)[0][0]


def unpack(archive, folder):
    """The disks of an archive by id, put together from what tar unpacks."""
    (folder / "x.xva").write_bytes(archive)
    subprocess.run(["tar", "-xf", "x.xva"], cwd=str(folder), check=True)
    objects = xmlrpc_value((folder / "ova.xml").read_bytes())["objects"]
    found = {}
    for one in objects:
        if one["class"] == "VDI" and (folder / one["id"]).is_dir():
            data = bytearray(int(one["snapshot"]["virtual_size"]))
            for chunk in (folder / one["id"]).iterdir():
                if chunk.suffix == "":
                    offset = int(chunk.name) * MIB
                    part = chunk.read_bytes()
                    data[offset:offset + len(part)] = part
            found[one["snapshot"]["name_label"]] = hashlib.sha256(data).hexdigest()
    return found


def needs(tool):
    return pytest.mark.skipif(shutil.which(tool) is None, reason="no %s here" % tool)


# --- calls ----------------------------------------------------------------------------------------

def test_encodings(sim, api):
    record = api.xenapi.VM.get_record(sim.ref("VM", "web"))
    assert record["memory_static_max"] == str(1 << 30)
    assert record["is_a_template"] is False
    assert record["snapshot_time"].value == "19700101T00:00:00Z"
    assert record["suspend_VDI"] == "OpaqueRef:NULL"
    assert record["HVM_shadow_multiplier"] == 1.0
    assert record["other_config"]["folder"] == "/Ümlaut & <co>"
    assert len(record["VBDs"]) == 3
    assert len(record) > 90


def test_errors_of_calls(sim, api):
    vm = sim.ref("VM", "web")
    calls = api.xenapi.VM
    assert failure(calls.nonsense) == ["MESSAGE_METHOD_UNKNOWN", "VM.nonsense"]
    assert failure(calls.snapshot, vm) == [
        "MESSAGE_PARAMETER_COUNT_MISMATCH", "VM.snapshot", "2", "1"]
    assert failure(calls.set_is_a_template, vm, "false")[0] == "INTERNAL_ERROR"
    assert failure(calls.get_record, "OpaqueRef:x") == ["HANDLE_INVALID", "VM", "OpaqueRef:x"]
    assert failure(calls.get_by_uuid, "x") == ["UUID_INVALID", "VM", "x"]
    assert failure(calls.snapshot_with_quiesce, vm, "x") == ["MESSAGE_REMOVED"]
    assert failure(calls.add_to_other_config, vm, "folder", "")[:3] == [
        "MAP_DUPLICATE_KEY", "VM", "other_config"]
    assert failure(calls.destroy, vm)[:3] == ["VM_BAD_POWER_STATE", vm, "halted, suspended"]


def test_the_shape_of_an_answer(sim):
    connection = http.client.HTTPConnection(sim.http[7:])
    connection.request("POST", "/anything", xmlrpc.client.dumps(("x",), "VM.get_all"))
    answer = connection.getresponse()
    assert (answer.status, answer.headers["content-type"]) == (200, "text/xml")
    body = answer.read().decode()
    assert "<name>Status</name><value>Failure</value>" in body
    assert "<value>SESSION_INVALID</value>" in body
    connection.request("POST", "/", "<nonsense>")   # the connection is still there
    assert connection.getresponse().status == 500


def test_a_call_of_more_than_300_kib_is_refused(sim):
    connection = http.client.HTTPConnection(sim.http[7:])
    connection.putrequest("POST", "/")
    connection.putheader("Content-Length", str(300 * 1024 + 1))
    connection.endheaders()
    assert connection.getresponse().status == 500


@pytest.mark.parametrize("expression, names", [
    ('field "is_a_template"="false" and field "is_a_snapshot"="false" and not '
     'field "is_control_domain"="true"',
     ["diskless", "elsewhere", "halted", "no cd seen", "stuck", "tiny", "web"]),
    ('field "name__label"="web" or (field "power_state" = "Running" and false)', ["web"]),
    ("false", []),
])
def test_filters(sim, api, expression, names):
    found = api.xenapi.VM.get_all_records_where(expression)
    assert sorted(record["name_label"] for record in found.values()
                  if record["name_label"] in NAMES) == names


def test_a_bad_filter(api):
    assert failure(api.xenapi.VM.get_all_records_where, 'field "name_label"="x"')[0] == \
        "INVALID_VALUE"


def test_logins(sim):
    def try_login(host=0, password=sim.password):
        session = XenAPI.Session(sim.hosts[host]["url"], transport=xmlrpc.client.SafeTransport(
            context=trust(sim, host)))
        session.login_with_password("root", password)

    assert failure(try_login, 0, "wrong")[:2] == ["SESSION_AUTHENTICATION_FAILED", "root"]
    assert sim.hosts[0]["port"] == sim.hosts[1]["port"]
    assert failure(try_login, 1, "wrong") == ["HOST_IS_SLAVE", "127.0.0.1"]
    sim.fault("login_error", error_info=["HOST_STILL_BOOTING"], times=1)
    assert failure(try_login) == ["HOST_STILL_BOOTING"]
    try_login()
    assert sim.password not in str(sim.calls())


def test_the_unix_socket_takes_any_password_on_every_member(sim):
    for host in sim.hosts:
        session = XenAPI.Session("http://" + host["socket"].replace("_", "%5f").replace("/", "_"),
                                 transport=UnixTransport(host["socket"]))
        session.login_with_password("anybody", "")
        assert len(session.xenapi.VM.get_all()) > 5
        session.xenapi.session.logout()


class UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path):
        super().__init__()
        self.path = path

    def make_connection(self, host):
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(self.path)
        return connection


def test_sessions_end(sim, api):
    sim.fault("session_lost")
    session = xmlrpc.client.ServerProxy(
        sim.url, transport=xmlrpc.client.SafeTransport(context=trust(sim)))
    assert session.VM.get_all(api.handle)["ErrorDescription"] == ["SESSION_INVALID", api.handle]
    assert sim.sessions() == {}


# --- snapshots ------------------------------------------------------------------------------------

def test_a_snapshot_is_what_xapi_makes_of_it(sim, api):
    vm = sim.ref("VM", "web")
    made = take_snapshot(sim, api)
    record = api.xenapi.VM.get_record(made)
    assert record["is_a_snapshot"] is record["is_a_template"] is True
    assert (record["snapshot_of"], record["power_state"]) == (vm, "Halted")
    assert record["ha_restart_priority"] == "restart"
    assert made in sim.record("VM", "web")["snapshots"]
    assert sim.record("VM", "web")["parent"] == made
    names = [one["name_label"] for one in disks_of(sim, made)]
    assert names == ["root", "data", "empty"]
    for vbd in record["VBDs"]:
        assert api.xenapi.VBD.get_other_config(vbd) == {"owner": ""}
        assert api.xenapi.VBD.get_currently_attached(vbd) is False
    assert [api.xenapi.VIF.get_MAC(one) for one in record["VIFs"]] == ["02:00:00:00:00:01"]
    assert failure(api.xenapi.VM.snapshot, made, "x")[0] == "VM_IS_SNAPSHOT"
    vdis = disks_of(sim, made)
    api.xenapi.VM.destroy(made)
    assert all(one["uuid"] in str(sim.records("VDI")) for one in vdis)
    for one in vdis:
        ref = sim.ref("VDI", one["uuid"])
        assert one["is_a_snapshot"]
        api.xenapi.VDI.destroy(ref)
        assert failure(api.xenapi.VDI.destroy, ref) == ["HANDLE_INVALID", "VDI", ref]
    assert made not in sim.record("VM", "web")["snapshots"]
    assert {entry["ref"] for entry in sim.destroyed()} >= {made}


def test_async_leaves_its_result_in_the_task(sim, api):
    task = api.xenapi.Async.VM.snapshot(sim.ref("VM", "web"), "x", [])
    record = finished(api, task)
    assert record["status"] == "success"
    made = xmlrpc_value(record["result"].encode())
    assert sim.records("VM")[made]["name_label"] == "x"
    record = finished(api, api.xenapi.Async.VM.destroy(made))
    assert record["result"] == "<value></value>"
    api.xenapi.task.destroy(task)
    assert failure(api.xenapi.task.get_status, task) == ["HANDLE_INVALID", "task", task]


def test_snapshots_that_fail(sim, api):
    def snap(name):
        return failure(api.xenapi.VM.snapshot, sim.ref("VM", name), "x")

    assert snap("stuck")[0] == "SR_OPERATION_NOT_SUPPORTED"
    assert snap("no cd seen") == ["NO_HOSTS_AVAILABLE"]
    assert snap("default")[0] == "VM_IS_TEMPLATE"
    sim.fault("snapshot_error", vm="web", times=2)
    assert snap("web")[0] == "SR_BACKEND_FAILURE_44"
    task = finished(api, api.xenapi.Async.VM.snapshot(sim.ref("VM", "web"), "x"))
    assert (task["status"], task["error_info"][0]) == ("failure", "SR_BACKEND_FAILURE_44")
    sim.fault("snapshot_no_ignore_vdis")
    assert failure(api.xenapi.VM.snapshot, sim.ref("VM", "web"), "x", [])[0] == \
        "MESSAGE_PARAMETER_COUNT_MISMATCH"
    api.xenapi.VM.snapshot(sim.ref("VM", "web"), "x")


def test_a_snapshot_keeps_its_moment(sim, api, tmp_path):
    sim.add_vm({"name": "written to", "disks": [disk(2 * MIB)]})
    made = take_snapshot(sim, api, "written to")
    before = sim.disk_sha256(disks_of(sim, made)[0]["uuid"])
    sim.set_content(disks_of(sim, "written to")[0]["uuid"], "zeros")
    assert sim.disk_sha256(disks_of(sim, made)[0]["uuid"]) == before
    assert list(unpack(export(sim, api, made).body, tmp_path).values()) == [before]


# --- exports --------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    {}, {"sha1_checksums": {}}, {"zero_chunks": {}}, {"sha1_checksums": {}, "zero_chunks": {}}])
def test_what_tar_unpacks_is_the_disk(sim, api, tmp_path, options):
    for name, values in options.items():
        sim.fault(name, **values)
    made = take_snapshot(sim, api)
    answer = export(sim, api, made)
    assert answer.ended == ("success", [])
    assert answer.body.endswith(bytes(1024))
    names = [name for name, _ in members(answer.body)]
    assert names[0] == "ova.xml"
    assert names[1].endswith("/00000000")
    assert names[2] == names[1] + (".checksum" if "sha1_checksums" in options else ".xxhash")
    expected = {one["name_label"]: sim.disk_sha256(one["uuid"]) for one in disks_of(sim, made)}
    assert unpack(answer.body, tmp_path) == expected


@needs("xva-img")
def test_what_xva_img_makes_of_it_is_the_disk(sim, api, tmp_path):
    sim.fault("sha1_checksums")
    vm = sim.ref("VM", "halted")
    (tmp_path / "x.xva").write_bytes(export(sim, api, vm).body)
    subprocess.run(["tar", "-xf", "x.xva"], cwd=str(tmp_path), check=True)
    folder = next(tmp_path.glob("Ref:*"))
    subprocess.run(["xva-img", "-p", "disk-export", str(folder) + "/", str(tmp_path / "out")],
                   check=True, stdout=subprocess.DEVNULL)
    data = (tmp_path / "out").read_bytes()
    assert hashlib.sha256(data).hexdigest() == sim.disk_sha256(disks_of(sim, vm)[0]["uuid"])


def test_an_archive_has_the_chunks_that_xapi_writes(sim, api):
    made = take_snapshot(sim, api)
    objects = {(one["class"], one["snapshot"].get("name_label")): one
               for one in ova(export(sim, api, made).body)["objects"]}
    vm = objects[("VM", "snap of web")]["snapshot"]
    assert vm["is_a_snapshot"] is False
    assert vm["is_a_template"] is True
    assert vm["snapshot_of"] == "OpaqueRef:NULL"
    assert all(ref.startswith("Ref:") for ref in vm["VBDs"])
    answer = members(export(sim, api, made).body)
    chunks = {}
    for name, size in answer[1:]:
        identity, number = name.split("/")
        chunks.setdefault(identity, []).append((number, size))
    assert list(chunks) == sorted(chunks)
    assert sorted(sum(size for number, size in one if "." not in number) for one in
                  chunks.values()) == [2 * MIB, 3 * MIB, 3 * MIB + 512]


def test_ids_cross_ten(sim, api):
    sim.setting(first_id=5)
    names = [name for name, _ in members(export(sim, api, take_snapshot(sim, api)).body)]
    identities = [name.split("/")[0] for name in names if "/" in name]
    assert identities == sorted(identities)
    assert {len(identity) for identity in identities} == {5, 6}


def test_the_head_of_an_export(sim, api):
    answer = export(sim, api, "halted")
    assert answer.status == "HTTP/1.0 200 OK"
    assert answer.headers == [
        "Connection: close", "Cache-Control: no-cache, no-store", "task-id: " + answer.task,
        "Server: xapi/26.17", "content-type: application/octet-stream",
        'Content-Disposition: attachment; filename="export.xva"']
    assert (answer.record["progress"], answer.record["result"]) == (1.0, "")


@pytest.mark.parametrize("word, command", [
    ("gzip", "gzip"), ("true", "gzip"), ("zstd", "zstd"), ("false", None), ("GZIP", None)])
def test_compression(sim, api, tmp_path, word, command):
    plain = members(export(sim, api, "halted").body)
    body = export(sim, api, "halted", use_compression=word).body
    if command is None:
        assert body.startswith(b"ova.xml")
        return
    if shutil.which(command) is None:
        pytest.skip("no %s here" % command)
    subprocess.run([command, "-t"], input=body, check=True)
    data = subprocess.run([command, "-dc"], input=body, check=True, stdout=subprocess.PIPE).stdout
    strip = [(name.partition("/")[2], size) for name, size in members(data)[1:]]
    assert strip == [(name.partition("/")[2], size) for name, size in plain[1:]]


@pytest.mark.parametrize("vm", ["tiny", "diskless"])
def test_small_vms(sim, api, tmp_path, vm):
    answer = export(sim, api, vm)
    assert answer.ended == ("success", [])
    assert sorted(unpack(answer.body, tmp_path).values()) == sorted(
        sim.disk_sha256(one["uuid"]) for one in disks_of(sim, vm))


def test_metadata(sim, api):
    answer = export(sim, api, "web", path="/export_metadata", export_snapshots="false")
    assert answer.status == "HTTP/1.0 200 OK"
    assert "Content-Length: %d" % len(answer.body) in answer.headers
    assert [name for name, _ in members(answer.body)] == ["ova.xml"]
    whole = ova(export(sim, api, "web", path="/export_metadata").body)["objects"]
    count = len([one for one in whole if one["class"] == "VM"])
    assert count == 1 + len(sim.record("VM", "web")["snapshots"])


@needs("qemu-img")
@pytest.mark.parametrize("name", ["web", "tiny"])
def test_raw_and_vhd(sim, api, tmp_path, name):
    made = take_snapshot(sim, api, name)
    for one in disks_of(sim, made):
        raw = Get(sim, api, "/export_raw_vdi", vdi=one["uuid"])
        assert raw.status == "HTTP/1.1 200 OK"
        assert "task-id:" + raw.task in raw.headers
        assert hashlib.sha256(raw.body).hexdigest() == sim.disk_sha256(one["uuid"])
        vhd = Get(sim, api, "/export_raw_vdi", vdi=one["uuid"], format="vhd")
        assert vhd.ended == ("success", [])
        # VHD knows whole sectors only
        (tmp_path / "x.raw").write_bytes(raw.body + bytes(-len(raw.body) % 512))
        (tmp_path / "x.vhd").write_bytes(vhd.body)
        # qemu cannot check this format, but reads all of it
        subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "vpc", "x.raw", "x.vhd"],
                       cwd=str(tmp_path), check=True, stdout=subprocess.DEVNULL)


def test_raw_export_of_what_cannot_be(sim, api):
    attached = Get(sim, api, "/export_raw_vdi", vdi=disks_of(sim, "web")[0]["uuid"])
    assert attached.status == "HTTP/1.1 200 OK"
    assert attached.body.startswith(b"HTTP/1.1 500 Internal Error")
    assert attached.ended[1][0] == "VDI_IN_USE"
    unknown = Get(sim, api, "/export_raw_vdi", vdi=disks_of(sim, "tiny")[0]["uuid"], format="x")
    assert unknown.status == "HTTP/1.0 404 Not Found"
    assert unknown.ended == ("failure", ["INTERNAL_ERROR", "Unknown format x"])


def test_the_database(sim, api):
    answer = Get(sim, api, "/pool/xmldbdump")
    assert answer.headers == ["Connection: close", "Cache-Control: no-cache, no-store"]
    assert answer.body.endswith(b"</database>")
    tables = {table.get("name"): len(table)
              for table in xml.etree.ElementTree.fromstring(answer.body).iter("table")}
    assert tables["VM"] == len(sim.records("VM"))
    slave = Get(sim, api, "/pool/xmldbdump", host=1)
    assert slave.status == "HTTP/1.1 200 OK"
    assert slave.body.startswith(b"HTTP/1.1 500 Internal Error")
    assert slave.ended[0] == "failure"


# --- what is refused ------------------------------------------------------------------------------

def test_refusals_before_the_body(sim, api):
    vm = sim.ref("VM", "web")
    answer = export(sim, api, vm)
    assert answer.status == "HTTP/1.1 500 Internal Error"
    assert answer.ended == ("failure", ["VM_BAD_POWER_STATE", vm, "halted, suspended", "running"])
    assert b"<h1> Additional information </h1>VM_BAD_POWER_STATE: [ " in answer.body
    answer = Get(sim, api, "/export", ref=vm, session_id="OpaqueRef:x")
    assert answer.status == "HTTP/1.1 401 Unauthorised"
    assert 'WWW-Authenticate: Basic realm="get_export"' in answer.headers
    assert answer.ended == ("pending", [])
    answer = Get(sim, api, "/export", ref="OpaqueRef:x")
    assert (answer.answer, answer.ended) == (b"", ("failure", ["NO_HOSTS_AVAILABLE"]))
    answer = export(sim, api, "no cd seen")
    assert (answer.answer, answer.ended) == (b"", ("failure", ["NO_HOSTS_AVAILABLE"]))
    answer = Get(sim, api, "/export", uuid="x")
    assert answer.ended[1][0] == "RBAC_PERMISSION_DENIED"
    sim.setting(bad_uuid="pending")
    assert Get(sim, api, "/export", uuid="x").ended == ("pending", [])
    sim.setting(bad_uuid="failure")


def test_heads(sim):
    assert raw_get(sim, "/export", "X: %s\r\n" % ("y" * 1006)).startswith(
        b"HTTP/1.1 431 Request Header Fields Too Large")
    sim.setting(head_timeout=0.05)
    connection = http.client.HTTPConnection(sim.http[7:])
    connection.connect()
    connection.sock.sendall(b"GET /export HTTP/1.1\r\n")
    assert connection.sock.recv(1000).startswith(b"HTTP/1.1 408 Request Timeout")
    connection.close()
    sim.setting(head_timeout=10)
    connection = http.client.HTTPConnection(sim.http[7:])
    connection.request("HEAD", "/export")
    assert connection.getresponse().status == 501


def test_redirect(sim, api):
    answer = export(sim, api, "elsewhere", use_compression="gzip")
    assert answer.status == "HTTP/1.1 302 Found"
    location = next(line for line in answer.headers if line.startswith("Location: "))[10:]
    assert location.startswith(sim.hosts[1]["url"] + "/export?")
    assert answer.ended == ("pending", [])
    parts = urllib.parse.urlsplit(location)
    followed = raw_get(sim, parts.path + "?" + parts.query, host=1)
    assert followed.startswith(b"HTTP/1.0 200 OK")
    assert finished(api, answer.task)["status"] == "success"
    assert sim.hosts[0]["fingerprint"] != sim.hosts[1]["fingerprint"]
    sim.fault("export_302", to=0)
    answer = export(sim, api, "halted")
    assert any(line.startswith("Location: " + sim.url) for line in answer.headers)


# --- faults ---------------------------------------------------------------------------------------

def test_faults_are_checked(sim):
    with pytest.raises(ValueError, match="no such fault"):
        sim.fault("nonsense")
    with pytest.raises(ValueError, match="takes no option"):
        sim.fault("export_cut", nonsense=1)
    with pytest.raises(ValueError, match="no such setting"):
        sim.setting(nonsense=1)


@pytest.mark.parametrize("task, ended", [
    ("pending", "pending"), ("failure", "failure"), ("success", "success"), ("vanish", None)])
def test_cut(sim, api, task, ended):
    whole = len(export(sim, api, "halted").body)
    for after in (0, 1, 512, MIB, whole - 1, whole):
        sim.fault("export_cut", vm="halted", after=after, task=task, times=1)
        answer = export(sim, api, "halted")
        assert len(answer.body) == after
        assert (answer.record and answer.record["status"]) == ended
    assert export(sim, api, "halted").ended == ("success", [])


def test_cut_behind_a_compressor(sim, api):
    sim.fault("export_cut", after=MIB, times=1)
    body = export(sim, api, "halted", use_compression="gzip").body
    data = subprocess.run(["gzip", "-dc"], input=body, check=True, stdout=subprocess.PIPE).stdout
    assert len(data) == MIB
    sim.fault("raw_cut", after=70000, times=1)
    assert len(export(sim, api, "halted", use_compression="gzip").body) == 70000


@pytest.mark.parametrize("name, info, text", [
    ("export_fail", ["VDI_IO_ERROR", "Device I/O errors"], True),
    ("export_fail_silent", ["VDI_IO_ERROR", "Device I/O errors"], False),
    ("export_cancel", [], True),
])
def test_failures_on_the_way(sim, api, name, info, text):
    sim.fault(name, after=MIB)
    answer = export(sim, api, "halted")
    assert answer.ended == ("cancelled" if name == "export_cancel" else "failure", info)
    tail = answer.body[MIB:]
    assert tail.startswith(b"HTTP/1.1 500 Internal Error\r\n") if text else tail == b""


def test_failures_at_the_end(sim, api):
    healthy = export(sim, api, "halted").body
    sim.fault("export_fail_after_whole", times=1)
    answer = export(sim, api, "halted")
    assert len(answer.body) == len(healthy)
    assert answer.ended[0] == "failure"
    sim.fault("task_never_completes", times=1)
    assert export(sim, api, "halted").ended == ("pending", [])
    sim.fault("task_vanish", after=MIB)
    answer = export(sim, api, "halted")
    assert answer.record is None
    assert len(answer.body) == len(healthy)


def test_a_reset(sim, api):
    sim.fault("export_reset", after=MIB)
    with pytest.raises((ConnectionResetError, ssl.SSLError)):
        export(sim, api, "halted")
    assert "failure" in [task["status"] for task in sim.tasks().values()]


def test_archives_that_are_wrong(sim, api):
    healthy = members(export(sim, api, "halted").body)

    def broken(name, **options):
        sim.fault(name, times=1, **options)
        return export(sim, api, "halted").body

    def names(body):
        return [name.partition("/")[2] for name, _ in members(body)]

    assert names(broken("missing_last_chunk")) == ["", "00000000", "00000000.xxhash"]
    assert names(broken("missing_chunk", chunk=0)) == ["", "00000001", "00000001.xxhash"]
    assert names(broken("keepalive_members")) == [
        "", "00000000", "00000000.xxhash", "00000001", "00000001.xxhash", "00000002",
        "00000002.xxhash"]
    assert not broken("no_end_blocks").endswith(bytes(1024))
    assert broken("trailing_text", text="rubbish").endswith(bytes(1024) + b"rubbish")
    assert broken("joined_twice").count(b"\0/00000000\0") == 0
    twice = len(broken("joined_twice"))
    assert twice == 2 * (len(export(sim, api, "halted").body))
    assert len(names(broken("restart_numbers"))) == len(healthy)
    one, other = broken("wrong_hash"), broken("flip_bit", byte=77)
    assert len(one) == len(other)


def test_raw_and_database_variants(sim, api):
    vdi = disks_of(sim, "tiny")[0]["uuid"]
    sim.fault("export_fail", path="/export_raw_vdi",
              error_info=["SR_BACKEND_FAILURE_46", "", "", ""])
    answer = Get(sim, api, "/export_raw_vdi", vdi=vdi)
    assert answer.body.startswith(b"HTTP/1.1 500 Internal Error")
    assert answer.ended[1][0] == "SR_BACKEND_FAILURE_46"
    sim.fault("export_cut", path="/pool/xmldbdump", after=-5, task="success")
    answer = Get(sim, api, "/pool/xmldbdump")
    assert answer.body.endswith(b"</data")
    assert answer.ended[0] == "success"


def test_other_answers(sim, api):
    for name, status in (("export_401", "401"), ("export_431", "431"), ("export_408", "408"),
                         ("export_500", "500")):
        sim.fault(name, times=1)
        assert export(sim, api, "halted").status.split()[1] == status
    sim.fault("export_empty_reply", error_info=["SOMETHING"], times=1)
    answer = export(sim, api, "halted")
    assert (answer.answer, answer.ended) == (b"", ("failure", ["SOMETHING"]))


def test_speed_limits(sim, api):
    sim.fault("export_slow_start", seconds=0.2, times=1)
    sim.fault("export_silence", seconds=0.2, after=MIB, times=1)
    sim.fault("export_rate", bytes=20 * MIB, times=1)
    start = time.monotonic()
    export(sim, api, "halted")
    assert time.monotonic() - start > 0.45


def test_vdi_in_use_and_destroy_errors(sim, api):
    made = take_snapshot(sim, api, "tiny")
    vdi = sim.ref("VDI", disks_of(sim, made)[0]["uuid"])
    sim.fault("vdi_in_use", times=2)
    for _ in range(2):
        assert failure(api.xenapi.VDI.destroy, vdi) == ["VDI_IN_USE", vdi, "destroy"]
    sim.fault("vm_destroy_error", vm="tiny", times=1, error_info=["OPERATION_NOT_ALLOWED", "x"])
    assert failure(api.xenapi.VM.destroy, made) == ["OPERATION_NOT_ALLOWED", "x"]
    api.xenapi.VM.destroy(made)
    api.xenapi.VDI.destroy(vdi)


def test_fields_that_are_missing_and_filters_that_find_nothing(sim, api):
    calls, vm = api.xenapi.VM, sim.ref("VM", "tiny")
    whole = calls.get_record(vm)
    sim.fault("fields_missing", cls="VM", fields=["uuid", "tags"])
    short = {name: value for name, value in whole.items() if name not in ("uuid", "tags")}
    assert calls.get_record(vm) == calls.get_all_records()[vm] == short
    assert calls.get_all_records_where("true")[vm] == short
    assert set(next(iter(api.xenapi.VDI.get_all_records().values()))) >= {"uuid", "tags"}
    sim.clear_faults()
    assert calls.get_record(vm) == whole
    sim.fault("where_empty", cls="VM")
    assert calls.get_all_records_where("true") == {}
    assert calls.get_all_records()
    assert api.xenapi.VDI.get_all_records_where("true")


def test_calls_that_go_wrong(sim, api):
    vm = sim.ref("VM", "tiny")
    sim.fault("rpc_error", method="VM.get_uuid", error_info=["X", "y"], skip=1, times=1)
    api.xenapi.VM.get_uuid(vm)
    assert failure(api.xenapi.VM.get_uuid, vm) == ["X", "y"]
    sim.fault("rpc_hang", method="VM.get_uuid", seconds=0.2, times=1)
    start = time.monotonic()
    api.xenapi.VM.get_uuid(vm)
    assert time.monotonic() - start > 0.15
    for moment, count in (("before", 0), ("after", 1)):
        before = len(sim.record("VM", "tiny")["snapshots"])
        sim.fault("rpc_drop", method="VM.snapshot", moment=moment, times=1)
        connection = http.client.HTTPConnection(sim.http[7:])
        connection.request("POST", "/", xmlrpc.client.dumps((api.handle, vm, "x"), "VM.snapshot"))
        with pytest.raises(http.client.RemoteDisconnected):
            connection.getresponse()
        assert len(sim.record("VM", "tiny")["snapshots"]) == before + count


@pytest.mark.parametrize("trigger", [
    {"method": "VM.get_uuid"}, {"method": "GET /export"}, {"after": MIB}])
def test_kill(sim, api, trigger):
    victim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with victim:
        sim.fault("kill_client_at", pid=victim.pid, **trigger)
        api.xenapi.VM.get_uuid(sim.ref("VM", "tiny"))
        export(sim, api, "halted")
        assert victim.wait(10) == -9
        victim.stdin.close()


def test_things_that_happen_meanwhile(sim, api):
    sim.add_vm({"name": "short-lived", "disks": [disk(MIB)]})
    sim.fault("vm_renamed", method="VM.get_all", target="short-lived", to="renamed")
    api.xenapi.VM.get_all()
    assert sim.record("VM", "renamed")
    sim.fault("vm_deleted", method="VM.get_all", target="renamed")
    api.xenapi.VM.get_all()
    with pytest.raises(KeyError):
        sim.record("VM", "renamed")


def test_a_busy_vm(sim, api):
    sim.set("VM", "halted", "current_operations", {"OpaqueRef:x": "clean_reboot"})
    vm = sim.ref("VM", "halted")
    assert export(sim, api, "halted").ended == (
        "failure", ["OTHER_OPERATION_IN_PROGRESS", "VM", vm, "clean_reboot", "OpaqueRef:x"])
    sim.set("VM", "halted", "current_operations", {})


def test_events(sim, api):
    call = getattr(api.xenapi.event, "from")
    first = call(["task"], "", 1.0)
    task = api.xenapi.task.create("a", "b")
    found = call(["task"], first["token"], 5.0)
    assert [(one["operation"], one["ref"]) for one in found["events"]] == [("add", task)]
    assert call(["task/" + task], found["token"], 0.05)["events"] == []
    api.xenapi.task.destroy(task)
    assert task in sim.tasks()      # pending: it goes when it ends


def test_the_certificate(sim, api):
    host = api.xenapi.session.get_this_host(api.handle)
    pem = api.xenapi.host.get_server_certificate(host)
    assert pem == Path(sim.certificate).read_text()
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest().upper()
    assert sim.fingerprint.replace(":", "") == digest


# --- the program ----------------------------------------------------------------------------------

def test_restart_and_new_master():
    with Simulator.start(Pool(hosts=3)) as sim:
        with login(sim) as api:
            api.xenapi.task.create("a", "")
            sim.fault("xapi_restart")
            assert (sim.tasks(), sim.sessions()) == ({}, {})
        sim.fault("master_moves", to=2)
        with pytest.raises(XenAPI.Failure) as caught, login(sim):
            pass
        assert caught.value.details == ["HOST_IS_SLAVE", "127.0.0.3"]
        with login(sim, 2) as api:
            assert len(api.xenapi.host.get_all()) == 3
        sim.fault("host_down", member=2)
        with pytest.raises(OSError), login(sim, 2):
            pass


def test_it_ends_with_its_standard_input():
    simulator = Simulator.start()
    simulator._process.stdin.close()
    assert simulator._process.wait(10) == 0
    assert not os.path.exists(simulator.socket)
    simulator.stop()


def test_ten_thousand_vms():
    pool = many(10000)
    with Simulator.start(pool) as sim:
        session = xmlrpc.client.ServerProxy(sim.http).session.login_with_password("root", "secret")
        connection = http.client.HTTPConnection(sim.http[7:])
        start = time.monotonic()
        connection.request(
            "POST", "/", xmlrpc.client.dumps((session["Value"],), "VM.get_all_records"))
        body = connection.getresponse().read()
        assert time.monotonic() - start < 5     # 0.5 s, and room for a busy machine
        assert body.count(b"<name>power_state</name>") == 10001


@pytest.mark.skipif(not DUMP.exists(), reason="the dump of a real pool is not there")
def test_a_real_database(tmp_path):
    with Simulator.start(database=DUMP) as sim, login(sim) as api:
        records = api.xenapi.VM.get_all_records()
        assert len(records) == 70
        assert sum(record["is_a_snapshot"] for record in records.values()) == 5
        assert len(sim.hosts) == 2
        made = api.xenapi.VM.snapshot(sim.ref("VM", "dlvm_local"), "x")
        sim.fault("export_cut", after=16 * MIB)
        assert export(sim, api, made).status == "HTTP/1.0 200 OK"


def test_vhd_footer(sim, api):
    body = Get(sim, api, "/export_raw_vdi", vdi=disks_of(sim, "tiny")[0]["uuid"], format="vhd").body
    footer = body[-512:]
    assert footer == body[:512]
    assert footer[:8] == b"conectix"
    stored = struct.unpack(">I", footer[64:68])[0]
    assert stored == ~(sum(footer) - sum(footer[64:68])) & 0xFFFFFFFF


def test_another_pool_in_the_same_process():
    with Simulator.start(Pool()) as sim:
        sim.fault("host_still_booting")
        pool = Pool(password="other")
        pool.vm("new one")
        sim.load(pool)
        with login(sim) as api:
            assert api.xenapi.VM.get_by_name_label("new one")
        assert sim.faults() == []
        with pytest.raises(ValueError, match="has 1 hosts"):
            sim.load(Pool(hosts=2))
