# SPDX-License-Identifier: GPL-3.0-or-later
"""A host that had to prove itself leads to nothing that need not; no secret leaks otherwise."""
import pytest
from support.world import one_vm

LEADS = ["http://127.0.0.1:80", "http://127.0.0.2:8080", "http://localhost", "/var/run/planted"]


def no_password_in_clear_text(here):
    return not [call for call in here.sim.calls() if call["transport"] == "http"]


@pytest.mark.parametrize("told", LEADS)
def test_a_master_without_proof(turn, told):
    here = turn(one_vm())
    here.configure("vm-export=web", "tls_fingerprint=" + here.sim.fingerprint)
    here.sim.fault("login_error", error_info=["HOST_IS_SLAVE", told])
    result = here.run()
    assert result.status == 3, result
    assert result.has("the host leads to '%s', which could not prove itself: refused" % told)
    assert no_password_in_clear_text(here)


@pytest.mark.parametrize("told", LEADS[:3] + ["https://[::1", "https://a..b"])
def test_a_redirect_without_proof(turn, told):
    here = turn(one_vm())
    here.configure("vm-export=web", "tls_fingerprint=" + here.sim.fingerprint)
    here.sim.fault("export_302", location=told + "/export?session_id=x")
    result = here.run()
    assert result.status == 2, result
    assert result.has("the host leads to '%s', which could not prove itself: refused" % told)
    assert no_password_in_clear_text(here)
    here.assert_pool_is_clean()


def test_a_redirect_to_this_machine_has_to_prove_itself_too(site):
    """A loopback address needs no proof by itself, but here it is led to by one that did."""
    here = site(one_vm(hosts=2))
    stranger = site(one_vm())
    here.configure("vm-export=web", "tls_fingerprint=" + here.sim.fingerprint)
    here.sim.fault("export_302", location=stranger.sim.url + "/export?x=y")
    result = here.run()
    assert result.status == 2, result
    assert result.has("is not trusted")
    assert not stranger.sim.methods()
    here.assert_pool_is_clean()


def test_the_keys_of_tls_are_not_logged(turn, tmp_path):
    here = turn(one_vm())
    keys = tmp_path / "keys"
    here.configure("vm-export=web", "tls_ca=" + here.sim.certificate)
    result = here.run(env={"SSLKEYLOGFILE": str(keys)})
    assert result.status == 0, result
    assert not keys.exists()
