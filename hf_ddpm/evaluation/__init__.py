"""MEASURE: a model and a data set become numbers."""
