"""Where an engine finds the model's configuration: one place for one configuration, whatever happens there."""

import json
import multiprocessing
import os
import random

import numpy as np
import pytest
import torch
from conftest import compose
from small_runs import resume, train
from transformers import AutoConfig

from kpo_cli.config import train_config
from kpo_cli.errors import UserError
from kpo_cli.policy.load import load_policy
from kpo_cli.rollout import engine as engines
from kpo_cli.rollout.engine import model_folder
from kpo_cli.training import assemble as assembling
from kpo_cli.training import sampler as samplers


def built_in():
    return load_policy(train_config(compose()).model).model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def place(model):
    with model_folder(model) as folder:
        assert (folder / "config.json").is_file()
        return folder


def test_the_same_configuration_has_one_place(cache):
    model, again = built_in(), built_in()
    again.config.name_or_path = "/somewhere/else"
    assert place(model) == place(again)
    assert place(model).is_relative_to(cache)
    assert [path.name for path in place(model).iterdir()] == ["config.json"]
    again.config.rope_parameters = {**again.config.rope_parameters, "rope_theta": 12345.0}
    assert place(again) != place(model)
    assert json.loads((place(again) / "config.json").read_text())["rope_parameters"]["rope_theta"] == 12345.0


def test_it_is_the_models_configuration(cache):
    model = built_in()
    model.config.architectures = None
    read = AutoConfig.from_pretrained(place(model))
    assert read.architectures == [type(model).__name__]
    wanted = {**model.config.to_dict(), "architectures": read.architectures}
    assert read.to_dict() | {"_name_or_path": ""} == wanted | {"_name_or_path": ""}
    assert model.config.architectures is None  # the model itself is left alone


def test_what_somebody_else_wrote_there_is_not_used(cache):
    model = built_in()
    file = place(model) / "config.json"
    text = file.read_text()
    for other in ("", text.replace("{", '{"auto_map": {"AutoConfig": "evil.Config"},', 1)):
        file.write_text(other)
        assert (place(model) / "config.json").read_text() == text


@pytest.mark.parametrize("obstacle", ["a file in its place", "no permission", "no home"])
def test_a_cache_that_cannot_be_written_is_done_without(obstacle, tmp_path, monkeypatch):
    home, model = tmp_path / "cache", built_in()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    if obstacle == "a file in its place":
        home.write_text("")
    elif obstacle == "no permission":  # not by chmod: a test may run as root
        monkeypatch.setattr(engines, "_placed", refusing(engines._placed, home))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(engines.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with model_folder(model) as folder:
        assert (folder / "config.json").is_file()
        assert not folder.is_relative_to(home)
    assert not folder.exists()  # a temporary one is removed


def refusing(placed, below):
    def attempt(folder, text):
        if folder.is_relative_to(below):
            raise PermissionError("read-only")
        return placed(folder, text)

    return attempt


def _many(path, text, count):
    for _ in range(count):
        engines._placed(path, text)
        assert (path / "config.json").read_text() == text  # never half of it


def test_two_processes_may_write_it_at_once(tmp_path):
    path, text = tmp_path / "a" / "b", json.dumps({"key": "value" * 20_000})
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_many, args=(path, text, 50)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [file.name for file in path.iterdir()] == ["config.json"]


def test_starting_an_engine_leaves_random_numbers_and_precision_alone():
    """Those of a resumed run have been restored before, and vLLM seeds all of them."""
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # noqa: NPY002
    precision = torch.get_float32_matmul_precision()

    def seeding():
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002
        random.seed(5)
        torch.set_float32_matmul_precision("medium")
        raise KeyError

    with pytest.raises(KeyError), engines._undisturbed("cpu"):
        seeding()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]
    assert torch.get_float32_matmul_precision() == precision


def test_a_resumed_run_has_its_optimizer_before_the_engine_takes_memory(tmp_path, monkeypatch):
    run, seen = train(tmp_path / "run", "rollout=hf", "trainer.steps=1"), []
    restore = assembling.restore

    def restoring(checkpoint, optimizer):
        restore(checkpoint, optimizer)
        seen.append(sum(t.nbytes for state in optimizer.state.values() for t in state.values()))

    class Engine:
        def __init__(self, policy, **settings):
            seen.append(settings["reserved"])
            raise UserError("so far")

    monkeypatch.setattr(assembling, "restore", restoring)
    monkeypatch.setattr(samplers, "VLLMEngine", Engine)
    with pytest.raises(UserError, match="so far"):
        resume(run, "rollout=vllm", "trainer.steps=2")
    moments, reserved = seen
    assert moments > 8 * 160_000
    assert reserved == 0  # they are there: nothing is to come
    seen.clear()
    with pytest.raises(UserError, match="so far"):
        train(tmp_path / "new", "rollout=vllm")
    assert seen == [8 * sum(p.numel() for p in built_in().parameters())]
    assert os.listdir(tmp_path) == ["run"]
