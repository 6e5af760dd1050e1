"""`sign_statistics` against closed forms and a token-by-token implementation."""

import math
from collections import Counter

import brute
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kpo_cli.analysis import sign_statistics


def full(rows):
    return np.ones(np.shape(rows), bool)


def test_alternating_signs_switch_at_every_token():
    z = np.tile([1.0, -1.0], (3, 10))
    found = sign_statistics(z, full(z))
    assert (found.switch_frequency, found.switch_frequency_two_state) == (1, 1)
    assert (found.mean_run_length, found.median_run_length, found.mean_off_policy_run_length) == (1, 1, 1)
    assert found.run_length_counts == Counter({1: 60})


def test_a_constant_never_switches_and_is_one_run_a_response():
    found = sign_statistics(np.full((3, 20), -0.1), full(np.zeros((3, 20))))
    assert (found.switch_frequency, found.mean_run_length) == (0, 20)
    assert found.run_length_counts == Counter({20: 3})
    assert (found.tokens, found.pairs) == (60, 57)


def test_zero_is_a_state_of_its_own():
    """Identical policies: the third state, which is on-policy and no off-policy run."""
    found = sign_statistics([[0.0, 0.0, 0.0, 1.0, 2.0, -1.0]], [[1, 1, 1, 1, 1, 1]])
    assert found.switch_frequency == pytest.approx(2 / 5)
    assert found.switch_frequency_two_state == pytest.approx(1 / 2)
    assert found.run_length_counts == Counter({3: 1, 2: 1, 1: 1})
    assert found.off_policy_run_length_counts == Counter({2: 1, 1: 1})
    assert found.mean_off_policy_run_length == 1.5
    nothing = sign_statistics(np.zeros((2, 4)), full(np.zeros((2, 4))))
    assert math.isnan(nothing.mean_off_policy_run_length)
    assert math.isnan(nothing.switch_frequency_two_state)


def test_the_dead_zone_includes_its_edge():
    z = [[0.1, -0.1, 0.2, -0.2]]
    assert sign_statistics(z, full(z), dead_zone=0.1).run_length_counts == Counter({2: 1, 1: 2})
    assert sign_statistics(z, full(z), dead_zone=0.2).run_length_counts == Counter({4: 1})


def test_fair_coins_switch_half_the_time_and_have_geometric_runs():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2000, 100))
    found = sign_statistics(z, full(z))
    assert found.switch_frequency == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(found.pairs))
    # Runs of length 1 inside a response: both neighbours differ, probability 1/4 a token.
    assert found.run_length_counts[1] / found.tokens == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("phi", [-0.5, 0.3, 0.9])
def test_an_autoregression_switches_at_arccos_phi_over_pi(phi: float):
    """P(sign change) of a Gaussian AR(1) with coefficient phi is arccos(phi) / pi (Rice)."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=(2000, 200))
    z[:, 0] /= math.sqrt(1 - phi**2)
    for t in range(1, 200):
        z[:, t] += phi * z[:, t - 1]
    assert sign_statistics(z, full(z)).switch_frequency == pytest.approx(math.acos(phi) / math.pi, abs=0.005)


def test_nothing_crosses_rows_or_gaps():
    z = np.array([[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, np.nan, 1.0]])
    mask = np.array([[0, 1, 1, 1], [1, 1, 0, 1]])
    found = sign_statistics(z, mask)
    assert (found.pairs, found.switch_frequency) == (3, 0)
    assert found.run_length_counts == Counter({3: 1, 2: 1, 1: 1})


@st.composite
def masked_rows(draw):
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    value = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    z = draw(st.lists(st.lists(value, min_size=width, max_size=width), min_size=rows, max_size=rows))
    mask = draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=rows, max_size=rows))
    return np.array(z), np.array(mask)


@settings(max_examples=200, deadline=None)
@given(masked_rows(), st.sampled_from([0.0, 0.5, 1.0]))
def test_equal_to_counting_token_by_token(data, dead_zone: float):
    z, mask = data
    found, expected = sign_statistics(z, mask, dead_zone), brute.sign_counts(z, mask, dead_zone)
    assert found.run_length_counts == expected["runs"]
    assert found.off_policy_run_length_counts == expected["off_policy_runs"]
    assert found.pairs == expected["pairs"]
    for name in ("switch_frequency", "switch_frequency_two_state"):
        assert getattr(found, name) == pytest.approx(expected[name], nan_ok=True)


def test_tensors_are_taken_as_they_are():
    z = torch.randn(3, 7, requires_grad=True)
    mask = torch.rand(3, 7) > 0.3
    assert sign_statistics(z, mask) == sign_statistics(z.detach().numpy(), mask.long())


@pytest.mark.parametrize(
    ("z", "mask", "dead_zone", "message"),
    [
        ([1.0, 2.0], [1, 1], 0.0, "one row a response"),
        ([[1.0, 2.0]], [[1]], 0.0, "mask has shape"),
        ([[1.0, 2.0]], [[1, 2]], 0.0, "0 and 1"),
        ([[1.0, math.nan]], [[1, 1]], 0.0, "nan at row 0, token 1"),
        ([[1.0]], [[1]], -1.0, "dead_zone=-1.0"),
    ],
)
def test_what_does_not_fit_is_named(z, mask, dead_zone, message):
    with pytest.raises(ValueError, match=message):
        sign_statistics(z, mask, dead_zone)
