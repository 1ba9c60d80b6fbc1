# SPDX-License-Identifier: GPL-3.0-or-later
"""Which VMs are chosen: rules, and properties."""
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vmbackup

QUICK = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))


def rules_of(*lines):
    pairs = [line.partition("=")[::2] + ("here",) for line in lines]
    return vmbackup.make_settings(pairs, []).rules


def chosen(lines, names):
    """{name: (kind, own max_backups)} of the VMs that these lines of a config file choose."""
    selection = vmbackup.select(rules_of(*lines), {name: ["ref"] for name in names})
    found = {choice.name: (choice.kind, choice.keep) for choice in selection.choices}
    assert len(found) == len(selection.choices), "a VM is chosen twice"
    return found


VM, VDI = "vm-export", "vdi-export"


@pytest.mark.parametrize("lines, names, expected", [
    # a simple name is itself alone, any other value matches at the start and is open at its end
    (["vm-export=web"], ["web", "web2", "my web"], {"web": (VM, None)}),
    (["vm-export=we."], ["web", "web2", "my web"], {"web": (VM, None), "web2": (VM, None)}),
    (["vm-export=web$"], ["web", "web2"], {"web": (VM, None)}),
    (["vm-export=web 1-a_B"], ["web 1-a_B", "web 1-a_B2"], {"web 1-a_B": (VM, None)}),
    (["vm-export=Web"], ["web", "Web"], {"Web": (VM, None)}),
    (["vm-export="], ["a", "b.c"], {"a": (VM, None), "b.c": (VM, None)}),
    (["vm-export=web.1"], ["web.1", "webx1", "web.10"],
     {"web.1": (VM, None), "webx1": (VM, None), "web.10": (VM, None)}),
    # :N, only from the end
    (["vm-export=web:2"], ["web"], {"web": (VM, 2)}),
    (["vm-export=web:1"], ["web"], {"web": (VM, 1)}),
    (["vm-export=a|b:2"], ["a", "b", "c"], {"a": (VM, 2), "b": (VM, 2)}),
    (["vm-export=:7"], ["a"], {"a": (VM, 7)}),
    (["vm-export=(?:x|y).*"], ["x1", "z"], {"x1": (VM, None)}),
    (["vm-export=a:b"], ["a", "a:b", "a:b:c"], {"a:b": (VM, None), "a:b:c": (VM, None)}),
    (["vm-export=a:3:2"], ["a", "a:3", "a:3:2"], {"a:3": (VM, 2), "a:3:2": (VM, 2)}),
    (["vdi-export=web:3"], ["web"], {"web": (VDI, 3)}),
    # a regular expression does not replace what a simple name chose, wherever either stands
    (["vm-export=web:9", "vm-export=w.*:2"], ["web", "www"], {"web": (VM, 9), "www": (VM, 2)}),
    (["vm-export=w.*:2", "vm-export=web:9"], ["web", "www"], {"web": (VM, 9), "www": (VM, 2)}),
    (["vm-export=web", "vm-export=w.*:2"], ["web"], {"web": (VM, None)}),
    # among equals the last counts, its :N too, and that it has none
    (["vm-export=web:2", "vm-export=web:3"], ["web"], {"web": (VM, 3)}),
    (["vm-export=web:2", "vm-export=web"], ["web"], {"web": (VM, None)}),
    (["vm-export=w.*:2", "vm-export=.e.*:3"], ["web", "www"], {"web": (VM, 3), "www": (VM, 2)}),
    (["vm-export=w.*:2", "vm-export=.*"], ["web"], {"web": (VM, None)}),
    # exclude wins, wherever it stands
    (["vm-export=.*", "exclude=web"], ["web", "db"], {"db": (VM, None)}),
    (["exclude=web", "vm-export=.*"], ["web", "db"], {"db": (VM, None)}),
    (["vm-export=web", "exclude=w.*"], ["web"], {}),
    (["vdi-export=web", "exclude=web"], ["web"], {}),
    (["vdi-export=web", "exclude=web", "vm-export=web"], ["web"], {}),
    (["exclude=web:2", "vm-export=.*"], ["web", "web:2"], {"web": (VM, None)}),
    (["exclude=", "vm-export=.*"], ["web"], {"web": (VM, None)}),
    # what vdi-export chose is not vm-exported
    (["vdi-export=web", "vm-export=.*"], ["web", "db"], {"web": (VDI, None), "db": (VM, None)}),
    (["vm-export=.*", "vdi-export=w.*:2"], ["web", "db"], {"web": (VDI, 2), "db": (VM, None)}),
    (["vm-export=web", "vdi-export=web"], ["web"], {"web": (VDI, None)}),
    (["vdi-export=", "vm-export=db"], ["web", "db"], {"db": (VM, None)}),
    # letters and digits of any script, with their combining marks, make a simple name
    (["vm-export=Büro"], ["Büro", "Büro 2"], {"Büro": (VM, None)}),
    (["vm-export=Bu\u0308ro"], ["Bu\u0308ro", "Bu\u0308ro 2"], {"Bu\u0308ro": (VM, None)}),
    (["vm-export=東京"], ["東京", "東京2"], {"東京": (VM, None)}),
    (["vm-export=हिन्दी"], ["हिन्दी", "हिन्दी2"], {"हिन्दी": (VM, None)}),
    (["vm-export=العربية ٣"], ["العربية ٣", "العربية ٣٤"], {"العربية ٣": (VM, None)}),
    (["vm-export=🐘"], ["🐘", "🐘🐘"], {"🐘": (VM, None), "🐘🐘": (VM, None)}),
])
def test_rules(lines, names, expected):
    assert chosen(lines, names) == expected


def test_what_matched_nothing_is_told_by_its_kind():
    """A simple name without a VM is an error, an expression or exclude without one a warning."""
    rules = rules_of("vm-export=gone", "vm-export=none.*:2", "exclude=nobody", "exclude=x.*")
    selection = vmbackup.select(rules, {"a": [1]})
    assert [(choice.name, choice.refs) for choice in selection.choices] == [("gone", [])]
    assert selection.unmatched == ["vm-export=none.*:2"]
    assert selection.unknown_excludes == ["nobody", "x.*"]
    assert selection.left == ["a"]


@pytest.mark.parametrize("line", ["vm-export=web:0", "vdi-export=web:0", "vm-export=a.*:00",
                                  "vm-export=web:-1"])
def test_own_max_backups_is_one_or_more(line):
    with pytest.raises(vmbackup.ConfigError, match="1 or more.*" + re.escape(line)):
        rules_of(line)


NO_REGEX = ["(", "*a", "[a", "a**", "(?P<x>a)(?P<x>b)", "(?L)a", "(?au)a",
            "a{99999999999999999999}", "(" * 3000 + ")" * 3000]


def compiles(value):
    try:
        re.compile(value)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("value", NO_REGEX)
@pytest.mark.parametrize("key", ["vm-export", "vdi-export", "exclude"])
def test_what_does_not_compile_is_named(key, value):
    """Or, where this Python can compile it, nothing is raised; all of them at once."""
    if compiles(value):
        vmbackup.select(rules_of("%s=%s" % (key, value)), {"web": [1]})
        return
    with pytest.raises(vmbackup.ConfigError) as caught:
        vmbackup.select(rules_of("%s=%s" % (key, value), "exclude=[b"), {"web": [1]})
    first, second = str(caught.value).split("\n")
    assert first.startswith("***ERROR - invalid regex: %s=%s" % (key, value))
    assert second == "***ERROR - invalid regex: exclude=[b"


@pytest.mark.parametrize("name", NO_REGEX[:6] + ["srv (old)", "C++ build", "db[1]", "cost$", "a.b"])
def test_a_vm_is_found_by_its_own_name_whatever_is_in_it(name):
    """An expression for others, too, where it is one; with :N, and as an exclude."""
    assert chosen(["vm-export=" + name], [name, "other"])[name] == (VM, None)
    assert chosen(["vdi-export=%s:3" % name], [name, "other"])[name] == (VDI, 3)
    assert name not in chosen(["vm-export=.*", "exclude=" + name], [name, "other"])
    (note,) = vmbackup.select(rules_of("vm-export=" + name), {name: [1]}).notes
    assert note.startswith("NOTE - vm-export=%s: " % name)
    assert "may match others too" in note


def test_the_note_tells_what_a_name_matches_besides():
    (note,) = vmbackup.select(rules_of("vm-export=db[1]"), {"db[1]": [1], "db1": [2]}).notes
    assert note.endswith("others too: db1")


@pytest.mark.parametrize("lines, names, notes", [
    (["vm-export=P-db.*:7", "vm-export=P-.*"], ["P-db1", "P-web"], ["vm-export=P-.*"]),
    (["vm-export=P-db.*:7", "vm-export=P-db1", "exclude=.*2", "vdi-export=.*3"],
     ["P-db1", "P-db2", "P-db3"], ["vm-export=P-db1", "exclude=.*2", "vdi-export=.*3"]),
    (["vm-export=web", "exclude=web"], ["web"], ["exclude=web"]),
    (["vm-export=web", "vdi-export=web"], ["web"], ["vdi-export=web"]),
    (["vm-export=web:1", "vm-export=web:2"], ["web"], ["vm-export=web:2"]),
    (["vm-export=a.*", "vm-export=.*b"], ["ab", "ac"], None),  # one is left to it
    (["vm-export=a", "vm-export=.*"], ["a", "b"], None), (["vm-export=gone"], ["a"], None),
])
def test_a_rule_whose_vms_others_took_is_told_with_them(lines, names, notes):
    found = vmbackup.select(rules_of(*lines), {name: [1] for name in names}).notes
    expected = ["NOTE - %s: all its VMs were taken by %s" % (lines[0], ", ".join(notes))] * (
        notes is not None) if notes else []
    assert found == expected


@pytest.mark.parametrize("line, meant", [
    ("vm-export=*", "this is written .*)"), ("vdi-export=web*", "this is written web.*)"),
    ("vm-export=*.example.org:2", r"this is written .*\.example\.org)"),
    ("vm-export=web # the shop", "a comment stands on a line of its own"),
    ("vm-export=web, db", "one name or expression a line"), ("vm-export=web;db", "one name"),
    ('vm-export="web shop":2', "leave the quotes out"), ("vm-export='web':2", "quotes"),
    ("vm-export=web.+", ""), ("vm-export=x{2,3}y", "one name or"), ("vm-export=web.*", ""),
])
def test_what_is_probably_meant_is_told(line, meant):
    try:
        (text,) = vmbackup.select(rules_of(line), {"sql": [1]}).unmatched
    except vmbackup.ConfigError as error:
        text = str(error).replace("***ERROR - invalid regex: ", "")
    assert text.startswith(line)
    assert meant in text if meant else text == line


@pytest.mark.parametrize("name, names, near", [
    ("web01", ["Web01", "web02"], "Web01"), ("wbe", ["web"], "web"), ("we", ["web"], "web"),
    ("webb", ["web"], "web"), ("wib", ["web", "wobb"], "web"), ("DEV mySql", ["DEV-mySql"], 0),
    ("Bu\u0308ro", ["Büro"], 0), ("web", ["sql", "w", "wxyb"], ""), ("web1", ["web"], "web"),
    ("web1", ["web2", "mail"], "web2"), ("a", [], ""), ("Sql-Server", ["web", "sql-servre"], 1),
])
def test_the_name_that_differs_in_case_or_by_a_letter(name, names, near):
    assert vmbackup.similar(name, names) == (names[near] if isinstance(near, int) else near)


def test_a_missing_name_is_told_with_the_nearest_one():
    found = vmbackup.select(rules_of("vm-export=Web", "exclude=dbb", "vm-export=q"),
                            {"web": [1], "db": [2]})
    assert found.notes == ['NOTE - vm-export=Web: no VM bears this name (perhaps "web" is meant)',
                           'NOTE - exclude=dbb: no VM bears this name (perhaps "db" is meant)']
    assert found.unknown_excludes == ["dbb"]


def narrowed(names, *only):
    lines, words = ["vm-export=.*", "vdi-export=db.*:3", "vm-export=gone", "exclude=old"], []
    words = [("only", value, "here") for value in only]
    made = vmbackup.make_settings([line.partition("=")[::2] + ("f",) for line in lines], words)
    found = vmbackup.select(made.rules, {name: [1] for name in names}, made.only)
    return sorted((choice.name, choice.keep) for choice in found.choices), found


@pytest.mark.parametrize("only, expected", [
    (["web"], [("web", None)]), (["db."], [("db1", 3), ("db2", 3)]), (["gone"], [("gone", None)]),
    (["web", "db1"], [("db1", 3), ("web", None)]), (["c[1]"], [("c[1]", None)]),
    (["."], [("c[1]", None), ("db1", 3), ("db2", 3), ("gone", None), ("web", None)]),
])
def test_only_narrows_what_was_chosen(only, expected):
    names = ["web", "db1", "db2", "old", "c[1]"]
    choices, found = narrowed(names, *only)
    assert choices == expected
    assert found.left == ["old"], "those that only= left out are in the backup all the same"
    assert found.unmatched == []


@pytest.mark.parametrize("only", ["old", "nothing", "web:3", "Web", "x.*"])
def test_only_that_leaves_nothing(only):
    with pytest.raises(vmbackup.ConfigError, match="only=" + re.escape(only)):
        narrowed(["web", "old"], only)


def test_one_only_of_several_that_matches_nothing_is_told():
    assert narrowed(["web", "db1"], "web", "wbe")[1].unmatched == [
        'only=wbe (perhaps "web" is meant)']


# --- properties ---

NAMES = st.text("ab-._ é1", min_size=1, max_size=4)
VALUES = st.one_of(NAMES, st.sampled_from(["a.*", ".*", "[ab]", "a|b", "b$", "", "é."]))
LINES = st.lists(st.tuples(st.sampled_from([VM, VDI, "exclude"]), VALUES,
                           st.sampled_from(["", ":1", ":12"])), max_size=8)


@QUICK
@given(LINES, st.sets(NAMES, max_size=8))
def test_every_vm_goes_where_the_rules_say(lines, names):
    """Against the rules in other words: for one name, the last simple line, or else the last
    expression, of vdi-export and then of vm-export."""
    lines = [(key, value.strip(), "" if key == "exclude" else keep) for key, value, keep in lines]
    lines = [line for line in lines if line[1] or line[0] == VM]

    def simple(value):
        return bool(value) and not set(value) & set(".*[]|$")

    def fits(value, name):
        return value == name or not simple(value) and bool(re.match(value, name))

    expected = {}
    in_file = {value for key, value, _ in lines if key != "exclude" and simple(value)}
    for name in names | in_file:
        if name in names and any(key == "exclude" and fits(value, name) for key, value, _ in lines):
            continue
        for kind in (VM, VDI):  # the second one wins
            mine = [line for line in lines if line[0] == kind]
            by_name = [line for line in mine if simple(line[1]) and line[1] == name]
            by_regex = [line for line in mine if not simple(line[1]) and fits(line[1], name)]
            last = (by_name or (by_regex if name in names else []))[-1:]
            for _, _, keep in last:
                expected[name] = (kind, int(keep[1:]) if keep else None)
    assert chosen(["%s=%s%s" % line for line in lines], names) == expected


@QUICK
@given(st.lists(st.tuples(st.sampled_from([VM, VDI, "exclude"]), st.text(max_size=12)), max_size=4),
       st.lists(st.text(max_size=6), max_size=4))
def test_no_selector_raises_anything_of_its_own(lines, names):
    try:
        selected = chosen(["%s=%s" % line for line in lines], names)
    except vmbackup.ConfigError:
        return
    assert set(selected) - set(names) <= {
        name for name in selected if vmbackup.make_rule("exclude", name).simple}
