"""The configuration of `kpo analyze` for tests: quick, unless overridden."""

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from kpo_cli.analysis.config import analyze_config
from kpo_cli.cli.compose import conf_dir

QUICK = ("nulls.draws=20", "nulls.tokens=2000", "time_constants=[]")


def raw_config(*overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        raw = OmegaConf.to_container(compose("analyze", [*QUICK, *overrides]), resolve=True)
    GlobalHydra.instance().clear()
    return {**raw, "runs": raw["runs"] or ["RUN"]}


def config(*overrides):
    return analyze_config(raw_config(*overrides))
