"""Replays a job on a modelled engine: the paper's evaluation without a GPU."""
