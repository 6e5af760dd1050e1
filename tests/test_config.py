"""Every file in conf/ composes, the YAML agrees with the presets of core, and bad values are named."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import compose
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from kpo_cli.cli.compose import conf_dir
from kpo_cli.config import as_dict, convert, data_label, model_label, resolve_filter, train_config
from kpo_cli.core import kalman_meaning, list_methods, load_objective
from kpo_cli.errors import UserError
from kpo_cli.evaluation.benchmarks import BenchmarkSource
from kpo_cli.evaluation.config import EvalConfig
from kpo_cli.training.main import make_objective

GROUPS = ["model", "method", "filter", "data", "rollout", "trainer", "experiment", "pair"]
"""Those of `kpo train` with a choice; `benchmark` and the groups of other commands have their own tests."""
FILES = {group: sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")) for group in GROUPS}
REQUIRED = {("model", "hub"): ["model.path=org/name"], ("data", "file"): ["data.path=x.jsonl"]}


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in FILES.items() for name in names])
@pytest.mark.parametrize("without", [[], ["~pair"]], ids=["pair", "no-pair"])
def test_every_file_composes(group: str, name: str, without: list[str]):
    if group == "pair" and without:
        assert compose(*without) != compose()
        return
    # A filter says nothing about its noise: that is a matter of the method, so take one that does.
    noise = (
        ["filter.time_constant=30"]
        if group == "filter" and "time_constant" in compose(f"filter={name}")["filter"]
        else []
    )
    raw = compose(f"{group}={name}", *REQUIRED.get((group, name), []), *noise, *without)
    config = train_config(raw)
    make_objective(config)
    if group not in ("experiment", "pair", "trainer", "filter"):  # a filter's file may be a variant of a filter
        assert raw[group]["name"] == name


def test_no_file_of_conf_is_missed():
    assert all(FILES.values())
    of_eval = {"eval": ["default", "paper", "paper_script"], "benchmark": ["known"]}
    folders = {
        path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in conf_dir().iterdir() if path.is_dir()
    }
    assert folders == FILES | of_eval
    for preset in of_eval["eval"]:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            raw = OmegaConf.to_container(hydra_compose("eval", [f"eval={preset}", "checkpoint=builtin"]))
        config = convert(EvalConfig, {key: value for key, value in raw.items() if key != "run_dir"})
        assert config.eval.name == preset
        assert {
            name: convert(BenchmarkSource, known).path.count("/") for name, known in config.known.items()
        } == dict.fromkeys(config.known, 1)


@pytest.mark.parametrize("method", FILES["method"])
def test_every_method_goes_with_every_filter(method: str, filters: dict[str, dict[str, Any]]):
    raw = compose(f"method={method}")
    for own in filters.values():
        noise = {"time_constant": 30} if "time_constant" in own else {}
        config = train_config({**raw, "filter": {**own, **noise}})
        assert (config.method.name, config.filter["name"]) == (method, own["name"])
        make_objective(config)


@pytest.fixture(scope="module")
def filters() -> dict[str, dict[str, Any]]:
    return {name: compose(f"filter={name}")["filter"] for name in FILES["filter"]}


def test_the_filter_of_the_command_line_wins_over_the_methods():
    assert compose("method=kpo", "filter=identity")["filter"] == {"name": "identity"}
    assert compose("filter=identity", "method=kpo")["filter"] == {"name": "identity"}


@pytest.mark.parametrize("method", list_methods())
def test_yaml_and_presets_agree(method: str):
    config = train_config(compose(f"method={method}", "~pair"))
    assert make_objective(config) == load_objective(method)
    assert config.method.name == method


def test_methods_are_the_same_on_both_sides():
    assert FILES["method"] == list_methods()


def kalman_methods() -> list[str]:
    return [method for method in FILES["method"] if "time_constant" in compose(f"method={method}")["filter"]]


def test_the_builtin_pair_sets_the_time_constant_of_every_kalman_method():
    methods = kalman_methods()
    assert {"kpo", "kpo_unclipped"} <= set(methods)
    for method in methods:
        noise = train_config(compose(f"method={method}")).filter
        assert kalman_meaning(noise["q"], noise["v"], 50).time_constant == pytest.approx(30), method


@pytest.mark.parametrize("method", ["kpo", "kpo_unclipped"])
def test_the_users_noise_wins(method: str):
    for pair in ([], ["~pair"]):
        own = train_config(compose(f"method={method}", "filter.q=2e-5", *pair)).filter
        assert (own["q"], own["v"]) == (2e-5, 1.0)
        own = train_config(compose(f"method={method}", "filter.time_constant=7", "filter.v=0.5", *pair)).filter
        assert own["q"] == pytest.approx(4 * math.sinh(1 / 14) ** 2 * 0.5, rel=1e-12)
        assert own["v"] == 0.5
        assert own["time_constant"] is None


def test_v_alone_scales_q_where_a_time_constant_is_the_default():
    one, four = (train_config(compose(f"filter.v={v}")).filter for v in (1, 4))
    assert four["q"] == pytest.approx(4 * one["q"], rel=1e-12)


@pytest.mark.parametrize("time_constant", [0.5, 1, 30, 1000, 1e6])
@pytest.mark.parametrize("v", [1e-4, 1.0, 3])
def test_noise_of_a_time_constant(time_constant: float, v: float):
    method = train_config(compose("method=kpo")).method
    own = {"name": "kalman", "q": None, "v": v, "time_constant": time_constant, "p0": 0.0}
    resolved = resolve_filter(own, method)
    assert resolved["q"] == pytest.approx(4 * math.sinh(1 / (2 * time_constant)) ** 2 * v, rel=1e-12)
    # The filter that comes of it: eta = 2 asinh(sqrt(Q/V) / 2) is 1 / tau.
    assert 1 / (2 * math.asinh(math.sqrt(resolved["q"] / v) / 2)) == pytest.approx(time_constant, rel=1e-9)
    assert resolve_filter(resolved, method) == resolved


def test_q_and_time_constant_exclude_each_other():
    for prefix, others in (("filter", []), ("method.filter_defaults", [])):
        with pytest.raises(UserError, match=rf"{prefix}\.q=.* and {prefix}\.time_constant=.*give one of them"):
            train_config(compose(f"{prefix}.q=1e-4", f"{prefix}.time_constant=3", *others))


@pytest.mark.parametrize(
    ("method", "others"),
    [
        *((method, []) for method in FILES["method"]),
        ("kpo", ["~pair", "model.path=org/name", "model=hub", "trainer.steps=7"]),
        ("gspo", ["data=file", "data.path=x.jsonl", "trainer.warmup_steps=2", "trainer.threads=3"]),
    ],
)
def test_a_configuration_survives_its_own_file(method: str, others: list[str], tmp_path: Path):
    from omegaconf import OmegaConf

    config = train_config(compose(f"method={method}", *others))
    assert train_config(as_dict(config)) == config
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(as_dict(config))))
    stored: Any = OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml"))
    assert train_config(stored) == config
    assert as_dict(train_config(stored)) == as_dict(config)


def test_the_warm_up_is_five_percent_of_the_steps_unless_it_is_given():
    assert train_config(compose("trainer.steps=60")).trainer.warmup_steps == 3
    assert train_config(compose("trainer.steps=60", "trainer.warmup_steps=0")).trainer.warmup_steps == 0


def test_configurations_are_frozen():
    config = train_config(compose())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.trainer.steps = 3  # type: ignore[misc]


def test_labels_of_directories():
    own = train_config(compose("model=hub", "model.path=runs/a/step-000030", "data=file", "data.path=d/my file.jsonl"))
    assert (model_label(own.model), data_label(own.data)) == ("step-000030", "my file")
    assert model_label(dataclasses.replace(own.model, path=".")) == Path.cwd().name
    builtin = train_config(compose())
    assert (model_label(builtin.model), data_label(builtin.data)) == ("tiny", "arithmetic")


@pytest.fixture(scope="module")
def default() -> dict[str, Any]:
    return compose()


@pytest.mark.parametrize("missing", ["seed", "model", "trainer.lr", "method.name", "data.fields.id", "rollout.name"])
def test_missing_keys(missing: str, default: dict[str, Any]):
    raw = copy.deepcopy(default)
    *path, last = missing.split(".")
    node = raw
    for part in path:
        node = node[part]
    del node[last]
    with pytest.raises(UserError, match=f"{missing} is missing; give {missing}=..."):
        train_config(raw)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("seed=-1", "at least 0"),
        ("seed=1.5", "a whole number"),
        ("seed=true", "a whole number"),
        ("seed=null", "seed=null must be a whole number"),
        ("trainer.steps=1e3", "a whole number"),
        ("trainer.steps='3'", "a whole number"),
        ("trainer.steps={a:1}", "a whole number"),
        ("trainer.lr=inf", "a finite number above 0"),
        ("trainer.lr=0", "above 0"),
        ("trainer.lr=true", "a number"),
        ("trainer.weight_decay=nan", "at least 0"),
        ("trainer.weight_decay=inf", "must be finite"),
        ("trainer.betas=[0.9,1.0]", "below 1"),
        ("trainer.betas=[0.9,nan]", "below 1"),
        ("trainer.betas=[0.9,null]", "trainer.betas[1]=null"),
        ("trainer.group_size=1", "at least 2"),
        ("trainer.mini_batches=33", "lower it or raise trainer.prompts_per_step"),
        ("trainer.max_tokens_per_micro_batch=0", "at least 1"),
        ("trainer.old_log_probs=both", "auto, trainer"),
        ("trainer.max_grad_norm=inf", "finite"),
        ("trainer.mask_truncated=1", "true or false"),
        ("trainer.threads=0", "at least 1"),
        ("trainer.eval_every=null", "a whole number"),
        ("trainer.checkpoint_every=-1", "at least 0"),
        ("trainer.warmup_steps=-1", "at least 0"),
        ("rollout.temperature=0", "above 0"),
        ("rollout.temperature=inf", "finite"),
        ("rollout.name=sglang", "must be one of: auto, hf, vllm"),
        ("data.limit=0", "at least 1"),
        ("data.heldout=null", "a whole number"),
        ("data.seed=-1", "at least 0"),
        ("data.fields=null", "a group of keys"),
        ("model.chat_template=jinja", "must be one of: auto,"),
        ("model.chat_template_kwargs=3", "a mapping"),
        ("method.name=a/b", "without a slash"),
        ("filter.q=0", "filter.q=0.0 must be a finite number above 0"),
        ("filter.q=nan", "filter.q=nan"),
        ("filter.v=-1", "filter.v=-1.0"),
        ("filter.p0=null", "filter.p0=null must be a number"),
        ("filter.p0=-1", "p0=-1"),
        ("filter.time_constant=inf", "finite"),
        ("filter.time_constant=1e-9", "cannot be expressed"),
        ("filter.time_constant=1e300", "cannot be expressed"),
        ("method.surrogate.eps_low=2", "at most 1"),
        ("method.surrogate.eps_low=x", "eps_low=x must be a number"),
        ("method.surrogate.name=clipp", "did you mean 'clip'?"),
        ("method.surrogate=clip", "a mapping"),
        ("method.filter_defaults.time_constant=x", "method.filter_defaults.time_constant=x must be a number"),
        ("method.filter_defaults.q=1e-3", "give one of them"),
        ("method.filter_defaults.time_constant=null", "give filter.q or filter.time_constant"),
        ("trainer.kl_coefficient=-1", "at least 0"),
        ("trainer.overlong_buffer=nan", "below 1"),
        ("trainer.kl_estimator=k4", "must be one of: k1, k2, k3"),
        ("rollout.correction=clip", "must be one of: auto, none, truncate, mask"),
        ("rollout.correction_cap=1", "above 1"),
    ],
)
def test_bad_values(override: str, hint: str, default: dict[str, Any]):
    """What the command line refuses (test_cli.py), without the time that composing takes."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(override)
    raw = copy.deepcopy(default)
    *path, last = parsed.key_or_group.split(".")
    node = raw
    for part in path:
        node = node[part]
    assert last in node
    node[last] = parsed.value()
    with pytest.raises(UserError) as caught:
        make_objective(train_config(raw))
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)
