"""Do training problems stand in the evaluation benchmarks? Compared by normalised text, without the benchmarks.

The package ships a 64-bit hash of every benchmark problem's normalised text, so that every run can say, offline,
whether it trains on what it will be measured by. Rebuilt with

    python -m kpo_cli.data.overlap aime24=FILE.jsonl math500=FILE.jsonl ...
"""

import hashlib
import json
import sys
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from kpo_cli.runs.directory import read_lines, write_text

FINGERPRINTS = Path(__file__).parent / "benchmark_fingerprints.json"


def fingerprint(problem: str) -> str:
    """A hash of the letters and digits of a problem, whatever its case, spacing, punctuation and LaTeX spacing."""
    text = unicodedata.normalize("NFKC", problem).casefold()
    kept = "".join(character for character in text if character.isalnum())
    return hashlib.blake2b(kept.encode(), digest_size=8).hexdigest()


def benchmark_overlap(problems: Iterable[str]) -> dict[str, int]:
    """Benchmarks that share problems with `problems`, and how many of `problems` they hold."""
    prints = [fingerprint(problem) for problem in problems]
    counts = {name: sum(p in known for p in prints) for name, known in _known().items()}
    return {name: count for name, count in counts.items() if count}


def shared_problems(problems: Iterable[str], others: Iterable[str]) -> int:
    """How many of `problems` stand among `others`."""
    known = {fingerprint(problem) for problem in others}
    return sum(fingerprint(problem) in known for problem in problems)


@cache
def _known() -> dict[str, frozenset[str]]:
    return {name: frozenset(hashes) for name, hashes in json.loads(FINGERPRINTS.read_text("utf-8")).items()}


def _build(sources: dict[str, str]) -> None:
    table = {}
    for name, path in sources.items():
        rows = [json.loads(line) for line in read_lines(Path(path))]
        table[name] = sorted({fingerprint(row["problem"]) for row in rows})
    write_text(FINGERPRINTS, json.dumps(table, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    _build(dict(argument.split("=", 1) for argument in sys.argv[1:]))
