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


@pytest.mark.parametrize("value", ["(", "*a", "[a", "a**", "(?P<x>a)(?P<x>b)", "(?L)a", "(?au)a",
                                   "a{99999999999999999999}", "(" * 3000 + ")" * 3000])
@pytest.mark.parametrize("key", ["vm-export", "vdi-export", "exclude"])
def test_what_does_not_compile_is_named(key, value):
    """Or, where this Python can compile it, nothing is raised."""
    try:
        re.compile(value)
    except Exception:
        with pytest.raises(vmbackup.ConfigError) as caught:
            rules_of("%s=%s" % (key, value))
        assert str(caught.value) == "***ERROR - invalid regex: %s=%s" % (key, value)
    else:
        rules_of("%s=%s" % (key, value))




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
        return value == name if simple(value) else bool(re.match(value, name))

    expected = {}
    in_file = {value for key, value, _ in lines if key != "exclude" and simple(value)}
    for name in names | in_file:
        if name in names and any(key == "exclude" and fits(value, name) for key, value, _ in lines):
            continue
        for kind in (VM, VDI):  # the second one wins
            mine = [line for line in lines if line[0] == kind]
            by_name = [line for line in mine if simple(line[1]) and line[1] == name]
            by_regex = [line for line in mine if not simple(line[1]) and re.match(line[1], name)]
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
    assert set(selected) - set(names) <= {name for name in selected if vmbackup.is_simple(name)}
