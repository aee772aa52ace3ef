"""Make the embedded data set hf_ddpm/data/digits from scikit-learn's copy of the UCI handwritten digits.

    python train_scripts/make_digits.py                # rewrites hf_ddpm/data/digits/*.parquet

No random number is drawn: the images are sorted by class (keeping their order within a class) and 300 evenly
spaced ones are for testing, so each class has the same share of both parts. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from convert_idx import write_shard
from sklearn.datasets import load_digits

NUM_TEST = 300
DIGITS = Path(__file__).resolve().parent.parent / "hf_ddpm" / "data" / "digits"


def split_indices(labels: np.ndarray, num_test: int = NUM_TEST) -> tuple[np.ndarray, np.ndarray]:
    """Stratified split without randomness.

    Args:
        labels: class of each image, shape (N,), integer.
        num_test: number of images of the second part.

    Returns:
        Ascending indices of the train part, shape (N - num_test,), and of the test part, shape (num_test,).
    """
    by_class = np.argsort(labels, kind="stable")
    spaced = (np.arange(num_test) * len(labels) + len(labels) // 2) // num_test
    test = np.sort(by_class[spaced])
    return np.setdiff1d(np.arange(len(labels)), test), test


def main(arguments: list[str] | None = None) -> None:
    """Write both parquet files."""
    parser = argparse.ArgumentParser(
        description="Make hf_ddpm/data/digits from scikit-learn's handwritten digits."
    )
    parser.add_argument(
        "--out", type=Path, default=DIGITS, help="folder to write to (default: hf_ddpm/data/digits)"
    )
    out = parser.parse_args(arguments).out

    pixels, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    levels = pixels.reshape(-1, 8, 8)  # integers 0 to 16, kept as float64
    images = np.round(255 * levels / 16).astype(np.uint8)

    out.mkdir(parents=True, exist_ok=True)
    for split, rows in zip(("train", "test"), split_indices(labels), strict=True):
        write_shard(out / f"{split}-00000-of-00001.parquet", images[rows], labels[rows], num_classes=10)


if __name__ == "__main__":
    main()
