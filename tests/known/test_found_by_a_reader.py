# SPDX-License-Identifier: GPL-3.0-or-later
"""What a last reading found."""
import json
import signal
import socket

import pytest
from simulator.pool import MIB, Pool, disk
from support.harness import finish, vmbackup
from support.world import one_vm, wait_until


@pytest.mark.parametrize("words", [
    ("list", "S3cret", "CONFIG"), ("check", "S3cret", "CONFIG"), ("verify", "S3cret", "CONFIG"),
    ("restore", "FOLDER", "S3cret"), ("restore", "web.xva", "S3cret"),
    ("pw", "CONFIG", "smtp_password=S3cret"), ("-", "create-password-file=x", "S3cret")])
def test_a_password_in_the_wrong_place_is_not_shown(turn, tmp_path, words):
    here = turn(one_vm(MIB))
    here.configure("vm-export=web")
    places = {"CONFIG": str(here.config), "FOLDER": str(here.backups)}
    result = vmbackup(*[places.get(word, word) for word in words], cwd=str(tmp_path), input=b"pw")
    assert result.status == 3, result
    assert result.out and "S3cret" not in result.out + result.err


def test_reports_do_not_wait_for_a_mail_server(turn):
    """It takes the connection, and never says a word."""
    here = turn(one_vm(MIB))
    report, metrics = here.path / "report.json", here.path / "vmbackup.prom"
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        here.configure("vm-export=web", "report_json=%s" % report, "metrics_file=%s" % metrics,
                       "mail_to=a@b", "mail_from=c@d",
                       "smtp_server=127.0.0.1:%d" % server.getsockname()[1])
        process = here.start()
        wait_until(lambda: report.exists() and metrics.exists())
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        server.accept()[0].close()
        result = finish(process)
    assert json.loads(report.read_text("utf-8"))["vms"][0]["status"] == "SUCCESS"
    assert result.has("the mail could not be sent")


def test_a_probe_that_cannot_go_does_not_keep_the_others(turn):
    here = turn(one_vm(MIB))
    here.configure("vm-export=web")
    host = socket.gethostname().split(".")[0]
    for pid in ("4999998", "4999999"):
        (here.backups / (".vmbackup-probe-%s-%s" % (host, pid))).mkdir()
    (here.backups / (".vmbackup-probe-%s-4999998" % host) / "notes.txt").write_text("a user's")
    assert here.run().status == 0
    left = [path.name for path in here.backups.iterdir() if "probe" in path.name]
    assert left == [".vmbackup-probe-%s-4999998" % host]


def test_one_mistake_about_mail_is_one_line(turn):
    here = turn(one_vm(MIB))
    here.configure("vm-export=web", "mail_to=a@b", "mail_from=c@d", "smtp_server=a b")
    result = here.run()
    assert result.status == 3, result
    assert len([line for line in result.lines if "ERROR" in line and "smtp_server" in line]) == 1


def test_as_many_retries_as_there_are_failures(turn):
    here = turn(one_vm(MIB))
    here.configure("vm-export=web", "retries=1000000000")
    result = here.run()
    assert result.status == 0, result


def test_a_second_backup_of_a_day(turn):
    """Where the pattern tells the day alone, it bears the next day's name."""
    pool = Pool()
    pool.vm("web", disks=[disk(MIB, seed=1)])
    here = turn(pool)
    here.configure("vm-export=web", "backup_dir_pattern=%Y-%m-%d")
    assert here.run().status == 0
    assert here.run().status == 0
    assert len(here.folders("web")) == 2
