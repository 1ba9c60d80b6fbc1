# SPDX-License-Identifier: GPL-3.0-or-later
"""The program dies at every step of a backup: by SIGKILL, or by the signals that it may answer.

Each step has a VM of its own, so that one run afterwards has to clean up after all of the deaths.
"""
import signal

import pytest
from support.forks import Forks
from support.world import (
    assert_as_if_nothing_had_happened,
    assert_whole,
    destroy_as_an_administrator,
    furnish,
    lone_vdi_snapshots,
    numbered_vms,
    the_host_forgets,
    unprovable,
)

CALLS = {"vm-export": 50, "vdi-export": 45}  # enough for those of a run, each with a VM of its own
CHANGES = 75  # the same for changes on disk
KINDS = ("vm-export", "vdi-export")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.mark.newest
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_call(turn, tmp_path, tally, kind):
    """SIGKILL comes when the host has got a call and before it carries it out, which it does all
    the same; so what one death leaves undone is what the death before it has left done."""
    site = turn(numbered_vms(CALLS[kind]))
    vms = ["vm%02d" % number for number in range(CALLS[kind])]
    ledger, deaths, window = furnish(site, vms), 0, set()
    with Forks(tmp_path) as forks:
        site.configure("%s=vm00" % kind, "max_backups=2")
        assert forks.run(site).status == 0
        methods = site.sim.methods()
        targets = [(name, methods[:at].count(name)) for at, name in enumerate(methods)]
        assert len(targets) < len(vms), "the run has more calls than this test has VMs"
        for vm, (method, skip) in zip(vms[1:], targets):
            site.configure("%s=%s" % (kind, vm), "max_backups=2")
            site.sim.reset_calls()
            run = forks.start(site)
            fault = site.sim.fault("kill_client_at", pid=run.pid, method=method, skip=skip)
            run.go()
            site.sim.clear_faults(fault)
            assert_whole(site, ledger, vm, least=2)
            if run.status != 0 or method != "task.get_record":  # asked as often as it takes
                assert run.status == -signal.SIGKILL, run
                deaths += 1
            if unprovable(site.sim.methods()):
                window.add(vm)
    assert bool(window) == (kind == "vdi-export")

    the_host_forgets(site)
    site.configure("max_backups=2", *["%s=%s" % (kind, vm) for vm in vms[1:len(targets) + 1]])
    result = site.run("host=" + site.sim.http)
    assert result.status == 0, result
    assert_as_if_nothing_had_happened(site, vms)
    assert set(site.snapshots()) == {"mine"}
    left = lone_vdi_snapshots(site)
    assert set(left.values()) == window
    destroy_as_an_administrator(site, left)
    tally("SIGKILL at a call of a " + kind, deaths - len(window), ledger)


@pytest.mark.newest
@pytest.mark.parametrize("pre_clean", [False, True])
def test_killed_at_every_change_on_disk(turn, tmp_path, shim, tally, pre_clean):
    """With pre_clean, up to the moment from which on the run goes like the other."""
    site = turn(numbered_vms(CHANGES))
    vms = ["vm%02d" % number for number in range(CHANGES)]
    ledger, deaths = furnish(site, vms), 0
    with Forks(tmp_path, preload=shim) as forks:
        for step, vm in enumerate(vms, 1):
            site.configure("vm-export=" + vm, "max_backups=2", "pre_clean=%s" % pre_clean)
            run = forks.run(site, env={"SHIM_TREE": str(site.backups), "SHIM_KILL": str(step)})
            assert_whole(site, ledger, vm, least=1 if pre_clean else 2)
            new = [folder for folder in site.folders(vm, marked=False) if "2020" not in folder.name]
            if run.status == 0 or (pre_clean and new):
                break
            assert run.status == -signal.SIGKILL, run
            deaths += 1
    assert run.status == (-signal.SIGKILL if pre_clean else 0), "not enough VMs for all changes"
    assert deaths > (8 if pre_clean else 40)
    the_host_forgets(site)
    site.configure("max_backups=2", *["vm-export=" + vm for vm in vms[:step]])
    result = site.run("host=" + site.sim.http)
    assert result.status == 0, result
    assert_as_if_nothing_had_happened(site, vms)
    assert set(site.snapshots()) == {"mine"}
    tally("SIGKILL at a change on disk", deaths, ledger)


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_at_every_call(turn, tmp_path, tally, kind):
    """SIGTERM, SIGINT and SIGHUP in turn: everything is undone, and the exit status tells."""
    site = turn(numbered_vms(1))
    ledger, signals, late = furnish(site, ["vm00"]), 0, 0
    site.configure("%s=vm00" % kind, "max_backups=2")
    with Forks(tmp_path) as forks:
        for step in range(0 if kind == "vm-export" else 8, CALLS[kind]):  # 8: the snapshot
            number = SIGNALS[step % 3]
            before = len(site.sim.methods())
            run = forks.start(site)
            fault = site.sim.fault("kill_client_at", pid=run.pid, method="*", skip=step,
                                   signal=number)
            run.go()
            if site.sim.faults()[-1]["fired"] == 0:
                break
            site.sim.clear_faults(fault)
            signals += 1
            rest = site.sim.methods()[before + step:]  # perhaps a late one of the run before
            asked_last = len(rest) <= 2 and rest[-1] == "session.logout"
            assert run.status in (128 + number, 0), run
            late += run.status == 0 and not asked_last  # the run was quicker than its signal
            assert_whole(site, ledger, "vm00", least=2)
            site.assert_pool_is_clean(["mine"])
            assert_as_if_nothing_had_happened(site, ["vm00"])
    assert run.status == 0, run
    assert signals > 20
    assert late <= 2
    the_host_forgets(site)  # a task that was destroyed before its export began
    tally("SIGTERM, SIGINT, SIGHUP at a call of a " + kind, signals, ledger)


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_while_the_snapshot_is_being_taken(turn, tmp_path, tally, kind):
    """The host goes on with what it was asked for: the program waits for it, and undoes it."""
    site = turn(numbered_vms(1))
    ledger = furnish(site, ["vm00"])
    site.configure("%s=vm00" % kind, "max_backups=2")
    site.sim.fault("snapshot_slow", seconds=0.5)
    with Forks(tmp_path) as forks:
        run = forks.start(site)
        site.sim.fault("kill_client_at", pid=run.pid, method="task.get_record", skip=1,
                       signal=signal.SIGTERM)
        run.go()
    assert run.status == 128 + signal.SIGTERM, run
    assert "task.cancel" in site.sim.methods()
    assert_whole(site, ledger, "vm00", least=2)
    assert_as_if_nothing_had_happened(site, ["vm00"])
    site.assert_pool_is_clean(["mine"])
    site.sim.clear_faults()
    tally("SIGTERM in a slow snapshot", 1, ledger)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_the_middle_of_two_exports_at_once(turn, tmp_path, tally, number):
    site = turn(numbered_vms(3))
    vms = ["vm00", "vm01", "vm02"]
    ledger = furnish(site, vms)
    site.configure("vm-export=", "max_backups=2", "parallel=2")
    with Forks(tmp_path) as forks:
        run = forks.start(site)
        site.sim.fault("kill_client_at", pid=run.pid, after=3000, vm="vm01", signal=number)
        site.sim.fault("export_silence", after=3001, vm="vm01", seconds=1)
        run.go()
    assert run.status == 128 + number, run
    assert [vm for vm in vms if ledger.untouched(vm)], "no export was stopped"
    for vm in vms:
        assert_whole(site, ledger, vm, least=2)
    assert_as_if_nothing_had_happened(site, vms)
    site.assert_pool_is_clean(["mine"] * 3)
    site.sim.clear_faults()
    tally("SIGTERM, SIGINT, SIGHUP in parallel exports", 1, ledger)


def test_a_signal_during_the_login(turn, tmp_path):
    site = turn(numbered_vms(1))
    site.configure("vm-export=")
    with Forks(tmp_path) as forks:
        run = forks.start(site)
        site.sim.fault("kill_client_at", pid=run.pid, method="session.login_with_password",
                       signal=signal.SIGTERM)
        run.go()
    assert run.status == 128 + signal.SIGTERM
    assert not list(site.backups.iterdir())
    site.assert_pool_is_clean(["mine"])
