"""The variational bound on an image's negative log-likelihood, Ho et al. 2020, eq. 5.

`bound_term` is one term of it; `estimate_bound` is unbiased from a few network evaluations for each image;
`evaluate_bound` visits every step. `rate_distortion` and `with_variance` read their results in another way.
`chains` says what chains of fewer steps cost, and which are best.
"""

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
