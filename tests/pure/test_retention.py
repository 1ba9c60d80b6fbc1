# SPDX-License-Identifier: GPL-3.0-or-later
"""Which backups stay: the rules of retention are one pure function.

The golden cases are restic's: 103 dates and what its rules keep of them. Dates and results are
facts; they stand here as a table. Its "oldest" rule is not ours: where it added a date, that date
is left out here.
"""
import calendar
import collections
import datetime
import itertools
import os
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vmbackup
from vmbackup import Folder, Policy, expired, kept

DAYS = {8: "08 10 12 13 13.1 15 18 20 21 22", 9: "01 02 05 06 08 09 10 11 20 22"}
DAYS[10], DAYS[11] = DAYS[9], DAYS[8]
JANUARY = ("01T01:02:03 01T01:03:03 01T07:08:03 03T07:02:03 04T10:23:03 04T11:23:03 04T12:23:03"
           " 04T12:24:03 04T12:28:03 04T12:30:03 04T16:23:03 05T09:02:03 06T08:02:03 07T10:02:03"
           " 08T20:02:03 09T21:02:03 12T21:02:03 12T21:08:03 18T12:02:03")
HISTORY = ["%d-%02d-%s" % (year, month, day) for year in (2014, 2015) for month in (8, 9, 10, 11)
           for day in DAYS[month].split() + ["22"] * 4 * (year == 2015 and month == 10)]
HISTORY += ["2016-01-" + day for day in JANUARY.split()]
WEEK = "05T09:02:03 06T08:02:03 07T10:02:03 08T20:02:03 09T21:02:03 12T21:08:03 18T12:02:03"
TEN_DAYS = "01T07:08:03 03T07:02:03 04T16:23:03 " + WEEK
AUTUMN = "2015-09-22 2015-10-22 2015-11-22"
THIRTY_DAYS = (
    "2015-09-22 " + " ".join("2015-10-" + day for day in DAYS[10].split())
    + " " + " ".join("2015-11-" + day for day in DAYS[11].split() if day != "13"))
GOLDEN = {  # restic's number: policy, how many stay, which ("": the newest)
    0: ({}, 1, ""),  # restic: none; here the newest always stays
    1: ({"last": 10}, 10, ""),
    2: ({"last": 15}, 15, ""),
    3: ({"last": 99}, 99, ""),
    4: ({"last": 200}, 103, ""),
    6: ({"daily": 3}, 3, "09T21:02:03 12T21:08:03 18T12:02:03"),
    7: ({"daily": 10}, 10, TEN_DAYS),
    8: ({"daily": 30}, 30, THIRTY_DAYS + " " + TEN_DAYS),
    9: ({"last": 5, "daily": 5}, 6,
        "07T10:02:03 08T20:02:03 09T21:02:03 12T21:02:03 12T21:08:03 18T12:02:03"),
    10: ({"last": 2, "daily": 10}, 10, TEN_DAYS),
    11: ({"weekly": 2}, 2, "12T21:08:03 18T12:02:03"),
    12: ({"weekly": 4}, 4, "03T07:02:03 09T21:02:03 12T21:08:03 18T12:02:03"),
    13: ({"daily": 3, "weekly": 4}, 4, "03T07:02:03 09T21:02:03 12T21:08:03 18T12:02:03"),
    14: ({"monthly": 6}, 6, "2014-11-22 2015-08-22 " + AUTUMN + " 18T12:02:03"),
    15: ({"daily": 2, "weekly": 2, "monthly": 6}, 7,
         "2014-11-22 2015-08-22 " + AUTUMN + " 12T21:08:03 18T12:02:03"),
    16: ({"yearly": 10}, 3, "2014-11-22 2015-11-22 18T12:02:03"),
    17: ({"daily": 7, "weekly": 2, "monthly": 3, "yearly": 10}, 10,
         "2014-11-22 2015-10-22 2015-11-22 " + WEEK),
    36: ({"last": 10**18}, 103, ""),
    39: ({"daily": 3, "weekly": 2, "monthly": 10**9, "yearly": 10**9}, 11,
         "2014-08-22 2014-09-22 2014-10-22 2014-11-22 2015-08-22 " + AUTUMN
         + " 09T21:02:03 12T21:08:03 18T12:02:03"),
}


def policy(last=0, daily=0, weekly=0, monthly=0, yearly=0):
    return Policy(last, daily, weekly, monthly, yearly)


def moment_of(text):
    """The datetime that '2014-08-13.1', '2016-01-04T12:23:03' or '04T12:23:03' tells."""
    text = "2016-01-" + text if text[2:3] == "T" else text
    day, _, clock = text.partition("T")
    day, _, part = day.partition(".")
    moment = datetime.datetime.strptime(day + (clock or "10:20:30"), "%Y-%m-%d%H:%M:%S")
    return moment.replace(microsecond=100000 if part else 0)


def backup(moment, number=0, **more):
    """The Folder of a whole backup, made at this local time (of a machine whose zone is UTC)."""
    name = moment.strftime("backup-%Y-%m-%d-(%H:%M:%S)") + ("#%d" % number if number else "")
    created = calendar.timegm(moment.timetuple()) + moment.microsecond / 1e6
    found = Folder(name, created, "success", False, False, "web.xva", 7, "", moment.date())
    return found._replace(**more)


def nightly(first, nights):
    return [backup(datetime.datetime(*first) + datetime.timedelta(days=n)) for n in range(nights)]


def stay(folders, **rules):
    return set(kept(folders, policy(**rules)))


@pytest.fixture(scope="module")
def history():
    folders = [backup(moment_of(text), number) for number, text in enumerate(HISTORY)]
    assert len(folders) == 103
    random.Random(4).shuffle(folders)
    return folders


@pytest.mark.parametrize("number", sorted(GOLDEN))
def test_golden_cases_of_restic(history, number):
    rules, count, dates = GOLDEN[number]
    why = kept(history, policy(**rules))
    inside = [item for item in vmbackup.backups(history) if item.name in why]
    assert len(inside) == count
    if dates:
        moments = [calendar.timegm(moment_of(text).timetuple()) for text in dates.split()]
        assert [int(item.created) for item in inside] == sorted(moments)
    else:
        assert inside == vmbackup.backups(history)[-count:]
    gone = expired(history, policy(**rules))
    assert gone == [item.name for item in vmbackup.backups(history) if item.name not in why]


def test_each_reason_is_told(history):
    why = kept(history, policy(last=2, daily=2, weekly=2, monthly=2, yearly=3))
    told = {name.partition("#")[0][7:]: reasons for name, reasons in why.items()}
    assert told == {
        "2016-01-18-(12:02:03)":
            ["last 2", "daily", "weekly", "monthly", "yearly", "newest whole"],
        "2016-01-12-(21:08:03)": ["last 2", "daily", "weekly"],
        "2015-11-22-(10:20:30)": ["monthly", "yearly"],
        "2014-11-22-(10:20:30)": ["yearly"],
    }
    assert list(why) == [item.name for item in vmbackup.backups(history) if item.name in why]


def test_four_hundred_nights():
    why = stay(nightly((2025, 10, 22, 2), 400), last=4, daily=7, weekly=4, monthly=6)
    assert " ".join(sorted(name[12:17] for name in why)) == (
        "06-30 07-31 08-31 09-30 10-31 11-08 11-15 11-19 11-20 11-21 11-22 11-23 11-24 11-25")


@pytest.mark.parametrize("rules", [
    policy(4, 7, 4, 6, 2), policy(1, monthly=3), policy(2, weekly=8), policy(3)])
@pytest.mark.parametrize("seed", [1, 2])
def test_night_after_night_leaves_what_one_batch_leaves(rules, seed):
    """Some nights fail, some run twice, some exports are hollow; some backups are pinned."""
    dice, here, everything = random.Random(seed), [], []
    for night in range(500):
        for hour in dice.choice([(), (2,), (2,), (2,), (2, 14)]):
            moment = datetime.datetime(2024, 6, 1, hour) + datetime.timedelta(days=night)
            made = backup(moment, size=dice.choice([0, 7, 7, 7]), pinned=dice.random() < 0.01)
            here.append(made)
            everything.append(made)
            gone = expired(here, rules, made.name)
            here = [item for item in here if item.name not in gone]
            assert made in here
    newest = everything[-1].name
    assert {item.name for item in here} == set(kept(everything, rules, newest))


def test_more_rules_only_ever_add():
    folders = nightly((2025, 1, 1, 2), 300)
    alone = [stay(folders, **{rule: 3}) for rule in Policy._fields]
    together = stay(folders, **dict.fromkeys(Policy._fields, 3))
    assert together == set.union(*alone)
    for fewer, more in itertools.product(alone, [together]):
        assert fewer <= more


@pytest.mark.parametrize("rule, nights, stays", [
    # Around new year: ISO weeks 2020-W53 ends on 2021-01-03, 2024-12-30 is in 2025-W01.
    ("weekly", ["2020-12-27", "2020-12-28", "2020-12-31", "2021-01-03", "2021-01-04"],
     ["2020-12-27", "2021-01-03", "2021-01-04"]),
    ("weekly", ["2024-12-29", "2024-12-30", "2025-01-01"], ["2024-12-29", "2025-01-01"]),
    ("weekly", ["2026-12-27", "2026-12-31", "2027-01-03"], ["2026-12-27", "2027-01-03"]),
    ("weekly", ["2025-01-02", "2026-01-01"], ["2025-01-02", "2026-01-01"]),  # W01 of two years
    ("monthly", ["2024-02-28", "2024-02-29", "2024-03-01"], ["2024-02-29", "2024-03-01"]),
    ("monthly", ["2025-03-31", "2026-03-31"], ["2025-03-31", "2026-03-31"]),
    ("yearly", ["2024-12-31", "2025-01-01", "2025-12-31"], ["2024-12-31", "2025-12-31"]),
    ("daily", ["2025-12-31", "2025-12-31T23:59:59", "2026-01-01T00:00:00"],
     ["2025-12-31", "2026-01-01"]),
])
def test_ends_of_periods(rule, nights, stays):
    folders = [backup(moment_of(night)) for night in nights]
    assert sorted(name[7:17] for name in stay(folders, **{rule: 9})) == stays


@pytest.fixture
def berlin():
    """The time zone of Berlin, whose clocks change on 2025-03-30 and 2025-10-26."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = "CET-1CEST,M3.5.0,M10.5.0/3"
    time.tzset()
    yield
    os.environ.pop("TZ")
    if before is not None:
        os.environ["TZ"] = before
    time.tzset()


def test_the_repeated_hour(berlin):
    """02:30 summer time comes before 02:10 winter time: the marker's moment orders them."""
    first = backup(datetime.datetime(2025, 10, 26, 2, 30), created=1761438600.0)
    second = backup(datetime.datetime(2025, 10, 26, 2, 10), created=1761441000.0)
    assert set(kept([second, first], policy(last=1))) == {second.name}
    assert set(kept([second, first], policy(daily=3))) == {second.name}


def test_a_day_is_that_of_the_name_whatever_the_zone_is_now(berlin):
    """Begun at 23:50 of one day, done on the next; and the machine moved to another zone since."""
    late = backup(datetime.datetime(2025, 6, 1, 23, 50), created=1748822400.0)  # 02:00 of June 2
    next_night = backup(datetime.datetime(2025, 6, 2, 23, 50), created=1748908800.0)
    assert set(kept([late, next_night], policy(daily=2))) == {late.name, next_night.name}


def test_one_that_is_not_made_yet_is_of_today():
    """preview asks what would go once the new backup is there."""
    today = datetime.datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)
    folders = [backup(today - datetime.timedelta(days=days)) for days in (0, 1, 2)]
    new = Folder("new", float("inf"), "success", False, False, "web.xva", 1, "", today.date())
    assert set(kept(folders + [new], policy(daily=2), "new")) == {"new", folders[1].name}


def test_a_clock_that_was_wrong():
    """What the clock of one night dates in 2036 does not push the later ones out, and the one just
    made is the newest whatever its name tells."""
    ahead = backup(datetime.datetime(2036, 1, 1), created=2082758400.0)
    nights = [backup(datetime.datetime(2026, 1, day, 2), created=2082758400.0 + day)
              for day in (2, 3, 4)]
    why = kept([ahead] + nights, policy(last=2, daily=3), nights[-1].name)
    assert set(why) == {item.name for item in nights}
    named = backup(datetime.datetime(2026, 1, 5, 2))  # as 3.25 would: its name alone dates it
    assert named.name in kept([ahead, named], policy(last=1), named.name)
    assert set(kept([ahead, named], policy(last=1), named.name)) == {named.name}
    assert set(kept([ahead, named], policy(last=1))) == {ahead.name}


def test_equal_times_are_ordered_by_name():
    moment = datetime.datetime(2026, 1, 1)
    folders = [backup(moment, number) for number in (3, 1, 2)]
    assert expired(folders, policy(last=1)) == [backup(moment, n).name for n in (1, 2)]


def test_what_is_no_backup_is_neither_kept_nor_expired():
    nights = nightly((2026, 1, 1, 2), 3)
    others = [Folder("notes"), nights[0]._replace(marker=None, unfinished=True),
              Folder("golden", None, "success", False, False, "web.xva", 7, "")]
    assert set(kept(others + nights[2:], policy(last=1))) == {nights[2].name}
    assert expired(others + nights[1:], policy(last=1)) == [nights[1].name]
    assert kept([], policy(last=4)) == {} and expired([], policy(last=4)) == []


@pytest.mark.parametrize("hollow", [{"size": 0}, {"export": None, "size": 0}])
def test_the_newest_whole_one_stays(hollow):
    nights = nightly((2026, 1, 1, 2), 4)
    nights[3], nights[2] = nights[3]._replace(**hollow), nights[2]._replace(**hollow)
    why = kept(nights, policy(last=2))
    assert why[nights[1].name] == ["newest whole"]
    assert set(why) == {item.name for item in nights[1:]}
    assert kept(nights, policy(last=2), pre_clean=True) == {
        nights[1].name: ["newest whole"], nights[3].name: ["last 1"]}
    assert kept(nights[2:], policy(last=1)) == {nights[3].name: ["last 1"]}


def test_a_hollow_one_does_not_stand_for_its_day():
    morning = backup(datetime.datetime(2026, 1, 1, 2))
    evening = backup(datetime.datetime(2026, 1, 1, 20), size=0)
    later = nightly((2026, 1, 2, 2), 2)
    assert set(kept([morning, evening] + later, policy(last=1, daily=3))) == {
        morning.name, later[0].name, later[1].name}


def test_pinned_ones_stay_and_do_not_count():
    nights = nightly((2026, 1, 1, 2), 6)
    nights[0], nights[5] = nights[0]._replace(pinned=True), nights[5]._replace(pinned=True)
    why = kept(nights, policy(last=2, daily=1))
    assert why == {nights[0].name: ["pinned"], nights[3].name: ["last 2"],
                   nights[4].name: ["last 2", "daily", "newest whole"],
                   nights[5].name: ["pinned"]}


def test_a_vm_made_anew_does_not_push_out_its_predecessor():
    nights = nightly((2026, 1, 1, 2), 8)
    nights = [item._replace(uuid="old" if number < 3 else "new")
              for number, item in enumerate(nights)]
    why = kept(nights, policy(last=2), nights[-1].name, "new")
    assert why == {nights[2].name: ["another VM's"], nights[6].name: ["last 2"],
                   nights[7].name: ["last 2", "newest whole"]}
    # Night after night it stays, also while room is made for the next one beforehand.
    assert nights[2].name in kept(nights, policy(last=2), pre_clean=True)
    # As many VMs as max_backups, no more.
    assert nights[2].name not in kept(nights, policy(last=1), nights[-1].name, "new")


def test_a_hollow_backup_of_the_predecessor_is_not_the_one_that_stays():
    nights = [item._replace(uuid=owner) for item, owner in zip(
        nightly((2026, 1, 1, 2), 5), ("old", "old", "new", "new", "new"))]
    nights[1] = nights[1]._replace(size=0)
    assert set(kept(nights, policy(last=2))) == {nights[0].name, nights[3].name, nights[4].name}


def test_one_that_tells_no_uuid_is_the_present_vms():
    nights = [item._replace(uuid=owner) for item, owner in zip(
        nightly((2026, 1, 1, 2), 4), ("", "old", "", "new"))]
    assert kept(nights, policy(last=2), uuid="new") == {
        nights[1].name: ["another VM's"], nights[2].name: ["last 2"],
        nights[3].name: ["last 2", "newest whole"]}
    assert kept(nights, policy(last=2), uuid="new") == kept(nights, policy(last=2))


def test_the_newest_backup_may_be_another_vms():
    """A VM made anew that has no backup yet, before its first one."""
    nights = [item._replace(uuid="old") for item in nightly((2026, 1, 1, 2), 3)]
    why = kept(nights, policy(last=1), uuid="new", pre_clean=True)
    assert why == {nights[2].name: ["last 1", "newest whole", "another VM's"]}


def test_two_pools_in_one_folder():
    nights = [item._replace(uuid="ab"[number % 2]) for number, item in enumerate(
        nightly((2026, 1, 1, 2), 10))]
    assert set(kept(nights, policy(last=4))) == {item.name for item in nights[-4:]}


def test_ten_thousand_backups_take_no_time():
    folders, begin = nightly((2000, 1, 1, 2), 10000), time.monotonic()
    found = collections.Counter(itertools.chain(*kept(folders, policy(4, 7, 4, 12, 30)).values()))
    assert found["yearly"] == 28 and found["monthly"] == 12
    assert time.monotonic() - begin < 2


HOURS = st.integers(0, 900)  # since new year
BACKUPS = st.lists(
    st.tuples(HOURS, st.sampled_from([0, 7, 7]), st.sampled_from(["", "a", "b", "c"]),
              st.sampled_from([False, False, False, True])), max_size=25)
RULES = st.builds(Policy, st.integers(1, 5), *[st.integers(0, 4)] * 4)


@settings(deadline=None, max_examples=100)
@given(BACKUPS, RULES, st.sampled_from(["", "a", "b"]), st.booleans(), st.randoms())
def test_what_holds_for_all_rules_and_backups(found, rules, uuid, pre_clean, dice):
    """Never the newest good backup, never what bears no marker; the last stay; more rules keep
    more; what was pruned once is done."""
    start = datetime.datetime(2026, 1, 1)
    folders = [backup(start + datetime.timedelta(hours=hours), number, size=size, uuid=owner,
                      pinned=pinned) for number, (hours, size, owner, pinned) in enumerate(found)]
    loose = [item for item in vmbackup.backups(folders) if not item.pinned]
    newest = dice.choice(loose).name if loose and not pre_clean else None
    loose.sort(key=lambda item: item.name == newest)
    others = [Folder("notes"), backup(start, 99, marker=None)]
    why = kept(folders + others, rules, newest, uuid, pre_clean)
    gone = expired(folders + others, rules, newest, uuid, pre_clean)
    assert sorted(list(why) + gone) == sorted(item.name for item in folders)
    assert all(item.name in why for item in folders if item.pinned)
    last = rules.last - pre_clean or 1
    assert all(item.name in why for item in loose[-last:])
    assert all(item.name in why for item in [i for i in loose if vmbackup.whole(i)][-1:])
    present = uuid or next((item.uuid for item in loose[::-1] if item.uuid), "")
    owned = {item.uuid or present: item.name for item in loose if item.size}  # the newest of each
    assert rules.last < 4 or set(owned.values()) <= set(why)
    count = last + sum(rules[1:]) + rules.last + sum(item.pinned for item in folders)
    assert len(why) <= count
    more = Policy(*[number + dice.randint(0, 2) for number in rules])
    assert set(why) <= set(kept(folders, more, newest, uuid, pre_clean))
    stay = [item for item in folders if item.name in why]
    # Where nobody says whose VM it is, what was pruned may have told so.
    assert not uuid or expired(stay, rules, newest, uuid, pre_clean) == []
