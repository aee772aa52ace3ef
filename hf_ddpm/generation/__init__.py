"""GENERATE: a model becomes images."""
