"""The sampler draws from exactly softmax(logits / temperature), and says so in its log-probabilities."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from kpo_cli.errors import RunStopped
from kpo_cli.rollout import HFSampler
from kpo_cli.rollout.hf import invert_cdf

VOCABULARY = 1000


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.25,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).eval()
    # What a hub model may bring along; none of it may reach training rollouts.
    model.generation_config = GenerationConfig(do_sample=True, top_k=20, top_p=0.8, temperature=0.6)
    return model


def sampler(model, **changes):
    settings = {"stop_ids": [0], "temperature": 1.0, "max_response_tokens": 1, "batch_size": 4096} | changes
    return HFSampler(model, **settings)


def chi_squared_p(tokens, probabilities):
    """p-value of the sampled tokens; tokens expected fewer than 5 times share one bin."""
    expected = probabilities * len(tokens)
    observed = np.bincount(tokens, minlength=len(probabilities)).astype(float)
    rare = expected < 5
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    return stats.chisquare(observed, expected).pvalue


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_tokens_follow_softmax_of_logits_over_temperature(model, temperature):
    prompt = [5, 17, 400]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    probabilities = torch.softmax(logits / temperature, -1).numpy()
    groups = sampler(model, temperature=temperature).sample([prompt], 20_000, (7,))
    tokens = [response.token_ids[0] for response in groups[0]]
    assert chi_squared_p(tokens, probabilities) > 1e-3
    # The test has teeth: draws from a top-k 50 or slightly sharper distribution fail it.
    rng = np.random.default_rng(0)
    top = np.where(probabilities >= np.sort(probabilities)[-50], probabilities, 0)
    sharper = probabilities**1.3
    for wrong in (top, sharper):
        drawn = rng.choice(VOCABULARY, 20_000, p=wrong / wrong.sum())
        assert chi_squared_p(drawn, probabilities) < 1e-6


def test_later_tokens_follow_their_own_distribution(model):
    """Second tokens, given the first, behind prompts of unequal length (left padding and cache in play)."""
    prompts = [[5, 17, 400, 8, 9], [33]]
    groups = sampler(model, max_response_tokens=2, temperature=0.5).sample(prompts, 12_000, (3,))
    for prompt, group in zip(prompts, groups, strict=True):
        firsts = [response.token_ids[0] for response in group]
        first = max(set(firsts) - {0}, key=firsts.count)
        seconds = [response.token_ids[1] for response in group if response.token_ids[0] == first]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, first]])).logits[0, -1].double()
        assert chi_squared_p(seconds, torch.softmax(logits / 0.5, -1).numpy()) > 1e-3


def test_inverse_of_the_cumulative_distribution():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).repeat(5, 1)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.999, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert invert_cdf(p, u).tolist() == [1, 1, 3, 3, 3]


def test_a_policy_that_exploded_is_reported(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RunStopped, match="weights have exploded"):
        sampler(broken, max_response_tokens=3).sample([[1, 2]], 2, (0,))


def test_a_response_does_not_depend_on_what_is_sampled_beside_it(model):
    prompts = [[1, 2, 3], [4], [5, 6]]
    together = sampler(model, max_response_tokens=6).sample(prompts, 3, (1, 2))
    apart = sampler(model, max_response_tokens=6, batch_size=2).sample(prompts, 3, (1, 2))
    assert [[r.token_ids for r in g] for g in together] == [[r.token_ids for r in g] for g in apart]
    assert sampler(model, max_response_tokens=6).sample(prompts, 3, (1, 3)) != together
    assert len({tuple(r.token_ids) for g in together for r in g}) == 9


def test_stop_tokens_end_a_response_and_belong_to_it(model):
    with torch.no_grad():
        first = int(model(torch.tensor([[1, 2]])).logits[0, -1].argmax())
        second = int(model(torch.tensor([[1, 2, first]])).logits[0, -1].argmax())
    stops_at = lambda ids, n: sampler(model, stop_ids=ids, max_response_tokens=n).sample([[1, 2]], 1, (0,), greedy=True)  # noqa: E731
    assert stops_at([first, 999], 5)[0][0].token_ids == [first]
    response = stops_at([second], 5)[0][0]
    assert response.token_ids == [first, second]
    assert response.finished
    assert len(response.log_probs) == 2
    cut = stops_at([second], 1)[0][0]
    assert cut.token_ids == [first]
    assert not cut.finished


def test_reported_log_probs_are_those_of_the_tempered_model(model):
    (response,) = sampler(model, max_response_tokens=5, temperature=0.6).sample([[9, 8]], 1, (5,))[0]
    with torch.no_grad():
        logits = model(torch.tensor([[9, 8, *response.token_ids]])).logits[0, 1:-1].double() / 0.6
    want = torch.log_softmax(logits, -1)[range(len(response.token_ids)), response.token_ids]
    assert response.log_probs == pytest.approx(want.tolist(), abs=1e-5)
