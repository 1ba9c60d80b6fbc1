# SPDX-License-Identifier: GPL-3.0-or-later
"""A strict reader of Prometheus' text exposition format, version 0.0.4, as node_exporter's textfile
collector wants it: UTF-8, line feeds, HELP and TYPE before a metric's samples, all of a metric
together, no series twice, no time stamps."""
import re

try:
    from prometheus_client.parser import text_string_to_metric_families as other_reader
except ImportError:  # then this one alone is the judge
    other_reader = None

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"'
SAMPLE = re.compile(r"(%s)(?:\{(%s(?:,%s)*)\})? (\S+)" % (NAME, LABEL, LABEL))
ESCAPES = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}


def unescaped(text):
    return re.sub(r'\\[\\"n]', lambda match: ESCAPES[match.group()], text)


def read_metrics(data):
    """{(metric, ((label, value), ...)): number} of the bytes of a file; labels sorted by name."""
    text = data.decode("utf-8")
    assert text.endswith("\n")
    series, told, current, ended = {}, {}, None, set()
    for line in text.split("\n")[:-1]:
        comment = re.fullmatch(r"# (HELP|TYPE) (%s) (.+)" % NAME, line)
        if comment:
            kind, name, rest = comment.groups()
            if name != current:
                assert name not in ended, "%s stands in two places" % name
                ended.add(current)
                current = name
            assert (name, kind) not in told, line
            assert not any(metric == name for metric, _ in series), "%s after a sample" % kind
            assert kind == "HELP" or rest in ("gauge", "counter", "untyped"), line
            told[name, kind] = rest
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample, line
        assert sample.group(1) == current, line
        labels = [(name, unescaped(value)) for name, value in re.findall(LABEL, sample.group(2))]
        assert len(dict(labels)) == len(labels), line
        key = current, tuple(sorted(labels))
        assert key not in series, line
        series[key] = float(sample.group(len(sample.groups())))
    for metric, _ in series:
        assert (metric, "HELP") in told and (metric, "TYPE") in told, metric
    if other_reader:
        theirs = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value
                  for family in other_reader(text) for sample in family.samples}
        assert theirs == series
    return series
