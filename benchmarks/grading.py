"""Accuracy of the grader on labelled answers, its throughput, and what hostile answers cost.

    python benchmarks/grading.py LABELLED.jsonl [--golds GOLDS.jsonl ...] [--answers 10000] [--workers 2]

A line of the labelled file has `response`, `gold`, `correct` and `why`; a line of a gold file has `answer`.
"""

import argparse
import json
import random
import re
import time
from collections import Counter
from pathlib import Path

from kpo_cli.rewards import Grader, Verdict

Pair = tuple[str, str]


def read_lines(path: Path) -> list[dict[str, str]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def ordinary_answers(count: int, seed: int = 0) -> tuple[list[Pair], list[bool]]:
    """Distinct answers of the kinds that benchmarks ask for, half of them right, and which ones are."""
    rng = random.Random(seed)
    makers = (integer, fraction, radical, polynomial, point, interval, function)
    pairs, truths = [], []
    for turn in range(count):
        gold, same, other = makers[turn % len(makers)](rng)
        truths.append(rng.random() < 0.5)
        answer = same if truths[-1] else other
        pairs.append((f"Some reasoning with $x = {rng.random()}$. The answer is $\\boxed{{{answer}}}$.", gold))
    return pairs, truths


def integer(rng: random.Random) -> tuple[str, str, str]:
    """An integer, with a unit or a thousands separator."""
    n = rng.randrange(1_000, 10**7)
    return str(n), f"{n:,}\\text{{ cm}}^2", str(n + 1)


def fraction(rng: random.Random) -> tuple[str, str, str]:
    """A fraction, unreduced."""
    a, b, k = rng.randrange(1, 999), rng.randrange(2, 999), rng.randrange(2, 9)
    return f"\\frac{{{a}}}{{{b}}}", f"\\dfrac{{{a * k}}}{{{b * k}}}", f"\\frac{{{a}}}{{{b + 1}}}"


def radical(rng: random.Random) -> tuple[str, str, str]:
    """A multiple of a root, with the factor under the root."""
    a, b = rng.randrange(2, 99), rng.choice((2, 3, 5, 7, 11))
    return f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b}}}", f"{a + 1}\\sqrt{b}"


def polynomial(rng: random.Random) -> tuple[str, str, str]:
    """A product of linear factors, expanded."""
    a, b = rng.randrange(1, 999), rng.randrange(1, 999)
    return f"(x+{a})(x-{b})", f"x^2 + {a - b}x - {a * b}".replace("+ -", "- "), f"x^2 + {a + b}x - {a * b}"


def point(rng: random.Random) -> tuple[str, str, str]:
    """A point with a constant in it."""
    a, b = rng.randrange(2, 999), rng.randrange(2, 99)
    return f"\\left({a}, \\frac{{\\pi}}{{{b}}}\\right)", f"({a}, \\pi/{b})", f"({a}, \\frac{{{b}}}{{\\pi}})"


def interval(rng: random.Random) -> tuple[str, str, str]:
    """An interval, as an inequality."""
    a, b = rng.randrange(1, 99), rng.randrange(100, 9_999)
    return f"(-{a}, \\sqrt{{{b}}}]", f"-{a} < x \\le \\sqrt{{{b}}}", f"[-{a}, \\sqrt{{{b}}})"


def function(rng: random.Random) -> tuple[str, str, str]:
    """A trigonometric expression, by the double angle."""
    a, b = rng.randrange(1, 99), rng.randrange(1, 99)
    return f"{2 * a}\\sin {b}t \\cos {b}t", f"{a}\\sin({2 * b}t)", f"{a}\\sin({b}t)"


def bombs(count: int) -> list[Pair]:
    """Answers made to exhaust a grader: towers, factorials, brackets, expansions, sums."""
    makers = (
        lambda i: f"9^{{9^{{9^{{{9 + i}}}}}}}",
        lambda i: "{" * 50_000 + str(i) + "}" * 50_000,
        lambda i: f"(({9 + i}!)!)!",
        lambda i: f"(x+y+z+{i})^{{50000}}",
        lambda i: "\\frac{1}{" * 2_000 + str(i) + "}" * 2_000,
    )
    return [(f"\\boxed{{{makers[i % len(makers)](i)}}}", "\\frac{1}{7}") for i in range(count)]


def timed(grader: Grader, pairs: list[Pair]) -> tuple[float, list[Verdict]]:
    """Seconds a batch takes, and its verdicts."""
    start = time.perf_counter()
    verdicts = grader.grade_batch(pairs)
    return time.perf_counter() - start, verdicts


def label_class(why: str) -> str:
    """The class of a labelled case: its tag in brackets, or else "other"."""
    tag = re.search(r"\[([a-z]+)\]", why)
    return tag.group(1) if tag else "other"


def report_accuracy(grader: Grader, path: Path) -> None:
    """Accuracy, grader failures, and the cases that were graded wrong."""
    cases = read_lines(path)
    seconds, verdicts = timed(grader, [(case["response"], case["gold"]) for case in cases])
    right = sum(verdict.correct == case["correct"] for verdict, case in zip(verdicts, cases, strict=True))
    print(f"labelled: {right} of {len(cases)} as labelled ({right / len(cases):.3f}), {seconds:.1f} s")
    print("reasons:", dict(Counter(verdict.reason for verdict in verdicts)))
    classes = Counter(label_class(case["why"]) for case in cases)
    wrong: Counter[tuple[str, str]] = Counter()
    for verdict, case in zip(verdicts, cases, strict=True):
        if verdict.correct != case["correct"] or verdict.failed:
            kind = verdict.reason if verdict.failed else "false negative" if case["correct"] else "false positive"
            wrong[label_class(case["why"]), kind] += 1
            print(f"  {kind}: gold {case['gold'][:60]!r}, answer {(verdict.extracted or '')[:60]!r} ({case['why']})")
    for (name, kind), count in sorted(wrong.items()):
        print(f"  class {name}: {count} {kind} of {classes[name]}")


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labelled", type=Path)
    parser.add_argument("--golds", type=Path, nargs="*", default=[])
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with Grader(workers=options.workers) as grader:
        report_accuracy(grader, options.labelled)
        for path in options.golds:
            golds = [line["answer"] for line in read_lines(path)]
            # A full stop and spaces keep the answer from being the same string as the gold.
            _, verdicts = timed(grader, [(f"\\boxed{{ {gold} . }}", gold) for gold in golds])
            print(
                f"golds of {path.name}: {sum(v.correct for v in verdicts)} of {len(golds)} correct against themselves"
            )
        pairs, truths = ordinary_answers(options.answers)
        plain, verdicts = timed(grader, pairs)
        right = sum(verdict.correct == truth for verdict, truth in zip(verdicts, truths, strict=True))
        print(f"throughput: {len(pairs)} ordinary answers in {plain:.1f} s, {right} graded right")
        mixed, verdicts = timed(grader, [*pairs[: len(pairs) * 19 // 20], *bombs(len(pairs) // 20)])
        failed = sum(verdict.failed for verdict in verdicts)
        print(f"with 5% hostile answers instead: {mixed:.1f} s, {failed} grader failures")
        single, _ = timed(grader, [(f"\\boxed{{{i % 10}}}", str(i % 7)) for i in range(256)])
        print(f"256 boxed digits: {1e3 * single:.1f} ms")


if __name__ == "__main__":
    main()
