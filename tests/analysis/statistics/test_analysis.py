"""Everything that analysis.json says, against the records summed another way."""

import json
import math

import brute
import numpy as np
import pytest
import torch
from ratio_config import config, raw_config
from ratio_files import tensors, write_record, write_run
from scipy import stats

from kpo_cli.analysis import sign_statistics
from kpo_cli.analysis.config import analyze_config
from kpo_cli.analysis.report.tables import terminal_tables
from kpo_cli.analysis.report.words import summary
from kpo_cli.analysis.source import find_source
from kpo_cli.analysis.statistics import noise_models
from kpo_cli.analysis.statistics.analyse import analyse
from kpo_cli.analysis.statistics.clipping import clip_counts
from kpo_cli.analysis.statistics.collect import Reservoir, energy_of_largest, magnitude_counts, percentiles
from kpo_cli.analysis.statistics.series import own_filter, series_of, share_passed
from kpo_cli.analysis.statistics.sums import COVERED, STATISTICS
from kpo_cli.core.filters import kalman_filter, kalman_meaning
from kpo_cli.core.surrogates import Clip
from kpo_cli.errors import UserError
from kpo_cli.runs.directory import finite
from kpo_cli.runs.ratios import Ratios


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run", steps=(1, 2, 3, 4))


@pytest.fixture(scope="module")
def found(run):
    result = analyse(find_source(run), config("filters=[kalman,sequence_mean]", "q_over_v=[0.1]")).found
    return json.loads(json.dumps(finite(result)))  # as it is written


def records(run):
    """z (B, T), mask, and the tensors of each record, off-policy rows only."""
    content = [tensors(step) for step in (1, 2, 3, 4)]
    chosen = [each["mini_batch_index"] > 0 for each in content]
    parts = [{name: t[rows] for name, t in each.items()} for each, rows in zip(content, chosen, strict=True)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_the_schema_holds_every_statistic_of_every_series(found):
    assert found["schema"] == "kpo-analysis-2"
    assert list(found["filters"]) == ["raw", "recorded", "kalman", "sequence_mean", "kalman_q_0.1"]
    for name, entry in found["filters"].items():
        for statistic in STATISTICS:
            line = entry[statistic]
            assert set(line) == {"value", "ci", "null_shuffled", "null_sign_flipped"}
            if name == "raw":
                assert (line["ci"] is None) == (statistic not in COVERED)
                for null in (line["null_shuffled"], line["null_sign_flipped"]):
                    assert set(null) == {"mean", "low", "high", "observed", "p_value", "p_adjusted", "band"}


def test_values_are_those_of_all_off_policy_tokens(run, found):
    together = records(run)
    z, mask = together["log_ratio"], together["response_mask"]
    by_name = {
        "raw": z,
        "recorded": together["filtered_log_ratio"],
        "kalman": kalman_filter(z, mask, q=1e-6, v=1.0),
        "kalman_q_0.1": kalman_filter(z, mask, q=0.1, v=1.0),
    }
    for name, x in by_name.items():
        entry, expected, tokens = found["filters"][name], sign_statistics(x, mask), x[mask].double().numpy()
        assert entry["switch_frequency"]["value"] == pytest.approx(expected.switch_frequency)
        assert entry["mean_off_policy_run_length"]["value"] == pytest.approx(expected.mean_off_policy_run_length)
        assert entry["run_lengths"]["median"] == expected.median_run_length
        counts = {int(length): count for length, count in entry["run_lengths"]["counts"].items()}
        assert counts == expected.run_length_counts
        assert entry["std"]["value"] == pytest.approx(tokens.std(), rel=1e-5)
        assert entry["kurtosis"]["value"] == pytest.approx(stats.kurtosis(tokens, fisher=False), rel=1e-4)
        assert entry["percentiles"]["95"] == pytest.approx(np.quantile(tokens, 0.95), rel=0.03)
        lag3 = entry["autocorrelation_by_lag"]["z"][2]
        assert lag3 == pytest.approx(brute.autocorrelation(x.double().numpy(), mask.numpy(), 3), abs=1e-6)
    assert found["source"]["off_policy_tokens"] == int(mask.sum())


def test_a_filter_that_cannot_be_rebuilt_has_values_and_no_nulls(found):
    """The made-up record holds z / 2, which no Kalman filter makes."""
    entry = found["filters"]["recorded"]["switch_frequency"]
    assert entry["value"] is not None
    assert (entry["null_shuffled"], entry["null_sign_flipped"]) == (None, None)
    assert found["filters"]["recorded"]["share_passed"] is None


def test_the_runs_own_filter_is_rebuilt_where_it_gives_the_recorded_numbers(tmp_path):
    content = tensors()
    content["filtered_log_ratio"] = kalman_filter(content["log_ratio"], content["response_mask"], q=1e-2, v=1.0)
    write_record(tmp_path / "ratios" / "step-000001.safetensors", 1, content)
    found = analyse(find_source(tmp_path), config()).found
    assert found["filters"]["recorded"]["switch_frequency"]["null_shuffled"]["p_value"] > 0
    assert own_filter({"filter": {"name": "nothing"}}) is None
    assert own_filter({}) is None


def test_mini_batches_stand_apart_and_the_first_is_exactly_zero(found):
    assert [entry["mini_batch"] for entry in found["mini_batches"]] == [0, 1, 2, 3]
    assert found["on_policy"]["identically_zero"] is True
    assert found["mini_batches"][0]["filters"]["raw"]["std"] == 0
    assert found["mini_batches"][2]["filters"]["raw"]["switch_frequency"] == pytest.approx(0.5, abs=0.05)
    tokens = sum(entry["tokens"] for entry in found["mini_batches"][1:])
    assert tokens == found["source"]["off_policy_tokens"] == sum(entry["tokens"] for entry in found["steps"])


def test_breakdowns_hold_every_token_once(run, found):
    together = records(run)
    z, mask = together["log_ratio"], together["response_mask"]
    assert set(found["breakdowns"]) == {"position", "entropy", "old_probability", "advantage"}
    for by_series in found["breakdowns"].values():
        assert sum(row["tokens"] for row in by_series["raw"]) == int(mask.sum())
    first = found["breakdowns"]["position"]["raw"][0]
    start = z[:, :8][mask[:, :8]].double()
    assert (first["bin"], first["tokens"]) == ("1-8", len(start))
    assert first["std"] == pytest.approx(float(start.std(correction=0)))
    assert first["switch_frequency"] == pytest.approx(sign_statistics(z[:, :8], mask[:, :8]).switch_frequency)
    sure = found["breakdowns"]["old_probability"]["raw"]
    p = together["old_log_probs"][mask].exp()
    assert {row["bin"]: row["tokens"] for row in sure}["0.5-0.7"] == int(((p >= 0.5) & (p < 0.7)).sum())
    negative = found["breakdowns"]["advantage"]["raw"][0]
    assert negative["bin"] == "A < 0"
    assert negative["cut"] == pytest.approx(negative["below"])  # a clip cuts where A pushes outwards


@pytest.mark.parametrize("widths", [(3e-4, 4e-4), (0.02, 0.01), (1.0, 0.2)])
def test_the_what_if_is_what_the_surrogate_does(widths):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 30, generator=generator, dtype=torch.float64) * 0.02
    mask, advantages = torch.rand(20, 30, generator=generator) > 0.2, torch.randn(20, generator=generator)
    advantages[:4] = 0
    x = torch.where(mask, x, 0.0)
    out = Clip(*widths)(x, x, advantages[:, None].expand_as(x).double(), mask)
    above, below, cut = clip_counts(x.numpy(), mask.numpy(), advantages.numpy(), [widths])[0]
    assert cut == out.active.sum()
    assert above + below == out.outside.sum()


def test_the_what_if_says_what_share_would_be_cut(found):
    line = next(e for e in found["clip_what_if"] if e["filter"] == "raw" and e["eps_low"] == 3e-4)
    assert line["cut"] == pytest.approx(0.49, abs=0.03)  # half of nearly all: the other half is pushed inwards
    assert line["above"] + line["below"] == pytest.approx(0.985, abs=0.01)


def test_mismatch_is_apart_from_drift(found):
    mismatch = found["mismatch"]
    assert mismatch["std"] == pytest.approx(1e-3, rel=0.05)
    assert mismatch["drift_std"] == found["filters"]["raw"]["std"]["value"]
    assert mismatch["kl_k3"] == pytest.approx(0.5e-6, rel=0.1)
    assert mismatch["truncated"] == 0


def test_white_noise_shows_no_structure_and_the_words_say_so(found):
    text = summary(found)
    assert "No order in time is seen: nothing lies outside what shuffled tokens show" in text
    assert "Shuffled tokens, filtered, switch as seldom: the drop is no sign of order in time." in text
    assert "There is a drift" not in text
    assert "`kalman` passes 0.0%: the ratio is 1 for every purpose" in text
    assert "z is exactly 0" in text


def test_a_drift_is_seen_and_the_words_say_so(tmp_path):
    write_run(tmp_path, steps=(1, 2), drift=0.02, prompts=16)
    found = analyse(find_source(tmp_path), config("nulls.draws=200")).found
    text = summary(found)
    assert "slow waves hold more energy than shuffled" in text
    assert "There is a drift along the response: the past predicts the next log-ratio (p 0.005 shuffled" in text
    drift = found["noise"]["drift"]
    assert (drift["verdict"], drift["against"]) == ("drift", [])
    # Q = 0.02^2 and V = 0.02^2: Q/V = 1, whose time constant is 1 / (2 asinh(1/2)) = 1.04 tokens.
    low, high = drift["q_interval"]
    assert low < 4e-4 < high < 1.5 * low
    assert abs(math.log(drift["q"] / drift["v"])) < 3 * drift["log_q_over_v_error"]
    assert drift["time_constant"] == pytest.approx(1.04, rel=0.1)
    models = found["noise"]["held_out"]["models"]
    assert models["random_walk"]["gain_over_constant_noise"] > 0.2


def test_ratios_that_are_all_one_are_said_to_tell_nothing(tmp_path):
    write_run(tmp_path, steps=(1,), mini_batches=1)
    found = analyse(find_source(tmp_path), config()).found
    assert found["filters"] == {}
    assert "All ratios are exactly 1" in summary(found)
    json.dumps(finite(found), allow_nan=False)


def test_off_policy_ratios_of_zero_tell_nothing_either(tmp_path):
    write_run(tmp_path, steps=(1,), scale=0.0)
    found = analyse(find_source(tmp_path), config()).found
    assert "All ratios are exactly 1" in summary(found)
    assert found["noise"]["drift"] is None


def test_bare_exports_are_analysed(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.jsonl"
    rows = [{"log_probs": rng.normal(size=30).tolist(), "old_log_probs": [-1.0] * 30} for _ in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = analyse(find_source(path), config()).found
    assert found["mini_batches"] == []
    assert found["mismatch"] is None
    assert set(found["breakdowns"]) == {"position", "old_probability"}
    assert all(entry["cut"] is None for entry in found["clip_what_if"])
    assert found["noise"]["held_out"]["by"] == "responses"  # one step only, and no prompts
    assert "all count as off-policy" in summary(found)


def test_nothing_to_read_is_one_line(tmp_path):
    (tmp_path / "ratios").mkdir()
    with pytest.raises(UserError, match="has no ratio records; train with trainer"):
        analyse(find_source(tmp_path), config())
    (tmp_path / "ratios" / "step-000001.safetensors").write_bytes(b"junk" * 9)
    with pytest.raises(UserError, match=r"step-000001.safetensors: truncated"):
        analyse(find_source(tmp_path), config())


def test_the_share_passed_is_the_closed_form():
    mask = np.ones((3, 50), bool)
    batch = Ratios(log_ratio=np.zeros((3, 50)), mask=mask, step=np.zeros(3, int), old_log_probs=np.full((3, 50), -1.0))
    series = {each.name: each for each in series_of(config("filters=[sequence_mean]", "time_constants=[30]"))}
    expected = kalman_meaning(4 * math.sinh(1 / 60) ** 2, 1.0, 50).share_passed
    assert share_passed(series["kalman_tau_30"], batch, 0.01) == pytest.approx(expected)
    assert share_passed(series["sequence_mean"], batch, 0.01) == pytest.approx(1)


def test_the_log_likelihood_is_that_of_the_joint_gaussian():
    """z is Gaussian with covariance q min(s, t) + v [s = t]."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 12))
    batch = Ratios(log_ratio=z, mask=np.ones((2, 12), bool), step=np.zeros(2, int))
    t = np.arange(1, 13)
    covariance = 0.3 * np.minimum(t, t[:, None]) + 0.7 * np.eye(12)
    expected = stats.multivariate_normal(np.zeros(12), covariance).logpdf(z)
    found = noise_models.NoiseModel("", v=0.7, q=0.3).log_likelihood(batch).sum(1)
    assert found == pytest.approx(expected)
    still = noise_models.NoiseModel("", v=0.7).log_likelihood(batch)
    assert still == pytest.approx(stats.norm(0, math.sqrt(0.7)).logpdf(z))


def test_the_right_noise_model_wins_on_steps_that_were_not_fitted():
    rng = np.random.default_rng(1)
    old = np.log(rng.uniform(0.01, 0.999, (60, 50)))
    z = rng.normal(size=old.shape) * 0.1 * (1 - np.exp(old)) ** 1.25
    batch = Ratios(log_ratio=z, mask=np.ones(z.shape, bool), step=np.repeat([1, 2, 3], 20), old_log_probs=old)
    found = noise_models.held_out(batch)
    assert (found["fitted_steps"], found["judged_steps"]) == ([1, 3], [2])
    models = found["models"]
    best = max(models[name]["log_likelihood_per_token"] for name in models)
    assert models["shaped_noise"]["log_likelihood_per_token"] == pytest.approx(best, abs=1e-3)  # a walk of Q = 0 too
    assert models["shaped_noise"]["description"].startswith("V_t = 0.0")
    assert "(1 - p_t)^2.5" in models["shaped_noise"]["description"].replace("2.49", "2.5").replace("2.48", "2.5")


def test_the_subsample_depends_on_the_seed_and_not_on_how_files_are_cut():
    rng = np.random.default_rng(0)
    mask = np.arange(20) < rng.integers(5, 21, (100, 1))
    whole = Ratios(log_ratio=np.where(mask, rng.normal(size=mask.shape), 0.0), mask=mask, step=np.arange(100))

    def sample(seed, cut):
        reservoir = Reservoir(200, np.random.default_rng(seed))
        for start in range(0, 100, cut):
            reservoir.add(whole.rows(slice(start, start + cut)))
        return reservoir.kept

    assert sample(0, 100).step.tolist() == sample(0, 7).step.tolist() != sample(1, 100).step.tolist()
    assert sample(0, 7).lengths.sum() <= 200


def test_percentiles_come_from_bins_of_one_percent():
    x = np.random.default_rng(0).standard_t(2, 20000) * 1e-3
    counts = magnitude_counts(x)
    for level, value in percentiles(counts, (1, 25, 75, 99)).items():
        assert value == pytest.approx(np.quantile(x, float(level) / 100), rel=0.03)
    largest = np.sort(x**2)[::-1][:200].sum() / (x**2).sum()
    assert energy_of_largest(counts, 0.01) == pytest.approx(largest, rel=0.02)
    assert percentiles(magnitude_counts(np.zeros(5)), (50,)) == {"50": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": []}, "kpo analyze RUN"),
        ({"filters": "kalman"}, "filters=kalman must be a list"),
        ({"filters": [3]}, "filters: 3 must be a filter's name"),
        ({"dead_zone": -1.0}, "dead_zone=-1.0"),
        ({"cutoff": 0.7}, "cutoff=0.7"),
        ({"time_constants": [0.0]}, "time_constants=0.0"),
        ({"clip_widths": [[0.2]]}, "clip_widths"),
        ({"clip_widths": [[2.0, 0.2]]}, "0 < eps_low <= 1"),
        ({"nulls": {"draws": 5, "tokens": 100}}, "nulls.draws=5"),
        ({"refresh": 0.0}, "refresh=0.0"),
        ({"watch": True, "runs": ["a", "b"]}, "--watch shows one run"),
        ({"colour": 1}, "unknown key colour"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        analyze_config({**raw_config(), **changes})


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ([{"name": "kalmn"}], "did you mean 'kalman'"),
        ([{"name": "kalman", "qq": 1.0}], "no parameter 'qq'"),
        ([{"name": "kalman", "q": 1.0, "time_constant": 3.0}], "keep one"),
        ([{"name": "ema", "gain": 2.0}], "filter.gain=2.0"),
        ([{"name": "kalman", "q": "much"}], "must be a number"),
        ([{"name": "kalman", "v": "much"}], "filters: "),
    ],
)
def test_filters_that_cannot_be_built_are_named(filters, message):
    with pytest.raises(UserError, match=message):
        series_of(analyze_config({**raw_config(), "filters": filters}))


@pytest.mark.parametrize("name", ["ema", "prefix_sum", "kalman_hetero", "kalman_robust", "kalman_adaptive"])
def test_every_filter_can_be_asked_for(run, name):
    found = analyse(find_source(run), config(f"filters=[{name}]", "likelihood_tokens=0")).found
    assert found["filters"][name]["switch_frequency"]["null_shuffled"] is not None


ROUNDING = {
    "responses": 8,
    "tokens": 300,
    "z": 0.02,
    "z_error": 0.03,
    "filtered_error": 6e-5,
    "width": 3e-4,
    "decided": 0.02,
}


def write_rounded(run, *roundings):
    for step, rounding in enumerate(roundings, start=1):
        path = run / "ratios" / f"step-{step:06d}.safetensors"
        write_record(path, step, tensors(step), dtype="bfloat16", rounding=rounding)
    return analyse(find_source(run), config("nulls.draws=0")).found


def test_rounding_stands_beside_z(tmp_path):
    """Root mean squares are pooled over tokens: of 0.03 over 300 and 0.05 over 100 it is 0.0361."""
    other = {**ROUNDING, "responses": 4, "tokens": 100, "z_error": 0.05}
    found = write_rounded(tmp_path, ROUNDING, other, None)
    pooled = found["rounding"]
    assert (pooled["dtype"], pooled["steps"], pooled["responses"], pooled["tokens"]) == ("bfloat16", 2, 12, 400)
    assert pooled["z_error"] == pytest.approx(math.sqrt((300 * 0.03**2 + 100 * 0.05**2) / 400))
    assert pooled["widths"] == pytest.approx(0.2)
    assert (
        "In bfloat16 log-ratios are off by 0.0361 (root mean square), 1.8 times their own size, and behind the run's "
        "filter by 0.2 of the clip width 0.0003: rounding takes part in what is clipped, at 2.0% of tokens."
    ) in summary(found)
    (table,) = [table for table in terminal_tables(found) if table.title == "Rounding"]
    assert table.rows == [["raw", "0.02", "0.0361", "-", "-"], ["recorded", "-", "6e-05", "0.2", "2.0%"]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"filtered_error": 1e-5, "decided": 0.0}, "0.0333 of the clip width 0.0003: below 0.1, too little to take"),
        ({"width": None}, "and behind the run's filter by 6e-05."),
        ({"z": 0.0}, "off by 0.03 (root mean square), and behind"),
    ],
)
def test_the_words_on_rounding_follow_its_numbers(tmp_path, changes, said):
    assert said in summary(write_rounded(tmp_path, {**ROUNDING, **changes}))


def test_a_run_in_float32_has_no_word_on_rounding(tmp_path, found):
    assert found["rounding"] is None
    assert "off by" not in summary(found)


@pytest.mark.parametrize(
    "rounding",
    [
        *([], 3, {}),
        *({**ROUNDING, name: value} for name, value in [("z", "0.1"), ("z", -1.0), ("z_error", math.inf)]),
        *({**ROUNDING, name: value} for name, value in [("tokens", 0), ("tokens", None), ("width", 0), ("more", 1.0)]),
    ],
)
def test_rounding_that_no_run_measured_is_a_bad_record(tmp_path, rounding):
    with pytest.raises(UserError, match="the rounding in its metadata is not that of a run"):
        write_rounded(tmp_path, rounding)
