"""Runs small enough for a test, in this process."""

import json

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file

from kpo_cli.cli.compose import conf_dir
from kpo_cli.config import ModelConfig, convert
from kpo_cli.runs.checkpoints import STATE
from kpo_cli.runs.directory import sha256_of
from kpo_cli.training.main import run

SMALL = [
    "trainer.steps=3",
    "trainer.prompts_per_step=4",
    "trainer.group_size=4",
    "trainer.mini_batches=2",
    "trainer.max_tokens_per_micro_batch=100",
    "trainer.warmup_steps=1",
    "trainer.eval_every=2",
    "trainer.checkpoint_every=1",
    "trainer.ratios_every=2",
    "rollout.max_response_tokens=12",
    "data.limit=32",
    "data.heldout=4",
]


def raw_config(*overrides):
    """The composed configuration as `kpo train` hands it on; small unless overridden."""
    arguments = [*SMALL, *overrides] if not any(o.startswith("resume=") for o in overrides) else list(overrides)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("train", arguments)
    return {**OmegaConf.to_container(config, resolve=True), "overrides": list(overrides)}


def model_config(*overrides):
    """The `model` group as dataclass; the built-in policy unless overridden."""
    return convert(ModelConfig, raw_config(*overrides)["model"], "model")


def train(run_dir, *overrides):
    run(raw_config(f"run_dir='{run_dir}'", *overrides))
    return run_dir


def resume(run_dir, *overrides):
    run(raw_config(f"resume='{run_dir}'", *overrides))
    return run_dir


def rewrite_state(path, **changes):
    """Change a checkpoint's state.json as another version would have written it; None takes a key out."""
    file = path / STATE
    state = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in state.items() if value is not None}))
    sums = json.loads((path / "checksums.json").read_text()) | {STATE: sha256_of(file)}
    (path / "checksums.json").write_text(json.dumps(sums))


def weights(run_dir, step):
    return load_file(run_dir / f"checkpoints/step-{step:06d}/model.safetensors")


def metrics(run_dir, timings=False):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("time_", "tokens_per_second")
    return rows if timings else [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
