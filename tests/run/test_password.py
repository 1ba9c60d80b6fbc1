# SPDX-License-Identifier: GPL-3.0-or-later
"""The password: as an argument, from standard input or a terminal, from a file and into one."""
import base64
import errno
import io
import os
import pty
import stat
import subprocess
import sys
import termios

import pytest
from simulator.pool import MIB
from support.harness import LINE, ROOT, SCRIPT, finish, start, vmbackup
from support.world import pool_of

import vmbackup as program

PASSWORD = "pä$$ \"w'o\\`r*d<&>;=#%:🐘"
TYPED = "open sesame"


def a_pool(password=TYPED):
    pool = pool_of("web")
    pool.description["password"] = password
    return pool


@pytest.fixture
def sim(turn):
    return turn(a_pool(PASSWORD)).sim


def connects(sim, tmp_path, word, **options):
    result = vmbackup(word, "web", "preview", "host=" + sim.url, "backup_dir=%s" % tmp_path,
                      **options)
    assert PASSWORD not in result.out + result.err
    return result


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\nnot this\n"])
def test_a_password_of_any_characters_from_standard_input(sim, tmp_path, end):
    assert connects(sim, tmp_path, "-", input=(PASSWORD + end).encode("utf-8")).status == 0


@pytest.mark.parametrize("env", [
    {}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_a_password_of_any_characters_as_an_argument(sim, tmp_path, env):
    assert connects(sim, tmp_path, PASSWORD, env=env).status == 0


@pytest.mark.parametrize("word", [PASSWORD, "-"])
def test_a_password_file(sim, tmp_path, word):
    folder = tmp_path / "own"
    folder.mkdir()
    path = folder / "pw"
    made = vmbackup(word, "create-password-file=%s" % path, env={"LC_ALL": "C"},
                    input=PASSWORD.encode("utf-8") + b"\n")
    assert made.status == 0, made
    assert PASSWORD not in made.out + made.err
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(str(folder)) == ["pw"]
    assert base64.b64decode(path.read_bytes()).decode("utf-8") == PASSWORD
    assert connects(sim, tmp_path, path).status == 0


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_password_file_of_upstream(sim, tmp_path, end):
    (tmp_path / "pw").write_bytes(base64.b64encode(PASSWORD.encode("utf-8")) + end)
    assert connects(sim, tmp_path, tmp_path / "pw").status == 0


@pytest.mark.parametrize("word", ["wrong", "", "-"])
def test_a_wrong_password_is_told_in_one_line(sim, tmp_path, word):
    result = connects(sim, tmp_path, word, input=b"wrong\n")
    assert result.status == 3, result
    assert "wrong user name or password" in result.lines[-1]
    assert len([line for line in result.lines if "ERROR" in line]) == 1
    assert not sim.sessions()


def test_a_file_that_is_no_password_file_is_told(sim, tmp_path):
    (tmp_path / "pw").write_text("secret in clear!")
    result = connects(sim, tmp_path, tmp_path / "pw")
    assert result.status == 3
    assert "create-password-file" in result.lines[-1]
    assert "secret in clear" not in result.out


def test_a_password_that_is_not_utf8_is_told(tmp_path):
    command = [os.fsencode(sys.executable), os.fsencode(str(SCRIPT)), b"p\xe4", b"web",
               b"backup_dir=" + os.fsencode(str(tmp_path))]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (3, b"")
    assert done.stdout.splitlines()[-1].endswith(b"the password is not UTF-8 text")


def test_create_password_file_takes_only_a_password_files_place(tmp_path):
    path = tmp_path / "pw"
    for password in ("first", "second"):
        assert vmbackup(password, "create-password-file=%s" % path).status == 0
    assert base64.b64decode(path.read_bytes()) == b"second"
    path.write_text("# a config file\n")
    assert vmbackup("third", "create-password-file=%s" % path).status == 3
    assert path.read_text() == "# a config file\n"


@pytest.mark.parametrize("words", [("create-password-file=none/pw",), ("create-password-file=",),
                                   ("create-password-file=pw", "preview")])
def test_create_password_file_refuses(refused, words):
    assert "password" in refused("pw", *words)


def test_why_a_password_file_cannot_be_read(refused, tmp_path):
    (tmp_path / "big").write_bytes(b"x" * (MIB + 1))
    assert "cannot be read: larger than 1.0 MiB" in refused(
        tmp_path / "big", "web", "backup_dir=%s" % tmp_path)


def test_a_password_file_is_secret_from_its_first_byte(tmp_path):
    """Its mode comes from its creation, whatever the umask: here it cannot be changed later."""
    code = ("import os, sys; sys.path.insert(0, %r); import vmbackup; os.umask(0);"
            " os.umask = lambda _: 0; os.chmod = os.fchmod = None; sys.exit(vmbackup.main())")
    subprocess.run([sys.executable, "-c", code % str(ROOT), "pw",
                    "create-password-file=%s/pw" % tmp_path], check=True, stdout=subprocess.PIPE)
    assert stat.S_IMODE((tmp_path / "pw").stat().st_mode) == 0o600


@pytest.mark.parametrize("words", [["web", "backup_dir=."], ["create-password-file=pw"]])
def test_an_empty_standard_input_gives_no_password(tmp_path, words):
    result = vmbackup("-", *words, cwd=tmp_path, input=b"")
    assert result.status == 3, result
    assert [line for line in result.lines if "ERROR" in line] == [
        "ERROR - no password was given on standard input"]
    assert os.listdir(str(tmp_path)) == []


def test_no_standard_input_is_an_empty_password(sim, tmp_path):
    process = start("-", "web", "preview", "host=" + sim.url, "backup_dir=%s" % tmp_path)
    assert finish(process).status == 3


@pytest.mark.parametrize("old", [None, "first"])
def test_a_password_file_that_cannot_be_put_in_its_place(tmp_path, shim, old):
    """Nothing of it stays, and the old one does."""
    path = tmp_path / "pw"
    if old:
        assert vmbackup(old, "create-password-file=%s" % path).status == 0
    before = path.read_bytes() if old else None
    result = vmbackup("second", "create-password-file=%s" % path, env={
        "LD_PRELOAD": str(shim), "SHIM_TREE": str(tmp_path), "SHIM_CALL": "rename",
        "SHIM_ERRNO": str(errno.EIO)})
    assert result.status == 3, result
    assert result.has("cannot write the password file: ") and result.has("Input/output error")
    assert os.listdir(str(tmp_path)) == ["pw"] * bool(old)
    assert not old or path.read_bytes() == before


# --- at a terminal --------------------------------------------------------------------------------

def test_the_password_is_asked_for_without_echo(turn, terminal, tmp_path):
    here = turn(a_pool())
    here.configure("vm-export=web")
    with (tmp_path / "log").open("wb") as log:
        term = terminal("-", here.config, "preview", stdout=log)
        term.asks()
        term.type(here.sim.password + "\n")
        assert term.end() == 0
    assert here.sim.password.encode() not in term.raw
    log = (tmp_path / "log").read_text()
    assert here.sim.password not in log and "assword:" not in log
    assert log.splitlines()[-1].endswith("SUCCESS preview parameters")


def test_a_password_file_is_made_of_what_is_typed(turn, terminal, tmp_path):
    here = turn(a_pool())
    here.configure("vm-export=web")
    term = terminal("-", "create-password-file=%s" % (tmp_path / "pass"))
    term.asks()
    term.type(here.sim.password + "\n")
    assert term.end() == 0
    assert here.sim.password.encode() not in term.raw
    assert terminal(tmp_path / "pass", here.config, "preview").end() == 0


def at_the_question(turn, terminal):
    """A site, and the terminal of a run there that asks for the password."""
    here = turn(a_pool())
    here.configure("vm-export=web")
    term = terminal("-", here.config)
    term.asks()
    return here, term


def test_a_wrong_password_at_the_terminal(turn, terminal):
    _, term = at_the_question(turn, terminal)
    term.type("swordfish\n")
    assert term.end() == 3
    assert "wrong user name or password" in term.rows[-1]
    assert b"swordfish" not in term.raw


def test_ctrl_c_at_the_question(turn, terminal):
    """The run ends as by a signal, and the terminal echoes again."""
    here, term = at_the_question(turn, terminal)
    term.type("\x03")
    term.until(lambda: any("stopped by signal 2" in row for row in term.rows))
    assert term.echoes()
    assert term.end() == 130
    assert b"Traceback" not in term.raw
    assert not here.sim.calls()


def test_nothing_is_asked_before_the_echo_is_off(monkeypatch):
    """Or what is typed at once would show, and be dropped as well."""
    master, slave = pty.openpty()
    told = []

    class Recorder(io.StringIO):
        def write(self, text):
            told.append((text, bool(termios.tcgetattr(master)[3] & termios.ECHO)))
            if text == "Password: ":
                os.write(master, b"secret\n")

    monkeypatch.setattr(program.sys, "stderr", Recorder())
    with open(slave, encoding="ascii") as stream:
        assert program.read_line(stream) == b"secret\n"
    os.close(master)
    assert [pair for pair in told if pair[0]] == [("Password: ", False), ("\n", True)]


def test_ctrl_d_at_the_question(turn, terminal):
    here = turn(a_pool())
    here.configure("vm-export=web")
    term = terminal("-", here.config)
    term.asks()
    term.type("\x04")
    term.until(lambda: any("ERROR" in row for row in term.rows))
    assert term.echoes()
    assert term.end() == 3
    (error,) = [row for row in term.rows if "ERROR" in row]
    assert LINE.match(error).group(1) == "ERROR - no password was given on standard input"
    assert b"Traceback" not in term.raw
    assert not here.sim.calls()


def test_a_password_beyond_ascii_is_typed_where_the_locale_is_none(turn, terminal, tmp_path):
    password = "Gr\u00fcn3s H\u00e4uschen \u6771\u4eac \U0001f418"
    here = turn(a_pool(password))
    here.configure("vm-export=web")
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for words in ([here.config, "preview"], ["create-password-file=%s" % (tmp_path / "pass")]):
        term = terminal("-", *words, env=env)
        term.asks()
        term.type(password + "\n")
        assert term.end() == 0, term.rows
        assert password.encode("utf-8") not in term.raw
    assert terminal(tmp_path / "pass", here.config, "preview", env=env).end() == 0
