"""AdamW and where its state is. No GPU is needed: what moves, in which type, and that no place changes a bit."""

import dataclasses

import pytest
import torch
from small_runs import raw_config, train, weights

from kpo_cli.config import train_config
from kpo_cli.training import optimizer as module
from kpo_cli.training.optimizer import HostAdamW, SamplingAdamW, leave_device, make_optimizer
from kpo_cli.training.sampler import reserved_bytes

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "fused": True}


def parameters():
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((3, 4), (5,), (2, 2))]


def learn(optimizer, own, steps, skip=None):
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        for index, parameter in enumerate(own):
            gradient = torch.randn(parameter.shape, generator=draw)
            parameter.grad = None if index == skip else gradient
        optimizer.step()


@pytest.mark.parametrize("skip", [None, 1])
def test_state_in_host_memory_changes_no_bit(skip, monkeypatch):
    sizes = []

    def to_host(tensor):
        sizes.append(tensor.numel())
        return tensor.clone()

    monkeypatch.setattr(module, "to_host", to_host)
    here, there = parameters(), parameters()
    one, two = torch.optim.AdamW(here, **SETTINGS), HostAdamW(there, **SETTINGS)
    learn(one, here, 3, skip)
    learn(two, there, 3, skip)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert [p.grad is None for p in there] == [p.grad is None for p in here]
    stepped = [p for index, p in enumerate(there) if index != skip]
    assert sizes == 3 * [n for p in stepped for n in (1, p.numel(), p.numel())]  # step, and two moments of each in turn
    for mine, other in zip(one.state_dict()["state"].values(), two.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_state_in_host_memory_is_loaded_from_a_checkpoint_of_either_kind():
    here, there = parameters(), parameters()
    one, two = torch.optim.AdamW(here, **SETTINGS), HostAdamW(there, **SETTINGS)
    learn(one, here, 2)
    with torch.no_grad():
        for mine, other in zip(there, here, strict=True):
            mine.copy_(other)
    two.load_state_dict(one.state_dict())
    learn(one, here, 2)
    learn(two, there, 2)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def on_meta(kind):
    """The meta device stands for a GPU: it has shapes and types, and nothing on it takes memory."""
    own = [torch.nn.Parameter(torch.empty(3, 4, device="meta")), torch.nn.Parameter(torch.empty(5, device="meta"))]
    return own, kind(own)


def places(optimizer):
    return [
        (name, tensor.device.type, tensor.dtype, tensor.shape)
        for state in optimizer.state.values()
        for name, tensor in state.items()
    ]


@pytest.fixture
def meta_to_host(monkeypatch):
    copied = []

    def to_host(tensor):
        copied.append(tensor.device.type)
        return torch.zeros_like(tensor, device="cpu")

    monkeypatch.setattr(module, "to_host", to_host)
    return copied


def test_state_leaves_the_device_until_the_next_step(meta_to_host, monkeypatch):
    own, optimizer = on_meta(SamplingAdamW)
    for parameter in own:
        moments = {name: torch.empty_like(parameter, dtype=torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.empty((), device="meta"), **moments}
    before = places(optimizer)
    leave_device(optimizer)
    assert [(name, dtype, shape) for name, _, dtype, shape in places(optimizer)] == [(n, d, s) for n, _, d, s in before]
    assert {place for _, place, _, _ in places(optimizer)} == {"cpu"}
    leave_device(optimizer)  # a second batch of samples, or an evaluation, before the next step
    assert meta_to_host == ["meta"] * 6
    seen = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: seen.append(places(self)))
    optimizer.step()
    assert seen == [before]  # all of it is beside its parameter before anything is computed


def test_only_an_optimizer_that_was_asked_to_leaves_the_device(meta_to_host):
    own, optimizer = on_meta(torch.optim.AdamW)
    optimizer.state[own[0]] = {"exp_avg": torch.empty_like(own[0])}
    leave_device(optimizer)
    assert meta_to_host == []


@pytest.mark.parametrize("kind", [SamplingAdamW, HostAdamW])
def test_a_checkpoint_is_loaded_past_the_device(kind, meta_to_host):
    """An engine may have all of it. The plain one shows that the meta device would be seen to be used."""
    here = parameters()[:1]
    saved = torch.optim.AdamW(here, **SETTINGS)
    learn(saved, here, 2)
    plain_own, plain = on_meta(torch.optim.AdamW)
    plain.param_groups[0]["params"] = plain_own[:1]
    plain.load_state_dict(saved.state_dict())
    assert {place for name, place, _, _ in places(plain) if name != "step"} == {"meta"}
    own, optimizer = on_meta(kind)
    optimizer.param_groups[0]["params"] = own[:1]
    optimizer.load_state_dict(saved.state_dict())
    assert {place for _, place, _, _ in places(optimizer)} == {"cpu"}
    assert set(meta_to_host) == {"cpu"}  # nothing came from the device, so nothing was there
    assert optimizer.param_groups[0]["lr"] == SETTINGS["lr"]


def test_state_off_the_device_while_sampling_changes_no_bit():
    """Taken to host memory between steps, saved from there, loaded, and stepped on: as if it had never left."""
    here, there = parameters(), parameters()
    one, two = torch.optim.AdamW(here, **SETTINGS), SamplingAdamW(there, **SETTINGS)
    for _ in range(3):
        learn(one, here, 1)
        leave_device(two)
        learn(two, there, 1)
    leave_device(two)
    again = SamplingAdamW(there, **SETTINGS)
    again.load_state_dict(two.state_dict())
    learn(one, here, 2, skip=1)
    learn(again, there, 2, skip=1)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_moments_are_reserved_while_they_are_to_come(monkeypatch):
    """Fresh, restored, and off the device; gradients never."""
    own = parameters()
    model = torch.nn.ParameterList([*own, torch.nn.Parameter(torch.zeros(7), requires_grad=False)])
    trained = sum(p.numel() for p in own)
    raw = raw_config()
    config = train_config({k: v for k, v in raw.items() if k not in ("overrides", "run_dir", "resume")})

    def reserved(offload, optimizer):
        trainer = dataclasses.replace(config.trainer, offload_optimizer=offload)
        return reserved_bytes(dataclasses.replace(config, trainer=trainer), model, optimizer)

    optimizer = torch.optim.AdamW(own, **SETTINGS)
    assert reserved("none", optimizer) == 8 * trained
    assert reserved("sampling", optimizer) == reserved("always", optimizer) == 0
    learn(optimizer, own, 1)
    assert reserved("none", optimizer) == 0


def test_to_host_keeps_value_and_type():
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.randn(3, 4).to(dtype)
        copy = module.to_host(tensor)
        assert torch.equal(copy, tensor)
        assert (copy.dtype, copy.device.type) == (dtype, "cpu")
        assert copy.data_ptr() != tensor.data_ptr()


def test_only_weights_that_train_are_optimized():
    raw = raw_config()
    config = train_config({k: v for k, v in raw.items() if k not in ("overrides", "run_dir", "resume")}).trainer
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model.device = torch.device("cpu")
    model[0].requires_grad_(False)
    optimizer = make_optimizer(model, dataclasses.replace(config, lr=0.5))
    assert optimizer.param_groups[0]["params"] == [*model[1].parameters()]
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, config.betas, config.weight_decay)


def test_offloading_changes_no_run_on_a_cpu(tmp_path):
    plain = train(tmp_path / "plain", "trainer.steps=1")
    for offload in ("none", "sampling", "always"):
        other = train(tmp_path / offload, "trainer.steps=1", f"trainer.offload_optimizer={offload}")
        assert all(torch.equal(a, weights(other, 1)[name]) for name, a in weights(plain, 1).items())
