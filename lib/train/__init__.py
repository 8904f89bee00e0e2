"""Training, evaluation and recalibration: one `fit` for every stage."""

from lib.train.loop import (
    History,
    evaluate,
    find_hits,
    fit,
    forward,
    load_checkpoint,
    recalibrate,
)
from lib.train.recipe import Recipe

__all__ = [
    "History",
    "Recipe",
    "evaluate",
    "find_hits",
    "fit",
    "forward",
    "load_checkpoint",
    "recalibrate",
]
