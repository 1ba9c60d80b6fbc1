# SPDX-License-Identifier: GPL-3.0-or-later
"""RESTORE.txt in each backup: its commands are run as they stand there, by a shell."""
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from simulator.pool import MIB, Pool, disk, vif
from support.harness import SCRIPT
from support.restores import Here

NAME = "it's a (web) server & more"


@pytest.fixture
def here(turn):
    pool = Pool("Büro")
    pool.network("DMZ", bridge="xenbr7")
    pool.vm(NAME, memory=2 << 30, vcpus=2, vifs=[vif("DMZ", mac="02:00:00:00:00:01")],
            disks=[disk(4 * MIB, "root", seed=1), disk(6 * MIB, "data", seed=2)])
    return Here(turn(pool))


def note(here, *lines):
    here.site.configure(*lines)
    result = here.site.run()
    assert result.status == 0, result
    (here.folder,) = here.site.folders(NAME)
    here.remember()
    return (here.folder / "RESTORE.txt").read_text(encoding="utf-8")


def commands(text, word):
    """The indented lines of the note that begin with a word, each behind a `cd` of its own."""
    (folder,) = set(re.findall(r"^ {7}(cd .*)$", text, re.M))
    return ["%s && %s" % (folder, line) for line in
            re.findall(r"^ {7}(%s .*)$" % re.escape(word), text, re.M)]


def shell(here, command, **words):
    """Runs what an administrator would; each of `words` is put in place of that word."""
    words.setdefault("CA", here.sim.certificate)
    for word, value in words.items():
        command = re.sub(r"\b%s\b" % word, lambda _, value=value: value, command)
    command = command.replace("--user root", "--user root:%s" % here.sim.password)
    command = command.replace("vmbackup.py", "%s %s" % (sys.executable, SCRIPT))
    return subprocess.run(["sh", "-euc", command], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, input=here.sim.password.encode() + b"\n",
                          timeout=60)


def test_what_it_tells(here):
    text = note(here, "vm-export=.*", "compress=gzip")
    (original,) = [one for _, one in here.sim.disks_of(NAME) if one["name_label"] == "root"]
    for told in (NAME, "Büro", here.folder.name, "%s.xva.gz" % NAME, "2.0 GiB", "2 CPUs", "root",
                 "4.0 MiB, %d bytes" % (4 * MIB), "data", "DMZ", "02:00:00:00:00:01", "Storage",
                 here.sim.record("SR", "Storage")["uuid"], "host is gone",
                 here.sim.record("VM", NAME)["uuid"]):
        assert told in text, told
    assert "-k" not in text
    assert here.sim.password not in text
    assert max(map(len, text.replace(here.folder.name, "").splitlines())) < 260
    assert "RESTORE.txt" in (here.folder / "SHA256SUMS").read_text()


def test_the_note_of_a_plain_name_is_ascii(turn):
    pool = Pool()
    pool.vm("web", disks=[disk(MIB, "root", seed=1)])
    here = Here(turn(pool))
    here.site.configure("vm-export=web")
    assert here.site.run().status == 0
    (here.site.folders("web")[0] / "RESTORE.txt").read_bytes().decode("ascii")


@pytest.mark.parametrize("line", ["vm-export", "vdi-export"])
def test_the_sums(here, line):
    text = note(here, line + "=.*")
    (folder,) = set(re.findall(r"^ {7}(cd .*)$", text, re.M))
    done = shell(here, folder + " && sha256sum --quiet -c SHA256SUMS")
    assert done.returncode == 0, done.stdout
    assert "       sha256sum -c SHA256SUMS" in text


@pytest.mark.parametrize("compress", ["False", "gzip", "zstd"])
def test_vmbackup_and_curl_bring_a_vm_back(here, compress):
    if compress == "zstd" and not shutil.which("zstd"):
        pytest.skip("no zstd here")
    text = note(here, "vm-export=.*", "compress=" + compress)
    (own,) = commands(text, "vmbackup.py restore")
    done = shell(here, own)
    assert done.returncode == 0, done.stdout
    assert len(here.new("VM")) == 1
    here.the_vm(NAME)
    (rename,) = commands(text, "xe vm-param-set")  # what xe and curl make bears the snapshot's name
    assert rename.endswith("uuid=UUID name-label=" + shlex.quote(NAME))
    here.remember()
    (curl,) = commands(text, "curl")
    done = shell(here, curl)
    assert done.returncode in (0, 56), done  # it is broken off where all was read
    assert not done.stdout, done
    here.the_vm(NAME)


@pytest.mark.parametrize("kind", ["raw", "vhd"])
def test_vmbackup_and_curl_bring_a_disk_back(here, kind):
    text = note(here, "vdi-export=.*", "vdi_export_format=" + kind)
    (original,) = [one for _, one in here.sim.disks_of(NAME) if one["name_label"] == "root"]
    (own,) = commands(text, "vmbackup.py restore")
    done = shell(here, own)
    assert done.returncode == 0, done.stdout
    ((ref, vdi),) = here.new("VDI").items()
    assert here.sim.disk_sha256(ref) == here.sim.disk_sha256(original["uuid"])
    here.remember()
    (curl,) = commands(text, "curl")
    here.sim.set_content(ref, "zeros")
    done = shell(here, curl, VDI=vdi["uuid"])
    assert done.returncode == 0, done.stdout
    assert here.sim.disk_sha256(ref) == here.sim.disk_sha256(original["uuid"])
    (create,) = re.findall(r"xe vdi-create .*virtual-size=(\d+)", text)
    assert create == original["virtual_size"] or int(create) == original["virtual_size"]
    for word in ("xe vdi-import uuid=VDI", "format=" + kind, "xe vbd-create vm-uuid=VM"):
        assert word in text


@pytest.mark.parametrize("name, kind", [("-x{1,2}", "vm-export"), ("db: [a]", "vdi-export")])
def test_names_that_mean_something_to_curl_and_qemu(turn, name, kind):
    pool = Pool()
    pool.vm(name, disks=[disk(2 * MIB, "root", seed=1)])
    here = Here(turn(pool))
    here.site.configure(kind + "=.*")
    assert here.site.run().status == 0
    (here.folder,) = here.site.folders(name)
    here.remember()
    text = (here.folder / "RESTORE.txt").read_text(encoding="utf-8")
    (curl,) = commands(text, "curl")
    if kind == "vm-export":
        done = shell(here, curl)
        assert done.returncode in (0, 56) and not done.stdout, done
        here.the_vm(name)
        return
    (vdi,) = [one for _, one in here.sim.disks_of(name)]
    assert shell(here, curl, VDI=vdi["uuid"]).returncode == 0
    for command in commands(text, "qemu-img") if shutil.which("qemu-img") else ():
        assert shell(here, command).returncode == 0, command


def test_a_relative_backup_dir(here):
    here.site.configure("vm-export=.*")
    result = here.site.run("backup_dir=" + here.site.backups.name,
                           cwd=str(here.site.backups.parent))
    assert result.status == 0, result
    (folder,) = here.site.folders(NAME)
    assert "cd %s\n" % shlex.quote(str(folder)) in (folder / "RESTORE.txt").read_text("utf-8")


def test_extract(here):
    text = note(here, "vm-export=.*")
    (own,) = commands(text, "vmbackup.py extract")
    done = shell(here, own.replace("to=.", "to=" + str(here.site.path)))
    assert done.returncode == 0, done.stdout
    assert len(list(here.site.path.glob("*.raw"))) == 2
