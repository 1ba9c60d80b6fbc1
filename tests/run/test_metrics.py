# SPDX-License-Identifier: GPL-3.0-or-later
"""metrics_file: what node_exporter's textfile collector gets, read by a strict parser."""
import os
import stat
import time

from simulator.pool import MIB, Pool, disk
from support.harness import finish, vmbackup
from support.prometheus import read_metrics
from support.world import old_backup, wait_until

import vmbackup as program

OF_VMS = ("last_success_timestamp_seconds", "last_status", "last_size_bytes",
          "last_duration_seconds", "backups")


def a_pool(*names):
    pool = Pool()
    for name in names or ("web", "db"):
        pool.vm(name, power_state="Running", disks=[disk(MIB, seed=name)])
    return pool


def configure(here, *lines):
    here.configure("metrics_file=%s/vmbackup.prom" % here.path, *lines)


def metrics(here, config="weekend"):
    """{name without vmbackup_, or (that, vm): number} of one config file's series."""
    told = {}
    for (name, labels), number in read_metrics((here.path / "vmbackup.prom").read_bytes()).items():
        labels = dict(labels)
        if labels.pop("config") == config:
            key = name[len("vmbackup_"):]
            told[(key, labels["vm"]) if "vm" in labels else key] = number
            assert set(labels) <= ({"version"} if key == "info" else {"vm"})
    return told


def vms_in(told):
    return {key[1] for key in told if isinstance(key, tuple)}


def test_metrics_of_a_run(turn):
    here = turn(a_pool())
    old_backup(here, "db", 1)
    here.sim.fault("snapshot_error", vm="db")
    configure(here, "vm-export=.*")
    begin = int(time.time())
    assert here.run().status == 2
    file, told = here.path / "vmbackup.prom", metrics(here)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    (folder,) = here.folders("web")
    assert begin <= told["last_success_timestamp_seconds", "web"] <= time.time()
    assert told["last_size_bytes", "web"] == (folder / "web.xva").stat().st_size
    assert 0 < told["last_duration_seconds", "web"] < 60
    assert (told["last_status", "web"], told["backups", "web"]) == (0, 1)
    # Of the one that failed, what the disk tells.
    assert told["last_success_timestamp_seconds", "db"] == 1577844000  # 2020-01-01 02:00 UTC
    assert told["last_size_bytes", "db"] == (here.folders("db")[0] / "db.xva").stat().st_size
    assert (told["last_status", "db"], told["backups", "db"]) == (2, 1)
    assert ("last_duration_seconds", "db") not in told
    assert begin <= told["run_end_timestamp_seconds"] <= time.time()
    assert told["run_exit_status"] == 2
    usage = os.statvfs(str(here.backups))
    assert abs(told["free_bytes"] - usage.f_bavail * usage.f_frsize) < 1 << 30
    assert ('vmbackup_info{config="weekend",version="%s"} 1\n' % program.__version__
            in file.read_text(encoding="utf-8"))
    assert sorted(item.name for item in here.path.iterdir() if item.is_file()) == [
        "status.log", "vmbackup.prom", "weekend.cfg"]


def test_one_that_failed_keeps_its_last_success(turn):
    here = turn(a_pool())
    configure(here, "vm-export=.*")
    assert here.run().status == 0
    before = metrics(here)
    here.sim.fault("export_fail", vm="web")
    assert here.run().status == 2
    after = metrics(here)
    for key in OF_VMS:
        same = before[key, "web"] == after[key, "web"]
        assert same == (key != "last_status"), key
    assert after["last_status", "web"] == 2
    assert after["backups", "db"] == 2


def test_a_warning_is_status_1(turn):
    here = turn(a_pool("web"))
    here.sim.fault("vm_destroy_error", vm="web")
    configure(here, "vm-export=web")
    assert here.run().status == 1
    told = metrics(here)
    assert (told["last_status", "web"], told["run_exit_status"]) == (1, 1)


def test_series_of_a_vm_that_is_gone_go_and_those_that_only_left_out_stay(turn):
    here = turn(a_pool("web", "db", "old"))
    configure(here, "vm-export=.*")
    assert here.run().status == 0
    before = metrics(here)
    assert vms_in(before) == {"web", "db", "old"}
    here.sim.load(a_pool("web", "db"))
    assert here.run("only=web").status == 0
    after = metrics(here)
    assert vms_in(after) == {"web", "db"}
    assert {key: after[key] for key in after if "db" in key} == {
        key: before[key] for key in before if "db" in key}
    assert (after["backups", "web"], after["backups", "db"]) == (2, 1)
    configure(here, "vm-export=.*", "exclude=db")
    assert here.run().status == 0
    assert vms_in(metrics(here)) == {"web"}, "no rule chooses db any more"


def test_a_run_that_could_not_choose_keeps_the_vms_and_renews_the_rest(turn):
    here = turn(a_pool())
    configure(here, "vm-export=.*")
    assert here.run().status == 0
    before = metrics(here)
    here.sim.fault("login_error", error_info=["HOST_STILL_BOOTING"])
    time.sleep(1)
    assert here.run().status == 3
    after = metrics(here)
    assert after["run_exit_status"] == 3
    assert after["run_end_timestamp_seconds"] > before["run_end_timestamp_seconds"]
    assert {key: value for key, value in after.items() if isinstance(key, tuple)} == {
        key: value for key, value in before.items() if isinstance(key, tuple)}


def test_two_config_files_do_not_collide_even_in_one_file(turn):
    here = turn(a_pool())
    configure(here, "vm-export=web")
    assert here.run().status == 0
    before, here.config = metrics(here), here.path / "night.ly.conf"
    configure(here, "vm-export=web", "vm-export=db")
    assert here.run().status == 0
    assert metrics(here) == before
    assert vms_in(metrics(here, "night.ly")) == {"web", "db"}


def test_without_a_config_file_the_label_says_none(turn):
    here = turn(a_pool("web"))
    result = vmbackup(here.sim.password, "web", "host=" + here.sim.url,
                      "backup_dir=%s" % here.backups, "metrics_file=%s/vmbackup.prom" % here.path)
    assert result.status == 0, result
    assert vms_in(metrics(here, "none")) == {"web"}


HOSTILE = ['a"b', "back\\slash", "two\nlines", '"} 1', "Büro 東京 🐘", "\\n", "{a}",
           "\u2028", "tab\t", 'x",vm="web']


def test_hostile_names_are_labels_and_stay_so_from_run_to_run(turn):
    here = turn(a_pool("web", *HOSTILE))
    here.config = here.path / 'a "b\\" ü.cfg'
    configure(here, "vm-export=.*")
    assert here.run().status == 0
    before = metrics(here, 'a "b\\" ü')
    assert vms_in(before) == {"web"} | set(HOSTILE)
    assert here.run("only=web").status == 0
    after = metrics(here, 'a "b\\" ü')
    assert vms_in(after) == vms_in(before)
    assert [key for key in after if isinstance(key, tuple) and after[key] != before[key]
            and key[1] != "web"] == []


def test_backups_that_somebody_deleted_are_no_success_any_more(turn):
    here = turn(a_pool("web"))
    configure(here, "vm-export=web")
    assert here.run().status == 0
    (folder,) = here.folders("web")
    (folder / "success").unlink()
    here.sim.fault("snapshot_error")
    assert here.run().status == 2
    told = metrics(here)
    assert told["backups", "web"] == 0
    assert ("last_success_timestamp_seconds", "web") not in told


def test_preview_writes_no_report_of_any_kind(turn):
    here = turn(a_pool())
    configure(here, "vm-export=.*", "report_json=%s/report.json" % here.path)
    assert here.run("preview").status == 0
    assert sorted(item.name for item in here.path.iterdir()) == ["backups", "weekend.cfg"]


def test_metrics_that_cannot_be_written_are_a_warning_of_the_run(turn):
    here = turn(a_pool("web"))
    folder = here.path / "collector"
    folder.mkdir()
    here.configure("vm-export=web", "report_json=%s/report.json" % here.path,
                   "metrics_file=%s/vmbackup.prom" % folder)
    here.sim.fault("export_silence", vm="web", after=4096, seconds=3600)
    process = here.start()
    wait_until(lambda: any(call["method"] == "GET /export" for call in here.sim.calls()))
    folder.rmdir()
    here.sim.clear_faults()
    result = finish(process)
    assert result.status == 1, result
    assert result.has("***WARNING - metrics_file cannot be written: ")
    assert '"exit_status": 1' in (here.path / "report.json").read_text(encoding="utf-8")
