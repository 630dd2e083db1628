"""`fastmtp report`: tables against the paper's own numbers, pictures and page well-formed, merging."""

import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from helpers.bench_results import MEANS, TABLE_1, TABLE_2, TASKS, run, table_1, table_2

from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.files.plot_style import PALETTE
from swift_fastmtp.files.table import escape, markdown, terminal_table
from swift_fastmtp.report import tables
from swift_fastmtp.report.entries import entries, fastest_maps, mean_speedup
from swift_fastmtp.report.figure import inline_svg
from swift_fastmtp.report.merge import load_results, notes
from swift_fastmtp.report.plots import plots
from swift_fastmtp.report.report import report

NASTY = 'a|b <script src="http://x.example/x.js"></script> $\\frac{$ ![x](http://x.example/p.png) 中文 &amp;'


@pytest.fixture
def load(tmp_path):
    """Results dicts, by way of files."""

    def write(*values):
        paths = []
        for i, value in enumerate(values):
            paths.append(tmp_path / f"{i}.json")
            paths[-1].write_text(json.dumps(value), encoding="utf-8")
        return load_results(paths)

    return write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report of the paper's two tables, with three concurrencies, another temperature, and hostile names."""
    base = tmp_path_factory.mktemp("report")
    first, second = table_1((1, 4, 16)), table_2()
    first["servers"]["vanilla-k3"]["command"] = ["python", NASTY]
    first["settings"]["tasks"]["math_500"]["title"] = NASTY
    first["runs"].append(run("self-k3", "qa", 2.2, 40.0, 31.92, 3, temperature=0.6))
    for value in (second["servers"], second["settings"]["tasks"]):
        for name in [n for n in value if n != "baseline"]:
            value[f"two-{name}"] = value.pop(name)
    for r in second["runs"]:
        r["task"] = f"two-{r['task']}"
        r["server"] = r["server"] if r["server"] == "baseline" else f"two-{r['server']}"
    for name, value in (("1.json", first), ("2.json", second)):
        (base / name).write_text(json.dumps(value), encoding="utf-8")
    report([base / "1.json", base / "2.json"], base / "out")
    return base / "out"


def test_table_1_is_the_papers(load):
    table = tables.main_table(load(table_1()), 0.0, 1)
    assert table.columns[:4] == [("", "K"), ("", "method"), ("MT.", "τ"), ("MT.", "token/s")]
    assert table.columns[-3:] == [("Mean", "τ"), ("Mean", "token/s"), ("Mean", "speedup")]
    assert [row[:2] for row in table.rows[:2]] == [["0", "Baseline"], ["1", "Vanilla MTP"]]
    assert table.rows[0][2:4] == ["1.00", "31.28"] and table.rows[0][-1] == "1.00×"
    assert len(table.rows) == 1 + len(TABLE_1)
    for row, (name, numbers) in zip(table.rows[1:], TABLE_1.items(), strict=True):
        assert row[0] == name[-1]
        assert row[2:-3] == numbers.split()
        if name in MEANS:  # the paper's means are of unrounded numbers: half a unit of the last place apart
            expected = MEANS[name].split()
            assert abs(float(row[-3]) - float(expected[0])) < 0.011
            assert abs(float(row[-2]) - float(expected[1])) < 0.011
            assert row[-1] == expected[2]


def test_table_2_is_the_papers(load):
    rows = tables.map_table(load(table_2()), 0.0, 1).rows
    expected = []
    for task, (base, sizes) in TABLE_2.items():
        title, language = TASKS[task]
        expected.append([title, "3", "Baseline", "1.000", f"{base:.3f}", "1.000×"])
        for size, (tau, speed, speedup) in sizes.items():
            name = "whole vocabulary" if size is None else f"{language}-{size} ({size:,} ids)"
            expected.append([title, "3", name, f"{tau:.3f}", f"{speed:.3f}", speedup])
    assert rows == expected


def test_acceptance_is_labelled_and_losslessness_told(load):
    value = table_2()
    value["runs"][1] |= {"marginal": [0.7, 0.35, 0.07], "conditional": [0.7, 0.5, 0.2], "tau_micro": 2.12}
    value["runs"][1] |= {
        "lossless": {"compared": 80, "equal": 79, "first_divergence": {"id": "q7", "turn": 1, "token": 9}}
    }
    results = load(value)
    rows = tables.acceptance_table(results, 0.0).rows
    assert rows[0] == ["3", "FastMTP", "ZH.", "marginal", "70.0%", "35.0%", "7.0%", "2.12", "2.56"]
    assert rows[1] == ["3", "FastMTP", "ZH.", "conditional", "70.0%", "50.0%", "20.0%", "", ""]
    row = tables.lossless_table(results).rows[0]
    assert row[-2:] == ["79 of 80", "request q7, turn 1, token 9"]
    assert any("1 of 10 runs" in note for note in notes(results))
    latency = tables.latency_table(results)
    assert latency.rows[0][5:8] == ["41.0", "52.0", "80.5"]


def test_mean_speedup_by_hand(load):
    value = table_2()
    fast, slow = (r for r in value["runs"] if r["server"] == "tuned-k3")
    fast |= {"tokens_per_second_per_request": 60.0, "speedup": {"value": 2.0, "low": 1.9, "high": 2.2}}  # baseline 30
    slow |= {"tokens_per_second_per_request": 15.0, "speedup": {"value": 1.5, "low": 1.3, "high": 1.6}}  # baseline 10
    runs = [r for r in load(value).runs if r.server == "tuned-k3"]
    ratio = mean_speedup(runs)
    assert ratio.value == pytest.approx(75 / 40)
    assert ratio.value - ratio.low == pytest.approx(((30 * 0.1) ** 2 + (10 * 0.2) ** 2) ** 0.5 / 40)
    assert ratio.high - ratio.value == pytest.approx(((30 * 0.2) ** 2 + (10 * 0.1) ** 2) ** 0.5 / 40)
    runs[0].speedup = None
    assert mean_speedup(runs) is None and mean_speedup([]) is None


def test_maps_of_one_method_are_one_row_unless_they_ran_the_same_task(load):
    value = table_2()
    several = [e.name for e in entries(load(value), 0.0, 1)]
    assert several[:3] == ["Baseline", "FastMTP", "FastMTP + FR (zh-8192)"] and len(several) == 8
    assert [e.name for e in fastest_maps(entries(load(value), 0.0, 1))] == ["Baseline", "FastMTP", "FastMTP + FR"]
    fastest = fastest_maps(entries(load(value), 0.0, 1))[-1]
    assert {task: r.server for task, r in fastest.runs.items()} == {
        "c_eval": "tuned-k3-zh-16384",
        "mt_bench": "tuned-k3-en-16384",
    }
    kept = ("baseline", "tuned-k3", "tuned-k3-zh-16384", "tuned-k3-en-16384")
    value["runs"] = [r for r in value["runs"] if r["server"] in kept]
    results = load(value)
    assert [e.name for e in entries(results, 0.0, 1)] == ["Baseline", "FastMTP", "FastMTP + FR"]
    assert tables.main_table(results, 0.0, 1).rows[-1][2:6] == ["2.52", "62.93", "2.52", "62.14"]


def test_what_was_not_measured_stays_empty(load):
    value = table_1()
    value["runs"] = [r for r in value["runs"] if (r["server"], r["task"]) != ("self-k3", "qa")]
    for r in value["runs"]:
        r["ttft"] = r["itl"] = None
        if r["server"] == "vanilla-k1":
            r |= {"tau_micro": None, "tau_macro": None, "marginal": [], "conditional": [], "histogram": []}
        if r["server"] == "fixed-k1" and r["task"] == "rag":
            r |= {"num_failed": 80, "tokens_per_second": 0.0, "tokens_per_second_per_request": 0.0, "speedup": None}
    results = load(value)
    rows = {f"{row[1]} {row[0]}": row for row in tables.main_table(results, 0.0, 1).rows}
    assert rows["Self-data FT 3"][10:12] == ["–", "–"] and rows["Self-data FT 3"][-3:] == ["–", "–", "–"]
    assert rows["Vanilla MTP 1"][2:4] == ["–", "41.86"] and rows["Vanilla MTP 1"][-3:] == ["–", "41.67", "1.32×"]
    assert rows["Fixed-data FT 1"][9] == "–" and rows["Fixed-data FT 1"][-2:] == ["–", "–"]
    assert tables.latency_table(results) is None
    told = "\n".join(notes(results))
    assert "80 of 80 requests failed: fixed-k1 on rag (temperature 0, concurrency 1)" in told
    assert "did not tell how many drafts" in told


def test_a_baseline_alone_or_no_baseline_is_a_report_too(load):
    value = table_2()
    value["runs"] = [r for r in value["runs"] if r["server"] == "baseline"]
    assert plots(load(value)) == []
    value = table_2()
    value["baseline"] = None
    value["runs"] = [{**r, "speedup": None, "lossless": None} for r in value["runs"] if r["server"] != "baseline"]
    results = load(value)
    assert {p.name for p in plots(results)} == {
        "acceptance-by-depth",
        "map-sizes",
        "accepted-per-step",
        "tau-by-position",
        "tau-by-context",
    }
    assert tables.speedup_table(results, 0.0, 1) is None and "no baseline" in notes(results)[0]


def test_files_merge(load):
    whole = table_1()
    parts = []
    for of_part in (lambda task: task == "qa", lambda task: task != "qa"):
        part = copy.deepcopy(whole)
        part["runs"] = [r for r in part["runs"] if of_part(r["task"])]
        part["settings"]["tasks"] = {k: v for k, v in part["settings"]["tasks"].items() if of_part(k)}
        parts.append(part)

    def cells(results):
        table = tables.main_table(results, 0.0, 1)
        order = [table.columns.index((title, name)) for title, _ in TASKS.values() for name in ("τ", "token/s")]
        return [[row[i] for i in (0, 1, *order, -3, -2, -1)] for row in table.rows]

    assert cells(load(parts[1], parts[0])) == cells(load(whole))
    parts[0]["provenance"]["hardware"] = "another machine"
    assert "hardware (made by hand, another machine)" in notes(load(*parts[::-1]))[0]


def test_files_that_contradict_each_other_are_one_line(load):
    one = table_1()
    for change, message in (
        (lambda v: None, r"baseline on mt_bench \(temperature 0, concurrency 1\) is also in .*0.json"),
        (lambda v: (v["runs"].clear(), v["servers"]["fr-k1"].update(num_steps=2)), "server 'fr-k1' is another one"),
        (
            lambda v: (v["runs"].clear(), v["settings"]["tasks"]["qa"].update(sha256="f" * 64)),
            "task 'qa' is another one",
        ),
        (lambda v: (v["runs"].clear(), v.update(baseline="vanilla-k1")), "report them apart"),
    ):
        two = copy.deepcopy(one)
        change(two)
        with pytest.raises(FastMTPError, match=message) as error:
            load(one, two)
        assert "\n" not in str(error.value)
    one["runs"] = []
    with pytest.raises(FastMTPError, match="holds no run"):
        load(one)
    with pytest.raises(FastMTPError, match="no results file"):
        load()


def test_same_run_twice_in_one_file(load):
    value = table_2()
    value["runs"].append(value["runs"][0])
    with pytest.raises(FastMTPError, match="twice in it"):
        load(value)


class Page(HTMLParser):
    """What a browser would build, strict about nesting."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.loads, self.labels, self.text = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.note(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.note(tag, attrs)

    def note(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
                self.loads.append(value)
            if name in ("aria-labelledby",):
                self.labels += value.split()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_well_formed_accessible_and_alone(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.labels) <= set(page.ids)
    assert all(target.startswith("#") and target[1:] in page.ids for target in page.loads)
    assert "script" not in page.tags and "img" not in page.tags and "link" not in page.tags
    assert not re.search(r"@import|url\((?!#)", text)
    assert page.tags.count("table") == page.tags.count("caption") > 8
    assert page.tags.count("figure") == page.tags.count("svg") == page.tags.count("desc") > 8
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text and '<html lang="en">' in text
    assert NASTY in "".join(page.text)
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    for color, _ in PALETTE:
        assert color not in svgs  # all follow the reader's scheme
    assert not re.search(r"(fill|stroke): #", svgs)


class Outline(HTMLParser):
    """What a screen reader goes by: headings, tables with their headers, boxes that scroll, pictures."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.boxes, self.unnamed = [], [], []
        self.tables = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        elif tag == "table":
            self.tables.append({"captions": 0, "scopes": set(), "rows": []})
        elif tag == "caption":
            self.tables[-1]["captions"] += 1
        elif tag == "th":
            self.tables[-1]["scopes"].add(given.get("scope"))
        elif tag == "tr":
            self.tables[-1]["rows"].append(0)
        elif given.get("class") == "scroll":
            self.boxes.append(given)
        elif (tag == "img" and not given.get("alt")) or (tag == "svg" and not given.get("aria-labelledby")):
            self.unnamed.append(tag)
        if tag in ("th", "td"):
            self.tables[-1]["rows"][-1] += int(given.get("colspan") or 1)


def test_page_is_read_without_seeing_it(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    outline = Outline(text)
    assert outline.headings.count(1) == 1 and outline.headings[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(outline.headings)), "a level is left out"
    assert 3 in outline.headings, "several answers have headings of their own"
    assert outline.unnamed == []
    assert len(outline.boxes) == len(outline.tables) > 8
    for box in outline.boxes:
        assert box["tabindex"] == "0" and box["role"] == "region" and box["aria-labelledby"]
    for table in outline.tables:
        assert table["captions"] == 1
        assert None not in table["scopes"] and {"col", "row"} <= table["scopes"] <= {"col", "row", "colgroup"}
        assert table["rows"][0] == table["rows"][-1], "a header over each column"
    # The answer comes first of all that is below the title.
    assert text.index("<h1>") < text.index('id="answer"') < text.index("<nav") < text.index("<table")
    assert text.index('id="answer"') < text.index("<strong>Fastest: ") < text.index("<nav")


def test_text_has_contrast_in_both_schemes(folder):
    """WCAG 2: 4.5 to 1 for text."""
    style = re.search(r"<style>(.*?)</style>", (folder / "report.html").read_text(encoding="utf-8"), re.S)[1]
    blocks = re.findall(r":root \{(.*?)\}", style, re.S)
    assert len(blocks) == 2
    colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", blocks[0]))
    for block in blocks:
        colors |= dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for text in ("ink", "soft"):
            for ground in ("page", "stripe"):
                assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)


def contrast(one, other):
    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_pictures_are_well_formed_and_opaque(folder):
    from PIL import Image

    names = sorted(p.stem for p in (folder / "plots").glob("*.svg"))
    assert names == sorted(p.stem for p in (folder / "plots").glob("*.png"))
    kinds = {name.removesuffix("-t0").removesuffix("-t0.6") for name in names}
    assert kinds == {"speedup-radar", "speedup-by-task", "tau-and-speed-by-k", "acceptance-by-depth", "map-sizes",
                     "concurrency", "accepted-per-step", "tau-by-position", "tau-by-context"}  # fmt: skip
    assert "concurrency-t0.6" not in names and "tau-by-position-t0.6" in names
    for name in names:
        root = ElementTree.parse(folder / "plots" / f"{name}.svg").getroot()
        assert root.get("viewBox") and root.get("role") == "img"
        text = (folder / "plots" / f"{name}.svg").read_text()
        assert not re.search(r'(src|href)="(?!#)', text) and "<script" not in text
        with Image.open(folder / "plots" / f"{name}.png") as image:
            image = image.convert("RGBA")
            assert image.getextrema()[3] == (255, 255) and image.getpixel((0, 0)) == (255, 255, 255, 255)
    radar = ElementTree.parse(folder / "plots" / "speedup-radar-t0.svg").getroot()
    description = radar.find("{http://www.w3.org/2000/svg}desc").text
    assert "Self-data FT + FR: MT. 2.03×, Code 2.10×" in description


def test_markdown_is_tables_and_pictures(folder):
    text = (folder / "report.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(blocks) == text.count("\n## ") - 1  # every section but the plots' is a table
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    for target in re.findall(r"(?<!\\)\]\(([^)]*)\)", text):
        assert (folder / target).exists()
    assert "<script" not in text


def test_the_same_input_gives_the_same_files(load):
    results = load(table_2())
    first, second = plots(results), plots(results)
    assert [(p.name, p.svg, p.png) for p in first] == [(p.name, p.svg, p.png) for p in second]
    assert inline_svg(first[0]).startswith("<svg")


def test_methods_keep_their_colours(load):
    """Blue is the tuned head's and orange the vanilla one's in every picture they are in."""
    for plot in plots(load(table_1())):
        assert PALETTE[1][0] in plot.svg and PALETTE[2][0] in plot.svg and PALETTE[3][0] in plot.svg


def test_report_refuses_to_overwrite_and_leaves_nothing(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(table_2()))
    (tmp_path / "out").mkdir()
    with pytest.raises(FastMTPError, match="already exists"):
        report([path], tmp_path / "out")
    path.write_text(json.dumps({"schema": "swift_fastmtp.bench/0"}))
    with pytest.raises(FastMTPError, match=r"bench/0.*bench/2"):
        report([path], tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "results.json"]


def test_a_terminal_table_is_aligned_by_what_is_seen():
    text = terminal_table(("server", "τ", ""), [("中文", "2.50", "WORSE"), ("tuned-k3", "10.00"), ("a|b", "1e5", "")])
    assert text.splitlines() == [
        "server        τ",
        "中文       2.50  WORSE",
        "tuned-k3  10.00",
        "a|b         1e5",
    ]


def test_escape_and_layout_of_a_table():
    table = tables.Table("x", "T", "C", [("", "a"), ("G", "b")], [["1|2", "<b>"]])
    assert markdown(table) == "## T\n\n| a    |    G b |\n|:-----|-------:|\n| 1\\|2 | &lt;b> |\n\nC\n"
    assert escape("a\nb ![x](y)") == "a b !\\[x]\\(y)"
    assert asdict(table)["rows"] == [["1|2", "<b>"]]
