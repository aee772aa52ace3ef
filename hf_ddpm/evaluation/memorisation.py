"""Does a model repeat its training images? The nearest one of each sample, and how far it is.

    d(a, b) = √⟨(a − b)²⟩ on grey levels 0..255

Held-out images, which the model can't have memorised, tell what distance is suspicious: a sample is "near" if
it is no farther from its nearest training image than the nearest 1 % of the held-out images are from theirs.
The distance compares pixel with pixel, so a copy that is moved or mirrored is not found.
"""

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.data.pixels import image_digest
from hf_ddpm.data.stream import ImageStream
from hf_ddpm.denoiser import scoring_device
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.images import digest_rows, fingerprint
from hf_ddpm.evaluation.parts import Parts, pieces
from hf_ddpm.generation.grids import plot_reconstructions, to_pil
from hf_ddpm.runtime.processes import process_state
from hf_ddpm.runtime.progress import progress
from hf_ddpm.seeds import Use, derive_seed
from hf_ddpm.shown import fields_line

QUANTILE = 0.01  # share of the held-out images that count as near their nearest training image
PAIRS = 8  # samples in the picture
BLOCK = 2**24  # float64 numbers in memory at once, for each of a few tensors
MOST = 4096  # images at most that are compared at once


def nearest(
    queries: Tensor, images: Tensor, device: torch.device | str = "cpu", numbers_at_once: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """The nearest image of each query.

        ‖a − b‖² = ‖a‖² + ‖b‖² − 2 ⟨a, b⟩,   in float64, where sums of such whole numbers are exact

    Args:
        queries: uint8, shape (Q, C, H, W).
        images: uint8, shape (M, C, H, W); all of them at once in memory as float64.
        device: where it is computed; it has float64.
        numbers_at_once: how many numbers of the queries are in memory at once as float64; at least those of
            one query are.

    Returns:
        Its index, the lowest of several, and ‖a − b‖², both (Q,), int64, on the CPU.
    """
    b = images.flatten(1).to(device).double()
    b_square, places = b.square().sum(1), torch.arange(len(b), device=device)
    index, square = [], []
    for piece in queries.flatten(1).split(block_size(b.shape[1], numbers_at_once)):
        a = piece.to(device).double()
        squares = torch.addmm(a.square().sum(1, keepdim=True) + b_square, a, b.T, alpha=-2)
        least = squares.amin(1, keepdim=True)
        index.append(torch.where(squares == least, places, len(b)).amin(1).cpu())
        square.append(least.squeeze(1).long().cpu())
    return torch.cat(index), torch.cat(square)


def block_size(dims: int, numbers_at_once: int = BLOCK) -> int:
    """How many images of `dims` numbers are compared at once."""
    return max(1, min(MOST, numbers_at_once // dims))


@dataclass(frozen=True, eq=False)
class NearestFound:
    """The nearest training images of N samples and of M held-out images.

    Attributes:
        samples: the samples, uint8, (N, C, H, W).
        rows: row of each sample's nearest training image in the whole of its split, (N,), int64.
        distances: RMSE in grey levels to it, (N,), float64.
        heldout_rows: rows of the held-out images in their own data set, (M,), int64.
        heldout_nearest_rows: row of each held-out image's nearest training image, (M,), int64.
        heldout_distances: RMSE in grey levels to it, (M,), float64.
        near: the distance up to which an image is near, the QUANTILE of the held-out images' distances.
        num_training: how many training images there are.
        training_fingerprint: of all of them.
    """

    samples: Tensor
    rows: Tensor
    distances: Tensor
    heldout_rows: Tensor
    heldout_nearest_rows: Tensor
    heldout_distances: Tensor
    near: float
    num_training: int
    training_fingerprint: str

    __repr__ = fields_line


class Memorisation:
    """A search for the nearest training images. Its inputs are checked when constructed; `run` searches.

    Args:
        config: `nearest_dataset` and `nearest_split` name the training images, `num_samples` says how many
            held-out images are searched for beside the samples, if there are so many.
        heldout: the images that the model is evaluated on, in the order of their source.
        training: the images to search, in the order of their source.
        trained_on: whether the model is known to have been trained on them.

    Raises:
        ValueError: images of another shape, or the held-out images themselves.

    Attributes:
        trained_on: as given.
    """

    def __init__(
        self, config: EvaluationConfig, heldout: ImageStream, training: ImageStream, trained_on: bool = False
    ):
        dataset, split = config.nearest_dataset, config.nearest_split
        self._config, self._heldout, self._stream = config, heldout, training
        self.trained_on = trained_on
        if self._stream.shape != heldout.shape:
            raise ValueError(
                f"images of nearest_dataset {dataset!r} are {self._stream.shape} (C, H, W); allowed: "
                f"{heldout.shape}, as those that are evaluated"
            )
        key = derive_seed(Use.HELDOUT_ROWS, config.seed)
        order = np.random.default_rng(key).permutation(heldout.num_rows())
        self.heldout_rows = np.sort(order[: config.num_samples])
        # Images that can't be read show here
        found = digest_rows(heldout, self.heldout_rows)
        # A data set of as many rows may be the same one by another name
        if self._stream.num_rows() == heldout.num_rows():
            if torch.equal(found[:4], digest_rows(self._stream, self.heldout_rows[:4])):
                raise ValueError(
                    f"nearest_split {split!r} of {dataset!r} has the images that are evaluated; allowed: the "
                    "model's training images, and others to evaluate"
                )

    def run(self, samples: Tensor, out: Path) -> NearestFound:
        """Search all training images for the nearest of every sample and held-out image, on every process.

        Args:
            samples: uint8, (N, C, H, W), the same on every process.
            out: folder of the parts.

        Raises:
            ValueError: a training image that can't be read, or held-out images that are all among them.
        """
        heldout = torch.stack(list(self._heldout.select(self.heldout_rows)))
        rows, square, digests = self._search(torch.cat([samples, heldout]), out)
        distance = (square.double() / samples[0].numel()).sqrt()
        ours, floor = distance.split([len(samples), len(heldout)])
        if not floor.any():
            raise ValueError(
                f"all {len(floor)} held-out images are among those of nearest_dataset "
                f"{self._config.nearest_dataset!r}, so they say nothing; allowed: the training images alone"
            )
        return NearestFound(
            samples=samples,
            rows=self._numbers(rows[: len(samples)]),
            distances=ours,
            heldout_rows=torch.from_numpy(self._heldout.chosen.of(self.heldout_rows)),
            heldout_nearest_rows=self._numbers(rows[len(samples) :]),
            heldout_distances=floor,
            near=float(floor.quantile(QUANTILE)),
            num_training=self._stream.num_rows(),
            training_fingerprint=fingerprint(digests),
        )

    def _numbers(self, places: Tensor) -> Tensor:
        """Places among the training images as rows of their whole split."""
        return torch.from_numpy(self._stream.chosen.of(places.numpy()))

    def _search(self, queries: Tensor, out: Path) -> tuple[Tensor, Tensor, Tensor]:
        """Row of each query's nearest training image, ‖a − b‖², and a digest of every training image."""
        total, size = self._stream.num_rows(), block_size(queries[0].numel())
        blocks, state = pieces(total, size), process_state()
        device = scoring_device(torch.device(state.device or "cpu"))

        def search_blocks(numbers: Sequence[int]) -> Generator[dict[str, Tensor], None, None]:
            images = self._stream.select([row for number in numbers for row in blocks[number]])
            count = sum(len(blocks[number]) for number in numbers)
            with progress("nearest", count, "image", state.is_main_process) as bar:
                for rows in (blocks[number] for number in numbers):
                    block = torch.stack([next(images) for _ in rows])
                    index, square = nearest(queries, block, device)
                    digests = torch.tensor([image_digest(image) for image in block], dtype=torch.int64)
                    yield {"rows": (index + rows.start)[None], "squares": square[None], "digests": digests}
                    bar.update(len(block))

        looked_for = hashlib.sha256(queries.contiguous().numpy().data).hexdigest()
        facts = {"what": "nearest", "num_rows": total, "block": size, "queries": looked_for}
        found = Parts(out, self._config, facts).complete(len(blocks), search_blocks)
        least = found["squares"].amin(0)
        rows = torch.where(found["squares"] == least, found["rows"], total).amin(0)
        return rows, least, found["digests"]

    def plot(self, found: NearestFound, path: Path) -> None:
        """Draw the nearest samples above their training images, with distance and row, as a PNG file."""
        chosen = found.distances.argsort(stable=True)[:PAIRS].tolist()
        wanted = sorted({int(found.rows[i]) for i in chosen})
        places = self._stream.chosen.count_before(wanted)
        training = dict(zip(wanted, self._stream.select(places), strict=True))
        pictures = [
            [to_pil(found.samples[i]) for i in chosen],
            [to_pil(training[int(found.rows[i])]) for i in chosen],
        ]
        labels = [f"RMSE {found.distances[i]:.1f}\nrow {found.rows[i]}" for i in chosen]
        plot_reconstructions(pictures, labels, path, ["sample", "training"])
