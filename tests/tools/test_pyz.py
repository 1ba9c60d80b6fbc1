# SPDX-License-Identifier: GPL-3.0-or-later
"""vmbackup.pyz: one file that needs no installed package, the same one wherever it is built."""
import base64
import csv
import ctypes
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from simulator.pool import MIB, Pool, disk
from support.harness import Result, finish, vmbackup

from tools.environment import ROOT, dotted, interpreters

TOOLS = Path("tests", "tools")
BUILD, REQUIREMENTS = TOOLS / "build_pyz.py", TOOLS / "requirements-pyz.txt"
SOURCES = ("vmbackup.py", "LICENSE", str(TOOLS / "environment.py"), str(BUILD), str(REQUIREMENTS))
ALONE = ("-I", "-S")  # without a user's settings, and without any installed package
CA_FILES = ("/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/certs/ca-certificates.crt")
UNREACHABLE = re.compile("No matching distribution found.*|.*Max retries exceeded.*|.*timed out.*")


def build(*words, checkout=ROOT, python=sys.executable, **options):
    """Runs build_pyz.py; the test is skipped where there is no package index to take from."""
    env = dict({"PIP_RETRIES": "1"}, **os.environ)
    done = subprocess.run([str(python), str(Path(checkout, BUILD))] + list(map(str, words)),
                          env=dict(env, **options.pop("env", {})), stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    output = done.stdout.decode("utf-8", "replace")
    missing = UNREACHABLE.search(output)
    if done.returncode and missing:
        pytest.skip("no package index to build vmbackup.pyz from: " + missing.group().strip())
    return Result(done.returncode, done.stdout, b"")


@pytest.fixture(scope="session")
def pyz(tmp_path_factory):
    """vmbackup.pyz, built once for all processes of a test run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / "vmbackup.pyz"
    with open(str(folder / "vmbackup.pyz.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            result = build(path)
            assert result.status == 0, result
    return path


@pytest.fixture
def checkout(tmp_path):
    """Another checkout, as far as building goes."""
    for name in SOURCES:
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(ROOT / name), str(tmp_path / "checkout" / name))
    return tmp_path / "checkout"


def start(program, *words, flags=ALONE, **env):
    """The process of a pyz, or with flags=("-c", ...) of something else that imports from it."""
    clean = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "TZ": "UTC"}
    command = [sys.executable] + list(flags) + [str(program)] + [str(word) for word in words]
    return subprocess.Popen(command, env=dict(clean, **env), stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(program, *words, **options):
    return finish(start(program, *words, **options))


def edited(pyz, path, remove=(), add=None):
    """A copy of the pyz without the files that begin so, and with others."""
    with zipfile.ZipFile(str(pyz)) as old, zipfile.ZipFile(str(path), "w") as new:
        for name in old.namelist():
            if not name.startswith(tuple(remove)):
                new.writestr(name, old.read(name))
        for name, data in (add or {}).items():
            new.writestr(name, data)
    return path


def one_vm(hosts=1):
    pool = Pool(hosts=hosts)
    pool.vm("web", power_state="Running", disks=[disk(3 * MIB + 512, seed=1)])
    return pool


# --- building ------------------------------------------------------------------------------------

def test_the_same_sources_make_the_same_file(pyz, checkout):
    """In another folder, at another time, with other settings, and by another Python if there is
    one: the newest, or for the newest the oldest."""
    found = interpreters()
    other = max(found) if sys.version_info[:2] < max(found) else min(found)
    for name in SOURCES:
        os.utime(str(checkout / name), (10**9, 10**9))
    before = os.umask(0o077)
    try:
        result = build(checkout=checkout, python=found[other].path,
                       env={"TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "1"})
    finally:
        os.umask(before)
    assert result.status == 0, result
    built = checkout / "dist" / "vmbackup.pyz"
    assert built.read_bytes() == pyz.read_bytes(), "by Python " + dotted(other)
    assert [path.stat().st_mode & 0o777 for path in (built, pyz)] == [0o755] * 2
    assert hashlib.sha256(pyz.read_bytes()).hexdigest() in result.out
    assert [path.name for path in built.parent.iterdir()] == ["vmbackup.pyz"]


def test_a_wheel_with_another_hash_is_refused(pyz, checkout):
    path = checkout / REQUIREMENTS
    path.write_text(re.sub("(sha256:)(....)", r"\g<1>0000", path.read_text(), count=1))
    result = build(checkout=checkout)
    assert result.status == 1, result
    assert "DO NOT MATCH THE HASHES" in result.out
    assert not (checkout / "dist").exists()


def test_it_carries_whole_wheels_and_their_licences(pyz):
    with zipfile.ZipFile(str(pyz)) as archive:
        files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        entries = archive.infolist()
    assert [entry.filename for entry in entries] == sorted(files)
    assert {(entry.date_time, entry.external_attr >> 16, entry.compress_type)
            for entry in entries} == {((1980, 1, 1, 0, 0, 0), 0o100644, zipfile.ZIP_STORED)}
    assert not [name for name in files if re.search(r"[.](so|pyd|pyc|pem)$", name)]
    for name in ("vmbackup.py", "LICENSE"):
        assert files.pop(name) == (ROOT / name).read_bytes()

    pinned = re.findall(r"^([\w-]+)==(\S+)", (ROOT / REQUIREMENTS).read_text(), re.M)
    wanted = {"%s-%s.dist-info" % (name.lower().replace("-", "_"), version)
              for name, version in pinned}
    assert {name.split("/")[0] for name in files if "dist-info" in name} == wanted
    recorded = set()
    for folder in wanted:
        for name, digest, _ in csv.reader(io.StringIO(str(files[folder + "/RECORD"], "utf-8"))):
            recorded.add(name)
            if digest:
                found = base64.urlsafe_b64decode(digest.replace("sha256=", "") + "=")
                assert found == hashlib.sha256(files[name]).digest(), name
    assert set(files) - recorded == {"__main__.py", "certifi.py"}

    for folder in wanted:
        licences = [name for name in files if name.startswith(folder + "/LICENSE")]
        if not folder.startswith("xenapi"):
            assert licences, folder
    assert b"Redistribution and use" in files["XenAPI/XenAPI.py"]  # its licence is in there


# --- running -------------------------------------------------------------------------------------

@pytest.mark.parametrize("word", ["version", "help"])
def test_it_answers_as_vmbackup_py_does(pyz, word):
    result = run(pyz, word)
    assert result.status == 0, result
    assert (result.out, result.err) == (vmbackup(word).out, "")


def test_a_preview_and_a_backup_without_any_installed_package(pyz, turn):
    here = turn(one_vm())
    here.configure("vm-export=.*", "pool_db_backup=1")
    bare = run("import importlib.util as find; print(list(map(find.find_spec, %r)))"
               % (["XenAPI", "requests"],), flags=ALONE + ("-c",))
    assert bare.out == "[None, None]\n", bare
    result = run(pyz, here.sim.password, here.config, "preview")
    assert (result.status, result.err) == (0, ""), result
    assert not here.folders("web", marked=False)
    result = run(pyz, here.sim.password, here.config)
    assert (result.status, result.err) == (0, ""), result
    assert result.lines[-1] == "VmBackup ended - Success - S:1 W:0 E:0"
    folder, = here.folders("web")
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=str(folder), check=True)
    assert {call["transport"] for call in here.sim.calls()} == {"tls"}
    here.assert_pool_is_clean()


@pytest.mark.parametrize("module", ["XenAPI", "requests"])
def test_a_missing_module_is_noticed_in_a_zip_too(pyz, turn, tmp_path, module):
    here = turn(one_vm())
    here.configure("vm-export=web")
    result = run(edited(pyz, tmp_path / "less.pyz", [module + "/"]), here.sim.password, here.config)
    assert result.status == 3, result
    assert result.has("ERROR - the Python package %s is missing" % module)


def test_it_is_a_command(pyz, tmp_path):
    (tmp_path / "python3").symlink_to(sys.executable)
    process = subprocess.Popen([str(pyz), "version"], stdin=subprocess.DEVNULL,
                               env={"PATH": "%s:%s" % (tmp_path, os.environ["PATH"])},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert finish(process).out == vmbackup("version").out


def test_what_the_machine_has_is_not_used(pyz, turn, tmp_path):
    """Each package is installed as well, in a state that is of no use."""
    here = turn(one_vm())
    here.configure("vm-export=web")
    for name in ("XenAPI", "requests", "urllib3", "idna", "charset_normalizer", "certifi"):
        (tmp_path / (name + ".py")).write_text("raise SystemExit('not this one')\n")
    (tmp_path / "chardet.py").write_text("__version__ = '5.1.0'  # requests wants one before 5\n")
    result = run(pyz, here.sim.password, here.config, flags=["-S"], PYTHONPATH=str(tmp_path))
    assert (result.status, result.err) == (0, ""), result
    assert here.folders("web")


# --- the planted CA file -------------------------------------------------------------------------

# On Python 3.6, requests looks for cacert.pem in the folder for temporary files (/tmp, or TMPDIR as
# here, where no other program finds it) when certifi lies in a zip.
TRUST = """if True:
    import json, sys
    sys.path.insert(0, sys.argv[1])
    import requests

    def trusted(**options):
        try:
            return bool(requests.get(sys.argv[2], **options).status_code)
        except requests.exceptions.SSLError as error:
            return "CERTIFICATE_VERIFY_FAILED" not in str(error) and str(error)

    print(json.dumps([requests.__file__, requests.certs.where(), trusted(),
                      len(sys.argv) > 3 and trusted(verify=sys.argv[3])]))
"""


class Planted:
    """A folder for temporary files with a CA file in it that vouches for the simulator."""

    def __init__(self, folder, sim):
        self.env = {"TMPDIR": str(folder)}
        self.path = folder / "cacert.pem"
        shutil.copy(sim.certificate, str(self.path))
        libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        in_open = 0x20
        assert libc.inotify_add_watch(self._inotify, os.fsencode(str(self.path)), in_open) > 0

    def was_opened(self):
        """Whether anybody has opened the file since this was asked last."""
        try:
            return bool(os.read(self._inotify, 65536))
        except BlockingIOError:
            return False

    def close(self):
        os.close(self._inotify)


@pytest.fixture
def planted(site, tmp_path):
    """A Site with two hosts, and the CA file planted for its master."""
    here = site(one_vm(hosts=2))
    here.configure("vm-export=web")
    folder = tmp_path / "tmp"
    folder.mkdir()
    here.planted = Planted(folder, here.sim)
    yield here
    here.planted.close()


def trust(pyz, here, *verify):
    """Of requests in the pyz: its __file__, its CA file, and what it trusts."""
    result = run(TRUST, pyz, here.sim.url, *verify, flags=ALONE + ("-c",), **here.planted.env)
    assert result.status == 0, result
    return json.loads(result.out)


@pytest.mark.skipif(not any(map(os.path.isfile, CA_FILES)), reason="no CA file on this machine")
def test_requests_in_it_takes_the_ca_file_of_the_system_and_no_planted_one(pyz, planted):
    file, where, plainly, _ = trust(pyz, planted)
    assert file.startswith(str(pyz))
    assert where in CA_FILES and os.path.isfile(where)
    assert plainly is False
    assert not planted.planted.was_opened()
    # It would have been good enough, and a look at it does not go unnoticed.
    assert trust(pyz, planted, planted.planted.path)[2:] == [False, True]
    assert planted.planted.was_opened()


@pytest.mark.skipif(sys.version_info[:2] > (3, 6), reason="certifi went another way since 3.7")
def test_with_certifi_itself_the_planted_file_would_be_trusted(pyz, planted, tmp_path):
    certifi = pytest.importorskip("certifi")
    folder = Path(certifi.__file__).parent
    files = {"certifi/" + path.name: path.read_bytes() for path in folder.iterdir()
             if path.is_file()}
    other = edited(pyz, tmp_path / "certifi.pyz", ["certifi"], files)
    assert trust(other, planted)[1:3] == [str(other) + "/certifi/cacert.pem", True]
    assert planted.planted.was_opened()


def test_a_backup_looks_at_no_planted_ca_file(pyz, planted):
    sim = planted.sim
    result = run(pyz, sim.password, planted.config, "tls_ca=" + sim.hosts[1]["certificate"],
                 **planted.planted.env)
    assert result.status == 3, result
    assert result.has("is not trusted")
    assert "session.login_with_password" not in sim.methods()
    result = run(pyz, sim.password, planted.config, "tls_fingerprint=" + sim.fingerprint,
                 **planted.planted.env)
    assert result.status == 0, result
    assert planted.folders("web")
    assert not planted.planted.was_opened()
