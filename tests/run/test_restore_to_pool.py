# SPDX-License-Identifier: GPL-3.0-or-later
"""restore: a backup's way back to a pool, judged by the simulator's disks and records."""
import contextlib
import hashlib
import json
import os
import re
import shutil

import pytest
from simulator.pool import MIB, Pool, disk
from support.harness import finish, start, vmbackup
from support.restores import MAC, VM, Here, a_pool


@pytest.fixture
def here(turn):
    return Here(turn(a_pool()))


@pytest.mark.parametrize("compress", ["False", "gzip", "zstd"])
def test_a_vm_comes_back_beside_the_original(here, compress):
    if compress == "zstd" and not shutil.which("zstd"):
        pytest.skip("no zstd here")
    here.back_up("vm-export=" + VM, "compress=" + compress)
    date = here.folder.name[7:17]
    result = here.restore()
    assert result.status == 0, result
    ref, vm = here.the_vm()
    assert vm["name_label"] == "%s-restored-%s" % (VM, date)
    assert re.search(r"restored: %s uuid=%s t:0$" % (vm["name_label"], vm["uuid"]), result.out,
                     re.M)
    assert "restored from %s by vmbackup" % here.folder.name in vm["name_description"]
    assert "Größe & <Art>" in vm["name_description"]
    assert (vm["power_state"], vm["is_a_template"], vm["is_a_snapshot"]) == ("Halted", False, False)
    assert (vm["ha_restart_priority"], vm["ha_always_run"]) == ("", False)
    assert "auto_poweron" not in vm["other_config"]
    assert "vmbackup" not in vm["other_config"]
    assert result.has("NOTE - %s is on the pool" % VM)
    assert result.has("sha256")
    assert MAC not in [one["MAC"] for one in here.new("VIF").values()]
    assert here.new("network") == {}
    assert {one["SR"] for one in here.new("VDI").values()} == {here.sim.ref("SR", "Storage")}
    here.assert_untouched()
    here.assert_clean()


def test_without_the_original_it_has_its_name_and_keeps_what_starts_it(here):
    here.back_up()
    here.sim.delete_vm(VM)
    here.remember()
    result = here.restore()
    assert result.status == 0, result
    ((_, vm),) = here.new("VM").items()
    assert vm["name_label"] == VM
    assert vm["ha_restart_priority"] == ""  # the snapshot lost it before the export
    assert vm["other_config"]["auto_poweron"] == "true"
    assert vm["power_state"] == "Halted"
    here.assert_untouched()


def test_names_that_are_taken(here):
    here.back_up()
    date = here.folder.name[7:17]
    for number in ("", "-2", "-3"):
        assert here.restore().status == 0
        assert "%s-restored-%s%s" % (VM, date, number) in [
            one["name_label"] for one in here.new("VM").values()]
    result = here.restore("as=other")
    assert result.status == 3, result
    result = here.restore("as=Brand neu")
    assert result.status == 0
    assert "Brand neu" in [one["name_label"] for one in here.new("VM").values()]
    here.assert_untouched()


@pytest.mark.parametrize("how", ["folder", "file", "copy"])
def test_from_a_folder_or_a_file(here, how, tmp_path):
    here.back_up()
    source = {"folder": here.folder, "file": here.file}.get(how)
    if how == "copy":
        source = tmp_path / "whatever.xva"
        shutil.copy(str(here.file), str(source))
    result = here.restore(source=source)
    assert result.status == 0, result
    assert result.has("NOT sha256") == (how == "copy")
    _, vm = here.the_vm()
    assert vm["name_label"].startswith(VM + "-restored-")
    here.assert_untouched()
    here.assert_clean()


def test_a_chosen_backup_and_storage(here):
    here.back_up()
    here.site.run()
    first, second = here.site.folders(VM)
    result = here.restore("backup=" + first.name, "sr=Thick")
    assert result.status == 0, result
    assert first.name in here.the_vm()[1]["name_description"]
    assert {one["SR"] for one in here.new("VDI").values()} == {here.sim.ref("SR", "Thick")}
    result = here.restore("backup=nonsense")
    assert result.status == 3, result
    uuid = here.sim.record("SR", "Elsewhere")["uuid"]
    here.remember()
    assert here.restore("sr=" + uuid).status == 0
    assert {one["SR"] for one in here.new("VDI").values()} == {here.sim.ref("SR", "Elsewhere")}


@pytest.mark.parametrize("words, text", [
    (["sr=ISOs"], "Thick"), (["sr=nonsense"], "free"), (["nonsense=1"], "nonsense"),
    (["preserve=perhaps"], "preserve"), (["as=other"], "as=other"), (["backup=x"], "such backup")])
def test_what_is_refused_before_anything_is_sent(here, words, text):
    here.back_up()
    here.sim.reset_calls()
    result = here.restore(*words)
    assert result.status == 3, result
    assert result.has(text)
    assert "PUT /import" not in here.sim.methods()
    assert "task.create" not in here.sim.methods()
    here.assert_nothing_new()


def test_unknown_names_and_sources(here, tmp_path):
    here.back_up()
    for words in ([here.site.config, "nobody"], [here.site.config], [tmp_path / "not there"],
                  [here.site.backups / VM], [here.folder, "a name"]):
        result = vmbackup("restore", here.sim.password, *words, "host=" + here.sim.url)
        assert result.status == 3, result
    assert vmbackup("restore", "wrong", here.folder, "host=" + here.sim.url).status == 3
    here.assert_nothing_new()


def test_preview_changes_nothing(here):
    here.back_up()
    here.sim.set("network", here.sim.ref("network", "DMZ"), "name_label", "other")
    here.sim.set("network", here.sim.ref("network", "other"), "bridge", "xenbr9")
    here.remember()
    here.sim.reset_calls()
    before = sorted(str(path) for path in here.site.backups.rglob("*"))
    result = here.restore("preview", "sr=Thick")
    assert result.status == 0, result
    assert result.has("DMZ")
    assert result.has("Thick")
    assert result.has("60.0 MiB free")
    assert not result.has("restored:")
    assert not [name for name in here.sim.methods() if ".get_" not in name
                and not name.startswith("session.")]
    assert sorted(str(path) for path in here.site.backups.rglob("*")) == before
    here.assert_nothing_new()


def test_an_archive_of_a_newer_xapi(here):
    here.sim.setting(archive_version="99.1")
    here.back_up()
    for words in (["preview"], []):
        result = here.restore(*words)
        assert result.status == 3, result
        assert result.has("newer")
    here.assert_nothing_new()


def test_preserve_only_where_it_touches_nothing(here):
    here.back_up()
    result = here.restore("preserve=True")
    assert result.status == 3, result
    assert result.has("preserve")
    here.assert_nothing_new()
    here.sim.delete_vm(VM)
    here.remember()
    result = here.restore("preserve=True")
    assert result.status == 0, result
    assert MAC in [one["MAC"] for one in here.new("VIF").values()]
    ((_, vm),) = here.new("VM").items()
    assert vm["name_label"] == VM
    result = here.restore("preserve=True")  # now a copy is there
    assert result.status == 3, result


def test_over_clear_text_to_this_machine_and_over_the_socket(here):
    here.back_up()
    result = here.restore("host=" + here.sim.http)
    assert result.status == 0, result
    here.the_vm()
    here.remember()
    result = vmbackup("restore", "local", here.site.config, VM, "host=" + here.sim.socket)
    assert result.status == 0, result
    here.the_vm()
    here.assert_clean()


def test_to_a_storage_that_only_a_slave_sees(site):
    here = Here(site(a_pool(hosts=2)))
    here.back_up()
    result = here.restore("sr=Elsewhere")
    assert result.status == 0, result
    here.the_vm()
    put = [call for call in here.sim.calls() if call["method"] == "PUT /import"]
    assert [call["host"] for call in put] == [0, 1]  # the master leads there
    here.remember()
    here.sim.fault("export_302", path="/import", times=1, to=1)  # wherever it leads
    result = here.restore("sr=Storage")
    assert result.status == 0, result
    here.the_vm()
    result = vmbackup("restore", here.sim.password, here.site.config, VM,
                      "host=" + here.sim.hosts[1]["url"])  # asked at the slave
    assert result.status == 0, result
    here.assert_clean()


def test_a_vm_goes_to_the_default_storage_and_a_disk_to_that_of_the_original(turn):
    pool = Pool()
    pool.sr("Fast")
    pool.vm(VM, disks=[disk(2 * MIB, "root", seed=1, sr="Fast")])
    here = Here(turn(pool))
    for line, sr in (("vm-export=" + VM, "Storage"), ("vdi-export=" + VM, "Fast")):
        here.back_up(line, "max_backups=1")
        result = here.restore()
        assert result.status == 0, result
        assert {one["SR"] for one in here.new("VDI").values()} == {here.sim.ref("SR", sr)}


def test_a_vm_without_disks_and_one_that_is_small(turn):
    pool = Pool()
    pool.vm(VM)
    here = Here(turn(pool)).back_up()
    result = here.restore()
    assert result.status == 0, result
    here.the_vm()


@pytest.mark.parametrize("kind", ["raw", "vhd"])
def test_a_disk(here, kind):
    here.back_up("vdi-export=" + VM, "vdi_export_format=" + kind)
    for source in (None, here.folder):
        here.remember()
        result = here.restore(source=source)
        assert result.status == 0, result
        assert here.new("VM") == here.new("VBD") == {}
        ((ref, vdi),) = here.new("VDI").items()
        (original,) = [one for _, one in here.sim.disks_of(VM) if one["name_label"] == "root"]
        assert here.sim.disk_sha256(ref) == here.sim.disk_sha256(original["uuid"])
        assert vdi["virtual_size"] == original["virtual_size"]
        assert vdi["name_label"].startswith("%s-restored-%s" % (VM, here.folder.name[7:17]))
        assert vdi["SR"] == original["SR"]
        assert len([line for line in result.lines if " xe " in line]) == 3
        assert result.has("vdi-uuid=%s" % vdi["uuid"])
        here.assert_untouched()
        here.assert_clean()


@pytest.mark.parametrize("size", [3 * MIB + 512, 512, 700 * 1024])
def test_disks_of_odd_sizes(turn, size):
    pool = Pool()
    pool.vm(VM, disks=[disk(size, "root", seed=3)])
    here = Here(turn(pool)).back_up("vdi-export=" + VM)
    result = here.restore()
    assert result.status == 0, result
    ((_, vdi),) = here.new("VDI").items()
    assert here.sum_of(vdi, size) == hashlib.sha256(here.file.read_bytes()).hexdigest()


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit in front": lambda path: flip(path, 2 * MIB),
    "a bit at the end": lambda path: flip(path, -700000),
    "the last byte": lambda path: flip(path, -1),
    "cut": lambda path: os.truncate(str(path), path.stat().st_size - 3000),
    "half": lambda path: os.truncate(str(path), path.stat().st_size // 2),
    "empty": lambda path: os.truncate(str(path), 0),
    "the very front": lambda path: flip(path, 3),
    "zeros behind": lambda path: os.truncate(str(path), path.stat().st_size + 9 * MIB),
}


@pytest.mark.newest
@pytest.mark.parametrize("lone", [False, True])
@pytest.mark.parametrize("line", ["vm-export", "gzip", "raw", "vhd"])
@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_damaged_export_is_never_imported(here, damage, line, lone, tmp_path):
    if line in ("raw", "vhd"):
        here.back_up("vdi-export=" + VM, "vdi_export_format=" + line)
    else:
        here.back_up("vm-export=" + VM, "compress=" + {"gzip": "gzip"}.get(line, "False"))
    path = here.file
    if lone:
        path = tmp_path / here.file.name
        shutil.copy(str(here.file), str(path))
    DAMAGES[damage](path)
    result = here.restore(source=path if lone else None)
    if lone and line in ("raw", "vhd") and damage != "empty" and not (
            line == "vhd" and damage in ("cut", "half", "the last byte", "the very front")):
        return  # nothing tells
    if lone and damage == "the very front" and line == "gzip":
        return  # a flag that means nothing
    assert result.status == 2, result
    assert not result.has("restored:")
    assert not result.has("took the import for whole")
    here.assert_nothing_new()


def test_sums_that_do_not_name_the_export(here):
    here.back_up()
    (here.folder / "SHA256SUMS").write_text("0" * 64 + "  other\n")
    result = here.restore()
    assert result.status == 2, result
    here.assert_nothing_new()
    (here.folder / "SHA256SUMS").unlink()
    result = here.restore()
    assert result.status == 0, result
    assert result.has("NOT sha256")


def test_the_host_may_stop_reading_and_break_off_when_it_has_all(here):
    here.back_up()
    with open(str(here.file), "ab") as file:
        file.write(bytes(MIB - 4096))
    here.make_old()
    here.sim.fault("import_slow_end", seconds=2)
    result = here.restore("host=" + here.sim.http)
    assert result.status == 0, result
    here.the_vm()


def test_a_snapshot_of_a_template_comes_back_as_a_vm(here):
    here.back_up()
    archive = here.file.read_bytes()
    flag = b"<name>is_a_template</name><value><boolean>%d</boolean></value>"
    assert flag % 0 in archive
    here.file.write_bytes(archive.replace(flag % 0, flag % 1))
    here.make_old()
    assert here.restore().status == 0
    assert here.the_vm()[1]["is_a_template"] is False


def test_the_rate_is_limited(here):
    here.back_up()
    result = here.restore("rate_limit=10")
    assert result.status == 0, result
    times = [call["time"] for call in here.sim.calls()]
    put = next(call["time"] for call in here.sim.calls() if call["method"] == "PUT /import")
    assert times[-1] - put > 1.5


def test_the_note_is_there_and_locked_while_it_is_sent(here):
    here.back_up()
    here.sim.fault("export_silence", path="/import", after=4 * MIB, seconds=3)
    process = start("restore", here.sim.password, here.site.config, VM)
    note = None
    while note is None:
        with contextlib.suppress(StopIteration):
            note = next(here.site.backups.glob(".restore-*.json"))
    while True:
        with contextlib.suppress(ValueError):
            facts = json.loads(note.read_text())
            break
    assert note.stat().st_mode & 0o777 == 0o600
    (pool,) = here.sim.records("pool").values()
    assert facts["pool"] == pool["uuid"]
    assert facts["task"] in here.sim.tasks()
    assert here.sim.tasks()[facts["task"]]["uuid"] in note.name
    assert (here.site.backups / (".%s.read.lock" % VM)).exists()
    second = here.restore()  # leaves the first one alone
    assert second.status == 0, second
    assert not second.has("clearing")
    assert finish(process).status == 0
    assert len(here.new("VM")) == 2
    here.assert_clean()
