"""Ten kinds of data and more, from a file to words: what is said stands in the tables, and what is there is found."""

import re
import sys
from functools import cache

import numpy as np
import pytest
from conftest import REPOSITORY

from kpo_cli.analysis.report.tables import noise_table, order_table, statistic_table
from kpo_cli.analysis.statistics.sums import STATISTICS

sys.path.append(str(REPOSITORY / "benchmarks"))  # at the end: its names are plain ones
from claims_of_analyze import DRIFTLESS, DRIFTS, FADING, KINDS, ORDERLESS, analysed

QUICK = ("nulls.draws=39", "filters=[kalman,steady_kalman]", "time_constants=[10]")


@cache
def made(kind):
    return analysed(kind, 7, *QUICK)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def found(kind):
    return made(kind)


def stars(found, null):
    """Cells of the tables that bear one, of one null: the last column but one, and the last."""
    at = {"null_shuffled": -2, "null_sign_flipped": -1}[null]
    tables = [*(statistic_table(found, name) for name in STATISTICS), order_table(found)]
    return sum(row[at].endswith("*") for table in tables for row in table.rows)


def test_no_verdict_contradicts_its_tables(kind, found):
    text = found["summary"]
    if kind == "identical":
        assert "All ratios are exactly 1" in text
        assert not re.search("order in time|drift|Shuffled", text)
        return
    shuffled = stars(found, "null_shuffled")
    assert ("There is order in time" in text) == (shuffled > 0)
    silent = "No order in time is seen" in text or "order in time cannot be told" in text
    assert silent == (shuffled == 0)
    assert len(found["order"]["null_shuffled"]["outside"]) == shuffled
    assert len(found["order"]["null_sign_flipped"]["outside"]) == stars(found, "null_sign_flipped")
    switches = [row for row in statistic_table(found, "switch_frequency").rows if row[0] != "raw"]
    filtered = [row[0] for row in switches if row[-2].endswith("*")]
    assert ("the drop is no sign of order in time" in text) == (not filtered)
    assert all(f"{name} (" in text.partition("outside what they do lie")[2] for name in filtered)
    drift, held, memory = (found["noise"][name] for name in ("drift", "held_out", "memory"))
    if held is None:
        assert kind in ("one prompt", "one response")
        assert memory is None
        return
    if "There is a drift" in text:
        assert "There is order in time" in text
        assert held["models"]["walk_in_shaped_noise"]["gain_of_walk"] > 0
        assert memory["walk"] > 0
        assert drift["q_interval"][0] > 0
    elif "No drift" in text:
        assert min(drift["p_values"]["prediction"].values()) > 0.05
    elif "fades" in text:
        assert "There is order in time" in text
        assert memory["fading"] > 1.6 * memory["fading_error"] > 0
    assert ("time constant of" in text) == (drift["verdict"] == "drift")
    assert ("fades" in text) == (drift["verdict"] == "fades")
    best = noise_table(found).rows[0]
    assert best[0] == "constant noise" or best[1] in text


def test_verdicts_find_what_is_there_and_no_drift_where_none_is(kind, found):
    text = found["summary"]
    if kind not in (*ORDERLESS, "identical"):
        assert "There is order in time" in text
    if kind in DRIFTLESS or kind == "identical":
        assert "There is a drift" not in text
    if kind in FADING and kind != "few prompts, AR(0.95)":
        assert "fades, by a factor e" in text
    if kind in DRIFTS:
        low, high = found["noise"]["drift"]["q_interval"]
        assert low < DRIFTS[kind] < high


def test_false_alarms_are_rare():
    """Each of eight kinds without order has one in 20; three of them together are one in 170."""
    assert sum("There is order in time" in made(kind)["summary"] for kind in ORDERLESS) <= 2


def test_an_autoregression_is_seen_with_twenty_draws():
    found = analysed("few prompts, AR(0.95)", 8, "nulls.draws=20", *QUICK[1:])
    assert found["order"]["null_shuffled"]["p_value"] == pytest.approx(1 / 21)
    assert "There is order in time" in found["summary"]


def test_without_draws_nothing_is_said_of_time():
    found = analysed("AR(0.95)", 8, "nulls.draws=0", *QUICK[1:])
    assert found["order"] is None
    assert "without a null this says nothing about time" in found["summary"]
    assert "is not determined: there is no null" in found["summary"]
    assert np.isfinite(found["filters"]["raw"]["switch_frequency"]["value"])
