"""Training, evaluation and recalibration: one `fit` for every stage."""

from lib.train.loop import History, fit, load_checkpoint
from lib.train.measure import evaluate, find_hits, forward, recalibrate, watch
from lib.train.recipe import Recipe
