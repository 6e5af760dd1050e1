"""The files of a run, each format written and read in one place."""
