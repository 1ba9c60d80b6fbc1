"""The main job: VMs of a pool, exported, proved, published, pruned."""
import subprocess

from simulator.pool import MIB, Pool, cd, disk, vif


def two_vms():
    pool = Pool()
    pool.vm("web", power_state="Running", vifs=[vif()], cds=[cd()],
            disks=[disk(3 * MIB + 512, seed=1), disk(2 * MIB, "data", seed=2, device="xvdb")])
    pool.vm("db", disks=[disk(5 * MIB, sparse=[1])])
    return pool


def test_a_run_leaves_whole_backups_and_a_clean_pool(site):
    here = site(two_vms())
    here.configure("vm-export=.*")
    result = here.run()
    assert result.status == 0, result
    assert result.lines[-1] == "VmBackup ended - Success - S:2 W:0 E:0"
    for name in ("web", "db"):
        (folder,) = here.folders(name)
        subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=str(folder), check=True)
        assert (folder / (name + ".xva")).stat().st_mode & 0o777 == 0o600
        assert folder.stat().st_mode & 0o777 == 0o700
    here.assert_pool_is_clean()
