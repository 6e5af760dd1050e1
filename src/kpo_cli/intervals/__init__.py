"""Intervals and tests, for evaluation, analysis and the terminal alike."""
