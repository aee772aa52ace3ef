"""Sample quality in the eyes of a feature network."""

from hf_ddpm.metrics.distances import SampleMetrics, load_reference, sample_metrics, save_reference
from hf_ddpm.metrics.extractors import INCEPTION, Extractor, Features, load_extractor
from hf_ddpm.metrics.frechet import FrechetDistance, frechet_distance, frechet_label

__all__ = [
    "INCEPTION",
    "Extractor",
    "Features",
    "FrechetDistance",
    "SampleMetrics",
    "frechet_distance",
    "frechet_label",
    "load_extractor",
    "load_reference",
    "sample_metrics",
    "save_reference",
]
