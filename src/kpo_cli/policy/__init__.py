"""The policy: loading it, and scoring with it."""
