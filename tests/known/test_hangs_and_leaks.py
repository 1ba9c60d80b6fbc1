# SPDX-License-Identifier: GPL-3.0-or-later
"""What made the program wait for ever, or leave behind what must not stay."""
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from simulator.pool import MIB, Pool, disk
from support.harness import ROOT, SCRIPT, finish, hasty, start, vmbackup
from support.relay import Relay, address_of
from support.world import IMPATIENT, old_backup, one_vm, pool_of, wait_until

pytestmark = pytest.mark.newest  # nothing here depends on the Python

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU")


def fifo_in_place_of(path):
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    os.mkfifo(str(path))


# --- a named pipe where a file is meant -----------------------------------------------------------

@pytest.mark.parametrize("name", ["success", "SHA256SUMS", "vm.cfg", "web.xva", "DISK-xvda/vdi.cfg",
                                  "vm-metadata.xml", "unfinished.partial", "keep"])
def test_a_named_pipe_in_a_backup_is_no_wait(turn, name):
    """Run, preview, verify, list and check come to their ends, and the other VM has its turn."""
    site = turn(pool_of("web", "db"))
    site.configure("vm-export=web", "vm-export=db", "max_backups=1")
    assert site.run().status == 0
    fifo_in_place_of(site.folders("web")[0] / name)
    result = vmbackup("verify", site.config, timeout=40)
    assert result.has("verify db/") and result.lines[-1].endswith("E:0") == (name == "keep"), result
    for words in (["list", site.config], ["list", site.config, "web"], ["check", site.config]):
        result = vmbackup(*words, timeout=40)
        assert result.status in (0, 2), result
        assert "db" in result.out or words[0] == "check" or "web" in words
    for words in (["preview"], []):
        result = site.run(*words, timeout=60)
        assert result.status in (0, 1), result
    assert len(site.folders("db")) == 1 and site.file("web").stat().st_size > MIB


def test_a_named_pipe_in_place_of_the_last_dump_is_no_wait(turn):
    site = turn(one_vm(MIB))
    site.configure("vm-export=web", "pool_db_backup=1")
    assert site.run().status == 0
    (dump,) = site.backups.glob("METADATA_*/*.dump")
    fifo_in_place_of(dump)
    assert site.run(timeout=60).status == 0


def test_a_named_pipe_in_place_of_a_config_or_password_file_is_no_wait(turn):
    site = turn(one_vm(MIB))
    site.configure("vm-export=web")
    pipe = site.path / "pipe"
    os.mkfifo(str(pipe))
    assert vmbackup(site.sim.password, pipe, timeout=40).status == 3
    assert vmbackup(pipe, site.config, timeout=40).status == 3


# --- signals --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SIGNALS)
def test_a_stop_signal_leaves_nothing(turn, name):
    """In the middle of an export: snapshot, session, task and folder are gone."""
    site = turn(one_vm())
    site.configure("vm-export=web")
    site.sim.fault("export_silence", vm="web", after=MIB, seconds=3600)
    number = getattr(signal, name)
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), site.sim.password, str(site.config)],
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in (number,)],
        cwd=str(site.path), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)
    wait_until(lambda: list(site.backups.glob("web/backup-*/web.xva.partial")))
    process.send_signal(number)
    wait_until(lambda: "task.cancel" in site.sim.methods())
    site.sim.clear_faults()  # or the host would not see that its client has gone
    result = finish(process)
    assert result.status == 128 + number, result
    site.assert_pool_is_clean()
    assert not list(site.backups.iterdir())
    assert not list(site.path.glob("core*"))


def test_no_core_file_is_ever_written(turn):
    """The password would be in it. The user allows cores, and the program dies of a signal that no
    program answers."""
    site = turn(one_vm())
    site.configure("vm-export=web")
    site.sim.fault("export_silence", vm="web", after=MIB, seconds=3600)
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), site.sim.password, str(site.config)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (
            resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2),
        cwd=str(site.path), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_until(lambda: list(site.backups.glob("web/backup-*/web.xva.partial")))
    (limit,) = [line.split()[4:6] for line in Path(
        "/proc/%d/limits" % process.pid).read_text().splitlines() if "core file" in line]
    os.kill(process.pid, signal.SIGSEGV)
    _pid, status = os.waitpid(process.pid, 0)
    process.returncode = status
    assert os.WTERMSIG(status) == signal.SIGSEGV
    assert not os.WCOREDUMP(status)
    assert [int(each) for each in limit] in ([0, 0], [1, 1])
    assert not list(site.path.glob("core*"))


def test_a_second_signal_ends_it_at_once(turn):
    """Whatever the first one is still waiting for."""
    site = turn(one_vm())
    site.configure("vm-export=web")
    site.sim.fault("rpc_hang", method="VM.snapshot")
    process = site.start()
    wait_until(lambda: "Async.VM.snapshot" in site.sim.methods())
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert finish(process, timeout=5).status == 128 + signal.SIGTERM


class Dripping(Relay):
    """Passes the calls of one method on, and their answers a byte at a time, without an end."""

    def __init__(self, sim, method):
        self.to, self.method, self.dripped = address_of(sim), method.encode(), 0
        super().__init__()

    def serve(self, client, number):
        server = socket.create_connection(self.to)
        state = {"drips": False}

        def answers():
            with contextlib.suppress(OSError):
                for data in iter(lambda: server.recv(65536), b""):
                    if state["drips"]:
                        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n<")
                        while True:
                            self.dripped += 1
                            client.sendall(b" ")
                            time.sleep(0.1)
                    client.sendall(data)
                client.shutdown(socket.SHUT_WR)

        threading.Thread(target=answers, daemon=True).start()
        with contextlib.suppress(OSError):
            for data in iter(lambda: client.recv(65536), b""):
                state["drips"] = state["drips"] or b">%s<" % self.method in data
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("method", ["session.login_with_password", "VM.get_all_records",
                                    "VM.get_snapshots", "VM.add_to_other_config", "VM.destroy"])
def test_a_stop_in_a_call_that_drips(turn, method):
    """Each byte comes in time, the answer never: a time limit for a read does not end it."""
    site = turn(one_vm())
    site.configure("vm-export=web")
    with Dripping(site.sim, method) as way:
        process = hasty(site, "host=" + way.url, STOP_GRACE=0.5, CLEANUP_GRACE=1, STOP_ENDS=15)
        wait_until(lambda: way.dripped > 2)
        process.send_signal(signal.SIGTERM)
        result = finish(process)
    assert result.status == 128 + signal.SIGTERM, result
    # It came to its end by itself, and not by the last resort.
    assert result.has("stopped by signal 15") or "VmBackup ended" in result.lines[-1], result


@pytest.mark.parametrize("method", ["VM.get_snapshots", "VM.add_to_other_config", "VM.destroy"])
def test_the_last_resort(turn, method):
    """The host answers no call any more, those that clean up included."""
    site = turn(one_vm())
    site.configure("vm-export=web")
    site.sim.fault("rpc_hang", method=method)
    process = hasty(site, STOP_GRACE=0.5, CLEANUP_GRACE=100, STOP_ENDS=4)
    wait_until(lambda: method in site.sim.methods())
    site.sim.fault("rpc_hang", method="*")
    process.send_signal(signal.SIGTERM)
    assert finish(process).status == 128 + signal.SIGTERM


@pytest.mark.parametrize("full", ["before the snapshot is marked", "in the export"])
def test_a_reader_of_the_log_that_reads_no_more(turn, full):
    """The pipe is full. A stop ends the program all the same, and leaves nothing on the pool."""
    site = turn(one_vm())
    site.configure("vm-export=web")
    if full == "in the export":
        site.sim.fault("export_silence", vm="web", after=MIB, seconds=3600)
    else:
        site.sim.fault("rpc_hang", method="VM.add_to_other_config", times=1)
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys, vmbackup\nvmbackup.STOP_ENDS = 30\nsys.exit("
         "vmbackup.main())", site.sim.password, str(site.config)], cwd=str(ROOT),
        stdin=subprocess.DEVNULL, stdout=writing, stderr=subprocess.DEVNULL)
    wait_until(lambda: site.sim.faults()[0]["fired"])
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 100)
    os.set_blocking(writing, True)  # of the open file: the program's, too
    site.sim.clear_faults()
    time.sleep(1)  # with the second it comes to its next line, and waits there
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        os.close(reading), os.close(writing)
    site.assert_pool_is_clean()


def test_the_keys_of_tls_are_written_nowhere(turn):
    site = turn(one_vm(MIB))
    site.configure("vm-export=web")
    keys = site.path / "keys"
    result = site.run(env={"SSLKEYLOGFILE": str(keys)})
    assert result.status == 0, result
    assert not keys.exists()


# --- an export that hangs though its host answers -------------------------------------------------

@pytest.mark.parametrize("kind", ["vm-export", "vdi-export"])
def test_an_export_that_moves_no_more_is_given_up(turn, kind):
    """vhd-tool looped for ever, its task pending; the next VM has its turn."""
    site = turn(pool_of("web", "zdb", power_state="Running"))
    site.configure(kind + "=web", kind + "=zdb", "vdi_export_format=vhd")
    path, of = ("/export", "vm") if kind == "vm-export" else ("/export_raw_vdi", "vdi")
    site.sim.fault("export_silence", path=path, **{of: "web", "after": 4096, "seconds": 4})
    process = hasty(site, SILENCE=0.3, STALLED=1.5, TASK_ENDS=1, FAILURE_ENDS=0.2)
    result = finish(process)
    assert result.status == 2, result
    assert result.has("%s web - ***ERROR***" % kind) and result.has("zdb - ***Success***")
    assert result.has("neither a byte came nor the task moved")
    site.assert_pool_is_clean()


def test_one_that_moves_slowly_is_not(turn):
    """Its task moves on: the bytes that come are few, the host has much to compress."""
    pool = Pool()
    pool.vm("web", disks=[disk(4 * MIB, seed=1)])
    site = turn(pool)
    site.configure("vm-export=web")
    site.sim.fault("export_rate", bytes=MIB)
    process = hasty(site, SILENCE=0.3, STALLED=3)
    result = finish(process)
    assert result.status == 0, result


def test_metadata_without_end(turn):
    """Where the host sends rubbish in place of metadata, memory has a bound."""
    site = turn(one_vm(MIB))
    site.configure("vm-export=web")
    with Flood(site.sim) as flood:
        process = start(site.sim.password, site.config, "host=" + flood.url)
        peak = 0
        with contextlib.suppress(OSError, ValueError, IndexError):
            while process.poll() is None:
                text = Path("/proc/%d/status" % process.pid).read_text()
                peak = max(peak, int(text.split("VmHWM:")[1].split()[0]))
                time.sleep(0.05)
        result = finish(process)
    assert result.status == 1, result
    assert result.has("no vm-metadata.xml: ")
    assert len(site.folders("web")) == 1
    assert peak < 500 * 1024
    assert flood.sent < 320 * MIB


class Flood(Dripping):
    """Answers GET /export_metadata with bytes without an end."""

    def __init__(self, sim):
        super().__init__(sim, "nothing")
        self.sent = 0

    def serve(self, client, number):
        head = client.recv(4096, socket.MSG_PEEK)
        if not head.startswith(b"GET /export_metadata"):
            super().serve(client, number)
            return
        with contextlib.suppress(OSError):
            client.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
            while self.sent < 700 * MIB:
                client.sendall(bytes(MIB))
                self.sent += MIB


def test_a_list_of_old_backups_is_no_wait_for_a_lock(turn):
    """A lock that nobody lets go: list, check and verify ask for none."""
    import fcntl
    site = turn(one_vm(MIB))
    site.configure("vm-export=web")
    old_backup(site, "web", 1)
    with open(str(site.backups / ".web.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for word in ("list", "check", "verify"):
            assert vmbackup(word, site.config, timeout=40).status in (0, 1, 2)
        assert site.run(constants=IMPATIENT).status == 4
