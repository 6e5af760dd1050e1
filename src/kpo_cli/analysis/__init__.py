"""What recorded ratios do: statistics, nulls, filters applied offline, reports. Reads files, never a model."""

from kpo_cli.analysis.statistics.signs import SignStatistics, sign_statistics

__all__ = ["SignStatistics", "sign_statistics"]
