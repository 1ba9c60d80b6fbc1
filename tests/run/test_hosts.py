# SPDX-License-Identifier: GPL-3.0-or-later
"""host=a,b,c: the first that answers and is trusted, by way of a slave too; or one clear line."""
import json

import pytest
from simulator.pool import MIB, Pool, disk
from support.harness import vmbackup
from support.world import WRONG, refused_port

LOGIN = "session.login_with_password"


@pytest.fixture
def here(site):
    pool = Pool(hosts=2, password="open sesame")
    pool.vm("web", disks=[disk(MIB, seed=1)])
    made = site(pool)
    made.report = made.path / "report.json"
    made.configure("vm-export=web", "report_json=%s" % made.report)
    return made


def told(here):
    return json.loads(here.report.read_text(encoding="utf-8"))


def logins(here):
    """The members at which a login was tried, in order, with its outcome."""
    return [(call["host"], call["outcome"]) for call in here.sim.calls() if call["method"] == LOGIN]


def test_the_first_is_down_and_the_second_answers(here):
    dead = "127.0.0.1:%d" % refused_port()
    result = here.run("host=%s, %s" % (dead, here.sim.url))
    assert result.status == 0, result
    assert logins(here) == [(0, "Success")]
    assert told(here)["host"] == here.sim.url[len("https://"):]
    here.assert_pool_is_clean()


def test_the_first_answers_and_the_second_is_not_asked(here):
    assert here.run("host=%s,127.0.0.1:%d" % (here.sim.url, refused_port())).status == 0


@pytest.mark.parametrize("first", [
    ("host_still_booting", {}), ("rpc_http", {"method": LOGIN}), ("rpc_drop", {"method": LOGIN}),
    ("login_error", {"error_info": ["INTERNAL_ERROR", "x"]}),
])
def test_the_first_answers_wrongly_and_the_second_leads_to_the_master(here, first):
    """Another session there may last: the slave names the master, which is well again."""
    here.sim.fault(first[0], host=0, times=1, **first[1])
    result = here.run("host=%s,%s" % (here.sim.url, here.sim.hosts[1]["url"]))
    assert result.status == 0, result
    assert [host for host, _ in logins(here)][-2:] == [1, 0]
    here.assert_pool_is_clean()


def test_a_slave_first_and_a_dead_host_behind_it(here):
    dead = "127.0.0.1:%d" % refused_port()
    result = here.run("host=%s,%s" % (here.sim.hosts[1]["url"], dead))
    assert result.status == 0, result
    assert logins(here) == [(1, "HOST_IS_SLAVE"), (0, "Success")]
    assert result.has("is not the pool master, going on to ")
    assert told(here)["host"] == here.sim.url[len("https://"):]
    assert here.folders("web")


def test_a_slave_whose_master_is_down_is_passed_over(here):
    here.sim.fault("host_down", member=0)
    result = here.run("host=%s" % here.sim.hosts[1]["url"])
    assert result.status == 3, result
    assert [line for line in result.lines if "ERROR" in line] == [result.lines[-1]]
    assert result.has("ERROR - no login: ")


def test_the_first_is_not_trusted_and_gets_no_password(here):
    """Only the second's certificate is known; it is a slave: the master is asked, and refused."""
    second = here.sim.hosts[1]
    result = here.run("host=%s,%s" % (here.sim.url, second["url"]),
                      "tls_fingerprint=" + second["fingerprint"])
    assert result.status == 3, result
    assert [host for host, _ in logins(here)] == [1]
    assert result.has("is not trusted: its SHA-256 fingerprint is " + here.sim.fingerprint)


def test_the_first_is_not_trusted_and_the_second_is_taken(here):
    here.sim.fault("master_moves", to=1)
    second = here.sim.hosts[1]
    result = here.run("host=%s,%s" % (here.sim.url, second["url"]),
                      "tls_fingerprint=" + second["fingerprint"])
    assert result.status == 0, result
    assert logins(here) == [(1, "Success")]


def test_a_wrong_password_is_tried_at_one_host_only(here):
    """It is wrong at every host of the pool, and an account may be locked after a few."""
    result = vmbackup("swordfish", here.config, "host=%s,%s" % (here.sim.url, here.sim.url))
    assert result.status == 3, result
    assert logins(here) == [(0, "SESSION_AUTHENTICATION_FAILED")]


def test_none_answers(here):
    dead = ["127.0.0.1:%d" % refused_port(), "[::1]:%d" % refused_port()]
    result = here.run("host=%s" % ",".join(dead + [here.sim.url]), "tls_fingerprint=" + WRONG)
    assert result.status == 3, result
    errors = [line for line in result.lines if "ERROR" in line]
    assert errors == [result.lines[-1]]
    assert errors[0].startswith("ERROR - no login: ")
    for host in dead:
        assert "%s: " % host in errors[0], errors
    assert "is not trusted" in errors[0]
    report = told(here)
    assert (report["status"], report["exit_status"], report["vms"]) == ("ERROR", 3, [])
    assert report["error"] == errors[0]
    assert all(host in report["host"] for host in dead)
    assert not here.folders("web", marked=False)


@pytest.mark.parametrize("lines, words, reason", [
    ([], ["backup_dir=/nonexistent"], "backup_dir does not exist: /nonexistent"),
    (["backup_dir=/nonexistent"], [], "backup_dir does not exist: /nonexistent"),
    (["status_log=/nonexistent/log"], [], "status_log=/nonexistent/log"),
    (["tls_ca=/nonexistent.pem"], [], "tls_ca=/nonexistent.pem"),
    (["username=nobody"], [], "wrong user name or password for nobody"),
])
def test_report_json_tells_why_nothing_was_started(here, lines, words, reason):
    here.configure("vm-export=web", "report_json=%s" % here.report, *lines)
    result = here.run(*words)
    assert result.status == 3, result
    assert result.has(reason)
    report = told(here)
    assert (report["status"], report["exit_status"], report["vms"]) == ("ERROR", 3, [])
    assert report["counts"] == {"success": 0, "warning": 0, "error": 0}
    assert reason in report["error"]
    assert "ERROR" in result.lines[-1]


def test_report_json_where_it_cannot_be(here):
    here.configure("vm-export=web", "report_json=/nonexistent/report.json")
    result = here.run()
    assert result.status == 3, result
    assert result.has("report_json=/nonexistent/report.json")
