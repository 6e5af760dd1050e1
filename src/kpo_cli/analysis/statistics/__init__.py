"""Of one set of ratios: every number and every verdict."""
