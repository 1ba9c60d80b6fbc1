# SPDX-License-Identifier: GPL-3.0-or-later
"""The mail that a run sends, received by a real mail server on loopback."""
import json
import re
import socket
import time

import pytest
from simulator.pool import MIB, Pool, disk
from support.harness import finish, hasty, start
from support.mail_server import MailServer
from support.world import wait_until

SECRET, MAIL_PASSWORD = "Grüße & %41", "pa ss:w\"\\rd"


@pytest.fixture
def mail_server(tmp_path):
    """mail_server(**options) starts one; a certificate of its own comes with tls=True."""
    started = []

    def make(tls=False, **options):
        started.append(MailServer(tls=tmp_path if tls else None, **options))
        return started[-1]

    yield make
    for server in started:
        server.stop()


@pytest.fixture
def here(turn):
    """A site with a new pool of two VMs."""
    pool = Pool("Büro", password=SECRET)
    for name in ("Größe 1", "db", "test"):
        pool.vm(name, power_state="Running", disks=[disk(MIB, seed=name)])
    return turn(pool)


def text_of(mail):
    return mail.get_body().get_content().replace("\r\n", "\n")


def log_of(mail):
    """The log that is attached to a mail."""
    (log,) = mail.iter_attachments()
    assert (log.get_filename(), log.get_content_type()) == ("vmbackup.log", "text/plain")
    return log.get_content().replace("\r\n", "\n")


def everything_in(mail):
    return text_of(mail) + log_of(mail)


def log_lines(result):
    """The lines of a run's log that a mail can hold: all but what is logged after it."""
    return [line for line in result.out.splitlines() if " - mail sent to " not in line]


def test_a_mail_tells_the_whole_run(here, mail_server):
    server = mail_server()
    here.sim.fault("snapshot_error", vm="db")
    here.configure("vm-export=.*", "exclude=test", *server.settings())
    result = here.run()
    assert result.status == 2, result
    (mail,), (envelope,) = server.mails, server.envelopes
    for told in (socket.gethostname().split(".")[0], here.sim.url[8:], "Büro"):
        assert told in mail["Subject"], told
    assert re.match(r"ERROR .* S:1 W:0 E:1\Z", mail["Subject"])
    assert (mail["From"], mail["To"]) == ("backup@example.org", "admin@example.org")
    assert (envelope.mail_from, envelope.rcpt_tos) == ("backup@example.org", ["admin@example.org"])
    head, table, reasons, left_out = text_of(mail).rstrip("\n").split("\n\n")
    assert "ERROR - S:1 W:0 E:1" in head
    begin = result.lines.index(table.splitlines()[0])
    told = table.splitlines()
    assert told[:-1] == result.lines[begin:begin + len(told) - 1]
    assert told[-1].startswith("total ")
    assert re.match(r"db +FAILED +.*SR_BACKEND_FAILURE_44", told[1])
    assert re.match(r"Größe 1 +ok ", told[2])
    (reason,) = [line for line in result.lines if "db - ***ERROR*** " in line]
    assert reasons.startswith("Failed:\n")
    assert reasons.split("\n")[1] == "vm-export db: " + reason.partition("***ERROR*** ")[2]
    assert left_out == "In no backup:\ntest"
    assert log_of(mail).splitlines() == log_lines(result)
    assert "VmBackup vm-export Größe 1 - ***Success*** t:0" in log_of(mail)
    assert result.lines[-1] == "mail sent to admin@example.org"


def test_what_goes_over_the_wire_is_a_mail_by_the_rules(site, mail_server):
    """RFC 5322: CRLF alone ends lines, none over 998 bytes; Date, Message-ID; ASCII, for a server
    need not take anything else. The pool's name is so long that its header has to be folded."""
    server, name = mail_server(), "Büro mit einem langen Namen, Haus 東京, " + "Wörter " * 20
    pool = Pool(name)
    pool.vm(".", disks=[disk(MIB)])
    pool.vm("vm " * 60, disks=[disk(MIB)])
    here = site(pool)
    here.configure("vm-export=.*", "exclude=nobody", *server.settings())
    begin = time.time()
    result = here.run()
    assert result.status == 1, result
    (mail,), raw = server.mails, server.envelopes[0].original_content
    assert raw.count(b"\r\n") == raw.count(b"\n") == raw.count(b"\r")
    assert max(raw) < 128 and max(map(len, raw.split(b"\r\n"))) <= 998
    assert name.strip() in mail["Subject"]
    assert begin - 2 < mail["Date"].datetime.timestamp() < begin + 100
    assert re.match(r"<[^<>@\s]+@[^<>@\s]+>\Z", mail["Message-ID"])
    assert not [part.defects for part in mail.walk() if part.defects]
    assert "vm " * 59 + "vm" in text_of(mail)
    assert log_of(mail).splitlines() == log_lines(result)


def test_a_run_of_plain_ascii_has_a_mail_with_crlf_only_too(here, mail_server):
    server = mail_server()
    here.configure("vm-export=db", *server.settings())
    assert here.run().status == 0
    raw = server.envelopes[0].original_content
    assert raw.count(b"\r\n") == raw.count(b"\n") == raw.count(b"\r")


def test_a_mail_holds_no_secret(here, mail_server):
    server = mail_server()
    here.sim.fault("export_fail", vm="db")
    here.sim.fault("vm_destroy_error", error_info=["INTERNAL_ERROR", "x"], vm="Größe 1")
    here.configure("vm-export=.*", *server.settings())
    here.run()
    source = server.envelopes[0].original_content.decode() + everything_in(server.mails[0])
    sessions = {word for call in here.sim.calls() for word in (
        call["args"] if isinstance(call["args"], list) else call["args"].values())
        if call["method"] == "session.logout"} | {
        call["args"]["session_id"] for call in here.sim.calls() if call["method"] == "GET /export"}
    assert sessions
    for secret in sessions | {here.sim.password}:
        assert secret not in source


def test_starttls_and_login_with_a_self_signed_certificate_on_loopback(here, mail_server, tmp_path):
    server = mail_server(tls=True, login=("backup", MAIL_PASSWORD))
    secret = tmp_path / "mail.pass"
    made = finish(start(MAIL_PASSWORD, "create-password-file=%s" % secret))
    assert made.status == 0, made
    here.configure("vm-export=db", *server.settings(
        smtp_starttls=True, smtp_user="backup", smtp_password_file=secret))
    result = here.run()
    assert result.status == 0, result
    assert server.encrypted == [True]
    assert "SUCCESS" in server.mails[0]["Subject"]
    assert MAIL_PASSWORD not in result.out + result.err + everything_in(server.mails[0])


def test_several_recipients_with_display_names(here, mail_server):
    server = mail_server()
    here.configure("vm-export=db", *server.settings(
        mail_to="a@example.org, Jörg Groß <b@example.org> ,c@example.org",
        mail_from="Büro-Sicherung <backup@example.org>"))
    result = here.run()
    assert server.envelopes, result
    envelope, mail = server.envelopes[0], server.mails[0]
    assert envelope.rcpt_tos == ["a@example.org", "b@example.org", "c@example.org"]
    assert envelope.mail_from == "backup@example.org"
    assert [address.display_name for address in mail["To"].addresses] == ["", "Jörg Groß", ""]
    assert mail["From"].addresses[0].display_name == "Büro-Sicherung"


@pytest.mark.parametrize("when, good, bad", [
    ("always", 1, 1), ("problems", 0, 1), ("never", 0, 0),
])
def test_mail_when(here, mail_server, when, good, bad):
    server = mail_server()
    here.configure("vm-export=db", *server.settings(mail_when=when))
    assert here.run().status == 0
    assert len(server.mails) == good
    here.sim.fault("snapshot_error")
    assert here.run().status == 2
    assert len(server.mails) == good + bad


def test_problems_are_warnings_too(here, mail_server):
    server = mail_server()
    here.configure("vm-export=db", "exclude=gone", *server.settings(mail_when="problems"))
    result = here.run()
    assert result.status == 1, result
    assert "WARNING" in server.mails[0]["Subject"]
    assert "***WARNING - vm(s) Exclude does not exist: gone" in text_of(server.mails[0])


@pytest.mark.parametrize("words, reason", [
    (("wrong", "weekend.cfg"), "wrong user name or password"),
    ((SECRET, "weekend.cfg", "backup_dir=/nonexistent"), "backup_dir does not exist"),
])
def test_a_mail_tells_why_nothing_was_started(here, mail_server, words, reason):
    server = mail_server()
    here.configure("vm-export=db", *server.settings())
    result = finish(start(*words, cwd=here.path))
    assert result.status == 3, result
    (mail,) = server.mails
    assert "ERROR" in mail["Subject"]
    assert here.sim.url[8:] in mail["Subject"]
    assert reason in text_of(mail)


def test_preview_sends_none(here, mail_server):
    server = mail_server()
    here.configure("vm-export=gone", *server.settings())
    assert here.run("preview").status == 2
    assert server.tries == 0


def test_a_mail_that_fails_is_a_warning_of_the_run(here, mail_server, tmp_path):
    """Four runs side by side: the mail server is out of order, is well, rejects the login, and
    bears a certificate that nobody vouches for."""
    secret = tmp_path / "mail.pass"
    assert finish(start("guess", "create-password-file=%s" % secret)).status == 0
    login = {"smtp_user": "backup", "smtp_password_file": secret, "smtp_starttls": True}
    down, well = mail_server(refuse=99), mail_server()
    strict = mail_server(tls=True, login=("backup", MAIL_PASSWORD))
    # To the program 127.1 is a name like any other, to the system it is 127.0.0.1.
    foreign = mail_server(tls=True, login=("backup", "guess"))
    runs = []
    for number, (server, more) in enumerate((
            (down, {}), (well, {}), (strict, login), (foreign, dict(login, smtp_server="127.1")))):
        name = "vm%d" % number
        here.sim.add_vm({"name": name, "disks": [disk(MIB, seed=name)]})
        here.config = here.path / (name + ".cfg")
        report = "report_json=%s/%s.json" % (here.path, name)
        here.configure("vm-export=" + name, report, *server.settings(**more))
        runs.append(here.start())
    results = [finish(process) for process in runs]
    for number, (result, cause) in enumerate(zip(results, (
            "451", None, "535", "CERTIFICATE_VERIFY_FAILED"))):
        assert result.status == (1 if cause else 0), result
        assert result.has("VmBackup ended - Success - S:1 W:0 E:0")
        assert len(here.folders("vm%d" % number)) == 1
        told = json.loads((here.path / ("vm%d.json" % number)).read_text(encoding="utf-8"))
        ending = (1, "WARNING") if cause else (0, "SUCCESS")
        assert (told["exit_status"], told["status"]) == ending
        warned = [line for line in result.lines if "the mail could not be sent" in line]
        if cause:
            (line,) = warned
            assert line.startswith("***WARNING - ")
            assert cause in line and "b'" not in line
        else:
            assert not warned
        assert told["warnings"] == warned
        assert "guess" not in result.out + result.err
    assert (len(down.mails), len(well.mails)) == (0, 1)
    assert not strict.mails
    assert not foreign.mails


def test_a_receiver_that_is_refused_is_told_and_the_others_get_one_mail(here, mail_server):
    server = mail_server(unknown="gone@example.org")
    here.configure("vm-export=db", *server.settings(mail_to="admin@example.org, gone@example.org"))
    result = here.run()
    assert result.status == 1, result
    assert result.has("the mail could not be sent: gone@example.org: 550 no such user here")
    assert [envelope.rcpt_tos for envelope in server.envelopes] == [["admin@example.org"]]


def test_smtp_ca_vouches_for_a_mail_server(here, mail_server, tmp_path):
    """With it the certificate is checked on loopback, too."""
    server = mail_server(tls=True)
    here.configure("vm-export=db", *server.settings(
        smtp_starttls=True, smtp_ca=server.certificate))
    assert here.run().status == 0
    here.configure("vm-export=db", *server.settings(
        smtp_starttls=True, smtp_ca=here.sim.certificate))
    result = here.run()
    assert result.status == 1, result
    assert result.has("CERTIFICATE_VERIFY_FAILED")
    assert server.encrypted == [True]


def test_a_stop_is_told_by_mail_and_waits_for_no_mail_server(here, mail_server):
    """VMs that it left unbegun are in the mail; one try has to do."""
    server, silent = mail_server(), socket.socket()
    silent.bind(("127.0.0.1", 0))
    silent.listen(1)
    for number, port in enumerate((server.port, silent.getsockname()[1]), 1):
        here.configure("vm-export=.*", "report_json=%s/report.json" % here.path,
                       *server.settings(smtp_port=port))
        here.sim.fault("export_silence", after=4096, seconds=3600)
        process = hasty(here, MAIL_TIMEOUT=2)
        wait_until(lambda number=number: number == sum(
            call["method"] == "GET /export" for call in here.sim.calls()))
        begin = time.monotonic()
        process.terminate()
        wait_until(lambda number=number: number == sum(
            call["method"] == "task.cancel" for call in here.sim.calls()))
        here.sim.clear_faults()
        result = finish(process)
        assert result.status == 143, result
        assert time.monotonic() - begin < 20
        told = json.loads((here.path / "report.json").read_text(encoding="utf-8"))
        assert told["exit_status"] == 143
        assert [vm["status"] for vm in told["vms"]].count("SKIPPED") == 2
    silent.close()
    (mail,) = server.mails
    assert mail["Subject"].startswith("ERROR ")
    assert len(re.findall(r"^\S.* +skipped\b", text_of(mail), re.M)) == 2


@pytest.mark.parametrize("setting, value", [
    ("mail_from", "a b@c d"), ("mail_to", "<>"), ("mail_to", '"'),
])
def test_an_odd_address_is_a_warning_at_worst(here, mail_server, setting, value):
    server = mail_server()
    here.configure("vm-export=db", *server.settings(**{setting: value}))
    result = here.run()
    assert result.has("VmBackup ended - Success - S:1 W:0 E:0")
    failed = result.has("***WARNING - the mail could not be sent: ")
    assert (result.status, failed) == (1 - len(server.mails), not server.mails)


def test_a_login_needs_a_password_file_and_encryption(here):
    mail = ("mail_to=a@example.org", "mail_from=b@example.org", "smtp_user=backup")
    here.configure("vm-export=db", "smtp_server=mail.example.org", *mail)
    result = here.run()
    assert result.status == 3, result
    assert result.has("smtp_starttls=True")
    here.configure("vm-export=db", "smtp_server=127.0.0.1", *mail)
    result = here.run()
    assert result.status == 3, result
    assert result.has("smtp_password_file")
    assert not here.sim.calls()
