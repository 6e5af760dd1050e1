"""report.html: whole, harmless, and running in a real browser."""

import json
import re
import shutil
import subprocess
from xml.etree import ElementTree

import numpy as np
import pytest
from ratio_config import config
from ratio_files import write_run
from rich.console import Console

from kpo_cli.analysis.main import analyse_one
from kpo_cli.analysis.report import figures
from kpo_cli.analysis.report.page import TOKENS_SHOWN, script_data
from kpo_cli.analysis.report.tokens import find_decoder
from kpo_cli.analysis.source import find_source

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> $title & \u2028"


def write(source, folder, *overrides):
    return analyse_one(source, folder, config(*overrides), Console(quiet=True))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("runs") / "<b>run</b>", steps=(1, 2))
    (run / "ratios" / "<i>.txt").write_text("foreign")
    write(find_source(run), run / "analysis", "filters=[kalman]")
    return run / "analysis"


@pytest.fixture(scope="module")
def evil_report(tmp_path_factory):
    """Responses that try to leave their place."""
    folder = tmp_path_factory.mktemp("evil")
    rng = np.random.default_rng(0)
    rows = [
        {"log_probs": rng.normal(size=30).tolist(), "old_log_probs": [-1.0] * 30, "response": EVIL, "step": i % 2}
        for i in range(20)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(find_source(folder / "a.jsonl"), folder / "out")
    return folder / "out"


DEGENERATE = {
    "two responses of three tokens": np.array([[0.01, -0.02, 0.03], [0.02, 0.01, -0.01]]),
    "one token": np.array([[0.01]]),
    "one response": 0.02 * np.random.default_rng(0).normal(size=(1, 40)),
    "zeros": np.zeros((4, 30)),
    "a constant": np.full((4, 30), 0.01),
    "a constant in each response": np.arange(1, 5)[:, None] * np.full((4, 30), 0.01),
    "alternating signs": 0.01 * np.cos(np.pi * np.arange(30)) * np.ones((4, 1)),
    "one that is not zero": 0.1 * (np.arange(120) == 57).reshape(4, 30),
    "shorter than 1/cutoff": 0.02 * np.random.default_rng(0).normal(size=(8, 20)),
    "denormal numbers": 1e-310 * np.random.default_rng(0).normal(size=(4, 30)),
    "very large ones": 50 * np.random.default_rng(0).normal(size=(4, 30)),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_sets_of_ratios_with_next_to_nothing_in_them_are_drawn(name, tmp_path):
    """What there is to draw is drawn; a spectrum is there exactly where one of the series has one."""
    rows = [{"log_probs": z.tolist(), "old_log_probs": [0.0] * len(z)} for z in DEGENERATE[name]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = write(find_source(tmp_path / "a.jsonl"), tmp_path / "out", "filters=[kalman]")
    drawn = {path.stem for path in (tmp_path / "out/figures").glob("*.svg")}
    powers = [entry["spectrum"]["relative_to_white_noise"] for entry in found["filters"].values()]
    some = any(power > 0 for series in powers for power in series)
    expected = {"traces", "run_lengths", "autocorrelation", *(["spectrum"] if some else [])}
    assert drawn == (expected if found["filters"]["raw"]["std"]["value"] else set())  # of a constant, nothing
    assert "<h3>" in (tmp_path / "out/report.html").read_text("utf-8")


def test_every_file_is_there(report):
    names = {path.relative_to(report).as_posix() for path in report.rglob("*") if path.is_file()}
    drawn = {
        f"figures/{n}.{kind}"
        for n in ("traces", "run_lengths", "spectrum", "autocorrelation")
        for kind in ("png", "svg")
    }
    assert names == {"analysis.json", "report.html", *drawn}
    for path in report.glob("figures/*.svg"):
        ElementTree.parse(path)
    for path in report.glob("figures/*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    found = json.loads((report / "analysis.json").read_text())
    assert found["summary"].startswith("2 recorded steps")


def test_the_page_needs_nothing_from_outside(report):
    page = (report / "report.html").read_text("utf-8")
    assert len(page) < 5_000_000
    assert not re.search(r"""(?:src|href)\s*=\s*["']?[^"'#]""", page)
    assert "@import" not in page
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_names_and_texts_are_escaped(report, evil_report):
    page = (report / "report.html").read_text("utf-8")
    assert "<b>run</b>" not in page
    assert "&lt;b&gt;run&lt;/b&gt;" in page
    assert "<i>" not in page
    evil = (evil_report / "report.html").read_text("utf-8")
    assert evil.count("<script") == 2
    assert "<img" not in evil
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', evil, re.DOTALL)[1]
    assert json.loads(data)["responses"][0]["prompt"] == f"response: {EVIL}"


def test_data_for_a_script_cannot_end_it():
    assert json.loads(script_data({"a": EVIL})) == {"a": EVIL}
    assert not set("<>&") & set(script_data(EVIL))


def test_long_responses_are_cut(tmp_path):
    run = write_run(tmp_path, steps=(1, 2), prompts=8, width=3000)
    write(find_source(run), run / "analysis", "filters=[kalman]")
    page = (run / "analysis" / "report.html").read_text("utf-8")
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    assert sum(len(response["tokens"]) for response in data["responses"]) == TOKENS_SHOWN
    assert len(page) < 5_000_000


def test_ratios_of_one_make_a_report_without_figures(tmp_path):
    run = write_run(tmp_path, steps=(1,), mini_batches=1)
    write(find_source(run), run / "analysis")
    page = (run / "analysis" / "report.html").read_text("utf-8")
    assert "All ratios are exactly 1" in page
    assert "<svg" not in page


def test_inlined_figures_keep_their_identifiers_apart():
    svg = '<?xml version="1.0"?><svg width="9pt" height="8pt" viewBox="0 0 1 1"><g id="a" clip-path="url(#c)"/></svg>'
    assert figures.inline(svg, "x") == (
        '<svg role="img" aria-label="x" viewBox="0 0 1 1"><g id="x-a" clip-path="url(#x-c)"/></svg>'
    )


def test_ids_are_decoded_where_the_tokenizer_is_at_hand(tmp_path):
    from kpo_cli.builtin import POLICY_DIR

    decoder = find_decoder(str(POLICY_DIR))
    assert decoder.text([3, 4]) == decoder.token(3) + decoder.token(4)
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in (None, "nowhere", "not/a/name", str(tmp_path)):
        assert find_decoder(name) is None


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("which", ["report", "evil_report"])
def test_it_runs_in_a_browser(which, request, tmp_path):
    folder = request.getfixturevalue(which)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=2000"
    page = (folder / "report.html").as_uri()
    done = subprocess.run(
        [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path}", "--dump-dom", page],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    tokens = re.search(r'<div id="tokens">(.*?)</div>', done.stdout, re.DOTALL)[1]
    assert tokens.count("<span title=") >= 20
    assert "background: rgb(var(--up)" in tokens
    assert "<img" not in done.stdout
