"""The steps of benchmarks/families.py, each for one family and in a process of its own: build, train, judge."""
