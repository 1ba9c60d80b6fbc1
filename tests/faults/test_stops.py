# SPDX-License-Identifier: GPL-3.0-or-later
"""A stop by signal: undone as far as the host answers, and over soon whatever hangs or drips."""
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from simulator.pool import MIB, Pool, disk
from support.harness import SCRIPT, finish, hasty, start, vmbackup
from support.world import one_vm, wait_until


def exporting(here, command=()):
    """A run, started by this command, in the middle of an export that will not go on."""
    here.configure("vm-export=web")
    here.sim.fault("export_silence", vm="web", after=MIB, seconds=3600)
    words = [sys.executable, str(SCRIPT), here.sim.password, str(here.config)]
    process = subprocess.Popen(list(command) + words, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: list(here.backups.glob("web/*/*.partial"))
               and "GET /export" in here.sim.methods())
    return process


def calling(here, method):
    """A run whose call of this method hangs."""
    here.configure("vm-export=web")
    here.sim.fault("rpc_hang", method=method, seconds=3600)
    process = here.start()
    wait_until(lambda: method in here.sim.methods())
    return process


@pytest.mark.parametrize("name", ["QUIT", "USR1", "USR2", "ALRM", "XCPU"])
def test_signals_that_end_a_process_undo_what_is_begun(turn, name):
    here, signum = turn(one_vm()), getattr(signal, "SIG" + name)
    process = exporting(here)
    process.send_signal(signum)
    here.sim.clear_faults()  # a host that would send on notices that nobody is there
    result = finish(process)
    assert result.status == 128 + signum, result
    here.assert_pool_is_clean()
    assert not here.folders("web", marked=False)


def test_no_core_file_can_be_written(turn):
    here = turn(one_vm())
    process = exporting(here)
    with open("/proc/%d/limits" % process.pid) as limits:
        (line,) = [line for line in limits if line.startswith("Max core file size")]
    process.terminate()
    finish(process)
    # 0 would not do: a kernel that hands cores to a program heeds no limit but 1, see core(5).
    assert line.split()[4:6] == ["1", "1"]


@pytest.mark.parametrize("method", ["session.login_with_password", "VM.get_all_records",
                                    "VM.get_record", "task.create"])
def test_a_call_that_hangs(turn, method):
    here = turn(one_vm())
    process = calling(here, method)
    process.terminate()
    begin = time.monotonic()
    result = finish(process)
    assert result.status == 143, result
    assert time.monotonic() - begin < 50
    here.sim.clear_faults()
    wait_until(lambda: not here.snapshots())
    assert not here.folders("web", marked=False)


def test_a_login_that_answers_soon_after_the_signal_is_undone(turn):
    here = turn(one_vm())
    process = calling(here, "session.login_with_password")
    process.terminate()
    time.sleep(1)
    here.sim.clear_faults()
    assert finish(process).status == 143
    here.assert_pool_is_clean()


@pytest.fixture
def host():
    """host(behave) gives the port of a server that calls behave(connection) for each."""
    servers = []

    def make(behave):
        def serve(server):
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                threading.Thread(target=attend, args=(connection,), daemon=True).start()

        def attend(connection):
            with contextlib.suppress(OSError):
                behave(connection)

        server = socket.socket()
        server.bind(("127.0.0.1", 0))
        server.listen(5)
        servers.append(server)
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        return server.getsockname()[1]

    yield make
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def drip(connection, head):
    connection.recv(1000)
    connection.sendall(head)
    while True:
        connection.sendall(b"x")
        time.sleep(0.2)


@pytest.mark.parametrize("scheme, head", [
    ("http", b"HTTP/1.1 200 OK\r\nx: "),
    ("https", b"\x16\x03\x03\x3f\xff\x02\x00\x3f\xfb\x03\x03"),  # the beginning of a handshake
])
def test_a_host_that_drips(host, tmp_path, scheme, head):
    came = threading.Event()

    def behave(connection):
        came.set()
        drip(connection, head)

    process = start("secret", "vm-export=web", "backup_dir=%s" % tmp_path,
                    "host=%s://127.0.0.1:%d" % (scheme, host(behave)))
    assert came.wait(30)
    process.terminate()
    begin = time.monotonic()
    result = finish(process)
    assert result.status == 143, result
    assert time.monotonic() - begin < 50


def test_a_second_signal_ends_it_at_once(turn):
    here = turn(one_vm())
    process = calling(here, "VM.get_all_records")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    assert finish(process).status == 143  # what it was stopped by
    assert time.monotonic() - begin < 4


@pytest.mark.skipif(not shutil.which("timeout"), reason="there is no command timeout")
def test_the_command_timeout_sends_its_signal_twice(turn):
    """It sends one to its child, and at once another to the group: they are one stop."""
    here = turn(one_vm())
    run = exporting(here, command=["timeout", "8"])
    wait_until(lambda: "task.cancel" in here.sim.methods())
    here.sim.clear_faults()
    result = finish(run)
    assert result.status == 124, result
    here.assert_pool_is_clean()
    assert result.has("VmBackup ended")


def test_a_regular_expression_of_exponential_time(turn):
    pool = Pool()
    pool.vm("a" * 60, disks=[disk(MIB, seed=1)])
    here = turn(pool)
    here.configure("vm-export=(a+)+b")
    process = here.start()
    wait_until(lambda: "VM.get_all_records" in here.sim.methods())
    time.sleep(1)
    assert process.poll() is None
    process.terminate()
    begin = time.monotonic()
    assert finish(process).status == 143
    assert time.monotonic() - begin < 20
    here.assert_pool_is_clean()


def test_a_reader_of_the_log_that_does_not_read(turn):
    """The pipe of standard output is full, so whoever logs waits."""
    here = turn(one_vm())
    here.configure("vm-export=web")
    process = hasty(here, STOP_ENDS=2)
    write = os.open("/proc/%d/fd/1" % process.pid, os.O_WRONLY)
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 4096)
    except BlockingIOError:
        os.close(write)
    time.sleep(2)
    assert process.poll() is None
    process.terminate()
    assert process.wait(20) == 143
    process.communicate()


def test_an_export_that_does_not_move_is_given_up(turn):
    """vhd-tool loops for ever over some disks: the host answers, the task is pending."""
    here = turn(one_vm())
    here.configure("vm-export=web")
    silence = here.sim.fault("export_silence", vm="web", after=MIB, seconds=3600)
    process = hasty(here, SILENCE=0.5, STALLED=2)
    wait_until(lambda: "task.cancel" in here.sim.methods())
    here.sim.clear_faults(silence)
    result = finish(process)
    assert result.status == 2, result
    assert result.has("the export is not whole: for 2 s neither a byte came nor the task moved on")
    here.assert_pool_is_clean()


def test_the_rate_that_all_exports_share(turn):
    pool = Pool()
    for vm in ("web", "db"):
        pool.vm(vm, disks=[disk(8 * MIB, seed=vm)])
    here = turn(pool)
    here.configure("vm-export=web", "vm-export=db", "parallel=2", "rate_limit=4")
    begin = time.monotonic()
    assert here.run().status == 0
    assert time.monotonic() - begin > 16 * MIB / 4e6 - 0.3
    assert vmbackup("secret", here.config, "rate_limit=-1").status == 3
