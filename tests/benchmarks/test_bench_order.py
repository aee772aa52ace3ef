"""How well orders mix sources that are sorted by class: chi-square of class counts, and its memory.

A permutation has a chi-square of 1 and no autocorrelation. Integers alone: no image is read.
"""

import numpy as np
import pytest

from hf_ddpm.data.order import Order

pytestmark = pytest.mark.bench

ROWS, SEED = 60_000, 0


def labels_in_order(order, classes):
    """The class of the row at each place of epoch 0."""
    found, window = np.empty(order.num_rows, np.int64), 0
    while order.places(window, 0).size:
        for lane in range(order.lanes):
            stretches, inside = order.part(0, window, lane)
            rows = np.concatenate([np.arange(*stretch) for stretch in stretches])
            found[order.places(window, lane)] = rows[inside]
        window += 1
    return found * classes // order.num_rows


def mixing(labels, classes, batch):
    """(chi-square over a permutation's, correlation of a class's count with that of the batch before)."""
    whole = len(labels) // batch * batch
    batches = labels[:whole].reshape(-1, batch) + np.arange(whole // batch)[:, None] * classes
    counts = np.bincount(batches.ravel(), minlength=whole // batch * classes).reshape(-1, classes)
    off = counts - batch / classes
    chi2 = (off**2).sum(1).mean() * classes / batch / (classes - 1)
    return chi2 * (len(labels) - 1) / (len(labels) - batch), (off[1:] * off[:-1]).mean() / (off**2).mean()


@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_mixing(classes, report):
    sources = {"folder": ([ROWS], [1])}
    sources |= {
        f"row groups of {size}": ([size] * (ROWS // size), [0.02, 0.05, 0.1, 0.25, 0.5, 1])
        for size in (100, 1000, ROWS)
    }
    for source, (groups, shares) in sources.items():
        for share in shares:
            labels = labels_in_order(Order(groups, int(ROWS * share), SEED), classes)
            for batch in (64, 256):
                chi2, correlation = mixing(labels, classes, batch)
                report(
                    benchmark="mixing of a sorted source",
                    source=source,
                    memory_of_data=share,
                    classes=classes,
                    batch=batch,
                    chi2=round(chi2, 2),
                    autocorrelation=round(correlation, 2),
                )
