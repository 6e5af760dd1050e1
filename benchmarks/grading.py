"""What the grader is worth: labelled answers, golds, the same verdict every time, and time.

    python benchmarks/grading.py accuracy LABELLED.jsonl ... [--without policy]
    python benchmarks/grading.py golds GOLDS.jsonl ...
    python benchmarks/grading.py same LABELLED.jsonl ... [--pairs 1000]
    python benchmarks/grading.py speed [--answers 10000] [--library-answers 1000]

A line of a labelled file has `response`, `gold`, `correct` and `why`; a line of a gold file has `answer`. `accuracy`
prints what was graded wrong; `same` grades the same pairs in seven settings and counts the verdicts that changed;
`speed` compares with math-verify on its own, where that is installed (it is no dependency of kpo).
"""

import argparse
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kpo_cli.rewards import Verdict, grade_batch

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


def timed(pairs: list[Pair]) -> tuple[float, list[Verdict]]:
    """Processor seconds that a batch takes, and its verdicts."""
    start = time.process_time()
    verdicts = grade_batch(pairs)
    return time.process_time() - start, verdicts


def accuracy(path: Path, without: str | None) -> None:
    """Accuracy, grader failures, and the cases that were graded wrong."""
    cases = [case for case in read_lines(path) if without is None or without not in case["why"]]
    seconds, verdicts = timed([(case["response"], case["gold"]) for case in cases])
    kinds: Counter[str] = Counter()
    for verdict, case in zip(verdicts, cases, strict=True):
        if verdict.correct == case["correct"] and not verdict.failed:
            continue
        kind = verdict.reason if verdict.failed else "false negative" if case["correct"] else "false positive"
        kinds[kind] += 1
        print(f"  {kind}: gold {case['gold'][:60]!r}, answer {(verdict.extracted or '')[:60]!r} ({case['why']})")
    right = sum(verdict.correct == case["correct"] for verdict, case in zip(verdicts, cases, strict=True))
    print(
        f"{path.name}: {right} of {len(cases)} as labelled ({right / len(cases):.4f}), {dict(kinds)}, {seconds:.1f} s"
    )


def golds(path: Path) -> None:
    """Golds against themselves, in a form that is not the same string."""
    texts = [line["answer"] for line in read_lines(path)]
    verdicts = grade_batch([(f"\\boxed{{ \\displaystyle {text} . }}", text) for text in texts])
    print(f"golds of {path.name}: {sum(v.correct for v in verdicts)} of {len(texts)} correct against themselves")


def same(paths: list[Path], count: int) -> None:
    """The same pairs in seven settings; the verdicts of the first are what the others should be."""
    labelled = [(case["response"], case["gold"]) for path in paths for case in read_lines(path)]
    pairs = [*labelled, *bombs(50)]
    pairs = [*pairs, *ordinary_answers(max(0, count - len(pairs)))[0]][:count]
    first = [grade_batch([pair])[0] for pair in pairs]
    order = random.Random(1).sample(range(len(pairs)), len(pairs))
    settings: dict[str, Callable[[], list[Verdict]]] = {
        "alone, again": lambda: batches(pairs, 1),
        "in batches of 15": lambda: batches(pairs, 15),
        "in batches of 64": lambda: batches(pairs, 64),
        "in one batch": lambda: batches(pairs, len(pairs)),
        "shuffled": lambda: restored(batches([pairs[place] for place in order], 64), order),
        "under load": lambda: loaded(lambda: batches(pairs, 64)),
        "under load, shuffled, alone": lambda: loaded(
            lambda: restored(batches([pairs[place] for place in order], 1), order)
        ),
    }
    print(f"{len(pairs)} pairs, {sum(v.correct for v in first)} right, {sum(v.failed for v in first)} failures")
    for name, setting in settings.items():
        changed = sum(one != other for one, other in zip(first, setting(), strict=True))
        print(f"  {name}: {changed} verdicts changed")


def batches(pairs: list[Pair], size: int) -> list[Verdict]:
    """Verdicts of the pairs, graded in batches."""
    return [verdict for i in range(0, len(pairs), size) for verdict in grade_batch(pairs[i : i + size])]


def restored(verdicts: list[Verdict], order: list[int]) -> list[Verdict]:
    """Verdicts of shuffled pairs in the order that the pairs had before."""
    back = dict(zip(order, verdicts, strict=True))
    return [back[place] for place in range(len(order))]


def loaded(run: Callable[[], Any]) -> Any:
    """The result of a run beside two busy processes for each core."""
    busy = [multiprocessing.Process(target=spin, daemon=True) for _ in range(2 * (os.cpu_count() or 1))]
    for process in busy:
        process.start()
    try:
        return run()
    finally:
        for process in busy:
            process.kill()


def spin() -> None:
    """Keep a core busy."""
    while True:
        pass


def speed(count: int, library_count: int) -> None:
    """Processor time of ordinary answers, of hostile ones among them, and of math-verify on some of the first."""
    pairs, truths = ordinary_answers(count)
    plain, verdicts = timed(pairs)
    right = sum(verdict.correct == truth for verdict, truth in zip(verdicts, truths, strict=True))
    print(f"{count} ordinary answers: {plain:.1f} s of processor time, {right} graded right")
    mixed, verdicts = timed([*pairs[: count * 19 // 20], *bombs(count // 20)])
    print(f"with 5% hostile answers instead: {mixed:.1f} s, {sum(v.failed for v in verdicts)} grader failures")
    digits, _ = timed([(f"\\boxed{{{i % 10}}}", str(i % 7)) for i in range(256)])
    print(f"256 boxed digits: {1e3 * digits:.1f} ms")
    try:
        from math_verify import parse, verify
    except ImportError:
        print("math-verify is not installed")
        return
    parse("$x$")
    start, right = time.process_time(), 0
    for (response, gold), truth in zip(pairs[:library_count], truths, strict=False):
        right += bool(verify(parse(f"${gold}$"), parse(response))) == truth
    library = time.process_time() - start
    ratio = library / library_count / (plain / count)
    print(
        f"math-verify: {library_count} of them in {library:.1f} s, {right} graded right; {ratio:.1f} times as long each"
    )


def main() -> None:
    """Run one mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("accuracy", "golds", "same", "speed"))
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--without", help="leave out the cases with this word in `why`")
    parser.add_argument("--pairs", type=int, default=1_000)
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--library-answers", type=int, default=1_000)
    options = parser.parse_args()
    if options.mode == "same":
        same(options.files, options.pairs)
    elif options.mode == "speed":
        speed(options.answers, options.library_answers)
    for path in options.files:
        if options.mode == "accuracy":
            accuracy(path, options.without)
        elif options.mode == "golds":
            golds(path)


if __name__ == "__main__":
    main()
