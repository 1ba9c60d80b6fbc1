# SPDX-License-Identifier: GPL-3.0-or-later
"""How a host is reached and trusted: TLS, the socket, lists of hosts, slaves, redirects."""
import json

import pytest
from simulator.pool import MIB, Pool, disk
from support.harness import vmbackup
from support.world import WRONG, one_vm, refused_port


@pytest.mark.parametrize("trust, accepted", [
    (lambda sim: [], True),
    (lambda sim: ["tls_fingerprint=" + sim.fingerprint], True),
    (lambda sim: ["tls_fingerprint=" + sim.fingerprint.replace(":", "").lower()], True),
    (lambda sim: ["tls_fingerprint=%s,%s" % (WRONG, sim.fingerprint)], True),
    (lambda sim: ["tls_ca=" + sim.hosts[0]["certificate"]], True),
    (lambda sim: ["tls_fingerprint=" + WRONG, "tls_verify=False"], True),
    (lambda sim: ["tls_fingerprint=" + WRONG], False),
    (lambda sim: ["tls_ca=" + sim.hosts[1]["certificate"]], False),
])
def test_a_certificate_is_trusted_or_one_line_tells_its_fingerprint(site, trust, accepted):
    here = site(one_vm(hosts=2))
    here.configure("vm-export=web", *trust(here.sim))
    result = here.run()
    if accepted:
        assert result.status == 0, result
        assert here.folders("web")
        return
    assert result.status == 3, result
    told = [line for line in result.lines if "is not trusted" in line]
    assert len(told) == 1
    assert told[0].count(here.sim.fingerprint) == 2    # to compare it, and in the setting to add
    assert "tls_fingerprint=" + here.sim.fingerprint in told[0]
    assert "session.login_with_password" not in here.sim.methods()
    assert not here.folders("web", marked=False)


def test_no_check_is_a_warning_in_the_log_of_every_run(turn):
    here = turn(one_vm())
    here.configure("vm-export=web", "tls_verify=False")
    for _ in range(2):
        assert here.run("preview").has("WARNING - tls_verify=False")


def test_streams_go_over_the_socket_too(turn):
    here = turn(one_vm())
    here.configure("vm-export=web", "pool_db_backup=1")
    result = vmbackup("local", here.config, "host=" + here.sim.socket)
    assert result.status == 0, result
    assert {call["transport"] for call in here.sim.calls()} == {"unix"}
    here.assert_pool_is_clean()


def test_each_worker_logs_in_by_itself(turn):
    """The pool database is the first job: of a worker that has made no call yet."""
    here = turn(one_vm())
    here.configure("vm-export=web", "pool_db_backup=1", "parallel=3")
    for host in (here.sim.url, here.sim.http):
        assert here.run("host=" + host).status == 0
    result = vmbackup("local", here.config, "host=" + here.sim.socket)
    assert result.status == 0, result
    here.assert_pool_is_clean()


def test_http_is_spoken_to_a_loopback_address_only(turn):
    here = turn(one_vm())
    here.configure("vm-export=web")
    assert here.run("host=" + here.sim.http).status == 0
    result = here.run("host=http://192.0.2.1")
    assert result.status == 3
    assert result.has("host=http://192.0.2.1")


def test_the_environment_has_no_say(turn, tmp_path):
    here = turn(one_vm())
    here.configure("vm-export=web")
    nowhere = "http://127.0.0.1:%d" % refused_port()
    (tmp_path / ".netrc").write_text("default login eve password eve\n")
    result = here.run(env={
        "HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere, "ALL_PROXY": nowhere, "http_proxy": nowhere,
        "https_proxy": nowhere, "REQUESTS_CA_BUNDLE": "/nonexistent", "HOME": str(tmp_path)})
    assert result.status == 0, result
    assert not [call for call in here.sim.calls() if "authorization" in
                {name.lower() for name in call.get("headers") or ()}]


def test_a_redirect_goes_to_a_member_that_the_pool_vouches_for(site):
    here = site(one_vm(hosts=2))
    here.configure("vm-export=web", "tls_fingerprint=" + here.sim.fingerprint)
    here.sim.fault("export_302", to=1, host=0)
    result = here.run()
    assert result.status == 0, result
    assert [call["host"] for call in here.sim.calls() if call["method"] == "GET /export"] == [0, 1]


def test_redirects_in_a_circle_end(site):
    here = site(one_vm(hosts=2))
    here.configure("vm-export=web")
    here.sim.fault("export_302")
    result = here.run()
    assert result.status == 2, result
    assert result.has("in a circle")
    here.assert_pool_is_clean()


def test_a_host_that_is_booting_is_told(turn):
    here = turn(one_vm())
    here.configure("vm-export=web")
    here.sim.fault("login_error", error_info=["HOST_STILL_BOOTING"])
    result = here.run()
    assert result.status == 3
    assert result.has("HOST_STILL_BOOTING")


# --- host=a,b,c: the first that answers and is trusted, by way of a slave too; or one clear line --

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
    result = here.run("host=%s,%s" % (here.sim.hosts[1]["url"], dead), "pool_db_backup=1")
    assert result.status == 0, result
    assert logins(here) == [(1, "HOST_IS_SLAVE"), (0, "Success")]
    assert {call["host"] for call in here.sim.calls() if call["kind"] == "http"} == {0}
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
