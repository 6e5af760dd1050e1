"""Verifiable rewards: finding the answer in a response and comparing it with the reference answer."""

from kpo_cli.rewards.grader import grade_batch
from kpo_cli.rewards.verdict import Verdict

__all__ = ["Verdict", "grade_batch"]
