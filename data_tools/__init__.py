"""Corpora and indexed datasets: commands, each with `--help`."""
