"""A model sharded over one process is that model: in float32 to the bit, in bfloat16 with masters in float32."""

import copy

import pytest
import torch
from test_scorer import PACKED, ragged_batch, tiny
from torch.distributed.fsdp import FSDPModule

from kpo_cli.config import LoraConfig
from kpo_cli.policy.fidelity import choose_way
from kpo_cli.policy.lora import add_adapters
from kpo_cli.policy.recompute import recompute_layers
from kpo_cli.policy.scorer import Scorer
from kpo_cli.policy.sharding import full, mesh_of_one, shard, trained_weights

CPU = torch.device("cpu")


def pair(name, dtype=None, *, packed=True, lora=False, recompute=False):
    """A plain model and a sharded one with the same weights."""
    model = tiny(PACKED[name])
    if lora:
        add_adapters(model, LoraConfig(4, None, "all-linear", False))
        draw = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.1, generator=draw)
    assert not recompute or recompute_layers(model)
    if packed:
        assert choose_way(model).packed
    other = copy.deepcopy(model)
    shard(other, mesh_of_one(CPU), dtype)
    return model, other


def steps(model, packed):
    """Log-probs and entropies before each of five steps, all weights behind them, and AdamW's moments."""
    scorer, batch, values = Scorer(model, 0.7, packed=packed), ragged_batch(), []
    optimizer = torch.optim.AdamW(trained_weights(model), lr=1e-2, fused=True)
    for _ in range(5):
        for rows in torch.arange(12).split(4):
            log_probs, entropy = scorer(batch.rows(rows), entropy_gradient=True)
            part = batch.rows(rows)
            (torch.where(part.response_mask, log_probs + 0.3 * entropy, 0) * part.advantages[:, None]).sum().backward()
            values += [log_probs.detach(), entropy.detach()]
        parameters = [p for p in model.parameters() if p.requires_grad]
        values += [full(p.grad).clone() for p in parameters if p.grad is not None]
        values.append(full(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        for weight, parameter in zip(optimizer.param_groups[0]["params"], parameters, strict=True):
            weight.grad = None if parameter.grad is None else getattr(parameter.grad, "_local_tensor", parameter.grad)
        optimizer.step()
        model.zero_grad(set_to_none=True)
    moments = [t for state in optimizer.state.values() for t in state.values()]
    return [*values, *(full(p.detach()) for p in model.parameters()), *moments]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "mixtral", "gpt2"])
def test_in_float32_nothing_changes_to_the_bit(name, packed, lora, recompute):
    plain, sharded = pair(name, packed=packed, lora=lora, recompute=recompute)
    assert isinstance(sharded, FSDPModule)
    assert sum(isinstance(module, FSDPModule) for module in sharded.modules()) == 3  # two layers and what is around
    for one, two in zip(steps(plain, packed), steps(sharded, packed), strict=True):
        assert torch.equal(one, two)
