"""The command line as a user meets it: what it answers, what it refuses, and what it leaves behind."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from kpo_cli.builtin import POLICY_DIR
from kpo_cli.cli import main as cli
from kpo_cli.cli.names import RENAMED, closest, conf_dir, config_keys

Setup = Callable[[Path], Any]
ROWS = [{"id": f"p{i}", "problem": f"{i}+1?", "answer": str((i + 1) % 10)} for i in range(20)]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- help, version, and what Hydra shows


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_answer_without_the_heavy_imports(argument: str, tmp_path: Path):
    probe = (
        "import sys\nfrom kpo_cli.cli import main as cli\n"
        f"sys.argv = ['kpo', {argument!r}]\n"
        "try:\n    cli.main()\nfinally:\n"
        "    heavy = {'torch', 'hydra', 'omegaconf', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == "heavy: []\n"
    assert "kpo" in done.stdout


def test_help_names_the_commands_and_no_argument_means_help(kpo):
    result = kpo("--help")
    assert result.code == 0
    assert all(word in result.out for word in ("train", "eval", "analyze", "--version"))
    assert kpo() == result


def test_eval_asks_for_a_checkpoint(kpo):
    result = kpo("eval")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("kpo: give checkpoint=RUN")
    assert result.err.count("\n") == 1


def test_bad_configuration_is_found_without_torch(tmp_path: Path):
    probe = (
        "import sys\nfrom kpo_cli.cli import main as cli\nsys.argv = ['kpo', 'train', 'trainr.steps=3']\n"
        "try:\n    cli.main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "kpo: unknown key trainr.steps; did you mean trainer.steps?\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], ["method: ", "grpo, grpo_tight", "trainer:", "kpo train -m"]),
        (["--help", "method=grpo"], ["name: grpo"]),
        (["--hydra-help"], ["--multirun", "--cfg"]),
        (["--version"], ["Hydra 1.3"]),
        (["--info"], ["isolated"]),
        (["--info", "defaults"], ["method/kpo"]),
        (["-i", "searchpath"], ["Provider", "conf"]),
        (["--cfg", "job"], ["time_constant: 30", "seed: 0"]),
        (["--cfg=job", "trainer.steps=7"], ["steps: 7"]),
        (["--cfg=job", "model.chat_template_kwargs={enable_thinking: false}"], ["    enable_thinking: false"]),
        (["--cfg=job", "model.chat_template_kwargs.enable_thinking=false"], ["    enable_thinking: false"]),
        (["--cfg=job", "model=qwen3_0.6b", "model.chat_template_kwargs.x=1"], ["    enable_thinking: false\n    x: 1"]),
        (["--cfg=job", "rollout.engine.max_num_seqs=8"], ["  engine:\n    max_num_seqs: 8"]),
        (["-c", "job", "--package", "trainer"], ["steps: 30"]),
        (["--cfg", "job", "--resolve", "seed=${trainer.steps}"], ["seed: 30"]),
        (["--cfg", "job", "seed=${trainer.steps}"], ["seed: ${trainer.steps}"]),
        (["--cfg", "hydra"], ["launcher"]),
        (["trainer.steps=7", "--cfg", "job", "seed=3"], ["steps: 7", "seed: 3"]),
        (["--cfg", "job", "model.path=org/name"], ["name: hub"]),
        (["--cfg", "job", "data.path=x.jsonl"], ["name: file"]),
        (["--cfg", "job", "data.path=x.jsonl", "data=arithmetic"], ["name: arithmetic"]),
        (["--cfg", "job", "--", "seed=4"], ["seed: 4"]),
    ],
    ids=" ".join,
)
def test_what_hydra_shows(arguments: list[str], expected: list[str], kpo, tmp_path: Path):
    result = kpo("train", *arguments)
    assert (result.code, result.err) == (0, "")
    for text in expected:
        assert text in result.out
    assert not any(tmp_path.iterdir())


OWN_PLACES = [["--config-dir", "mine"], ["--config-dir=mine"], ["-cd", "mine"], ["hydra.searchpath=[mine]"]]
OWN_PLACES += [["hydra.searchpath=[file://mine]"]]


@pytest.mark.parametrize("place", OWN_PLACES, ids=" ".join)
def test_own_experiments(place: list[str], kpo, tmp_path: Path):
    """They are found, wrong names are refused with the nearest, and the built-in task's own settings stay."""
    (tmp_path / "mine" / "experiment" / "sub").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "quick.yaml").write_text("# @package _global_\ntrainer: {steps: 77}\n")
    (tmp_path / "mine" / "experiment" / "sub" / "e.yaml").write_text("# @package _global_\ntrainer: {lr: 3.0e-3}\n")
    result = kpo("train", *place, "experiment=quick", "--cfg", "job")
    assert (result.code, result.err) == (0, "")
    shown = yaml.safe_load(result.out)
    assert (shown["trainer"]["steps"], shown["trainer"]["lr"]) == (77, 2e-4)
    assert shown["method"]["filter_defaults"]["time_constant"] == 30
    shown = yaml.safe_load(kpo("train", *place, "experiment=sub/e", "--cfg", "job").out)
    assert (shown["trainer"]["steps"], shown["trainer"]["lr"]) == (30, 3e-3)
    result = kpo("train", *place, "experiment=qiuck")
    assert (result.code, result.err) == (2, "kpo: experiment=qiuck does not exist; did you mean quick?\n")


def test_an_experiment_of_another_model_takes_none_of_the_pairs_settings(kpo):
    for arguments in (["experiment=paper_qwen3_4b"], ["experiment=null"], ["~experiment"], ["pair=null"]):
        shown = yaml.safe_load(kpo("train", *arguments, "--cfg", "job").out)
        assert shown["trainer"]["lr"] == 1e-6, arguments
        assert shown["method"]["filter_defaults"]["time_constant"] is None


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help_lists_the_groups_that_the_command_has(command: str, kpo, tmp_path: Path):
    (tmp_path / "mine" / "method").mkdir(parents=True)
    (tmp_path / "mine" / "method" / "own_one.yaml").write_text("name: own_one\n")
    listed = re.findall(r"^(\w+): ", kpo("train" if command == "train" else "eval", "--help").out, re.MULTILINE)
    defaults = yaml.safe_load((conf_dir() / f"{command}.yaml").read_text())["defaults"]
    groups = {key.removeprefix("optional ") for entry in defaults if isinstance(entry, dict) for key in entry}
    known = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    assert set(listed) & known == {group for group in groups if not group.startswith("override")} & known
    if command == "train":
        assert "own_one" in kpo("train", "--help", "--config-dir", "mine").out


# --- bad input: exit code 2, one line, nothing left behind


@pytest.fixture
def refused(kpo, small: list[str], tmp_path: Path, tree) -> Callable[..., str]:
    def refuse(*arguments: str) -> str:
        before = tree(tmp_path)
        result = kpo("train", *small, *arguments)
        assert result.code == 2, result
        assert result.err.startswith("kpo: ")
        assert result.err.count("\n") == 1
        assert result.err.endswith("\n")
        assert result.out == ""
        assert tree(tmp_path) == before
        return result.err

    return refuse


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("lr=3", "unknown key lr; did you mean trainer.lr?"),
        ("trainer.stepz=3", "did you mean trainer.steps?"),
        ("modle.path=x", "did you mean model.path?"),
        ("trainer.temperature=3", "did you mean rollout.temperature?"),
        ("methd=kpo", "did you mean method?"),
        ("method=kpp", "method=kpp does not exist; did you mean kpo?"),
        ("filter=kalmn", "did you mean kalman?"),
        ("experiment=long_arithmetic_cp", "did you mean long_arithmetic_cpu?"),
        ("experiment=", "choose one experiment of"),
        ("pair=tiny_fil", "pair=tiny_fil does not exist; did you mean tiny_file?"),
        ("experiment=e --config-dir .", "experiment=e does not exist"),
        ("-m experiment=paper_qwen3_4b,papr_qwen3_4b", "experiment=papr_qwen3_4b does not exist; did you mean paper"),
        ("-m method=glob(nope*)", "the sweep has no jobs"),
        ("rollout.top_p=0.9", "unknown key rollout.top_p"),
        ("+rollout.top_k=50", "unknown key rollout.top_k"),
        ("data.fields.problm=x", "did you mean data.fields.problem?"),
        ("+new.key=1", "unknown key new"),
        ("++trainer.foo=1", "unknown key trainer.foo"),
        ("+seed=1", "cannot set seed"),
        ("~trainer.lr", "~trainer.lr: trainer.lr cannot be removed; leave ~trainer.lr out, or set it with trainer.lr="),
        ("~trainer.lr=1e-6", "trainer.lr cannot be removed"),
        ("~trainer.eval", "trainer.eval cannot be removed"),
        ("~data.fields.id", "data.fields.id cannot be removed"),
        ("~method", "method cannot be removed"),
        ("~nope", "nope"),
        ("method=null", "choose one method of: "),
        ("trainer=null", "choose one trainer of: default"),
        ("method=[grpo,kpo]", "choose one method of"),
        ("hydra/launcher=nope", "there are: basic, isolated"),
        ("--lr=3", "no such option --lr; settings are written key=value, did you mean trainer.lr=...?"),
        ("--steps 3", "did you mean trainer.steps=...?"),
        ("--infoo", "no such option --infoo"),
        ("-x", "unrecognized arguments: -x"),
        ("-", "cannot read '-'"),
        ("--cfg", "expected one argument"),
        ("--cfg jobb", "invalid choice: 'jobb'"),
        ("--resolve", "--resolve goes with --cfg"),
        ("--config-name nope", "nope"),
        ("--config-dir nope", "nope' not found"),
        ("--experimental-rerun nope", "no such file"),
        ("-m --cfg job seed=1,2", "only one of"),
        ("method kpo", "cannot read 'method'; settings are written key=value"),
        ("seed=[", "cannot read 'seed=['"),
        ("trainer.betas=[0.9,", "cannot read"),
        ("=3", "cannot read '=3'"),
        ("seed=${nope}", "nope"),
        ("seed=${seed}", "seed"),
        ("seed=${oc.env:KPO_NOT_SET}", "KPO_NOT_SET"),
        ("seed=1,2", "Ambiguous value"),
        ("trainer.betas=~/x", """needs quotes of its own: 'trainer.betas="~/x"'"""),
        ("trainer.eval.benchmarks=arithmetic", "must be a list: trainer.eval.benchmarks=[arithmetic]"),
        ("trainer.eval.benchmarks=a,b", "must be a list: trainer.eval.benchmarks=[a,b]"),
    ],
)
def test_words_that_kpo_does_not_know(arguments: str, hint: str, refused):
    assert hint in refused(*arguments.split())


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("seed=", "seed= must be a whole number"),
        ("trainer.steps=0", "at least 1"),
        ("trainer.lr=nan", "a finite number above 0"),
        ("trainer.lr=null", "trainer.lr=null must be a number"),
        ("trainer.betas=0.9", "a list of 2 values"),
        ("trainer.prompts_per_step=1000", "only 16 training problems"),
        ("trainer.threads=100000000", "at most 1024"),
        ("rollout.max_prompt_tokens=3", "raise it"),
        ("data=file", "give data.path=..."),
        ("data.path=", "is a directory"),
        ("model=hub", "give model.path=..."),
        ("filter.q=true", "filter.q=True must be a number"),
        ("filter.straight_through=true", "unknown key filter.straight_through"),
        ("+filter.foo=1", "foo"),
        ("method.surrogate.eps_high=null", "method.surrogate.eps_high=null"),
        ("filter.name=identity", "chosen as a group, filter=NAME"),
    ],
)
def test_values_of_the_wrong_type_or_out_of_range(override: str, hint: str, refused):
    assert hint in refused(override)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("filter.q=1 filter.time_constant=3", "give one of them"),
        ("method=grpo filter.q=1e-6", "filter.q does not exist with this filter"),
        ("method=gspo filter.time_constant=30", "filter.time_constant does not exist with this filter"),
        ("method=gspo filter.straight_through=null", "filter.straight_through=null"),
        ("method=grpo filter=kalman experiment=null", "method=grpo sets no noise for filter=kalman"),
        ("data=file data.path=null", "data=file needs a file"),
        ("model=hub model.path=null", "model=hub needs a model"),
        ("data.operators=1 data.limit=4000", "raise data.operators"),
        ("resume=nope", "not a run directory"),
        ("resume=.", "not a run directory"),
        ("-m seed=1,2 lr=3", "did you mean trainer.lr?"),
        ("-m method=kpo,kpp", "did you mean kpo?"),
        ("-m method=kpo,null", "choose one method of"),
        ("-m seed=1,2 run_dir=/dev/null/x", "/dev/null is a file"),
    ],
)
def test_settings_that_do_not_go_together(arguments: str, hint: str, refused):
    assert hint in refused(*arguments.split())


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [(["trian"], "train"), (["--foo"], "--foo"), (["--versoin"], "--versoin"), (["--version=3"], "--version")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_first_words(arguments: list[str], hint: str, kpo):
    result = kpo(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("kpo: ")
    assert hint in result.err
    assert result.err.count("\n") == 1


def parquet(rows: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("d.jsonl", b"", "holds no problems"),
        ("d.jsonl", b"\n \n", "holds no problems"),
        ("d.jsonl", jsonl(ROWS[:2]).encode() + b"{'a': 1}\n", "d.jsonl:3: not valid JSON"),
        ("d.jsonl", jsonl(ROWS).encode()[:-8], "d.jsonl:20: not valid JSON"),
        ("d.jsonl", json.dumps(ROWS).encode(), "d.jsonl:1:"),
        ("d.jsonl", json.dumps(ROWS, indent=1).encode(), "d.jsonl:1: not valid JSON"),
        ("d.jsonl", b"3\n", "3 is not an object"),
        ("d.jsonl", b"{}\n", "it has no fields"),
        (
            "d.jsonl",
            jsonl([{"question": "a", "gold": "b"}]).encode(),
            "it has question, gold; set data.fields.problem=",
        ),
        ("d.jsonl", jsonl(ROWS[:3]).encode() + b'{"problem": "\xe9", "answer": "1"}\n', "d.jsonl:4: not UTF-8"),
        ("d.jsonl", jsonl(ROWS).encode("utf-16"), "d.jsonl:1: not UTF-8"),
        ("d.jsonl", json.dumps(ROWS[0]).encode("utf-16-be"), "d.jsonl:1: not valid JSON"),  # Python would guess it
        ("d.json", json.dumps(ROWS).encode("utf-16"), "d.json: not UTF-8"),
        ("d.json", json.dumps(ROWS).encode("utf-32-le"), "d.json: not valid JSON"),
        (
            "d.jsonl",
            jsonl([{"problem": "q", "answer": None}]).encode(),
            "answer must be a text or a number, found null",
        ),
        ("d.jsonl", jsonl([{"problem": "q", "answer": True}]).encode(), "found true"),
        ("d.jsonl", b'{"problem": "q", "answer": NaN}\n', "found NaN"),
        ("d.jsonl", jsonl([{"problem": " ", "answer": "1"}]).encode(), "problem must be a text that is not empty"),
        ("d.jsonl", jsonl([{"problem": 3, "answer": "1"}]).encode(), "found 3"),
        ("d.jsonl", b'{"problem": "\\ud800", "answer": "1"}\n', "d.jsonl:1: holds half a character"),
        ("d.jsonl", b'{"problem": "q", "answer": ' + b"9" * 5000 + b"}\n", "d.jsonl:1:"),
        ("d.jsonl", b'{"a":' * 100_000 + b"\n", "nested too deeply"),
        ("d.jsonl", jsonl([*ROWS, {"id": "p3", "problem": "new", "answer": "1"}]).encode(), "d.jsonl:21: the id 'p3'"),
        ("d.jsonl", jsonl(ROWS[:4]).encode(), "at least 5 are needed"),
        ("d.jsonl", jsonl(ROWS[:1] * 30).encode(), "at least 5 are needed"),
        ("d.txt", jsonl(ROWS).encode(), "give a .jsonl"),
        ("d", jsonl(ROWS).encode(), "no suffix"),
        ("d.parquet", b"", "not a readable parquet file"),
        ("d.parquet", b"PAR1 and nothing", "not a readable parquet file"),
        ("d.parquet", parquet(ROWS)[:-20], "not a readable parquet file"),
        ("d.parquet", parquet([{"q": "a"}]), "(row 1): no field 'problem'; it has q"),
        ("d.parquet", parquet([{"problem": b"\xff", "answer": "1"}]), "problem must be a text"),
        ("d.parquet", parquet([{"problem": "a", "answer": float("nan")}]), "found NaN"),
    ],
)
def test_bad_data_files(name: str, content: bytes, hint: str, refused, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    assert hint in refused(f"data.path={name}")


@pytest.mark.parametrize(
    ("setup", "arguments", "hint"),
    [
        (lambda d: None, ["data.path=nope.jsonl"], "does not exist"),
        (lambda d: None, [f"data.path={'a' * 300}.jsonl"], "does not exist"),
        (lambda d: None, ["data.path='~nobody-of-this-name/x.jsonl'"], "does not exist"),
        (lambda d: (d / "d.jsonl").mkdir(), ["data.path=d.jsonl"], "is a directory"),
        (lambda d: os.mkfifo(d / "d.jsonl"), ["data.path=d.jsonl"], "is not a file"),
        (
            lambda d: (d / "d.jsonl").write_text(jsonl(ROWS)),
            ["data.path=d.jsonl", "data.fields.problem=questoin"],
            "no field 'questoin'; it has id, problem, answer",
        ),
        (
            lambda d: (d / "d.jsonl").write_text(jsonl(ROWS)),
            ["data.path=d.jsonl", "rollout.max_prompt_tokens=8"],
            "longer than rollout.max_prompt_tokens=8",
        ),
        (
            lambda d: (d / "d.jsonl").write_text(jsonl(ROWS[:5])),
            ["data.path=d.jsonl", "trainer.prompts_per_step=5"],
            "only 4 training problems",
        ),
    ],
)
def test_bad_data_settings(setup: Setup, arguments: list[str], hint: str, refused, tmp_path: Path):
    setup(tmp_path)
    assert hint in refused(*arguments)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write anything")
def test_no_permission(refused, tmp_path: Path):
    (tmp_path / "d.jsonl").write_text(jsonl(ROWS))
    (tmp_path / "d.jsonl").chmod(0)
    assert "Permission denied" in refused("data.path=d.jsonl")
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "no permission to write" in refused("run_dir=closed/a")


def policy(change: Setup) -> Setup:
    """A copy of the built-in policy, spoilt."""

    def setup(folder: Path) -> None:
        shutil.copytree(POLICY_DIR, folder / "m")
        change(folder / "m")

    return setup


def template(text: str) -> Setup:
    def write(model: Path) -> None:
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": text}))

    return policy(write)


@pytest.mark.parametrize(
    ("setup", "arguments", "hint"),
    [
        (lambda d: None, ["model.path=nope"], "no such model directory"),
        (lambda d: None, ["model.path=/nope/a"], "no such model directory"),
        (lambda d: (d / "m").mkdir(), ["model.path=m"], "it has no config.json"),
        (lambda d: (d / "m").write_text(""), ["model.path=m"], "no such model directory"),
        (policy(lambda m: (m / "config.json").write_text("{")), ["model.path=m"], "not a valid JSON file"),
        (policy(lambda m: (m / "config.json").write_text("{}")), ["model.path=m"], "cannot be loaded"),
        (policy(lambda m: (m / "tokenizer.json").write_text("{")), ["model.path=m"], "cannot be loaded"),
        (policy(lambda m: (m / "tokenizer_config.json").write_text("{")), ["model.path=m"], "cannot be loaded"),
        (
            policy(lambda m: [(m / f).unlink() for f in ("tokenizer.json", "tokenizer_config.json")]),
            ["model.path=m"],
            "tokeniz",
        ),
        (policy(lambda m: os.truncate(m / "model.safetensors", 1000)), ["model.path=m"], "cannot be loaded"),
        (policy(lambda m: os.truncate(m / "model.safetensors", 600_000)), ["model.path=m"], "cannot be loaded"),
        (policy(lambda m: (m / "model.safetensors").unlink()), ["model.path=m"], "cannot be loaded"),
        (template("{% if %}"), ["model.path=m"], "chat template fails"),
        (
            template("{{ raise_exception('no system role') }}"),
            ["model.path=m", "data.system_prompt=x"],
            "chat template fails (no system role)",
        ),
    ],
)
def test_bad_models(setup: Setup, arguments: list[str], hint: str, refused, tmp_path: Path):
    setup(tmp_path)
    assert hint in refused(*arguments)


@pytest.mark.parametrize("command", ["train", "eval"])
def test_names_of_other_trainers(command: str, kpo):
    """Each of them is answered with a key that exists; and none of them is a key of ours itself."""
    known = config_keys(command)
    keys = [key for key in RENAMED if key in known]
    assert len(keys) > (30 if command == "train" else 3)
    for key in keys:
        for theirs in RENAMED[key].split():
            assert theirs not in known
            assert closest(f"actor.{theirs}", known) in (key, closest(theirs, known))
    for given, ours in OTHERS[command].items():
        assert kpo(command, f"{given}=1").err == f"kpo: unknown key {given}; did you mean {ours}?\n"


OTHERS = {
    "train": {
        "trainer.batch_size": "trainer.prompts_per_step",
        "trainer.learning_rate": "trainer.lr",
        "rollout.n": "trainer.group_size",
        "num_generations": "trainer.group_size",
        "actor_rollout_ref.actor.optim.lr": "trainer.lr",
        "actor_rollout_ref.rollout.n": "trainer.group_size",
        "data.train_batch_size": "trainer.prompts_per_step",
        "data.max_response_length": "rollout.max_response_tokens",
        "output_dir": "run_dir",
    },
    "eval": {"max_new_tokens": "eval.max_tokens", "eval.n_samples": "eval.n", "tasks": "benchmarks"},
}


def test_a_bad_model_is_one_line_of_a_real_process_too(run_kpo, tmp_path: Path):
    """Libraries write to the process's stderr behind the back of a test in this one."""
    policy(lambda m: os.truncate(m / "model.safetensors", 1000))(tmp_path)
    result = run_kpo("train", "model.path=m", cwd=tmp_path)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("kpo: model.path=m cannot be loaded")
    assert result.err.count("\n") == 1


def full(folder: Path) -> None:
    folder.mkdir()
    (folder / "file").write_text("mine")


@pytest.mark.parametrize(
    ("setup", "argument", "hint"),
    [
        (lambda d: full(d / "a"), "run_dir=a", "exists already; go on with resume=a"),
        (lambda d: (d / "a").write_text(""), "run_dir=a", "exists already"),
        (lambda d: (d / "a").write_text(""), "run_dir=a/b/c", "a is a file"),
        (lambda d: (d / "a").symlink_to("a"), "run_dir=a", "cannot make run_dir=a"),
        (lambda d: None, "run_dir=", "the directory you are in"),
        (lambda d: None, "run_dir=.", "the directory you are in"),
        (lambda d: None, f"run_dir={'a' * 300}", "File name too long"),
        # Found out only on making it: what was made on the way has to go again.
        (lambda d: None, f"run_dir=x/y/{'a' * 300}", "File name too long"),
        (lambda d: None, "run_dir=/dev/null/x", "/dev/null is a file"),
        (lambda d: (d / "a").mkdir(), "resume=a", "not a run directory"),
        (lambda d: None, f"resume={'a' * 300}", "File name too long"),
    ],
)
def test_bad_run_directories(setup: Setup, argument: str, hint: str, refused, tmp_path: Path):
    setup(tmp_path)
    assert hint in refused(argument)


# --- a run, and what may be asked of it afterwards


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, run_kpo, small: list[str]) -> Path:
    """A directory in which a run called `a` has ended."""
    folder = tmp_path_factory.mktemp("finished")
    result = run_kpo("train", *small, "run_dir=a", cwd=folder)
    assert (result.code, result.err) == (0, "")
    return folder


def test_a_run_leaves_one_directory(finished: Path):
    assert [path.name for path in finished.iterdir()] == ["a"]
    names = {path.name for path in (finished / "a").iterdir()}
    assert {"config.yaml", "manifest.json", "metrics.jsonl", "summary.json", "checkpoints"} <= names


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["trainer.lr=3e-4"], "trainer.lr=3e-4 differs from the run's own 0.0002"),
        (["seed=1"], "seed=1 differs from the run's own 0"),
        (["method=grpo"], "method=grpo differs from the run's own kpo"),
        (["run_dir=b"], "run_dir= and resume= exclude each other"),
        (["trainer.steps=x"], "trainer.steps=x must be a whole number"),
        ([], "give a larger trainer.steps="),
    ],
)
def test_bad_resumes(arguments: list[str], hint: str, finished: Path, kpo, tmp_path: Path, tree):
    shutil.copytree(finished / "a", tmp_path / "a")
    before = tree(tmp_path)
    result = kpo("train", "resume=a", *arguments)
    assert (result.code, result.out) == (2, "")
    assert hint in result.err
    assert result.err.count("\n") == 1
    assert tree(tmp_path) == before


def test_resume_from_a_configuration_that_is_none(kpo, tmp_path: Path):
    (tmp_path / "a").mkdir()
    for content in ("- a list\n", "a: [\n", "name: x\n"):
        (tmp_path / "a" / "config.yaml").write_text(content)
        result = kpo("train", "resume=a")
        assert result.code == 2
        assert result.err.count("\n") == 1


@pytest.mark.parametrize("name", ["it's a b=c,d", "Größe-訓練", "x/y/z", "2026_11_26", "[x] (1) $HOME ${ \\b \x1b[1m"])
def test_odd_names_of_run_directories(name: str, kpo, small: list[str], tmp_path: Path):
    result = kpo("train", *small, f"run_dir={name}")
    assert (result.code, result.err) == (0, "")
    assert "\x1b" not in result.out
    again = next(line for line in result.out.splitlines() if line.startswith("next:"))
    resumed = shlex.split(again, comments=True)[1:]
    assert "\x1b" in name or resumed[2:] == [f"resume={name}", "trainer.steps=2"]
    assert (tmp_path / name / "summary.json").is_file()
    assert (tmp_path / name.split("/")[0]) in list(tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 1


def test_a_link_to_an_empty_directory_stays_a_link(kpo, small: list[str], tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a").symlink_to("disk")
    assert kpo("train", *small, "run_dir=a").code == 0
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "disk" / "summary.json").is_file()


def test_an_absolute_run_directory_and_no_home(run_kpo, small: list[str], tmp_path: Path):
    where = tmp_path / "elsewhere"
    where.mkdir()
    run = tmp_path / "runs" / "a"
    result = run_kpo("train", *small, f"run_dir={run}", cwd=where, env={"HOME": None, "LC_ALL": "C"})
    assert (result.code, result.err) == (0, "")
    assert (run / "summary.json").is_file()
    assert not any(where.iterdir())


def test_the_default_run_directory(kpo, small: list[str], tmp_path: Path):
    assert kpo("train", *small, "method=gspo", "seed=5").code == 0
    runs = list(tmp_path.glob("outputs/train/gspo-tiny-arithmetic-s5/*/summary.json"))
    assert len(runs) == 1


def test_without_a_terminal_lines_are_plain(kpo, small: list[str]):
    result = kpo("train", *small, "run_dir=a")
    assert "\x1b" not in result.out
    assert "step    1  reward" in result.out
    assert "run: a" in result.out


@pytest.mark.parametrize("arguments", [["train", "--cfg", "job"], ["--help"], ["train", "--info"]], ids=" ".join)
def test_a_reader_that_leaves_early_sees_no_traceback(arguments: list[str], tmp_path: Path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "kpo_cli", *arguments],
        cwd=tmp_path,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode in (0, 1)


def test_ctrl_c_is_one_line(kpo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def interrupt(raw: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kpo_cli.cli.main._train", interrupt)
    assert kpo("train") == (130, "", "kpo: interrupted\n")


def test_a_defect_is_not_dressed_up_as_bad_input(monkeypatch: pytest.MonkeyPatch):
    """Only UserError becomes one line; a stack trace is what a bug report needs."""

    def fail(raw: dict[str, Any]) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("kpo_cli.cli.main._train", fail)
    monkeypatch.setattr(sys, "argv", ["kpo", "train"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(ZeroDivisionError):
        cli.main()
