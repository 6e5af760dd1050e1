"""vLLM draws from exactly softmax(logits / temperature): what tests/rollout/test_sampler.py asks of transformers."""
# ruff: noqa: F811 - `model` is test_sampler's fixture

import pytest
import torch
from test_sampler import chi_squared_p, model  # noqa: F401
from vllm_policies import bare, sampler_of, started

from kpo_cli.rollout.engine import installed

if not installed():
    pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)


@pytest.fixture(scope="module")
def engine(model):
    with started(bare(model), max_length=64, max_num_seqs=1024) as engine:
        yield engine


def sampler(engine, **changes):
    return sampler_of(engine, [0], **({"temperature": 1.0, "max_response_tokens": 1} | changes))


def logits_after(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1].double()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_tokens_follow_softmax_of_logits_over_temperature(model, engine, temperature):
    """The model's generation_config asks for top-k 20, top-p 0.8 and a temperature of 0.6; nothing of it may show."""
    prompt = [5, 17, 400]
    probabilities = torch.softmax(logits_after(model, prompt) / temperature, -1).numpy()
    groups = sampler(engine, temperature=temperature).sample([prompt], 20_000, (7,))
    assert chi_squared_p([response.token_ids[0] for response in groups[0]], probabilities) > 1e-3


def test_later_tokens_follow_their_own_distribution(model, engine):
    prompts = [[5, 17, 400, 8, 9], [33]]
    groups = sampler(engine, max_response_tokens=2, temperature=0.5).sample(prompts, 12_000, (3,))
    for prompt, group in zip(prompts, groups, strict=True):
        firsts = [response.token_ids[0] for response in group]
        first = max(set(firsts) - {0}, key=firsts.count)
        seconds = [response.token_ids[1] for response in group if response.token_ids[0] == first]
        assert chi_squared_p(seconds, torch.softmax(logits_after(model, [*prompt, first]) / 0.5, -1).numpy()) > 1e-3


def test_seeds_reproduce_and_differ(engine):
    prompts = [[1, 2, 3], [4], [5, 6]]
    ids = lambda groups: [[r.token_ids for r in g] for g in groups]  # noqa: E731
    six = sampler(engine, max_response_tokens=6)
    together = ids(six.sample(prompts, 3, (1, 2)))
    assert ids(six.sample(prompts, 3, (1, 2))) == together
    assert ids(six.sample(prompts, 3, (1, 3))) != together
    assert len({tuple(tokens) for group in together for tokens in group}) == 9
    # The place of a prompt counts, not what is sampled beside it, nor how many samples.
    assert ids(six.sample(prompts[1:], 3, (1, 2), places=[1, 2])) == together[1:]
    assert ids(six.sample(prompts[2:], 2, (1, 2), places=[2])) == [together[2][:2]]


def test_stop_tokens_end_a_response_and_belong_to_it(model, engine):
    first = int(logits_after(model, [1, 2]).argmax())
    second = int(logits_after(model, [1, 2, first]).argmax())

    def greedy(ids, length):
        limited = sampler_of(engine, ids, max_response_tokens=length)
        return limited.sample([[1, 2]], 1, (0,), greedy=True)[0][0]

    assert greedy([first, 999], 5).token_ids == [first]
    assert greedy([999, first], 5).finished
    response = greedy([second], 5)
    assert response.token_ids == [first, second]
    assert response.finished
    assert len(response.log_probs) == 2
    cut = greedy([second], 1)
    assert cut.token_ids == [first]
    assert not cut.finished


def test_reported_log_probs_are_those_of_the_tempered_model(model, engine):
    (response,) = sampler(engine, max_response_tokens=5, temperature=0.6).sample([[9, 8]], 1, (5,))[0]
    with torch.no_grad():
        logits = model(torch.tensor([[9, 8, *response.token_ids]])).logits[0, 1:-1].double() / 0.6
    want = torch.log_softmax(logits, -1)[range(len(response.token_ids)), response.token_ids]
    assert response.log_probs == pytest.approx(want.tolist(), abs=1e-5)


def test_top_p_keeps_to_the_nucleus(model, engine):
    probabilities = torch.softmax(logits_after(model, [5, 17, 400]), -1)
    ordered, index = probabilities.sort(descending=True)
    inside = set(index[: int((ordered.cumsum(0) < 0.5).sum()) + 1].tolist())
    groups = sampler(engine, top_p=0.5).sample([[5, 17, 400]], 2_000, (7,))
    drawn = {response.token_ids[0] for response in groups[0]}
    assert drawn <= inside
    assert len(drawn) > len(inside) / 2


def test_progress_counts_what_is_finished_and_sampled(engine):
    seen = []
    groups = sampler(engine, max_response_tokens=40, progress=lambda *state: seen.append(state)).sample(
        [[1, 2], [3]], 4, (0,)
    )
    assert seen == sorted(seen)
    assert seen[-1] == (8, sum(len(r.token_ids) for g in groups for r in g))
    assert len({finished for finished, _ in seen}) > 1
    assert seen[0][0] == 0


def test_nothing_of_an_aborted_batch_is_left_in_the_engine(engine, monkeypatch):
    step, calls = engine.llm.llm_engine.step, []

    def failing():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a device was lost")
        return step()

    limited = sampler(engine, max_response_tokens=6)
    expected = limited.sample([[1, 2, 3]], 4, (9,))
    monkeypatch.setattr(engine.llm.llm_engine, "step", failing)
    assert limited.sample([[1, 2, 3]], 4, (9,)) == expected  # tried once more, to the same responses
    assert len(calls) > 3
    assert not engine.llm.llm_engine.has_unfinished_requests()
