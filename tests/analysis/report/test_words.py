"""What is said and shown of ratios that are rare: no sentence contradicts its own table, and tables fit a terminal."""

import io
import json

import numpy as np
from ratio_config import config
from ratio_files import write_run
from rich.console import Console

from kpo_cli.analysis.compare.comparison import tables
from kpo_cli.analysis.main import analyse_one
from kpo_cli.analysis.report.tables import Table, compared, number, statistic_table, terminal_tables
from kpo_cli.analysis.report.words import summary
from kpo_cli.analysis.source import find_source
from kpo_cli.analysis.statistics.analyse import analyse


def found_of(folder, z, *overrides, **more):
    """analysis.json of responses (B, T), one prompt each."""
    rows = [
        {"log_probs": row.tolist(), "old_log_probs": [0.0] * len(row), "mini_batch_index": 1, "prompt_index": i} | more
        for i, row in enumerate(np.asarray(z))
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return analyse(find_source(folder / "a.jsonl"), config("filters=[kalman]", *overrides)).found


def test_a_shift_of_all_tokens_is_no_ratio_of_one(tmp_path):
    text = summary(found_of(tmp_path, np.full((8, 30), 0.25)))
    assert "exactly 1" not in text
    assert "Whether there is order in time cannot be told" in text
    assert "exactly 1" in summary(found_of(tmp_path, np.zeros((8, 30))))


def test_tokens_without_neighbours_say_nothing_of_time(tmp_path):
    text = summary(found_of(tmp_path, np.random.default_rng(0).normal(size=(20, 1))))
    assert "No token has a neighbour" in text
    assert "switches at" not in text
    assert "-" not in text.split()


def test_a_difference_of_sampler_and_trainer_is_said_where_z_is_one_number(tmp_path):
    text = summary(found_of(tmp_path, np.full((8, 30), 0.25), rollout_log_probs=[-0.01, 0.01] * 15))
    assert "Sampler and trainer differ by 0.01 (standard deviation of log pi_old - log mu)." in text
    assert "apart from drift" not in text


def test_what_lies_outside_is_shown_outside():
    """7.94% beside a band up to 7.92% is not 7.9% beside 7.9%; inside, no digit more than usual is shown."""
    null = {"band": (0.046, 0.0792), "observed": 0.0794, "p_adjusted": 0.02}
    assert compared([null], share=True) == ["7.94%", "4.60..7.92% *"]
    assert compared([None, null | {"p_adjusted": 0.2}], share=True) == ["7.9%", "-", "4.6..7.9%  "]
    close = {"band": (-0.1, 0.12341), "observed": 0.12343, "p_adjusted": 0.02}
    assert compared([close, None], fixed=True) == ["0.12343", "-0.10000..0.12341 *", "-"]
    assert compared([None]) == ["-", "-"]


def test_one_of_a_thing_is_said_in_the_singular(tmp_path):
    text = summary(found_of(tmp_path, np.random.default_rng(0).normal(size=(1, 40))))
    assert text.startswith("1 recorded step, 1 response, 40 tokens,")


def test_ratios_of_one_in_several_mini_batches_are_not_for_want_of_these(tmp_path):
    assert "trainer.mini_batches=4" not in summary(found_of(tmp_path, np.zeros((8, 30))))
    alone = summary(found_of(tmp_path, np.zeros((8, 30)), mini_batch_index=0))
    assert "Train with trainer.mini_batches=4" in alone


def test_zero_has_no_sign():
    assert [number(-1e-9, share=True), number(-1e-9, fixed=True)] == ["0.0%", "0.000"]


def test_tables_fit_a_terminal_of_80_columns(tmp_path):
    run = write_run(tmp_path / "run", scale=3.0)
    found = analyse(find_source(run), config("time_constants=[10,100]")).found
    for table in terminal_tables(found):
        console = Console(width=80, file=io.StringIO())
        console.print(table.for_terminal())
        shown = console.file.getvalue()
        assert all(cell.strip() in shown for row in table.rows for cell in row[table.label_columns :]), table.title


def test_what_no_interval_covers_has_none(tmp_path):
    """Of the kurtosis of prompts of different size the truth lay in the jackknife's in 60 to 78% (docs/claims.md)."""
    found = found_of(tmp_path, np.random.default_rng(0).standard_t(3, (12, 30)), "nulls.draws=0")
    for name, entry in found["filters"]["raw"].items():
        if isinstance(entry, dict) and "ci" in entry:
            assert (entry["ci"] is None) == (name == "kurtosis")
    (row,) = (row for row in statistic_table(found, "kurtosis").rows if row[0] == "raw")
    assert row[2] == "-"


def width(table: Table) -> int:
    return Console(width=300).measure(table.for_terminal()).maximum


def test_a_comparison_shows_the_sample_and_the_band_of_the_page_of_a_run(tmp_path):
    run = write_run(tmp_path / "run")
    settings = config("filters=[kalman]", "report=false")
    found = analyse_one(find_source(run), tmp_path / "out", settings, Console(quiet=True))
    kept = ("switch_frequency", "low_frequency_energy", "std", "kl_k3")
    runs = {"a": {name: {stat: entry[stat] for stat in kept} for name, entry in found["filters"].items()}}
    (ratios,) = tables({"groups": {}, "differences": [], "runs": runs})
    for shown, alone in zip(ratios.rows, statistic_table(found, "switch_frequency").rows, strict=False):
        assert shown[1:5] == [alone[0], alone[1], alone[3], alone[4]]
    assert width(ratios) <= 80
