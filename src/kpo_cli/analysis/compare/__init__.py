"""Several runs."""
