"""`kpo eval`, from configuration to results: everything that can be wrong is found before the first sample."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kpo_cli.config import convert
from kpo_cli.data.prompt_checks import check_prompts
from kpo_cli.data.prompts import Prompt
from kpo_cli.errors import RunInterrupted, RunStopped, SamplingFailed, UserError
from kpo_cli.evaluation import results as report
from kpo_cli.evaluation.benchmarks import Benchmark, Files, load_benchmarks
from kpo_cli.evaluation.config import MAX_TOKENS, EvalConfig
from kpo_cli.evaluation.rows import make_rows, regraded
from kpo_cli.evaluation.subject import Subject, find_subjects
from kpo_cli.evaluation.trained_on import trained_on
from kpo_cli.policy.load import Policy, context_of, share_threads
from kpo_cli.policy.threads import Workers
from kpo_cli.rollout import HFSampler, Sampler, VLLMSampler
from kpo_cli.rollout.check import FIRST_TOKENS, RESPONSES, SamplerCheck, model_score
from kpo_cli.rollout.engine import VLLMEngine, choose_engine, usable_vllm
from kpo_cli.rollout.hf import Report
from kpo_cli.rollout.room import check_bytes
from kpo_cli.rollout.trial import choose_ways
from kpo_cli.rollout.ways import Ways
from kpo_cli.runs.directory import RunDir, check_new, finite, make_manifest, path_of, read_text, write_text
from kpo_cli.runs.samples import Key, Row, SampleFile, read_rows
from kpo_cli.terminal import counted, make_console, printable, say, show


@dataclass(frozen=True)
class Asked:
    """A policy and what it is asked."""

    role: str
    """"checkpoint" or "vs"."""
    subject: Subject
    policy: Policy
    workers: Workers
    prompts: dict[str, list[Prompt]]
    """By benchmark."""
    notes: list[str]
    """What the user should know of them."""
    ways: Ways = field(default_factory=Ways)
    """How transformers samples it."""


def run(raw: dict[str, Any]) -> None:
    """Entry point of the command; `raw` is the composed configuration. Raises UserError."""
    raw.pop("overrides")
    target = path_of("run_dir", raw.pop("run_dir"))
    config = convert(EvalConfig, raw)
    console = make_console(width_of_files=160)
    if config.regrade is not None:
        _regrade(config, Path(config.regrade), target, console)
    else:
        _evaluate(config, target, console)


def _evaluate(config: EvalConfig, run_dir: Path | None, console: Console) -> None:
    subjects = find_subjects(config)
    benchmarks = load_benchmarks(
        config.benchmarks, config.known, Files(config.data, config.data_dir), config.eval.limit
    )
    asked = [_ask(role, subject, benchmarks, config) for role, subject in subjects.items()]
    config, fitted = _fit(config, asked)
    settings = _settings(config, asked, benchmarks)
    if run_dir is None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
        run_dir = Path("outputs") / "eval" / f"{subjects['checkpoint'].label}-{digest}"
    new = not (run_dir / "config.yaml").is_file()
    if new:  # what cannot be sampled is refused before anything is made
        asked = [_tried(item, config) for item in asked]
    with _open(run_dir, new, settings, asked) as out:
        samples = SampleFile(out.path / "samples.jsonl", config.eval.n)
        _keep_prompts(out, asked)
        say(console, f"evaluation: {out.path}")
        for item in asked:
            first = next(iter(item.prompts.values()))[0]
            say(console, f"first prompt of {item.subject.label}: {first.text!r}")
        notes = [
            *fitted,
            *(note for b in benchmarks for note in b.notes),
            *(note for item in asked for note in item.notes),
        ]
        for note in dict.fromkeys([*notes, *trained_on(config, benchmarks)]):
            say(console, note)
        try:
            for item in asked:
                missing = [b for b in benchmarks if samples.missing((item.role, b.name), len(b.problems))]
                ready = _tried(item, config) if missing and not new else item
                for note in ready.notes[len(item.notes) :]:
                    say(console, note)
                with _engine(ready, missing, config, console) as engine:
                    for benchmark in benchmarks:
                        _sample(ready, benchmark, engine, config, samples, console)
        except SamplingFailed as error:
            raise RunStopped(f"{error}; the samples made are in {out.path}, the same command goes on") from error
        except UserError:  # the engine did not start
            if new and not samples.path.exists():
                out.discard()
            raise
        except KeyboardInterrupt:
            raise RunInterrupted(f"interrupted; the samples made are in {out.path}, the same command goes on") from None
        keys = {(item.role, b.name): b.problems for item in asked for b in benchmarks}
        tables = {key: samples.table(key, [problem.id for problem in problems]) for key, problems in keys.items()}
        labels = {item.role: item.subject.label for item in asked}
        _report(out.path, tables, labels, settings, config, console)


def _ask(role: str, subject: Subject, benchmarks: list[Benchmark], config: EvalConfig) -> Asked:
    policy = subject.load(role)
    policy.model.requires_grad_(False)
    workers = share_threads(None, policy)
    prompts, notes = {}, list(policy.way.notes)
    for benchmark in benchmarks:
        builder = subject.prompts(policy, benchmark.has_instruction)
        prompts[benchmark.name] = [builder.build(problem) for problem in benchmark.problems]
        notes += check_prompts(builder, prompts[benchmark.name], policy.stop_ids)
    return Asked(role, subject, policy, workers, prompts, notes)


def _tried(item: Asked, config: EvalConfig) -> Asked:
    """With the way to sample it, and computing in its own type from here on. Raises UserError if there is no way."""
    if _engine_name(item, config) == "vllm":
        usable_vllm(item.policy)
        item.policy.narrow()
        return item
    sampler = _hf_sampler(item, config, None)
    if item.policy.half:
        sampler = sampler.changed(lean=False)  # as it will be
    score = model_score(item.policy, sampler.temperature)
    prompts = [prompt.token_ids for prompts in item.prompts.values() for prompt in prompts]
    found = choose_ways(sampler, score, prompts)
    item.policy.narrow()
    return replace(item, ways=found.ways, notes=[*item.notes, *found.notes()])


def _fit(config: EvalConfig, asked: list[Asked]) -> tuple[EvalConfig, list[str]]:
    """The configuration with a length that every context has room for, where none was given, and a line on it.

    Raises UserError for a prompt that is too long, or a length that does not fit."""
    sampling = config.eval
    room, why = sampling.max_tokens or MAX_TOKENS, None
    for item in asked:
        context, called = context_of(item.policy.model)
        for name, prompts in item.prompts.items():
            longest = max(len(prompt.token_ids) for prompt in prompts)
            if longest > (sampling.max_prompt_tokens or longest):
                raise UserError(
                    f"{name} has a prompt of {longest} tokens but eval.max_prompt_tokens="
                    f"{sampling.max_prompt_tokens}, and no problem may be left out; raise it"
                )
            if context is None or longest + room <= context:
                continue
            if longest >= context:
                raise UserError(
                    f"{name} has a prompt of {longest} tokens, and they exceed {called} ({item.subject.label}); "
                    f"no problem may be left out"
                )
            if sampling.max_tokens is not None:
                raise UserError(
                    f"{name}: a prompt of {longest} tokens and eval.max_tokens={room} exceed "
                    f"{called} ({item.subject.label}); lower eval.max_tokens to {context - longest}, or set it to null"
                )
            room, why = context - longest, f"{called} ({item.subject.label}) leaves beside a prompt of {longest}"
    note = [] if why is None else [f"note: responses of at most {room} tokens, which is what {why}"]
    return replace(config, eval=replace(sampling, max_tokens=room)), note


def _settings(config: EvalConfig, asked: list[Asked], benchmarks: list[Benchmark]) -> dict[str, Any]:
    """Everything that the results depend on: equal settings continue or repeat one evaluation."""
    return {
        # The batch size changes no sample; an evaluation that ran out of memory goes on with a smaller one.
        "sampling": {key: value for key, value in asdict(config.eval).items() if key not in ("batch_size", "engine")}
        | {"rollout": _engine_name(asked[0], config)},
        "seed": config.seed,
        "grader": _grader(),
        **{
            item.role: {
                "label": item.subject.label,
                "weights": item.policy.identity,
                "chat_template": item.subject.model.chat_template,
                "chat_template_kwargs": item.subject.model.chat_template_kwargs,
                "system_prompt": item.subject.system_prompt,
                "instruction": item.subject.instruction,
                "dtype": item.policy.dtype,
                "stop_ids": list(item.policy.stop_ids),
            }
            for item in asked
        },
        "benchmarks": {b.name: {"problems": len(b.problems), "of": b.total, "sha256": _hash(b)} for b in benchmarks},
    }


def _grader() -> dict[str, Any]:
    versions = make_manifest()["versions"]
    return {package: versions[package] for package in ("kpo-cli", "mpmath")}


def _hash(benchmark: Benchmark) -> str:
    text = "\0".join(f"{p.id}\0{p.problem}\0{p.answer}" for p in benchmark.problems)
    return hashlib.sha256(text.encode()).hexdigest()


def _open(path: Path, new: bool, settings: dict[str, Any], asked: list[Asked]) -> RunDir:
    """The evaluation's directory: a new one, or the one that this same evaluation has begun."""
    if new:
        return RunDir.create(path, settings, make_manifest(device=str(asked[0].policy.model.device)))
    out = RunDir.open(path)
    if out.config() != settings:
        raise UserError(f"run_dir={path} holds another evaluation; choose another run_dir=")
    return out


def _keep_prompts(out: RunDir, asked: list[Asked]) -> None:
    """Every prompt as it is sent, in prompts.jsonl. Raises UserError if this evaluation has begun with others."""
    rows = [
        {
            "subject": item.role,
            "benchmark": name,
            "place": place,
            "id": prompt.problem.id,
            "prompt": prompt.text,
            "token_ids": prompt.token_ids,
        }
        for item in asked
        for name, prompts in item.prompts.items()
        for place, prompt in enumerate(prompts)
    ]
    if not (out.path / "prompts.jsonl").is_file():
        out.write_rows("prompts.jsonl", rows)
    elif out.rows("prompts.jsonl") != rows:
        raise UserError(f"run_dir={out.path} was begun with other prompts (prompts.jsonl); choose another run_dir=")


def _engine_name(item: Asked, config: EvalConfig) -> str:
    return choose_engine(config.eval.rollout, item.policy.model.device)


@contextmanager
def _engine(
    item: Asked, benchmarks: list[Benchmark], config: EvalConfig, console: Console
) -> Iterator[VLLMEngine | None]:
    """The engine for a policy on `benchmarks`, tried on a few prompts; None without any, or with transformers."""
    if not benchmarks or _engine_name(item, config) != "vllm":
        yield None
        return
    prompts = [prompt.token_ids for benchmark in benchmarks for prompt in item.prompts[benchmark.name]]
    longest, gpu = max(map(len, prompts)), item.policy.model.device.type == "cuda"
    eager = item.policy.way.attention == "eager"
    engine = VLLMEngine(
        item.policy,
        max_length=longest + config.eval.longest,
        options=config.eval.engine or {},
        reserved=check_bytes(item.policy.model.config.get_text_config(), longest + FIRST_TOKENS, eager),
        float32_logits=gpu,  # as in training, whose policy this is
    )
    for note in engine.notes:
        say(console, note)
    try:
        check = SamplerCheck(model_score(item.policy, 1.0), item.policy.half, gpu)
        sampler = VLLMSampler(engine, stop_ids=item.policy.stop_ids, temperature=1.0, max_response_tokens=FIRST_TOKENS)
        first = prompts[:RESPONSES]
        check(first, sampler.sample(first, 1, (config.seed,)))
        yield engine
    finally:
        engine.close()


def _sampler(item: Asked, engine: VLLMEngine | None, config: EvalConfig, progress: Report) -> Sampler:
    if engine is None:
        return _hf_sampler(item, config, progress).changed(ways=item.ways)
    return VLLMSampler(
        engine,
        stop_ids=item.policy.stop_ids,
        temperature=config.eval.temperature or 1.0,
        max_response_tokens=config.eval.longest,
        top_p=config.eval.top_p,
        progress=progress,
    )


def _hf_sampler(item: Asked, config: EvalConfig, progress: Report | None) -> HFSampler:
    return HFSampler(
        item.policy.model,
        stop_ids=item.policy.stop_ids,
        temperature=config.eval.temperature or 1.0,
        max_response_tokens=config.eval.longest,
        batch_size=config.eval.batch_size,
        top_p=config.eval.top_p,
        workers=item.workers,
        progress=progress,
    )


def _sample(
    item: Asked,
    benchmark: Benchmark,
    engine: VLLMEngine | None,
    config: EvalConfig,
    samples: SampleFile,
    console: Console,
) -> None:
    """Make and grade the samples that are not there yet, some problems at a time."""
    key: Key = (item.role, benchmark.name)
    prompts, n = item.prompts[benchmark.name], config.eval.n
    missing = samples.missing(key, len(prompts))
    greedy = config.eval.temperature == 0
    # An engine fills the place of each response that ends; it idles only at the end of what it was given.
    step = max(1, config.eval.batch_size * (1 if engine is None else 4) // n)
    # A benchmark's samples do not change with the other benchmarks beside it.
    seed = (config.seed, int.from_bytes(hashlib.sha256(benchmark.name.encode()).digest()[:4], "big"))
    what = f"{item.subject.label} on {benchmark.name}"
    with _progress(console) as progress:
        done = (len(prompts) - len(missing)) * n
        task = progress.add_task(printable(what), total=len(prompts) * n, completed=done)
        sampler = _sampler(item, engine, config, lambda finished, _: progress.update(task, completed=done + finished))
        for start in range(0, len(missing), step):
            places = missing[start : start + step]
            ids = [prompts[place].token_ids for place in places]
            groups = sampler.sample(ids, n, seed, greedy=greedy, places=places)
            texts = [
                [prompts[place].opening + item.policy.decode(response.token_ids) for response in group]
                for place, group in zip(places, groups, strict=True)
            ]
            problems = [benchmark.problems[place] for place in places]
            samples.append(key, make_rows(key, places, problems, texts, groups))
            done += len(places) * n
            progress.update(task, completed=done)
    say(
        console,
        f"{what}: {counted(len(prompts), 'problem')} x {counted(n, 'sample')}",
    )


def _progress(console: Console) -> Progress:
    label = TextColumn("{task.description}", markup=False)
    columns = (label, BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True)


def _report(
    path: Path,
    tables: dict[Key, list[list[Row]]],
    labels: dict[str, str],
    settings: dict[str, Any],
    config: EvalConfig,
    console: Console,
) -> None:
    benchmarks: dict[str, dict[str, Any]] = {}
    for (role, name), table in tables.items():
        benchmarks.setdefault(name, {})[role] = report.summarise(table, config.seed)
    if "vs" in labels:
        for name, results in benchmarks.items():
            first, second = tables["checkpoint", name], tables["vs", name]
            results["comparison"] = report.compare(first, second, config.seed)
    results = {"subjects": labels, "settings": settings, "benchmarks": benchmarks}
    write_text(path / "results.json", json.dumps(finite(results), indent=2) + "\n")
    write_text(path / "results.md", report.markdown(results, config.published))
    report.pass_at_k_figure(results, path / "pass_at_k.png")
    for title, head, rows in report.tables(results, config.published):
        show(console, report.rich_table(title, head, rows))
    failed = sum(row["grader_failed"] for table in tables.values() for rows in table for row in rows)
    if failed:
        say(
            console,
            f"warning: the grader failed on {counted(failed, 'sample')}; wrong here; results.json says what if right",
        )
    say(console, f"results.json, results.md, pass_at_k.png and samples.jsonl are in {path}")


def _regrade(config: EvalConfig, source: Path, run_dir: Path | None, console: Console) -> None:
    """Grade recorded samples again into a directory of their own."""
    if not (source / "samples.jsonl").is_file() or not (source / "results.json").is_file():
        raise UserError(f"regrade={source} is not a finished evaluation (it needs samples.jsonl and results.json)")
    target = run_dir or source / "regraded"
    if target.exists():
        raise UserError(f"{target} exists already; choose another run_dir= for what is graded now")
    check_new(target)
    try:
        stored = json.loads(read_text(source / "results.json"))
    except ValueError:
        raise UserError(
            f"{source}/results.json is damaged; run the evaluation's own command again to write it"
        ) from None
    settings = {**stored["settings"], "grader": _grader(), "regraded": str(source)}
    old = read_rows(source / "samples.jsonl")
    new = regraded(old)
    changed = sum(a["correct"] != b["correct"] for a, b in zip(old, new, strict=True))
    tables: dict[Key, list[list[Row]]] = {}
    for row in sorted(new, key=lambda row: (row["place"], row["sample"])):
        table = tables.setdefault((row["subject"], row["benchmark"]), [])
        if row["place"] == len(table):
            table.append([])
        table[row["place"]].append(row)
    with RunDir.create(target, settings, make_manifest()) as out:
        out.write_rows("samples.jsonl", new)
        say(console, f"{changed} of {counted(len(new), 'verdict')} changed")
        _report(out.path, tables, stored["subjects"], settings, config, console)
