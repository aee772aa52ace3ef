"""TRAIN: a run, from its config to its pipeline."""
