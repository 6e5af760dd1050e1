def run(raw):
    import json, sys
    from kpo_cli.config import train_config, as_dict
    raw.pop("overrides"); rd=raw.pop("run_dir"); raw.pop("resume")
    c = train_config(raw)
    print(rd, json.dumps(as_dict(c))[:3000])
    if c.seed == 1: sys.exit(3)
