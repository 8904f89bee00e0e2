"""Training, evaluation and recalibration: one `fit` for every stage."""

from lib.train.checkpoint import load_checkpoint
from lib.train.loop import History, evaluate, fit, forward, recalibrate
from lib.train.recipe import Recipe

__all__ = [
    "History",
    "Recipe",
    "evaluate",
    "fit",
    "forward",
    "load_checkpoint",
    "recalibrate",
]
