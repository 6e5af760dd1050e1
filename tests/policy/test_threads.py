"""Work spread over threads."""

import threading
import time

import pytest
import torch

from kpo_cli.policy.threads import Workers


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_the_order_of_the_items(count):
    def work(item):
        time.sleep(0.01 * (5 - item))
        return item, torch.get_num_threads()

    assert Workers(count).map(work, range(6)) == [(item, 1) for item in range(6)]


def test_as_many_at_a_time_as_there_are_workers():
    meeting = threading.Barrier(3, timeout=20)
    Workers(3).map(lambda item: meeting.wait(), range(3))  # one worker less would wait for ever


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_ends_it_and_leaves_nothing_running(count):
    running, begun = [], []

    def work(item):
        begun.append(item)
        running.append(item)
        try:
            if item == 1:
                raise ValueError("item 1")
            time.sleep(0.2)
        finally:
            running.remove(item)

    with pytest.raises(ValueError, match="item 1"):
        Workers(count).map(work, range(20))
    assert not running
    assert len(begun) < 6
