# SPDX-License-Identifier: GPL-3.0-or-later
"""What an adversary found in restore and extract."""
import json
import os
import re
import select
import signal
import socket

import pytest
import XenAPI
from simulator.pool import MIB, Pool, disk, vif
from support.harness import finish, start, vmbackup
from support.relay import Relay, address_of
from support.restores import VM, Here
from support.world import wait_until


@pytest.fixture
def here(turn):
    pool = Pool()
    pool.vm(VM, vifs=[vif()], disks=[disk(20 * MIB, "root", seed=1)])
    return Here(turn(pool))


class Leading(Relay):
    """Answers the first PUT with a redirect, and closes at once. `early`: bytes of a body that came
    before the answer did: for those TCP resets the connection, and the answer may be lost."""

    def __init__(self, sim):
        self.to, self.place, self.early = address_of(sim), sim.http, None
        super().__init__()

    def serve(self, client, _number):
        head = client.recv(65536, socket.MSG_PEEK)
        if not head.startswith(b"PUT") or self.early is not None:
            self.pass_on(client, socket.create_connection(self.to))
            return
        client.recv(head.index(b"\r\n\r\n") + 4)
        waits = select.select([client], [], [], 1)[0]
        self.early = len(client.recv(65536)) if waits else 0
        path = head.split()[1].decode("ascii")
        client.sendall(("HTTP/1.1 302 Found\r\nLocation: %s%s\r\nConnection: close\r\n\r\n"
                        % (self.place, path)).encode("ascii"))
        client.close()


def test_no_byte_of_the_archive_goes_out_before_the_answer(here):
    here.back_up()
    with Leading(here.sim) as way:
        result = here.restore("host=" + way.url)
    assert result.status == 0, result
    assert way.early == 0
    here.the_vm()
    here.assert_clean()


@pytest.mark.parametrize("sums", ["", "\n"])
@pytest.mark.parametrize("line", ["vm-export", "vdi-export"])
def test_sums_that_were_emptied_vouch_for_nothing(here, line, sums):
    here.back_up("%s=%s" % (line, VM))
    data = bytearray(here.file.read_bytes())
    if line == "vdi-export":  # no other proof finds it
        data[MIB] ^= 1
        here.file.write_bytes(data)
    (here.folder / "SHA256SUMS").write_text(sums)
    result = here.restore()
    assert result.status == 2, result
    assert result.has("SHA256SUMS does not list")
    here.assert_nothing_new()
    if line == "vm-export":
        to = here.site.path / "out"
        to.mkdir()
        result = vmbackup("extract", here.folder, "to=%s" % to)
        assert result.status == 2, result
        assert os.listdir(str(to)) == []


@pytest.mark.parametrize("method", ["PBD.get_all_records", "task.create", "VM.set_name_label"])
def test_a_stop_while_the_host_hangs_is_told_as_one(here, method):
    here.back_up()
    here.sim.reset_calls()
    here.sim.fault("rpc_hang", method=method, times=1)
    process = start("restore", here.sim.password, here.site.config, VM)
    wait_until(lambda: method in here.sim.methods())
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert result.status == 128 + signal.SIGTERM, result
    here.sim.clear_faults()
    here.assert_untouched()


def test_an_archive_with_much_behind_its_end_is_not_sent(here):
    """XAPI reads no further than the last chunk: it would have imported it."""
    here.back_up()
    here.make_old()
    os.truncate(str(here.file), here.file.stat().st_size + 120 * MIB)
    result = here.restore()
    assert result.status == 2, result
    assert result.has("is damaged, it was not imported")
    here.assert_nothing_new()
    assert not [call for call in here.sim.calls() if call["method"].startswith("PUT")]


@pytest.mark.parametrize("field", ["other_config", "name_label", "uuid", "bridge"])
def test_a_damaged_ova_xml_is_a_damaged_archive(here, field):
    here.back_up()
    data, name = here.file.read_bytes(), b"<name>%s</name>" % field.encode()
    assert name in data
    here.file.write_bytes(data.replace(name, name.upper().replace(b"NAME>", b"name>")))
    result = here.restore()
    assert result.status == 2, result
    assert not result.has("internal error")
    here.assert_nothing_new()


def test_the_note_of_a_disk_that_the_host_may_still_make_stays(here):
    here.back_up("vdi-export=" + VM)
    here.sim.fault("rpc_hang", method="VDI.create", times=1)
    process = start("restore", here.sim.password, here.site.config, VM)
    wait_until(lambda: "Async.VDI.create" in here.sim.methods())
    process.kill()
    process.wait()
    (note,) = here.site.backups.glob(".restore-*.json")
    session = XenAPI.Session(here.sim.http)
    session.login_with_password("root", here.sim.password)
    task = session.xenapi.task.create("Async.VDI.create", "")  # as the host's own is called
    assert here.restore("as=zwei").has("the next restore tries it")
    assert note.exists()
    session.xenapi.task.destroy(task)
    session.logout()
    here.sim.clear_faults()
    assert here.restore("as=drei").status == 0
    assert not note.exists()


def test_a_name_that_was_taken_meanwhile(here):
    here.back_up()
    here.sim.fault("import_slow_end", seconds=3)
    process = start("restore", here.sim.password, here.site.config, VM, "as=neu")
    wait_until(lambda: here.new("VM"))
    here.sim.add_vm({"name": "neu", "disks": []})
    result = finish(process)
    assert result.status == 0, result
    assert result.has("restored: neu-2 uuid=")


@pytest.mark.parametrize("backup", ["notes.txt", "../other/backup-2026-11-23-(02:00:00)"])
def test_what_is_no_backup_of_the_vm(here, backup):
    here.back_up()
    (here.folder.parent / "notes.txt").write_text("")
    result = here.restore("backup=" + backup)
    assert result.status == 3, result
    assert not result.has("internal error")


def test_a_name_that_no_vm_can_bear_is_refused_at_once(here):
    here.back_up()
    here.sim.reset_calls()
    result = here.restore("as=a\ab")
    assert result.status == 3, result
    assert not here.sim.methods()


def test_the_hint_of_a_lone_image_names_it(here):
    here.back_up("vdi-export=" + VM)
    result = vmbackup("extract", here.file.name, cwd=str(here.folder))
    assert result.status == 0, result
    (path,) = re.findall("-O qcow2 ('[^']*'|[^ ]+)", result.out)
    assert path.strip("'") == str(here.file)
    assert json.loads(vmbackup("list", here.site.config, "json").out)


def test_a_description_longer_than_64_kib(turn):
    """vm.cfg holds it, and must be read all the same: it tells whose backup this is."""
    pool = Pool()
    pool.vm(VM, description="x" * 70000, disks=[disk(MIB, "root", seed=1)])
    here = Here(turn(pool)).back_up()
    here.sim.set("VM", VM, "name_label", "another")
    result = here.restore()
    assert result.status == 0, result
    assert result.has("NOTE - another is on the pool")
