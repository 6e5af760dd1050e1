"""Sampling with transformers against vLLM, responses of fixed and of ragged length, side by side.

    make test-vllm && .venv-vllm/bin/python benchmarks/rollout.py [--threads 1] [--rounds 3]

The models have random weights and nearly uniform distributions over their tokens, so that a share of the vocabulary as
stop ids is the chance that a response ends at a token: lengths are then geometric, cut at the limit. As in training
a few long responses go on while the others have ended. The samplers take turns within a round; a line has the median of
the rounds, the smallest and the largest. Prompts are shared by groups of 8, as in training.
"""

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from kpo_cli.policy.threads import Workers
from kpo_cli.rollout import HFSampler, VLLMSampler
from kpo_cli.rollout.engine import VLLMEngine

VOCABULARY = 4096
PROMPT, GROUP = 64, 8
MODELS = {  # layers, hidden size, heads, prompts
    "tiny, hidden 64": (3, 64, 2, 32),
    "hidden 512": (4, 512, 8, 16),
}
CASES = {  # the longest response, the mean if none were cut
    "fixed 64": (64, None),
    "ragged 64, at most 512": (512, 64),
}


def make_model(layers: int, hidden: int, heads: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        max_position_embeddings=2048,
        initializer_range=0.02,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def measure(samplers: dict, prompts: list[list[int]], rounds: int) -> dict[str, list[float]]:
    """Response tokens a second, of each round."""
    speeds: dict[str, list[float]] = {name: [] for name in samplers}
    for number in range(-1, rounds):  # the first is a warm-up
        for name, sampler in samplers.items():
            start = time.perf_counter()
            groups = sampler.sample(prompts, GROUP, (number + 1,))
            seconds = time.perf_counter() - start
            if number >= 0:
                speeds[name].append(sum(len(r.token_ids) for group in groups for r in group) / seconds)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, {given.threads} threads; response tokens a second, median (smallest-largest)\n")
    print("| model | responses | lengths | hf | vLLM | vLLM / hf |\n|---|---|---|---|---|---|")
    for model_name, (layers, hidden, heads, count) in MODELS.items():
        model = make_model(layers, hidden, heads)
        draw = torch.Generator().manual_seed(1)
        prompts = torch.randint(VOCABULARY, (count, PROMPT), generator=draw).tolist()
        engine = VLLMEngine(SimpleNamespace(model=model, dtype="float32"), max_length=PROMPT + 512, options={})
        for case, (limit, mean) in CASES.items():
            settings = {
                "stop_ids": list(range(VOCABULARY // mean)) if mean else [VOCABULARY - 1],
                "temperature": 1.0,
                "max_response_tokens": limit,
            }
            samplers = {
                "hf": HFSampler(model, batch_size=256, workers=Workers(1), **settings),
                "vLLM": VLLMSampler(engine, **settings),
            }
            speeds = measure(samplers, prompts, given.rounds)
            hf, vllm = (f"{statistics.median(s):,.0f} ({min(s):,.0f}-{max(s):,.0f})" for s in speeds.values())
            ratio = statistics.median(b / a for a, b in zip(*speeds.values(), strict=True))
            print(f"| {model_name} | {count * GROUP} | {case} | {hf} | {vllm} | {ratio:.2f} |", flush=True)
        engine.close()


if __name__ == "__main__":
    main()
