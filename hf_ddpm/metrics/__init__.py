"""Sample quality in the eyes of a feature network."""

from hf_ddpm.metrics.distances import SampleMetrics, load_reference, sample_metrics, save_reference
from hf_ddpm.metrics.extractors import INCEPTION, Extractor, Features, load_extractor

__all__ = [
    "INCEPTION",
    "Extractor",
    "Features",
    "SampleMetrics",
    "load_extractor",
    "load_reference",
    "sample_metrics",
    "save_reference",
]
