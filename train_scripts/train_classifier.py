r"""Train the small classifiers that measure samples on a machine without Inception's weights.

    python train_scripts/train_classifier.py --dataset data/fashion-mnist --flip \
        --out train_scripts/classifiers/fashion-mnist
    python train_scripts/train_classifier.py --dataset digits --side 32 --widths 16,32,48 --shift 0 \
        --epochs 30 --out train_scripts/classifiers/digits

The result is an ordinary transformers folder: config, safetensors (float32), image processor. Any
`AutoModelForImageClassification` reads it, and so does `hf_ddpm.metrics.load_extractor`, through which the
stated test accuracy is measured. The seed decides everything that is random.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from hf_ddpm.data.pixels import Decoder
from hf_ddpm.metrics import Features, load_extractor
from hf_ddpm.runtime.arguments import Parser, wholes
from hf_ddpm.runtime.messages import one_line
from hf_ddpm.runtime.streams import guard_streams

DIGITS = Path(__file__).resolve().parent.parent / "hf_ddpm" / "data" / "digits"
LICENCES = {"digits": "CC BY 4.0 (hf_ddpm/data/digits/README.md)", "fashion-mnist": "MIT (Zalando Research)"}
README = """---
library_name: transformers
pipeline_tag: image-classification
license: apache-2.0
---
# A {dataset} classifier to measure samples with

Test accuracy **{accuracy:.4f}**: {num_test:,} test, {num_train:,} train images; {epochs} epochs, seed {seed}.

- **Use**: `hf_ddpm.metrics.load_extractor` reads this folder as `{name}`. Its numbers carry that
  name; they are neither FID nor Inception score, and compare only with numbers of the same name.
- **Network**: `ResNetForImageClassification`, widths {widths}, {parameters:,} parameters in float32; the
  features are its {width} pooled channels. The image processor resizes to {side}x{side} (bilinear) and maps
  levels to [-1, 1].
- **Command**: `{command}`, {seconds:.0f} s with one thread.
- **Licence of the data**: {licence}. The weights are under this repository's licence.
"""


def load_labelled(source: str, split: str) -> tuple[Tensor, Tensor]:
    """All images of a split with their labels.

    Args:
        source: "digits", or a folder of parquet files with an `image` and a `label` column.
        split: name of the split.

    Returns:
        Images (N, C, H, W), uint8, and labels (N,), int64.

    Raises:
        ValueError: no such folder, split or column, or images of several sizes.
    """
    folder = DIGITS if source == "digits" else Path(source)
    if not folder.is_dir():
        raise ValueError(
            f"no folder {source!r}; make one with train_scripts/convert_idx.py, or give 'digits'"
        )
    try:
        splits = datasets.load_dataset(str(folder.resolve()), streaming=True)
    except Exception as error:  # what `datasets`, fsspec or pyarrow raise
        raise ValueError(f"can't read {source!r} as a data set: {one_line(error)}") from error
    if split not in splits:
        raise ValueError(f"no split {split!r} in {source}; it has {', '.join(map(str, splits))}")
    rows = splits[split]
    if not {"image", "label"} <= set(rows.features or {}):
        raise ValueError(
            f"{source} needs the columns image and label; it has {', '.join(rows.features or {})}"
        )
    images, labels, decode = [], [], Decoder()
    for row in rows.decode(False):
        images.append(decode(row["image"]).transpose(2, 0, 1))
        labels.append(row["label"])
    if len({image.shape for image in images}) != 1 or min(labels) < 0:
        raise ValueError(f"the {split} images of {source} must be labelled and all of one size, at least one")
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def augment(images: Tensor, flip: bool, shift: int, generator: torch.Generator) -> Tensor:
    """Mirror half of the images and move each by up to `shift` pixels over a black ground.

    Args:
        images: (B, C, H, W), uint8.
        flip: whether to mirror at all.
        shift: the largest move in either direction.
        generator: where the draws come from.

    Returns:
        (B, C, H, W), uint8.
    """
    count, _, height, width = images.shape
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    if shift:
        top, left = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        padded = pad(images, (shift, shift, shift, shift)).movedim(1, -1)
        images = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(
            -1, 1
        )
    return images


def train_classifier(options: argparse.Namespace, command: str) -> float:
    """Train on the split "train", save, read back, measure on "test", and describe it in README.md.

    Returns:
        Test accuracy.
    """
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    images, labels = load_labelled(options.dataset, "train")
    test_images, test_labels = load_labelled(options.dataset, "test")
    channels, classes = images.shape[1], int(labels.max()) + 1
    if test_images.shape[1:] != images.shape[1:] or int(test_labels.max()) >= classes:
        raise ValueError(
            f"the test split of {options.dataset} has images or labels that its train split has not"
        )
    start = time.perf_counter()

    # A ResNet halves the side four times: the processor enlarges small images, so that something is left.
    processor = ViTImageProcessorPil(
        size={"height": options.side, "width": options.side},
        image_mean=[0.5] * channels,
        image_std=[0.5] * channels,
    )
    config = ResNetConfig(
        num_channels=channels,
        embedding_size=options.widths[0],
        hidden_sizes=options.widths,
        depths=[1] * len(options.widths),
        layer_type="basic",
        id2label=dict(enumerate(map(str, range(classes)))),
        label2id={str(label): label for label in range(classes)},
    )
    model = ResNetForImageClassification(config).train()
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    steps = options.epochs * (len(images) // options.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=steps)

    bar = tqdm(total=steps, unit="step", desc=str(options.out), mininterval=0.5)
    for _ in range(options.epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(order) // options.batch_size * options.batch_size].split(options.batch_size):
            batch = augment(images[rows], options.flip, options.shift, generator)
            logits = model(processor(list(batch.numpy()), return_tensors="pt")["pixel_values"]).logits
            loss = cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    bar.close()

    model.eval().save_pretrained(options.out)
    processor.save_pretrained(options.out)
    extractor = load_extractor(options.out)
    logits = Features.cat(map(extractor, test_images.split(500))).logits
    assert logits is not None
    accuracy = (logits.argmax(1) == test_labels).double().mean().item()
    dataset = Path(options.dataset).name
    facts = {
        **vars(options),
        "dataset": dataset,
        "accuracy": accuracy,
        "num_test": len(test_images),
        "num_train": len(images),
        "name": extractor.name,
        "parameters": model.num_parameters(),
        "width": options.widths[-1],
        "command": command,
        "seconds": time.perf_counter() - start,
        "licence": LICENCES.get(dataset, "see the data set"),
    }
    (options.out / "README.md").write_text(README.format(**facts), encoding="utf-8")
    return accuracy


def _widths(word: str) -> list[int]:
    widths = wholes(word)
    if 0 in widths:
        raise argparse.ArgumentTypeError(f"{word!r}; allowed: positive numbers with commas, such as 32,64,96")
    return widths


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 2 after one line of error."""
    parser = Parser(
        "train_classifier.py", "Train a small ResNet on labelled images, to measure samples with."
    )
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--dataset", required=True, help="'digits' or a folder of labelled parquet files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--side", type=int, default=48, help="the image processor resizes to it")
    parser.add_argument("--widths", type=_widths, default="32,64,96", help="channels of the stages")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the train split")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    parser.add_argument(
        "--learning-rate", type=float, default=4e-3, help="the highest of the one-cycle schedule"
    )
    parser.add_argument("--flip", action="store_true", help="mirror half of the images")
    parser.add_argument("--shift", type=int, default=1, help="move images by up to so many pixels")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    guard_streams()
    words = sys.argv[1:] if arguments is None else arguments
    options = parser.parse(words)
    try:
        for name, least in (("side", 8), ("epochs", 1), ("batch_size", 2), ("shift", 0), ("seed", 0)):
            if (value := getattr(options, name)) < least:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; allowed: whole numbers >= {least}")
        if not 0 < options.learning_rate < 1:
            raise ValueError(f"--learning-rate is {options.learning_rate}; allowed: between 0 and 1")
        accuracy = train_classifier(
            options, shlex.join(["python", "train_scripts/train_classifier.py", *words])
        )
    except (ValueError, OSError) as error:
        print(one_line(f"error: {one_line(error)}"), file=sys.stderr)
        return 2
    print(f"{options.out}: test accuracy {accuracy:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
