"""The algorithms, in pure torch: borrow them for any trainer.

Nothing in here imports anything of kpo outside this package.
"""

from kpo_cli.core.advantages import GroupAdvantages, group_normalised
from kpo_cli.core.aggregation import Denominators
from kpo_cli.core.filters import kalman_filter, kalman_meaning, q_over_v_of
from kpo_cli.core.log_probs import linear_log_probs, token_log_probs
from kpo_cli.core.methods import build_objective, list_methods, load_objective
from kpo_cli.core.objective import Objective, ObjectiveOutput
from kpo_cli.core.penalties import MaskedImportance, ReferenceKL, TruncatedImportance

__all__ = [
    "Denominators",
    "GroupAdvantages",
    "MaskedImportance",
    "Objective",
    "ObjectiveOutput",
    "ReferenceKL",
    "TruncatedImportance",
    "build_objective",
    "group_normalised",
    "kalman_filter",
    "kalman_meaning",
    "linear_log_probs",
    "list_methods",
    "load_objective",
    "q_over_v_of",
    "token_log_probs",
]
