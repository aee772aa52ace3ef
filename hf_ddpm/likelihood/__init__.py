"""The variational bound: its terms, its estimate, all of it."""

from hf_ddpm.likelihood.bound import BoundTerm, bound_term, prior_kl
from hf_ddpm.likelihood.estimator import (
    Estimate,
    decoder_evals,
    default_proposal,
    estimate_bound,
    mean_and_stderr,
    paired_difference,
    pilot_proposal,
)
from hf_ddpm.likelihood.full import (
    Bound,
    RateDistortion,
    evaluate_bound,
    image_noise,
    rate_distortion,
    with_variance,
)

__all__ = [
    "Bound",
    "BoundTerm",
    "Estimate",
    "RateDistortion",
    "bound_term",
    "decoder_evals",
    "default_proposal",
    "estimate_bound",
    "evaluate_bound",
    "image_noise",
    "mean_and_stderr",
    "paired_difference",
    "pilot_proposal",
    "prior_kl",
    "rate_distortion",
    "with_variance",
]
