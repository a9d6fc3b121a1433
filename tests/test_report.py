"""The report of waves: pages of tables, the list in the log when asked to, figures, and the HTML page."""

import dataclasses
import http.server
import json
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.user_error import UserError
from sweeps.lab import report, report_figures, report_page
from sweeps.lab import report_tables as tables
from sweeps.lab import verdicts as fx
from sweeps.lab.paths import ROOT, SHIPPED_FIGURES, SHIPPED_RESULTS
from tests.support.lab_rows import broken_rows, row, write_rows

SEEDS = 1337, 42, 7
EVIL = "<img src=x onerror=\"document.title='broken'\">`|`</script><!-- /wave demo -->"
HAND = "# Experiment log\n\nNewest first, by hand.\n\n## 2026-11-01 · old entry\n\nVerdict  kept | as é is \n"


def some_rows(wave: str = "demo", began: float = 1.7e9) -> list[dict]:
    """Three arms of which two are the parts of the third, four learning rates, and all that can go wrong."""
    rng = np.random.default_rng(8)
    changes = dict(
        control={}, a=dict(KNOB_A="1"), b=dict(KNOB_B="2"), ab=dict(KNOB_A="1", KNOB_B="2"),
        lr2=dict(MATRIX_LR="0.02"), lr8=dict(MATRIX_LR="0.08"), lr16=dict(MATRIX_LR="0.16"),
    )  # fmt: skip
    gains = dict(control=0, a=-0.02, b=0.0, ab=-0.03, lr2=0.02, lr8=-0.01, lr16=-0.02)
    rows = [
        row(arm, seed, 2 + place / 100 + gains[arm] + 0.001 * rng.standard_normal(), wave, change=change,
            started=began, ended=began + 60, held_out_val_bpb=2.1 + gains[arm] / 2)
        for arm, change in changes.items()
        for place, seed in enumerate(SEEDS)
    ]  # fmt: skip
    rows += [row("control", 1337, 2.001, wave, rerun=1), row("a", 7, 9.9, wave, state="running")]
    rows += [dict(rows[3])]  # a run written twice: the last row stands
    return rows + [dict(one, hypothesis=EVIL, message=EVIL) for one in broken_rows(wave)] + [rows[5]]


@pytest.fixture
def lab(tmp_path):
    """lab(name=rows, ...) writes results; lab.run(*arguments) makes the report of them in tmp_path."""

    class Lab:
        results, log, page = tmp_path / "results", tmp_path / "log.md", tmp_path / "out/report.html"
        figures = tmp_path / "figures"

        def __call__(self, **waves):
            for name, rows in waves.items():
                write_rows(self.results / f"{name}.jsonl", rows)
            return tables.read_waves(self.results, tmp_path)

        def run(self, *arguments) -> int:
            places = ["--results", self.results, "--log", self.log, "--figures", self.figures]
            return report.main([*arguments, *map(str, [*places, "--html", self.page])])

    return Lab()


def payload(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


# Rows


def test_torn_and_foreign_lines_are_skipped_and_counted(lab):
    lab(demo=[row("control", 1, 2.0), row("control", 1, 1.9)])
    with (lab.results / "demo.jsonl").open("a") as file:
        file.write('[1, 2]\n\n"text"\n{"wave": "demo", "arm": "a", "se')
    (wave,) = tables.read_waves(lab.results)
    assert [r["val_bpb"] for r in wave.rows] == [1.9] and wave.unreadable == 2
    assert "2 unreadable line(s)" in tables.wave_block(wave)


def test_a_running_run_is_followed_in_its_own_log(lab, tmp_path):
    logs = tmp_path / "runs/x/logs"
    logs.mkdir(parents=True)
    events = [dict(event="step", step=5, train_loss=6.0, lr_scale=0.5, progress=0.1, train_ms=50.0)]
    events += [dict(event="val", step=6, val_bpb=3.5, train_ms=60.0), dict(events[0])]  # done twice
    text = "\n".join(map(json.dumps, events)) + '\n{"event": "st'
    (logs / "r.jsonl").write_text(text)
    rows = [row("control", seed, None, state="running", out_dir="runs/x", steps=None) for seed in (1, 2)]
    rows[1]["out_dir"] = "runs/none"
    first, second = lab(demo=rows)[0].rows
    assert first["curve"] == [[6, 60.0, 3.5]] and first["loss_curve"] == [[5, 50.0, 6.0]]
    assert (first["lr_trace"], first["steps"], first["progress"]) == ([[0.1, 0.5]], 6, 0.1)
    assert second["curve"] == [] and second["steps"] is None
    page = report_page.page(lab(demo=rows), watch=2)
    assert payload(page)["runs"][0]["loss_curve"] == [[5, 50.0, 6.0]]


# The log


@given(
    st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")),
    st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=50),
)  # fmt: skip
@settings(max_examples=60)
def test_what_is_outside_of_the_markers_stays(before, after, block):
    text = f"{before}<!-- waves -->old<!-- /waves -->{after}"
    if text.count("<!-- waves -->") == 1:
        new = report.place_block(text, block)
        newline = "\r\n" if "\r\n" in text else "\n"
        block = block.replace("\n", newline)
        assert new == f"{before}<!-- waves -->{newline}{block}<!-- /waves -->{after}"


@pytest.mark.parametrize(
    "text", ["<!-- waves -->", "<!-- /waves --><!-- waves -->", "<!-- waves --><!-- /waves -->" * 2]
)
def test_a_log_with_broken_markers_is_not_touched(text, lab, capsys):
    lab(x=[row("control", 1, 2.0, "x")])
    lab.log.write_text(text)
    assert lab.run("--publish") == 2 and "<!-- waves -->" in capsys.readouterr().err
    assert lab.log.read_text() == text


def test_the_log_is_written_only_when_asked_to(lab):
    lab.log.write_bytes(HAND.encode())
    lab(first=some_rows("first", 1.7e9))
    written = lab.log.stat().st_mtime_ns
    assert lab.run() == 0
    assert (lab.log.read_bytes(), lab.log.stat().st_mtime_ns) == (HAND.encode(), written)
    lab.log.unlink()
    assert lab.run() == 0 and not lab.log.exists()


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_list_in_the_log_is_oldest_first_and_hand_written_text_stays(newline, lab):
    hand = HAND.replace("\n", newline)
    lab.log.write_bytes(hand.encode())
    lab(second=some_rows("second", 1.8e9))
    assert lab.run("--publish") == 0
    assert lab.log.read_bytes().startswith(hand.encode())
    after = f"{newline}More by hand.{newline}"
    lab.log.write_bytes(lab.log.read_bytes() + after.encode())
    lab(first=some_rows("first", 1.7e9))
    assert lab.run("--publish") == 0
    text = lab.log.read_bytes().decode()
    assert text.startswith(hand) and text.endswith(after) and text.count("## All waves") == 1
    assert re.findall(r"^\| \[(\w+)\]\(results/\w+\.md\) \|", text, re.M) == ["first", "second"]
    assert "62 runs planned" in text and text.count("\n") == text.count(newline)
    for name in re.findall(r"\]\((results/[^)]+)\)", text):
        assert (lab.log.parent / name).is_file()
    before = lab.log.read_bytes(), lab.log.stat().st_mtime_ns
    assert lab.run("--publish") == 0  # nothing new: not even written
    assert (lab.log.read_bytes(), lab.log.stat().st_mtime_ns) == before


def tracked_state() -> dict[str, tuple[int, int]]:
    """Size and time of every file that the report writes when it publishes."""
    paths = [*SHIPPED_RESULTS.iterdir(), *SHIPPED_FIGURES.iterdir(), ROOT / "experiment_log.md"]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def test_what_git_knows_is_written_only_when_it_is_published(tmp_path, monkeypatch, capsys):
    before = tracked_state()
    own = tmp_path / "runs/results"
    monkeypatch.setattr(report, "OWN_RESULTS", own)
    html = ["--html", str(tmp_path / "x.html")]
    assert report.main(html) == 0 and "--shipped shows the results" in capsys.readouterr().out
    write_rows(own / "mine.jsonl", some_rows("mine"))
    assert report.main(html) == 0
    assert (own / "mine.md").is_file() and (own / "figures/mine_effects.png").is_file()
    assert "(figures/mine_effects.png)" in (own / "mine.md").read_text()
    assert report.main(["wave08_asymmetry", *html]) == 2
    assert "--shipped wave08_asymmetry" in capsys.readouterr().err
    for shipped in (["--shipped"], ["--results", str(SHIPPED_RESULTS)]):
        assert report.main(["wave08_asymmetry", *shipped, *html]) == 0
        assert payload((tmp_path / "x.html").read_text())["waves"][0]["name"] == "wave08_asymmetry"
    assert tracked_state() == before
    assert not list(tmp_path.glob("*.md"))


def test_publishing_means_the_shipped_results():
    asked = report.options(["--publish"])
    assert (asked.results, asked.figures, asked.only_html) == (SHIPPED_RESULTS, SHIPPED_FIGURES, False)
    with pytest.raises(SystemExit):
        report.options(["--shipped", "--results", "x"])


# The pages


def test_each_wave_has_a_page_beside_its_results(lab):
    waves = lab(one=some_rows("one"), two=some_rows("two"))
    assert lab.run() == 0
    for wave in waves:
        text = (lab.results / f"{wave.name}.md").read_text()
        assert text.startswith(tables.GENERATED) and f"# {wave.name}\n\nQuestion  Does it hold?" in text
        assert tables.wave_block(wave).partition("\n![")[0] in text
        for name in re.findall(r"\]\(([^)]+)\)", text):
            assert (lab.results / name).is_file(), name
    together = (lab.results / "all_waves.md").read_text()
    assert "[one](one.md)" in together and "[two](two.md)" in together
    pages = sorted(lab.results.glob("*.md"))
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in pages]
    assert lab.run() == 0  # nothing new: not even written
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in pages] == before


def test_only_the_named_waves_pages_are_written(lab):
    lab(one=some_rows("one"), two=some_rows("two"))
    assert lab.run("two") == 0
    assert sorted(path.name for path in lab.results.glob("*.md")) == ["all_waves.md", "two.md"]
    assert "| [one](one.md) |" in (lab.results / "all_waves.md").read_text()
    assert not list(lab.figures.glob("one*"))
    assert [w["name"] for w in payload(lab.page.read_text())["waves"]] == ["two"]


@pytest.mark.parametrize("name", ["one.md", "all_waves.md"])
def test_a_page_by_hand_is_never_overwritten(name, lab, capsys):
    lab(one=some_rows("one"))
    (lab.results / name).write_text(HAND)
    assert lab.run("--publish") == 2 and name in capsys.readouterr().err
    assert (lab.results / name).read_text() == HAND
    assert len(list(lab.results.glob("*.md"))) == 1 and not lab.log.exists() and not lab.figures.exists()


def test_an_unknown_wave_is_an_error(lab, capsys):
    lab(one=[])
    assert lab.run("other") == 2 and "other" in capsys.readouterr().err
    assert not lab.page.exists() and not lab.log.exists() and not list(lab.results.glob("*.md"))


def test_the_tables_say_what_the_effects_are(lab):
    (wave,) = lab(demo=some_rows())
    block, found = tables.wave_block(wave), fx.effects(wave.rows)
    assert [e.verdict for e in found if e.arm in "ab"] == ["better", "inside noise", "better"]
    for e in found:
        line = next(line for line in block.splitlines() if line.startswith(f"| `{e.arm}` | "))
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        assert cells[2] == str(e.n) and cells[9] == e.verdict
        assert cells[4] == (f"{e.mean:+.4f}" if e.n else "–")
    assert "31 runs planned, 30 started, 28 finished, 25 with a score, 22 valid" in block
    assert re.search(r"`MATRIX_LR` \| 0.02 0.04 0.08 0.16 .* falls, lowest at 0.16", block)
    assert "the whole (`ab`)" in block and "held-out half" in block
    assert "`demo.crasher.1` crashed" in block and "`demo.later.1` planned" in block
    for fact in ("300 steps", "614,400 tokens", "2,048 tokens a step", "6 layers x 96", "seeds 1337 42 7",
                 "test device", "code cdcdcdcdcdcd", "torch 2.13.0", "tidal_1434"):  # fmt: skip
        assert fact in block, fact


def test_no_text_of_a_run_can_break_a_page(lab):
    (wave,) = lab(demo=some_rows())
    block = tables.wave_block(wave)
    assert "<!--" not in block and "<img" not in block and "</script" not in block
    widths = {line.replace("\\|", "").count("|") for line in block.splitlines() if line.startswith("| `")}
    assert widths <= {13, 9, 5}  # of the four tables


def test_different_regimes_never_share_a_table(lab):
    rows = some_rows()
    rows += [
        row("control", 5, 1.5, device="other"),
        row("a", 5, 1.4, device="other", change=dict(KNOB_A="1")),
    ]
    (wave,) = lab(demo=rows)
    block = tables.wave_block(wave)
    assert "1 of 2, not to be merged" in block and "2 of 2, not to be merged" in block
    assert block.count("| `control` |") == 2
    first, second = ([e.n for e in fx.effects(group) if e.arm == "a"] for group in wave.regimes)
    assert (first, second) == ([3], [1])
    assert len({step.regime for step in tables.progression([wave])}) == 2
    with pytest.raises(UserError):
        tables.regime_block(wave.rows, "")


def test_progression_keeps_what_is_better_beyond_noise(lab):
    noise = [row(arm, s, 2 + 0.01 * ((s * len(arm)) % 5), "null", started=2e9) for arm in ("control", "xx")
             for s in SEEDS]  # fmt: skip
    steps = tables.progression(lab(demo=some_rows(), null=noise))
    assert [step.wave for step in steps] == ["demo", "null"]
    assert steps[0].best.arm == "ab" and steps[0].best_bpb < steps[0].control
    assert steps[1].best is None and steps[1].best_bpb is None


def ladder_waves() -> dict[str, list[dict]]:
    """Two lengths of run at which a change has opposite signs; a part that is added, and taken out again."""

    def wave(name, steps, gain, base=False, arm="lr", change=None):
        more = dict(steps=steps, config=dict(iterations=steps, tidal_lr=base))
        change = change or dict(MATRIX_LR="0.08")
        return [row("control", s, 2.0 - base / 10 + s / 1e4, name, **more) for s in SEEDS] + [
            row(arm, s, 2.0 - base / 10 + gain + s / 1e4 + s % 3 / 1e4, name, change=change, **more)
            for s in SEEDS
        ]

    return dict(
        h250=wave("h250", 250, -0.02), h1000=wave("h1000", 1000, 0.01),
        add=wave("add", 500, -0.08, arm="tidal", change=dict(TIDAL_LR="1")),
        drop=wave("drop", 500, 0.09, base=True, arm="no_tidal", change=dict(TIDAL_LR="0")),
    )  # fmt: skip


def test_ladders_and_parts_across_waves(lab):
    waves = lab(**ladder_waves())
    block = tables.across_block(waves)
    runs = sum(len(wave.rows) for wave in waves)
    assert block.startswith(f"All 4 waves: {runs} runs planned, {runs} started, {runs} finished, ")
    assert re.search(r"`MATRIX_LR=0.08` \| `tidal_1434` \| steps \| 250: -0.0.* \| sign flips \|", block)
    assert "Parts added one by one in `add`, taken out one by one in `drop`" in block
    together = report_page.across(waves)
    assert together["ladders"][0]["says"] == "sign flips" and len(together["ablations"]) == 1
    assert together["ladders"][0]["parent"] == "tidal_1434"


FEW = dict(
    none=[], planned=broken_rows()[-1:], running=broken_rows()[-2:-1], crashed=broken_rows()[:1],
    one=[row("control", 1, 2.0)], no_control=[row("a", 1, 2.0)],
    one_arm=[row("control", 1, 2.0), row("a", 1, 1.9)],
    no_curves=[row("control", 1, 2.0, curve=None, loss_curve=None, lr_trace=None, groups=None)],
    odd=[dict(wave="odd", arm="a", state="ok", val_bpb="2.0"), dict(run_id="x"), dict(state=None, seed="s")],
)  # fmt: skip


@pytest.mark.parametrize("name", FEW)
def test_it_works_with_almost_nothing(name, lab):
    waves = lab(**{name: FEW[name]})
    assert tables.wave_page(waves[0]) and tables.across_page(waves) and tables.index_block(waves, "results")
    page = payload(report_page.page(waves))
    assert len(page["runs"]) == len(FEW[name]) and len(page["waves"]) == 1


def test_it_works_without_results(lab):
    assert lab.run("--publish") == 0 and not lab.log.exists() and not lab.results.exists()
    assert payload(lab.page.read_text())["runs"] == []


# Figures


def test_figures_are_drawn_and_named_in_the_pages(lab):
    lab(demo=some_rows(), few=FEW["one"], **ladder_waves())
    assert lab.run("demo", "few") == 0
    names = sorted(path.name for path in lab.figures.iterdir())
    assert names == ["demo_curves.png", "demo_effects.png", "few_curves.png", "ladders.png"]
    first = {name: (lab.figures / name).read_bytes() for name in names}
    assert all(content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 3000 for content in first.values())
    text = "".join((lab.results / f"{page}.md").read_text() for page in ("demo", "few", "all_waves"))
    assert all(f"(../figures/{name})" in text for name in names)


def test_the_figure_of_ladders_has_a_panel_for_each_change(lab, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report_figures, "save", lambda figure, path: drawn.append(figure) or path)
    (one,) = tables.all_ladders(lab(**ladder_waves()))
    others = [dataclasses.replace(one, change=f"KNOB_{place}=1") for place in range(5)]
    assert report_figures.ladders([one, *others], tmp_path / "x.png")
    panels = [axes for axes in drawn[0].axes if axes.get_title()]
    assert [axes.get_title().split("\n")[0] for axes in panels] == [
        ladder.change for ladder in [one, *others]
    ]
    dots = [line for line in panels[0].lines if line.get_marker() == "o"]
    assert [line.get_ydata()[0] for line in dots] == [rung.effect.mean for rung in one.rungs]
    assert [line.get_color() for line in dots] == [report_figures.COLOURS[v] for v in ("better", "worse")]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["250", "1000"]
    plt.close(drawn[0])
    assert report_figures.ladders([], tmp_path / "x.png") is None


# The page


def test_the_page_is_one_file_that_asks_for_nothing(lab):
    page = report_page.page(lab(demo=some_rows()))
    for part in ("page.html", "page.css", "page.js"):
        text = (report_page.PARTS / part).read_text()
        assert not re.search(
            r"https?:|//[a-z]|@import|url\(", re.sub(r"^\s*//.*$|// [a-z ]+$", "", text, flags=re.M)
        )
    own = page.replace(report_page.library(), "")
    assert not re.search(r"(src|href)=(?!\"data:,\")", own.partition('id="data"')[0])
    assert "default-src 'none'" in own and 'http-equiv="refresh"' not in own
    assert own.count("</script") == 3 and own.count("<script") == 3  # no run can open or close one
    assert '<meta http-equiv="refresh" content="5">' in report_page.page(lab(), watch=5)
    runs = payload(page)["runs"]
    assert len(runs) == 32 and any(r["message"] == EVIL for r in runs)


def test_watching_rewrites_the_page_and_nothing_else(lab, monkeypatch):
    lab(demo=[row("control", 1, None, state="running", out_dir=None)])
    sizes, written = [], []

    def sleep(seconds):
        assert seconds == 3
        sizes.append(len(payload(lab.page.read_text())["runs"]))
        written.append([path.name for path in lab.page.parent.iterdir()])
        lab(demo=some_rows())
        if len(sizes) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        lab.run("--watch", "3")
    assert sizes == [1, 32] and written[-1] == ["report.html"] and not lab.log.exists()
    assert 'http-equiv="refresh" content="3"' in lab.page.read_text()
    with pytest.raises(SystemExit):
        lab.run("--watch", "0")


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = """
--headless=new --no-sandbox --disable-gpu --no-first-run --disable-sync --disable-background-networking
--disable-component-update --disable-default-apps --disable-extensions --disable-domain-reliability
--disable-client-side-phishing-detection --virtual-time-budget=20000 --window-size=1300,3000
--disable-features=OptimizationHints,MediaRouter,Translate,NetworkTimeServiceQuerying
"""


@contextmanager
def only_way_out(page: bytes):
    """A proxy that answers with the page, whatever it is asked for; yields its port and what was asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page)

        def do_CONNECT(self):
            asked.append(self.path)
            self.send_error(403)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port, asked
        server.shutdown()


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_a_browser_draws_it_and_fetches_nothing(lab, tmp_path):
    page = report_page.page(lab(demo=some_rows())).encode()
    with only_way_out(page) as (port, asked):
        way = [f"--proxy-server=127.0.0.1:{port}", "--proxy-bypass-list=<-loopback>"]
        command = [BROWSER, *QUIET.split(), *way, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
        shown = subprocess.run([*command, "http://report.test/"], capture_output=True, text=True, timeout=100)
    dom = shown.stdout
    assert [address for address in asked if not re.search(r"google(apis)?\.com", address)] == [
        "http://report.test/"
    ]
    body = dom[dom.index("<body") :]
    assert re.search(r'<body[^>]* data-fetched="0"[^>]* data-drawn="yes"', dom)
    assert body.count('class="main-svg"') >= 2 * 5  # effects, curves, rates, parts, sizes
    together = body[body.index("Wave after wave") : body.index("Size by group")]
    assert "<td>demo</td>" in together and "<td>ab</td>" in together
    table = re.search(r'<table id="runs">.*?</table>', body, re.S)[0]
    assert table.count("<tr>") == 33 and "demo.crasher.1" in table and "32 of 32 runs" in body
    assert "<title>Waves: demo</title>" in dom and "<img src=x" not in re.sub(
        r"<script.*?</script>", "", dom, flags=re.S
    )
    assert "&lt;img src=x" in table
    for number in ("trace scatter", "trace bars"):
        assert number in body


def test_regimes_are_numbered_from_one(lab):
    waves = lab(one=[row("control", 1, 2.0, "one")], two=[row("control", 1, 2.0, "two", device="other")])
    assert sorted(step.regime for step in tables.progression(waves)) == [1, 2]


def test_a_figure_has_the_control_and_the_nine_arms_that_moved_most(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(report_figures, "save", lambda figure, path: drawn.append(figure) or path)
    rows = []
    for number in range(12):
        for seed in SEEDS:
            arm = f"arm{number}" if number else "control"
            one = row(
                arm, seed, 2.0 + number / 100 + seed / 1e6, change=dict(KNOB_A=number) if number else {}
            )
            rows.append(one | dict(curve=[[5, 10.0, 3.0], [10, 20.0, 2.5]]))
    report_figures.curves(rows, "demo", tmp_path / "x.png")
    (axes,) = drawn[0].axes
    names = [line.get_label() for line in axes.get_lines()]
    assert names == ["control", *(f"arm{number}" for number in range(11, 2, -1))]
    assert axes.get_title(loc="left") == "demo (2 arms that moved less are left out)"
    plt.close(drawn[0])


def test_the_wait_for_the_verdicts_is_said_once_and_not_again_while_watching(lab, capsys, monkeypatch):
    lab(demo=some_rows())
    assert lab.run("--only-html") == 0
    assert capsys.readouterr().out.startswith(f"judges the waves in {lab.results}")

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lab.run("--watch", "2")
    assert "judges" not in capsys.readouterr().out


@pytest.mark.parametrize("interval", [None, fx.Interval(-0.01, 0.02)])
def test_the_bars_of_a_figure_have_the_interval_of_what_they_show(interval):
    shown = report_page.bars(fx.Contrast(0.005, interval, 3))
    low, high = interval or (None, None)
    assert shown == {"mean": 0.005, "low": low, "high": high, "n": 3}
