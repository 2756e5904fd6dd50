"""Few batch sizes, for devices that prepare work for fixed shapes.

A captured CUDA graph holds for one shape only. oneDNN, which multiplies reduced precisions on a CPU, makes a kernel for
each shape it meets: that takes milliseconds, several times a product's own time, and it keeps 1,024 of them at most.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from asr_exit.config import require


@dataclass(frozen=True)
class BatchBuckets:
    """Sizes that batches are padded to. Raises ConfigError unless they are whole, positive and rising.

    More sizes waste less on padding and take more graphs.
    """

    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    whole_chunks: bool = True  # pad shorter chunks, too, and mask what may be padding, so that sizes decide every shape

    def __post_init__(self) -> None:
        whole = bool(self.sizes) and all(type(size) is int and size > 0 for size in self.sizes)
        rising = whole and list(self.sizes) == sorted(set(self.sizes))
        require(rising, f"batch buckets {list(self.sizes)} must be whole, positive and rising, such as [1, 2, 4, 8]")

    def size(self, streams: int) -> int:
        """The smallest size that holds so many streams; beyond the largest one its multiples."""
        largest = self.sizes[-1]
        if streams > largest:
            return -(-streams // largest) * largest
        return self.sizes[bisect_left(self.sizes, streams)]

    def shape(self, streams: int, longest: int, chunk_frames: int) -> tuple[int, int]:
        """Rows and frames of a batch of chunks of `longest` frames and less, on a grid of `chunk_frames`."""
        return self.size(streams), chunk_frames if self.whole_chunks else longest


@dataclass(frozen=True)
class ProductBuckets(BatchBuckets):
    """For devices that prepare products, which ask for the frames of a batch and not how they make up rows.

    Sizes count streams with 8 frames each. Chunks of other lengths get powers of two, so that a batch of them has as
    many frames as one of such streams.
    """

    whole_chunks: bool = False

    def shape(self, streams: int, longest: int, chunk_frames: int) -> tuple[int, int]:
        frames = 1 << (longest - 1).bit_length()
        return self.size(-(-streams * frames // _FRAMES)) * _FRAMES // frames, frames


_FRAMES = 8
_FINE = (*range(1, 9), *(step * base for base in (2, 4, 8, 16, 32, 64) for step in (5, 6, 7, 8)))
CPU_BUCKETS = ProductBuckets(_FINE)  # padding: less than a fifth of a batch, a twelfth on average
