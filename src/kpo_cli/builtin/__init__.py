"""The built-in policy: a 0.15M-parameter decoder that knows the arithmetic task's format, ready for RL.

Rebuild the shipped checkpoint (about two and a half CPU-minutes) with `python -m kpo_cli.builtin.warmup`.
"""

from pathlib import Path

POLICY_DIR = Path(__file__).parent / "policy"
