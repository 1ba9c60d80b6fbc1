# SPDX-License-Identifier: GPL-3.0-or-later
"""What goes wrong at a moment, or stands in a place, where one does not expect it."""
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from simulator.pool import MIB, Pool, disk
from support.harness import ROOT, SCRIPT, finish, hasty, vmbackup
from support.relay import Relay
from support.world import IMPATIENT, one_vm, wait_until


class Between(Relay):
    """A man in the middle: passes each TCP connection on, but for what `odd(number, client)` does
    with it; true: that was all."""

    def __init__(self, to, odd):
        self.to, self.odd = to, odd
        super().__init__()
        self.host = self.url.partition("//")[2]

    def serve(self, client, number):
        if not self.odd(number, client):
            self.pass_on(client, socket.create_connection(self.to))


@pytest.fixture
def between(request):
    def make(to, odd):
        made = Between(to, odd)
        request.addfinalizer(made.close)
        return made

    return make


def reset(client):
    client.recv(4096)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    return True


def hang_up(client):
    client.recv(4096)
    client.close()
    return True


def talk_clear_text(client):
    client.recv(4096)
    client.sendall(b"HTTP/1.1 503 busy\r\n\r\n")
    client.close()
    return True


@pytest.mark.parametrize("deed", [reset, hang_up, talk_clear_text])
def test_tls_that_breaks_tells_no_session(turn, between, deed):
    """A session reference is as good as the password, and urllib3 tells it with the URL."""
    here = turn(one_vm())
    here.configure("vm-export=web", "report_json=%s" % (here.path / "report.json"))
    host = here.sim.hosts[0]
    way = between((host["address"], host["port"]), lambda number, client: number > 1
                  and deed(client))
    result = here.run("host=" + way.host, constants=IMPATIENT)
    assert result.status == 2, result
    assert result.has("web - ***ERROR*** the connection to the host broke"), result
    written = result.out + result.err + "".join(
        path.read_text() for path in (here.status_log, here.path / "report.json"))
    assert "session_id" not in written and "OpaqueRef" not in written


def test_one_reset_is_not_an_internal_error(turn, between):
    """It hits the metadata, and for those alone no backup fails."""
    here = turn(one_vm())
    here.configure("vm-export=web")
    host = here.sim.hosts[0]
    way = between((host["address"], host["port"]), lambda number, client: number == 2
                  and reset(client))
    result = here.run("host=" + way.host)
    assert result.status == 1, result
    assert result.has("WARNING no vm-metadata.xml: the connection to the host broke"), result
    assert len(here.folders("web")) == 1


@pytest.mark.parametrize("location, told", [
    ("https://[::1/export", "the host leads to 'https://[::1', which could not prove itself"),
    ("http://127.0.0.1:{port}/export?{query}", "")])
def test_a_redirect_that_stays_open_or_leads_nowhere(turn, between, location, told):
    here = turn(one_vm())
    here.configure("vm-export=web")
    address, port = here.sim.http.split("//")[1].split(":")

    def redirect(_number, client):
        head = client.recv(65536, socket.MSG_PEEK).decode()
        if not head.startswith("GET /export?"):
            return False
        there = location.format(port=port, query=head.split()[1].partition("?")[2])
        client.sendall(b"HTTP/1.1 302 Found\r\nLocation: %s\r\n\r\n" % there.encode())
        client.recv(65536)
        client.recv(1)  # until the other end closes it
        return True

    result = here.run("host=http://" + between((address, int(port)), redirect).host)
    assert result.status == (2 if told else 0), result
    assert result.has("***ERROR*** " + told if told else "web - ***Success***")


def test_space_that_is_already_written_is_not_reserved_again(small_disk):
    """db comes when web's disk is nearly written, and there is room for both."""
    pool = Pool()
    for name, size in (("web", 24), ("small", 1), ("db", 10)):
        pool.vm(name, disks=[disk(size * MIB, seed=name)])
    here = small_disk(pool, 44)
    here.configure("vm-export=web", "vm-export=small", "vm-export=db", "parallel=2")
    here.sim.fault("export_silence", vm="web", after=22 * MIB, seconds=3600)
    small = here.sim.fault("export_silence", vm="small", after=MIB // 2, seconds=3600)
    process = here.start()
    wait_until(lambda: [path for path in here.backups.glob("web/*/*.partial")
                        if path.stat().st_size > 20 * MIB])
    here.sim.clear_faults(small)
    wait_until(lambda: here.folders("db") or "ERROR" in here.status_log.read_text())
    here.sim.clear_faults()
    result = finish(process)
    assert result.status == 0, result


def test_nohup(turn):
    here = turn(one_vm())
    here.configure("vm-export=web")
    silence = here.sim.fault("export_silence", vm="web", after=MIB, seconds=3600)
    process = subprocess.Popen(
        ["nohup", sys.executable, SCRIPT, here.sim.password, str(here.config)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: "GET /export" in here.sim.methods())
    process.send_signal(signal.SIGHUP)
    here.sim.clear_faults(silence)
    result = finish(process)
    assert result.status == 0, result
    assert len(here.folders("web")) == 1


@pytest.mark.newest
@pytest.mark.parametrize("words, method, skip", [
    ((), "session.login_with_password", 0), (("preview",), "pool.get_all_records", 0),
    ((), "*", 3), (("preview",), "*", 4)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_a_silent_host(turn, words, method, skip, number):
    """The host would be silent for an hour; nothing is left behind."""
    here = turn(one_vm())
    here.configure("vm-export=web")
    here.sim.fault("rpc_hang", method=method, skip=skip, times=1)
    process = here.start(*words)
    wait_until(lambda: here.sim.faults()[0]["fired"])
    process.send_signal(number)
    result = finish(process)
    assert result.status == 128 + number, result
    assert result.has("stopped by signal %d" % number)
    if "login" not in method:
        assert not here.sim.sessions()
    here.sim.clear_faults()  # and the host carries out a login that nobody waits for any more
    wait_until(lambda: "login" not in method or here.sim.sessions())


def test_a_session_that_comes_after_the_signal_is_ended_too(turn):
    """The host has got the login and carries it out: what it answers must not be missed."""
    here = turn(one_vm())
    here.configure("vm-export=web")
    hang = here.sim.fault("rpc_hang", method="session.login_with_password", times=1)
    process = here.start()
    wait_until(lambda: here.sim.faults()[0]["fired"])
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: "SigPnd:\t0000000000000000" in Path(
        "/proc/%d/status" % process.pid).read_text())  # it has got the signal
    here.sim.clear_faults(hang)
    result = finish(process)
    assert result.status == 128 + signal.SIGTERM, result
    assert here.sim.methods()[-1] == "session.logout" and not here.sim.sessions()


AS_NOBODY = """
import os, sys, vmbackup, xmlrpc.client, xxhash
os.setgroups([]), os.setgid(65534), os.setuid(65534)
sys.exit(vmbackup.main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("name, status", [("lost+found", 0), ("db", 2)])
def test_verify_of_what_cannot_be_read_goes_on(turn, name, status):
    here = turn(one_vm())
    here.configure("vm-export=web")
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        assert here.run("backup_dir=" + folder).status == 0
        for path in [top] + list(top.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        (top / name).mkdir(mode=0o700)
        done = subprocess.run([sys.executable, "-c", AS_NOBODY, "verify", folder], cwd=str(ROOT),
                              stdout=subprocess.PIPE)
    text = done.stdout.decode("utf-8")
    assert done.returncode == status, text
    assert "verify web/" in text and "***Success***" in text
    assert ("Permission denied" in text) == (status == 2)


def test_two_disks_that_claim_to_be_the_same_device(turn):
    pool = Pool()
    pool.vm("web", disks=[disk(MIB, "root", seed=1, device="xvda", userdevice="0"),
                          disk(MIB, "data", seed=2, device="xvdb", userdevice="1"),
                          disk(MIB, "stale", seed=3, device="xvdb", userdevice="3")])
    here = turn(pool)
    here.configure("vm-export=web")
    result = here.run()
    assert result.status == 0, result
    (folder,) = here.folders("web")
    assert sorted(path.name for path in folder.glob("DISK-*")) == [
        "DISK-xvda", "DISK-xvdb", "DISK-xvdb-3"]


@pytest.mark.parametrize("name", ["rescued-files.raw", "web2.xva", "old.vhd.partial"])
def test_what_a_user_unpacked_beside_a_backup_is_his(turn, name):
    here = turn(one_vm())
    here.configure("vm-export=web", "max_backups=1")
    assert here.run().status == 0
    (folder,) = here.folders("web")
    (folder / name).write_text("mine")
    result = here.run()
    assert result.status == 1 and result.has("it holds " + name), result
    assert (folder / name).read_text() == "mine"
    assert (folder / "success").exists()


def test_a_vdi_snapshot_whose_answer_got_lost_goes_too(turn):
    """It bears no mark yet; but it is the only new one of this disk, and no VM has it."""
    here = turn(one_vm())
    here.configure("vdi-export=web")
    here.sim.fault("rpc_drop", method="VDI.snapshot", moment="after", times=1)
    result = here.run()
    assert result.status == 2, result
    (gone,) = [item["record"] for item in here.sim.destroyed() if item["class"] == "VDI"]
    assert gone["is_a_snapshot"]
    here.assert_pool_is_clean()


def test_a_task_without_progress_ends_no_watch(turn):
    here = turn(one_vm())
    here.configure("vm-export=web")
    here.sim.fault("fields_missing", cls="task", fields=["progress"])
    silence = here.sim.fault("export_silence", after=1000, seconds=3600)
    process = hasty(here, SILENCE=0.1)
    wait_until(lambda: here.sim.methods().count("task.get_record") > 5)
    here.sim.clear_faults(silence)
    result = finish(process)
    assert (result.status, result.err) == (0, ""), result


def test_a_status_log_that_is_something_else(turn, tmp_path):
    here = turn(one_vm())
    word = tmp_path / "pass"
    assert vmbackup(here.sim.password, "create-password-file=%s" % word).status == 0
    fifo = tmp_path / "fifo"
    os.mkfifo(str(fifo))
    for path in (here.config, word, fifo):
        here.status_log = path
        text = here.configure("vm-export=web").read_text()
        secret = word.read_text()
        result = vmbackup(word, here.config)
        assert result.status == 3 and result.has("ERROR - status_log=%s: " % path), result
        assert (here.config.read_text(), word.read_text()) == (text, secret)
    here.status_log = Path(os.devnull)
    here.configure("vm-export=web")
    assert here.run().status == 0


def test_a_report_goes_through_no_link_that_somebody_planted(turn, tmp_path):
    """Nor does a temporary file that is not ours go."""
    here = turn(one_vm())
    victim, report = tmp_path / "victim", tmp_path / "report.json"
    victim.write_text("mine")
    here.configure("vm-export=web", "report_json=%s" % report)
    silence = here.sim.fault("export_silence", vm="web", after=MIB, seconds=3600)
    process = here.start()
    wait_until(lambda: "GET /export" in here.sim.methods())
    link = tmp_path / ("report.json.%d.tmp" % process.pid)
    link.symlink_to(victim)
    here.sim.clear_faults(silence)
    assert finish(process).status == 0
    assert victim.read_text() == "mine" and link.is_symlink()
    assert json.loads(report.read_text())["status"] == "SUCCESS"
    assert not report.is_symlink() and report.stat().st_mode & 0o777 == 0o644
    assert not list(tmp_path.glob(".vmbackup-*"))


def test_a_keep_count_of_any_length_is_a_number(turn):
    here = turn(one_vm())
    here.configure("vm-export=web:" + "9" * 5000)
    assert here.run("preview").status == 0
