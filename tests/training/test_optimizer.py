"""AdamW and where its state is. No GPU is needed: what moves, in which type, and that no place changes a bit."""

import dataclasses

import pytest
import torch
from small_runs import raw_config, train, weights

from kpo_cli.config import train_config
from kpo_cli.training import optimizer as module
from kpo_cli.training.optimizer import HostAdamW, make_optimizer, off_device

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


def test_off_device_moves_all_state_there_and_back(monkeypatch):
    """The meta device stands for a GPU: it has shapes and types, and nothing on it takes memory."""
    own = [torch.nn.Parameter(torch.empty(3, 4, device="meta")), torch.nn.Parameter(torch.empty(5, device="meta"))]
    optimizer = torch.optim.AdamW(own)
    for parameter in own:
        moments = {name: torch.empty_like(parameter, dtype=torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.empty((), device="meta"), **moments}
    monkeypatch.setattr(module, "to_host", lambda tensor: torch.zeros_like(tensor, device="cpu"))

    def described():
        return [
            (name, tensor.device.type, tensor.dtype, tensor.shape)
            for state in optimizer.state.values()
            for name, tensor in state.items()
        ]

    before = described()
    with off_device(optimizer, True):
        inside = described()
    assert {place for _, place, _, _ in inside} == {"cpu"}
    assert [(name, dtype, shape) for name, _, dtype, shape in inside] == [(n, d, s) for n, _, d, s in before]
    assert described() == before
    with pytest.raises(KeyError), off_device(optimizer, True):
        raise KeyError
    assert described() == before  # also when sampling failed
    with off_device(optimizer, False):
        assert described() == before


def test_on_a_cpu_nothing_moves():
    own = parameters()
    optimizer = torch.optim.AdamW(own, **SETTINGS)
    learn(optimizer, own, 1)
    places = [tensor.data_ptr() for state in optimizer.state.values() for tensor in state.values()]
    with off_device(optimizer, True):
        assert [t.data_ptr() for state in optimizer.state.values() for t in state.values()] == places


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
    for offload in ("sampling", "always"):
        other = train(tmp_path / offload, "trainer.steps=1", f"trainer.offload_optimizer={offload}")
        assert all(torch.equal(a, weights(other, 1)[name]) for name, a in weights(plain, 1).items())
