"""What is typed as a path or another text arrives as typed."""

import dataclasses
import os
import typing
from pathlib import Path

import pytest
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from kpo_cli.analysis.config import AnalyzeConfig
from kpo_cli.cli.texts import PATH_LISTS, PATHS, TEXTS, as_typed, literal, with_positional
from kpo_cli.config import DataConfig, ModelConfig, TrainConfig
from kpo_cli.errors import UserError
from kpo_cli.evaluation.config import EvalConfig

ODD = [
    *("2026_11_26", "1e3", "1.10", "0x10", "0b1", "1_000", "007", "-1", "+1", "1e", "inf", "nan", "NaN", "1:30"),
    *("true", "False", "yes", "off", "NULL", "None", "~", "~/x", "a~", "a b", " lead", "tail ", "a\tb", "a=b", "=a"),
    *(
        "a,b",
        ",",
        "x, y",
        "ü",
        "e\u0301",
        "日本",
        "😀",
        "it's",
        "'",
        '"',
        'say "x"',
        "[x]",
        "[",
        "]",
        "{a}",
        "{",
        "(x)",
    ),
    *("glob(x)", "range(1,3)", "choice(a)", "str(1)x", "a#b", "#", "a;b", "$HOME", "a$b", "${", "a${", "a ${x", "${}"),
    *(
        "back\\slash",
        "end\\",
        "C:\\x",
        "a:b",
        "*",
        "?",
        "<x>",
        "a|b",
        "`x`",
        "!x",
        "&",
        "%s",
        "@x",
        "\u2028",
        "\x1b[1m",
    ),
    *("a\nb", "???x", "../x", "./1e3", "/tmp/1_0", "org/name-1.10", "train[:10%]", "[a", "a]", "a,1e3,ü=1"),
]


def read(override: str) -> str:
    """The value that a job gets of an override, by Hydra's parser and OmegaConf's resolution."""
    value = OverridesParser.create().parse_override(override).value()
    return OmegaConf.to_container(OmegaConf.create({"k": value}), resolve=True)["k"]


@pytest.mark.parametrize("text", ODD)
def test_a_text_arrives_as_typed(text: str):
    written = as_typed(f"run_dir={text}", sweep=False)
    assert read(written) == text
    assert as_typed(written, sweep=False) == written  # a sweep's job reads what its launcher wrote
    assert read(as_typed(f"++data.path={text}", sweep=False)) == text
    assert read(f"k={literal(text)}") == text


@pytest.mark.parametrize("text", [text for text in ODD if "," not in text and "(" not in text])
def test_a_text_arrives_as_typed_in_a_sweep(text: str):
    """Alone, and beside another: a comma means a sweep, but for one that is escaped or inside quotes."""
    takes_comma = text.endswith("\\") or text[0] in "'\""
    beside = [] if takes_comma else [(f"{text},other", [text.strip(" \t"), "other"])]
    for typed, expected in [(text, [text]), *beside]:
        override = as_typed(f"run_dir={typed}", sweep=True)
        parsed = OverridesParser.create().parse_overrides([override, "seed=0,1"])
        jobs = [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
        assert [read(job[0]) for job in jobs[::2]] == expected


def test_a_list_of_paths_arrives_as_typed():
    texts = ["2024_01", "~/x.jsonl", "a=b.jsonl", "ü", "a b", "1e3.jsonl", "x${.jsonl", "arithmetic"]
    assert read(as_typed(f"benchmarks=[{','.join(texts)}]", sweep=False)) == texts
    assert read(as_typed("benchmarks=['a,b', \"1e3\"]", sweep=False)) == ["a,b", "1e3"]
    assert read(as_typed("runs=[]", sweep=False)) == []
    swept = OverridesParser.create().parse_override(as_typed("benchmarks=[a],[b,1e3]", sweep=True))
    assert [[getattr(one, "text", one) for one in each] for each in swept.value().list] == [["a"], ["b", "1e3"]]


def test_what_hydra_documents_stays():
    """Its quotes, escapes, references, null, and functions that make sweeps."""
    for override in ('run_dir="a b"', "run_dir=a\\,b", "run_dir=runs/${seed}", "run_dir=null", "run_dir=", "seed=1e3"):
        assert as_typed(override, sweep=False) == override
    for override in ("method=glob(g*)", "run_dir=range(1,3)", "run_dir=shuffle(a,b)", "seed=1,2", "~run_dir"):
        assert as_typed(override, sweep=True) == override
    chosen = OverridesParser.create().parse_override(as_typed("resume=choice(1e3,~/x)", sweep=True)).value()
    assert list(map(str, chosen.list)) == ["1e3", "~/x"]
    assert read(as_typed("data.instruction=costs \\${5}", sweep=False)) == "costs ${5}"
    assert read(as_typed('data.instruction="costs ${ 5"', sweep=False)) == "costs ${ 5"


def texts_of(kind: type, prefix: str = "") -> dict[str, bool]:
    """Keys whose values are texts, and whether they are lists of them."""
    found: dict[str, bool] = {}
    for name, hint in typing.get_type_hints(kind).items():
        parts = typing.get_args(hint) or (hint,)
        if dataclasses.is_dataclass(hint):
            found |= texts_of(hint, f"{prefix}{name}.")
        elif hint == list[str]:
            found[prefix + name] = True
        elif str in parts and set(parts) <= {str, type(None)}:
            found[prefix + name] = False
    return found


def test_every_text_of_the_configurations_is_known():
    """A new key with a text in it belongs into cli/texts.py: among the paths, if it is one."""
    found = texts_of(TrainConfig) | texts_of(EvalConfig) | texts_of(AnalyzeConfig)
    assert {key for key, is_list in found.items() if is_list} <= PATH_LISTS
    missing = {key for key, is_list in found.items() if not is_list} - PATHS - TEXTS
    assert missing == set()
    assert {"path"} <= {f.name for f in dataclasses.fields(DataConfig)} & {
        f.name for f in dataclasses.fields(ModelConfig)
    }


# --- through the commands


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("train", ["run_dir", "resume", "model.path", "data.path", "trainer.eval.data_dir", "data.instruction"]),
        ("eval", ["run_dir", "checkpoint", "vs", "regrade", "data_dir", "system_prompt"]),
        ("analyze", ["run_dir"]),
    ],
)
def test_the_commands_compose_what_was_typed(command: str, keys: list[str], kpo):
    names = ["2026_11_26", "1e3", "a=b,ü c", "true", "it's ${", "1.10"]
    shown = kpo(command, "--cfg", "job", *map("{}={}".format, keys, names))
    assert (shown.code, shown.err) == (0, "")
    config = yaml.safe_load(shown.out)
    for key, name in zip(keys, names, strict=False):
        value = config
        for part in key.split("."):
            value = value[part]
        assert value == name.replace("${", "\\${")  # as OmegaConf writes what is no reference


def test_home_is_expanded_wherever_a_path_is_meant(kpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The errors name the place that was looked at; nothing is ever called ~."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = f"{tmp_path}/home/x"
    for arguments in (
        ["train", "resume=~/x"],
        ["train", "data.path=~/x.jsonl"],
        ["eval", "regrade=~/x"],
        ["eval", 'regrade="~/x"'],
        ["eval", "builtin", "data_dir=~/x", "benchmarks=[aime24]"],
        ["eval", "builtin", "benchmarks=[~/x.jsonl]"],
        ["analyze", "~/x"],
        ["analyze", "runs=[~/x]"],
    ):
        result = kpo(*arguments)
        assert (result.code, result.out) == (2, "")
        assert home in result.err, arguments
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}  # where libraries have their caches


# --- arguments without a key


def test_positional_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a=b" / "config.yaml").write_text("seed: 0\n")
    assert with_positional("eval", ["1e3", "eval.n=2"]) == ['checkpoint="1e3"', "eval.n=2"]
    assert with_positional("eval", ["--cfg", "job", "a=b"]) == ["--cfg", "job", 'checkpoint="a=b"']
    assert with_positional("train", ["a=b", "trainer.steps=3"]) == ['resume="a=b"', "trainer.steps=3"]
    assert with_positional("train", ["a=b/checkpoints"]) == ['resume="a=b/checkpoints"']
    assert with_positional("train", ["kpo"]) == ["kpo"]  # no run: for the error
    assert with_positional("analyze", ["~/x", "x/a=b", "a=b", "${x}", "seed=3", "~watch", "--watch"]) == [
        *("seed=3", "~watch", "watch=true"),
        'runs=["~/x","x/a=b","a=b","\\${x}"]',
    ]
    for arguments in (["x", "y"], ["x", "checkpoint=y"]):
        with pytest.raises(UserError, match=r"there is a checkpoint already; the one to compare it with is vs="):
            with_positional("eval", arguments)
    with pytest.raises(UserError, match="there is a resume already"):
        with_positional("train", ["a=b", "a=b"])


def test_a_word_that_is_no_run_is_refused(kpo):
    assert kpo("train", "kpo").err.startswith("kpo: cannot read 'kpo'; settings are written key=value")
    assert os.listdir() == []
