"""Features and images at random, for the tests of `hf_ddpm.metrics`."""

import numpy as np
import torch

from hf_ddpm.metrics import Features


def normal(count, dim=5, seed=0, shift=0.0, scale=1.0):
    x = np.random.default_rng(seed).normal(shift, scale, (count, dim))
    return torch.from_numpy(x).float()


def features(x, logits=None, extractor="net@0"):
    return Features(extractor, x, logits)


def images(count, channels=1, side=8, seed=0):
    shape = (count, channels, side, side)
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))
