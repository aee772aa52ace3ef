"""A lossless codec from a trained DDPM: files whose sizes are the variational bound.

`compress` and `decompress` are for users. scheme.py is the mathematics, container.py the file.
"""

from hf_ddpm.compression.codec import Decompressed, Sizes, compress, decompress

__all__ = ["Decompressed", "Sizes", "compress", "decompress"]
