"""Evaluation of a policy on problems with verifiable answers."""

from kpo_cli.evaluation.heldout import HeldoutResult, evaluate_heldout

__all__ = ["HeldoutResult", "evaluate_heldout"]
