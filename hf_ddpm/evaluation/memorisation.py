"""Does a model repeat its training images? The nearest one of each sample, and how far it is.

    d(a, b) = √⟨(a − b)²⟩ on grey levels 0..255

How near is suspicious, held-out images tell, which nobody has memorised: a sample is "near" if it is no
farther from its nearest training image than the nearest 1 % of them are from theirs. The distance is plain
pixels: a copy that is moved or mirrored is not found.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from hf_ddpm.data.pixels import image_digest
from hf_ddpm.data.stream import ImageStream, load_stream
from hf_ddpm.denoiser import scoring_device
from hf_ddpm.evaluation.images import digest_rows, fingerprint
from hf_ddpm.evaluation.parts import Parts
from hf_ddpm.folders.layout import NEAREST
from hf_ddpm.generation.grids import plot_reconstructions, to_pil
from hf_ddpm.runtime.progress import progress
from hf_ddpm.seeds import Use, derive_seed

QUANTILE = 0.01  # of the held-out images' distances: nearer is suspicious
PAIRS = 8  # samples in the picture
BLOCK = 2**24  # float64 numbers in memory at once, for each of a few tensors
MOST = 4096  # images of a block


def nearest(queries: Tensor, images: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The nearest image of each query.

        ‖a − b‖² = ‖a‖² + ‖b‖² − 2 ⟨a, b⟩,   in float64, where sums of such whole numbers are exact

    Args:
        queries: uint8, shape (Q, C, H, W).
        images: uint8, shape (M, C, H, W); all of them at once in memory as float64.
        device: where it is computed; it has float64.

    Returns:
        Its index, the lowest of several, and ‖a − b‖², both (Q,), int64, on the CPU.
    """
    b = images.flatten(1).to(device).double()
    b_square, numbers = b.square().sum(1), torch.arange(len(b), device=device)
    index, square = [], []
    for piece in queries.flatten(1).split(block_size(b.shape[1])):
        a = piece.to(device).double()
        squares = torch.addmm(a.square().sum(1, keepdim=True) + b_square, a, b.T, alpha=-2)
        least = squares.amin(1, keepdim=True)
        index.append(torch.where(squares == least, numbers, len(b)).amin(1).cpu())
        square.append(least.squeeze(1).long().cpu())
    return torch.cat(index), torch.cat(square)


def block_size(dims: int) -> int:
    """Images of `dims` numbers that are compared at once."""
    return max(1, min(MOST, BLOCK // dims))


class Memorisation:
    """A search that will be made: made, it has refused what can't be done; `run`, it does it.

    Args:
        dataset: of the training images: Hub id, folder, or "digits".
        split: of that data set.
        image_column: as in `load_stream`.
        fit: as in `load_stream`.
        heldout: the images that the model is evaluated on, in the order of their source.
        heldout_name: their data set and split.
        num_heldout: how many of them are the floor, or all if there are fewer.
        seed: of which.

    Raises:
        ValueError: a bad data set, images of another shape, or the held-out images themselves.
    """

    def __init__(
        self,
        dataset: str,
        split: str,
        image_column: str | None,
        fit: str,
        heldout: ImageStream,
        heldout_name: tuple[str, str],
        num_heldout: int,
        seed: int,
    ):
        same = (
            f"nearest_split {split!r} of {dataset!r} has the images that are evaluated; allowed: the model's "
            "training images, and others to evaluate"
        )
        if (dataset, split) == heldout_name:
            raise ValueError(same)
        sides = None if fit == "exact" else heldout.shape[1:]
        self._stream = load_stream(dataset, split, sides, column=image_column, fit=fit)
        if self._stream.shape != heldout.shape:
            raise ValueError(
                f"images of nearest_dataset {dataset!r} are {self._stream.shape} (C, H, W); allowed: "
                f"{heldout.shape}, as those that are evaluated"
            )
        order = np.random.default_rng(derive_seed(Use.HELDOUT_ROWS, seed)).permutation(heldout.num_rows())
        self._rows, self._heldout = np.sort(order[:num_heldout]), heldout
        self._source = {"dataset": dataset, "split": split, "num_rows": self._stream.num_rows()}
        self._how = {"image_column": image_column, "fit": fit}
        self._state = PartialState()
        found = digest_rows(heldout, self._rows)  # images that can't be read show
        if self._stream.num_rows() == heldout.num_rows():  # maybe the same by another name
            if torch.equal(found[:4], digest_rows(self._stream, self._rows[:4])):
                raise ValueError(same)

    def run(self, samples: Tensor, out: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Search all training images for the nearest of every sample and held-out image.

        Args:
            samples: uint8, (N, C, H, W), the same on every process.
            out: folder of the parts and of the picture, `nearest.png`.

        Returns:
            Section "memorisation" of the report, and each image's row and distance; on every process.

        Raises:
            ValueError: a training image that can't be read.
        """
        heldout = torch.stack(list(self._heldout.select(self._rows)))
        rows, square, digests = self._search(torch.cat([samples, heldout]), out)
        distance = (square.double() / samples[0].numel()).sqrt()
        ours, floor = distance.split([len(samples), len(heldout)])
        if not floor.any():
            raise ValueError(
                f"all {len(floor)} held-out images are among those of nearest_dataset "
                f"{self._source['dataset']!r}, so they say nothing; allowed: the training images alone"
            )
        near = float(floor.quantile(QUANTILE))
        section = self._source | {
            "fingerprint": fingerprint(digests),
            "quantile": QUANTILE,
            "near": near,
            "samples": _summary(ours, near),
            "heldout": _summary(floor, near),
        }
        tensors = {
            "nearest_rows": rows[: len(samples)],
            "nearest_distances": ours,
            "heldout_rows": torch.from_numpy(self._rows),
            "heldout_nearest_rows": rows[len(samples) :],
            "heldout_nearest_distances": floor,
        }
        if self._state.is_main_process:
            self._plot(samples, rows, ours, out / NEAREST)
        return section, tensors

    def _search(self, queries: Tensor, out: Path) -> tuple[Tensor, Tensor, Tensor]:
        """Row of each query's nearest training image, ‖a − b‖², and a digest of every training image."""
        state, stream, total = self._state, self._stream, self._stream.num_rows()
        size = block_size(queries[0].numel())
        looked_for = hashlib.sha256(queries.contiguous().numpy().data).hexdigest()
        parts = Parts(out, {"nearest": self._source | self._how, "block": size, "queries": looked_for})
        state.wait_for_everyone()
        chunks = [range(i, min(i + size, total)) for i in range(0, total, size)]
        mine = range(state.process_index, len(chunks), state.num_processes)
        mine = [i for i in mine if i not in parts]
        images = stream.select([row for i in mine for row in chunks[i]])
        device = scoring_device(torch.device(state.device or "cpu"))
        with progress("nearest", sum(len(chunks[i]) for i in mine), "image", state.is_main_process) as bar:
            for i in mine:
                block = torch.stack([next(images) for _ in chunks[i]])
                index, square = nearest(queries, block, device)
                digests = torch.tensor([image_digest(image) for image in block], dtype=torch.int64)
                found = {"rows": (index + chunks[i].start)[None], "squares": square[None], "digests": digests}
                parts.save(i, found)
                bar.update(len(block))
        state.wait_for_everyone()
        found = parts.load(len(chunks))
        state.wait_for_everyone()
        least = found["squares"].amin(0)
        rows = torch.where(found["squares"] == least, found["rows"], total).amin(0)
        return rows, least, found["digests"]

    def _plot(self, samples: Tensor, rows: Tensor, distance: Tensor, path: Path) -> None:
        """The nearest samples above their training images, with distance and row."""
        chosen = distance.argsort(stable=True)[:PAIRS].tolist()
        wanted = sorted({int(rows[i]) for i in chosen})
        training = dict(zip(wanted, self._stream.select(wanted), strict=True))
        pictures = [
            [to_pil(samples[i]) for i in chosen],
            [to_pil(training[int(rows[i])]) for i in chosen],
        ]
        labels = [f"{distance[i]:.1f}\nrow {rows[i]}" for i in chosen]
        plot_reconstructions(pictures, labels, path, ["sample", "training"])


def _summary(distance: Tensor, near: float) -> dict[str, Any]:
    """What the report says of some images' distances."""
    return {
        "num_images": len(distance),
        "share_near": float((distance <= near).double().mean()),
        "median_distance": float(distance.quantile(0.5)),
        "exact_copies": int((distance == 0).sum()),
    }
