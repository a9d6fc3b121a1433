"""The report of waves: what it writes in the log and what it leaves alone, its figures, and its page."""

import http.server
import json
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.user_error import UserError
from sweeps.lab import report, report_page
from sweeps.lab import report_tables as tables
from sweeps.lab import verdicts as fx
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
    text = f"{before}<!-- wave x -->old<!-- /wave x -->{after}"
    if text.count("<!-- wave x -->") == 1:
        new = report.place_block(text, "wave x", block, "")
        newline = "\r\n" if "\r\n" in text else "\n"
        block = block.replace("\n", newline)
        assert new == f"{before}<!-- wave x -->{newline}{block}<!-- /wave x -->{after}"


@pytest.mark.parametrize(
    "text", ["<!-- wave x -->", "<!-- /wave x --><!-- wave x -->", "<!-- wave x --><!-- /wave x -->" * 2]
)
def test_a_log_with_broken_markers_is_not_touched(text, lab):
    lab(x=[row("control", 1, 2.0, "x")])
    lab.log.write_text(text)
    with pytest.raises(ValueError, match="wave x"):
        report.write_log(lab.log, tables.read_waves(lab.results), ["x"], {})
    assert lab.log.read_text() == text


def test_new_entries_go_to_the_top_newest_first_and_hand_written_text_stays(lab):
    lab.log.write_bytes(HAND.encode())
    lab(first=some_rows("first", 1.7e9))
    assert lab.run() == 0
    text = lab.log.read_text()
    for part in HAND.split("## 2026"):
        assert part in text
    text = text.replace("(the finding, to be written)", "A matters").replace(
        "(to be written)", "Keep A.\n\nMore."
    )
    lab.log.write_text(text)
    lab(second=some_rows("second", 1.8e9))
    assert lab.run() == 0
    new = lab.log.read_text()
    heads = re.findall(r"^## (.*)$", new, re.M)
    assert [head.split(" · ")[-2:] for head in heads] == [
        ["All waves"], ["second", "(the finding, to be written)"], ["first", "A matters"],
        ["2026-11-01", "old entry"],
    ]  # fmt: skip
    assert "Question  Does it hold?" in new and "Conclusion  Keep A.\n\nMore." in new
    assert new.index("<!-- wave second -->") < new.index("<!-- wave first -->") < new.index("old entry")
    before = lab.log.read_bytes(), lab.log.stat().st_mtime_ns
    assert lab.run() == 0  # nothing new: not even written
    assert (lab.log.read_bytes(), lab.log.stat().st_mtime_ns) == before


def test_only_the_named_waves_entries_are_written(lab):
    lab(one=some_rows("one"), two=some_rows("two"))
    assert lab.run("two") == 0
    text = lab.log.read_text()
    assert "<!-- wave two -->" in text and "<!-- wave one -->" not in text
    assert text.startswith("# Experiment log") and "| `one` |" in text  # it is in the table of all waves
    assert not list(lab.figures.glob("one*")) and [
        w["name"] for w in payload(lab.page.read_text())["waves"]
    ] == ["two"]


def test_an_unknown_wave_is_an_error(lab, capsys):
    lab(one=[])
    assert lab.run("other") == 2 and "other" in capsys.readouterr().err
    assert not lab.page.exists() and not lab.log.exists()


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


def test_no_text_of_a_run_can_break_the_log(lab):
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


def test_ladders_and_parts_across_waves(lab):
    def wave(name, steps, gain, base=False, arm="lr", change=None):
        more = dict(steps=steps, config=dict(iterations=steps, tidal_lr=base))
        change = change or dict(MATRIX_LR="0.08")
        return [row("control", s, 2.0 - base / 10 + s / 1e4, name, **more) for s in SEEDS] + [
            row(arm, s, 2.0 - base / 10 + gain + s / 1e4 + s % 3 / 1e4, name, change=change, **more)
            for s in SEEDS
        ]

    waves = lab(
        h250=wave("h250", 250, -0.02), h1000=wave("h1000", 1000, 0.01),
        add=wave("add", 500, -0.08, arm="tidal", change=dict(TIDAL_LR="1")),
        drop=wave("drop", 500, 0.09, base=True, arm="no_tidal", change=dict(TIDAL_LR="0")),
    )  # fmt: skip
    block = tables.across_block(waves)
    runs = sum(len(wave.rows) for wave in waves)
    assert block.startswith(f"All 4 waves: {runs} runs planned, {runs} started, {runs} finished, ")
    assert re.search(r"`MATRIX_LR=0.08` \| steps \| 250: -0.0.* \| sign flips \|", block)
    assert "Parts added one by one in `add`, taken out one by one in `drop`" in block
    together = report_page.across(waves)
    assert together["ladders"][0]["says"] == "sign flips" and len(together["ablations"]) == 1


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
    assert tables.wave_block(waves[0]) and tables.across_block(waves)
    page = payload(report_page.page(waves))
    assert len(page["runs"]) == len(FEW[name]) and len(page["waves"]) == 1


def test_it_works_without_results(lab):
    assert lab.run() == 0 and not lab.log.exists()
    assert payload(lab.page.read_text())["runs"] == []


# Figures


def test_figures_are_drawn_and_named_in_the_log(lab):
    lab(demo=some_rows(), few=FEW["one"])
    assert lab.run() == 0
    names = sorted(path.name for path in lab.figures.iterdir())
    assert names == ["demo_curves.png", "demo_effects.png", "few_curves.png", "progression.png"]
    first = {name: (lab.figures / name).read_bytes() for name in names}
    assert all(content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 3000 for content in first.values())
    text = lab.log.read_text()
    assert all(f"(figures/{name})" in text for name in names)


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
    assert body.count('class="main-svg"') >= 2 * 6  # effects, curves, rates, parts, progression, sizes
    table = re.search(r'<table id="runs">.*?</table>', body, re.S)[0]
    assert table.count("<tr>") == 33 and "demo.crasher.1" in table and "32 of 32 runs" in body
    assert "<title>Waves: demo</title>" in dom and "<img src=x" not in re.sub(
        r"<script.*?</script>", "", dom, flags=re.S
    )
    assert "&lt;img src=x" in table
    for number in ("trace scatter", "trace bars"):
        assert number in body
