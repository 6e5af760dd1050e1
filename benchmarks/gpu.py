"""Everything that a GPU is asked, in one go and in less than five minutes.

    make gpu [ONLY=part,part] [ARGS="..."]             all parts; results go to $OUT, or to outputs/gpu/
    make gpu ARGS="--device cpu --small"               every part of it, short, on a CPU: does the script run?
    python benchmarks/gpu.py --list                    the parts, and the seconds that each may take
    python benchmarks/gpu.py --table results.jsonl     the tables once more, from the file

Each part runs in a process of its own with a time limit of its own, so that a fault of the device, a hang or an abort
ends that part alone. Its line is appended to results.jsonl when it ends; what it had measured until then is kept
whatever happened to it. What it printed goes to log.txt. A part that no longer fits into `--budget` is left out, and
its line says "no time".

The process is a fork of this one, which has imported everything and computed nothing: imports would cost more than
most parts. Should the first part fail, it is tried in a new interpreter, and if that helps, so are all others.
"""

import argparse
import contextlib
import faulthandler
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
GRACE = 3
"""Seconds that are kept for writing, and for killing what does not end."""


@dataclass(frozen=True)
class Part:
    name: str
    question: str
    function: str
    """module:function in this folder; it yields dicts of numbers as they come (gpu_parts/__init__.py)."""
    seconds: int
    """It may take on a GPU, at most."""
    small_seconds: int = 300
    """With --small, where it takes a few: cores may be slow and busy."""
    takes_the_rest: bool = False
    """It may take all that is left."""


PARTS = (
    Part("env", "what machine is this", "gpu_parts.machine:env", 15),
    Part("on_policy", "lr = 0 gives z = 0", "gpu_parts.numerics:on_policy", 25),
    Part("layouts", "packed = padded = float64", "gpu_parts.numerics:layouts", 10),
    Part("log_probs", "linear_log_probs against float64", "gpu_parts.numerics:log_probs", 10),
    Part("filters", "filters against float64; Triton", "gpu_parts.numerics:filters", 15),
    Part("backends", "which SDPA runs; a new shape's cost", "gpu_parts.attention:backends", 20),
    Part("varlen", "varlen attention = our buckets", "gpu_parts.attention:varlen", 22),
    Part("memory", "peak memory against the plan", "gpu_parts.costs:memory", 40),
    Part("step", "a training step, KPO against GRPO", "gpu_parts.costs:step", 55),
    Part("rollout", "sampling with rollout=hf in bf16", "gpu_parts.costs:rollout", 22),
    Part("resume", "kill and resume with offload", "gpu_parts.runs:resume", 36),
    Part("long", "experiment=long_arithmetic", "gpu_parts.runs:long", 30, takes_the_rest=True),
)


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    options = parse(arguments, parts)
    if options.table:
        with in_one_line(f"--table {options.table} cannot be read"):
            rows = read_results(options.table)
        print(tables(rows, parts))
        return 0
    if options.list:
        print("\n".join(f"{part.name:10} {part.seconds:4} s  {part.question}" for part in parts))
        return 0
    chosen = [part for part in parts if not options.only or part.name in options.only]
    if options.fresh_child:
        work(chosen[0], options, Path(options.fresh_child))
        return 0
    return Runner(options, chosen, parts).run()


def parse(arguments: Sequence[str] | None, parts: Sequence[Part]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="shapes for a CPU: seconds a part")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="PART,PART")
    parser.add_argument("--budget", type=float, help="seconds for all parts; by default 290, or 1,200 with --small")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or REPOSITORY / "outputs/gpu"))
    parser.add_argument("--fresh", action="store_true", help="a new interpreter for each part, not a fork")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of a results.jsonl and stop")
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    parser.add_argument("--fresh-child", help=argparse.SUPPRESS)  # the folder of a part that this process is
    options = parser.parse_args(arguments)
    if unknown := set(options.only or ()) - {part.name for part in parts}:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are: {', '.join(part.name for part in parts)}")
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu goes with --small: the shapes of a GPU would take hours")
    options.budget = options.budget or (1200 if options.small else 290)
    return options


@contextlib.contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """A file that cannot be used ends the script with one line and exit code 2."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        print(f"{Path(sys.argv[0]).name}: {what} ({getattr(error, 'strerror', None) or error})", file=sys.stderr)
        raise SystemExit(2) from None


class Runner:
    """Runs parts one after the other, and writes what came out of each."""

    def __init__(self, options: argparse.Namespace, chosen: Sequence[Part], parts: Sequence[Part]) -> None:
        self.options, self.chosen, self.parts = options, chosen, parts
        self.fresh = options.fresh
        self.ends = time.monotonic() + options.budget
        self.results, self.log = options.out / "results.jsonl", options.out / "log.txt"
        with in_one_line(f"--out {options.out} cannot be written to"):
            options.out.mkdir(parents=True, exist_ok=True)
            for file in (self.results, self.log, options.out / "table.md"):
                file.open("a").close()

    def run(self) -> int:
        """The number of parts that failed, did not end, or had no time."""
        prepare(self.chosen, self.options.small)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # with the part that runs, by `wait`
        total = sum(map(self.limit_of, self.chosen))
        print(f"{len(self.chosen)} parts, {total:,} s at most, a budget of {self.options.budget:,.0f} s", flush=True)
        rows = []
        for number, part in enumerate(self.chosen):
            row = self.attempt(part)
            if number == 0 and row["status"] == "failed" and not row["numbers"] and not self.fresh:
                self.fresh = True  # an import may have touched the device, which no fork survives
                again = self.attempt(part)
                self.fresh = again["status"] == "ok"
                row = again if self.fresh else row
            rows.append(row)
            with self.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{part.name:10} {row['status']:8} {row['seconds']:6.1f} s  {row['reason']}", flush=True)
        text = tables(rows, self.parts)
        (self.options.out / "table.md").write_text(text + "\n")
        print(f"\n{text}\n\n{self.results}")
        return sum(row["status"] != "ok" for row in rows)

    def limit_of(self, part: Part) -> int:
        return part.small_seconds if self.options.small else part.seconds

    def attempt(self, part: Part) -> dict[str, Any]:
        """A part's line: run, or not, if there is no time left for half of it."""
        left, limit = self.ends - time.monotonic() - GRACE, self.limit_of(part)
        about = {
            "part": part.name,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "small": self.options.small,
            "device": self.options.device,
            "numbers": {},
        }
        if left < limit / 2:
            return about | outcome("skipped", f"no time: {max(0, left):.0f} s of the budget are left", 0.0)
        seconds = left if part.takes_the_rest and not self.options.small else min(limit, left)
        folder = Path(tempfile.mkdtemp(prefix=f"gpu-{part.name}-"))
        start = time.monotonic()
        try:
            try:
                code = self.wait(self.start(part, folder, seconds), seconds)
            except (KeyboardInterrupt, SystemExit):
                code, self.ends = None, 0.0  # what it has measured is kept, and nothing runs after it
            return about | self.found(folder, code, time.monotonic() - start)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def start(self, part: Part, folder: Path, seconds: float) -> int:
        """The process of a part, leader of a group of its own, and told the seconds that it has."""
        (folder / "seconds").write_text(str(seconds))
        sys.stdout.flush()
        with self.log.open("a") as log:
            print(f"\n===== {part.name}", file=log, flush=True)
            if self.fresh:
                command = [sys.executable, sys.argv[0], "--only", part.name, "--fresh-child", str(folder)]
                command += ["--device", self.options.device, *(["--small"] if self.options.small else [])]
                return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True).pid
            if pid := os.fork():
                return pid
            try:
                os.setsid()
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                work(part, self.options, folder)
            finally:  # never back into the parent's code
                sys.stdout.flush()
                os._exit(0)

    def wait(self, pid: int, seconds: float) -> int | None:
        """Its exit status, minus the signal that killed it, or None if its time was up. Nothing of it goes on."""
        code, ends = None, time.monotonic() + seconds
        try:
            while code is None and time.monotonic() < ends:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    code = os.waitstatus_to_exitcode(status)
                else:
                    time.sleep(0.05)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            if code is None:
                os.waitpid(pid, 0)
        return code

    def found(self, folder: Path, code: int | None, spent: float) -> dict[str, Any]:
        """What a part left behind, however it ended."""
        kept = folder / "numbers.json"
        left = json.loads(kept.read_text()) if kept.exists() else {}
        if code is None:
            return left | outcome("timeout", f"stopped after {spent:.0f} s", spent)
        if "status" not in left:
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            said = self.log.read_text(errors="replace").split("\n===== ")[-1].split("Fatal Python error")[0]
            last = said.strip().splitlines()[-1]  # its name, if it said nothing before faulthandler spoke
            return left | outcome("failed", f"{how}; the last line in log.txt: {last}"[:300], spent)
        return left | {"seconds": round(spent, 2)}


def outcome(status: str, reason: str, seconds: float) -> dict[str, Any]:
    return {"status": status, "reason": reason, "seconds": round(seconds, 2)}


def prepare(parts: Sequence[Part], small: bool) -> None:
    """Import what the parts need, once. What cannot be imported fails where it is used, with its own message."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not start CUDA in the parent
    if small:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # small shapes gain nothing from threads that wait for each other
    for module in ["gpu_parts", *sorted({part.function.split(":")[0] for part in parts})]:
        with contextlib.suppress(Exception):
            importlib.import_module(module)


def work(part: Part, options: argparse.Namespace, folder: Path) -> None:
    """In the part's process: run it, and write after each of its numbers how far it is."""
    faulthandler.enable()
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - it is the process's own until its end
    left: dict[str, Any] = {"numbers": {}}

    def write(**more: Any) -> None:
        left.update(more)
        draft = folder / "draft.json"
        draft.write_text(json.dumps(left, default=str))
        draft.replace(folder / "numbers.json")

    try:
        shared = importlib.import_module("gpu_parts")
        device, versions = shared.device_and_versions(options.device)
        write(device=device, versions=versions)
        module, function = part.function.split(":")
        seconds = float((folder / "seconds").read_text())
        setting = shared.Setting(options.device, options.small, seconds, folder)
        for numbers in getattr(importlib.import_module(module), function)(setting):
            left["numbers"].update(numbers)
            write()
        write(status="ok", reason="")
    except BaseException as error:  # a part may raise anything, SystemExit too
        traceback.print_exc()
        lines = traceback.format_exception_only(error)[-1].strip().splitlines()
        write(status="failed", reason=lines[0][:300])  # the other lines of a CUDA error are advice


def read_results(path: Path) -> list[dict[str, Any]]:
    """The newest line of each part on each device."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return list({(row["part"], row["device"], row["small"]): row for row in rows}.values())


def tables(rows: Sequence[dict[str, Any]], parts: Sequence[Part]) -> str:
    """Markdown: how each part ended, and all numbers."""
    questions = {part.name: part.question for part in parts}
    lines = [line_of("part", "asked", "status", "s", "on", ""), "|---|---|---|---|---|---|"]
    for row in rows:
        on = f"{row['device']}{', small shapes: says nothing of a GPU' if row['small'] else ''}"
        asked, seconds = questions.get(row["part"], ""), f"{row['seconds']:.1f}"
        lines.append(line_of(row["part"], asked, row["status"], seconds, on, row["reason"]))
    lines += ["", line_of("part", "what", "value"), "|---|---|---|"]
    for row in rows:
        lines += [line_of(row["part"], name, shown(value)) for name, value in row["numbers"].items()]
    return "\n".join(lines)


def line_of(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
