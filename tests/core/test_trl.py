"""The same batch through TRL's own loss code (`pip install trl`; skipped where it is not installed).

TRL's GRPOTrainer computes its loss in `_compute_loss`, from the trainer's attributes and a batch. It is called here
on an object that has those attributes and no model, so what is compared is TRL's code and not a copy of it.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from test_objectives import ADVANTAGES, LENGTHS, example, value_and_gradient

from kpo_cli.core import ReferenceKL, load_objective

pytest.importorskip("trl")
GRPOTrainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer

TRL_SETTINGS = {
    "grpo": {"loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2},
    "grpo_tight": {"loss_type": "grpo", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "dapo": {"loss_type": "dapo", "epsilon_low": 0.2, "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo", "epsilon_low": 0.2, "epsilon_high": 0.2},
    "gspo": {
        "loss_type": "grpo",
        "epsilon_low": 3e-4,
        "epsilon_high": 4e-4,
        "importance_sampling_level": "sequence",
    },
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
}
OURS = {"dr_grpo": {"length": 20}, "cispo": {"cap": 1.3}}


def trl_loss(settings, log_probs, old, ref, beta):
    """TRL's loss and its gradient with respect to `log_probs` (B, T), which are free of NaN."""
    leaf = log_probs.clone().requires_grad_()
    mask = (torch.arange(12) < torch.tensor(LENGTHS)[:, None]).long()
    args = SimpleNamespace(
        delta=None,
        use_bias_correction_kl=False,
        steps_per_generation=1,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
    )
    trainer = SimpleNamespace(
        args=args,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
        ),
        beta=beta,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        importance_sampling_level="token",
        current_gradient_accumulation_steps=1,
        max_completion_length=20,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.zeros_like(leaf), None),
    )
    vars(trainer).update(settings)
    ids = torch.zeros(6, 12, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones(6, 1, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.tensor(ADVANTAGES, dtype=leaf.dtype),
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum().to(leaf.dtype),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss, gradient


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("scale", [1e-4, 0.3])
@pytest.mark.parametrize("method", TRL_SETTINGS)
def test_value_and_gradient_equal_those_of_trl(method, scale, beta):
    log_probs, old, advantages, mask, _ = example(seed=3, scale=scale)
    ref = torch.where(mask, old + 0.1 * torch.sin(torch.arange(12.0)), 0.0)
    clean = [torch.where(mask, x, -1.0) for x in (log_probs, old)]
    want, want_gradient = trl_loss(TRL_SETTINGS[method], *clean, ref, beta)
    kl = {"reference_kl": ReferenceKL(beta)} if beta else {}
    objective = load_objective(method, **OURS.get(method, {}), **kl)
    out, gradient = value_and_gradient(objective, log_probs, old, advantages, mask, ref_log_probs=ref)
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert torch.allclose(gradient, torch.where(mask, want_gradient, 0.0), rtol=1e-6, atol=1e-12)
