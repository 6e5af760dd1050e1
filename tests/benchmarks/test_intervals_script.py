"""benchmarks/intervals.py: its tables are of the right things, and stand where the page has them."""

import importlib.util

import numpy as np
import pytest
from conftest import REPOSITORY

from kpo_cli.intervals import accuracy

spec = importlib.util.spec_from_file_location("intervals_script", REPOSITORY / "benchmarks" / "intervals.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def test_its_values_of_pass_at_k_are_those_of_the_evaluation():
    correct = np.random.default_rng(0).random((40, 16)) < 0.3
    for k in (1, 4, 8, 16):
        assert script.pass_values(correct, k).mean() == pytest.approx(accuracy.pass_at_k(correct, k, 0).value)


def test_effects_are_what_they_are_called():
    rng, chances = np.random.default_rng(0), np.full(10_000, 0.2)
    assert script.EFFECTS["odds doubled"](rng, chances)[0] == pytest.approx(1 / 3)
    assert script.EFFECTS["5% become solved"](rng, chances).mean() == pytest.approx(0.05 + 0.95 * 0.2, abs=0.01)


def test_every_table_is_whole(monkeypatch):
    monkeypatch.setattr(script, "DIFFICULTIES", {"spread": script.DIFFICULTIES["spread: beta(.6, .9)"]})
    monkeypatch.setattr(script, "PROBLEMS", (15, 30))
    monkeypatch.setattr(accuracy, "DRAWS", 1000)
    for title, head, rows in script.tables(3):
        assert title.startswith("**")
        assert rows
        assert {len(row) for row in rows} == {len(head)}


def test_a_page_takes_tables_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- end of a -->\n<!-- b -->\nkept\n<!-- end of b -->\n")
    script.write(page, "a", "new\n")
    assert page.read_text() == "before\n<!-- a -->\n\nnew\n\n<!-- end of a -->\n<!-- b -->\nkept\n<!-- end of b -->\n"
    with pytest.raises(SystemExit, match="needs the lines"):
        script.write(page, "c", "new\n")
