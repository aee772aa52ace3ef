"""How many images fit into memory: a number that can't is refused before anything is allocated."""

from torch import nn

from hf_ddpm.folders.guard import activations, make_empty
from hf_ddpm.runtime.memory import check_memory

IN_FLOAT32 = 4  # bytes of a number


def check_batch(
    option: str, number: int, network: object, shape: tuple[int, int, int], evaluations: int = 1
) -> None:
    """Refuse a number of images at once that take a network more memory than there is.

    What an image takes is that of one call without gradients, which a training only adds to.

    Args:
        option: the option that says how many, for the message.
        number: how many images are given to the network at once.
        network: any; of one that can't be run without memory, only the images are counted.
        shape: of an image, (C, H, W).
        evaluations: how often the network gets each image at once.

    Raises:
        ValueError: the message names the option and its limit here.
    """
    channels, height, width = shape
    each = channels * height * width * IN_FLOAT32
    if number > 1 and isinstance(network, nn.Module) and hasattr(network, "config"):
        try:
            each = max(each, activations(make_empty(type(network), network.config).eval(), shape))  # type: ignore[arg-type]
        # A network of anybody's own may raise anything here
        except Exception:
            pass
    check_memory(option, number, each * evaluations, f"image {channels}x{height}x{width}")
