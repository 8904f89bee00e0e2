"""Data sets as uint8 tensors in memory, and batches drawn from them."""

from lib.data.batches import Draws, batches, count_batches, crop_flip, draw_epoch, normalise, resize
from lib.data.images import ImageSet, download, load, split_validation
from lib.data.sources import COUNTS

__all__ = ["COUNTS", "Draws", "ImageSet", "batches", "count_batches", "crop_flip", "download", "draw_epoch", "load", "normalise", "resize", "split_validation"]
