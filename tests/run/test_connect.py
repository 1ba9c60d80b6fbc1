# SPDX-License-Identifier: GPL-3.0-or-later
"""How a host is reached and trusted: TLS, the socket, slaves, dead hosts, redirects."""

import pytest
from simulator.pool import MIB, Pool, disk
from support.harness import vmbackup
from support.world import WRONG, refused_port


def one_vm(hosts=1):
    pool = Pool(hosts=hosts)
    pool.vm("web", disks=[disk(2 * MIB, seed=1)])
    return pool


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
def test_a_certificate_is_trusted_or_one_line_tells_its_fingerprint(turn_of_two, trust, accepted):
    here = turn_of_two
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


@pytest.fixture
def turn_of_two(site):
    return site(one_vm(hosts=2))


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


def test_dead_hosts_of_the_list_are_passed_over(turn):
    here = turn(one_vm())
    here.configure("vm-export=web")
    dead = "127.0.0.1:%d" % refused_port()
    assert here.run("host=%s,%s" % (dead, here.sim.url)).status == 0
    result = here.run("host=" + dead)
    assert result.status == 3
    assert result.has("ERROR - no login: %s" % dead)


def test_a_slave_leads_to_the_master(site):
    here = site(one_vm(hosts=2))
    here.configure("vm-export=web", "pool_db_backup=1")
    result = here.run("host=" + here.sim.hosts[1]["url"])
    assert result.status == 0, result
    assert {call["host"] for call in here.sim.calls()
            if call["kind"] == "http" or call["outcome"] == "Success"} == {0}


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
