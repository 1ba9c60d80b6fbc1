# SPDX-License-Identifier: GPL-3.0-or-later
"""Which folder is a VM's, and which backups in it expire: rules, and properties."""
import hashlib
import os
import string
import unicodedata

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import vmbackup

QUICK = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
TRICKY = st.text(st.sampled_from("/%.~2Fa5Ee0\0\n\x7f\x85é🐘-"), max_size=8)
LONG = st.builds(lambda start, char, count, end: start + char * count + end, TRICKY,
                 st.sampled_from("aé🐘%/"), st.integers(30, 210),
                 st.one_of(TRICKY, st.text("0123456789abcdef", min_size=8, max_size=8)
                           .map(lambda digits: "~" + digits)))
ANY_NAME = st.one_of(st.text(max_size=30), TRICKY, LONG)
FOLDERS = st.lists(st.builds(
    vmbackup.Folder, st.text(string.ascii_letters, min_size=1, max_size=6),
    st.one_of(st.none(), st.integers(0, 20).map(float)),
    st.one_of(st.none(), st.sampled_from(vmbackup.MARKERS)), st.booleans(),
), max_size=12, unique_by=lambda folder: folder.name)


def escaped(name):
    """The contract's words for the names of folders, char by char."""
    found = ""
    for index, char in enumerate(name):
        control = unicodedata.category(char) == "Cc"
        if char in "/%" or control or (char == "." and index == 0):
            found += "".join("%%%02X" % byte for byte in char.encode("utf-8"))
        else:
            found += char
    return found


@QUICK
@given(ANY_NAME)
@example("")
@example(".")
@example("..")
@example("success")
@example("-rf")
@example("a" * 200)
@example("a" * 201)
def test_a_folder_lies_inside_backup_dir(name):
    folder = vmbackup.folder_name(name)
    data = os.fsencode(vmbackup.native(folder))
    assert data == folder.encode("utf-8")
    assert 0 < len(data) <= 200
    assert os.path.dirname(os.path.normpath(b"/backups/" + data)) == b"/backups"
    assert not data.startswith(b".")
    assert not [char for char in folder if unicodedata.category(char) == "Cc"]


@QUICK
@given(st.text(min_size=1, max_size=60))
@example("a" * 200)
@example("é" * 100)
@example("/etc/passwd")
@example("../../x")
@example("100%")
@example("a.b")
@example("a\x85\n\0")
def test_a_short_name_is_escaped_as_the_contract_says(name):
    assume(len(escaped(name).encode("utf-8")) <= 200)
    assert vmbackup.folder_name(name) == escaped(name)


@QUICK
@given(LONG)
def test_a_long_name_ends_in_its_hash(name):
    assume(len(escaped(name).encode("utf-8")) > 200)
    digits = hashlib.sha256(name.encode("utf-8")).hexdigest()[:8]
    folder = vmbackup.folder_name(name)
    assert folder.endswith("~" + digits)
    assert escaped(name).startswith(folder[:-9])
    assert len(folder.encode("utf-8")) > 190


@QUICK
@given(st.lists(ANY_NAME, min_size=2, max_size=12, unique=True))
@example(["/", "%2F", "%252F"])
@example([".a", "%2Ea"])
@example(["a" * 300, "a" * 301])
def test_two_names_never_share_a_folder(names):
    folders = [vmbackup.folder_name(name) for name in names]
    folders += [vmbackup.folder_name(folder) for folder in set(folders) - set(names)]
    assert len(set(folders)) == len(folders)


def test_a_name_that_looks_like_a_cut_one_gets_a_folder_of_its_own():
    long = "a" * 300
    assert vmbackup.folder_name(vmbackup.folder_name(long)) != vmbackup.folder_name(long)


@QUICK
@given(FOLDERS, st.integers(-1, 6), st.data())
def test_only_good_backups_beyond_the_newest_expire(folders, keep, data):
    """G3: never what bears no marker or date, never the newest good one, never the one just made,
    and what goes is older than all that stays."""
    good = {folder.name: folder.created for folder in folders
            if folder.marker and folder.created is not None}
    newest = data.draw(st.sampled_from([None] + sorted(good)))
    doomed = vmbackup.expired(folders, keep, newest)
    stay = set(good) - set(doomed)
    assert len(set(doomed)) == len(doomed)
    assert set(doomed) <= set(good)
    assert len(stay) == min(len(good), max(keep, 1))
    assert newest is None or newest in stay
    ages = [good[name] for name in doomed]
    assert ages == sorted(ages)
    assert not ages or all(good[name] >= ages[-1] for name in stay - {newest})


@pytest.mark.parametrize("marker", ["success", "success_restore", "success_compress",
                                    "success_compressing"])
def test_every_marker_of_upstream_counts(tmp_path, marker):
    for day in "123":
        folder = tmp_path / ("backup-2026-01-0%s-(02:00:00)" % day)
        folder.mkdir()
        (folder / marker).write_text("")
    (tmp_path / "backup-2026-01-04-(02:00:00)").mkdir()
    (tmp_path / "@keep").mkdir()
    found = vmbackup.list_folders(str(tmp_path), [vmbackup.DEFAULT_PATTERN])
    assert vmbackup.expired(found, 2) == ["backup-2026-01-01-(02:00:00)"]
