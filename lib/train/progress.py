"""What a watcher sees of a training run."""

import os
import sys
import time

from tqdm.auto import tqdm

from lib.train import processes
from lib.train.recipe import Recipe


class Report:
    """A progress bar where somebody watches, one line an epoch in a batch run.

    Lines with speed and time left go to the file named by `PRUNING_PROGRESS`, because
    outputs of committed notebooks should not change from run to run. Of several
    processes the first one speaks.
    """

    def __init__(self, recipe: Recipe, steps: int, label: str, done: int):
        self.recipe, self.label, self.start = recipe, label, time.perf_counter()
        self.done, self.skipped, self.last = done, done, ""
        self.silent = processes.rank() > 0
        batch = self.silent or os.environ.get("TQDM_DISABLE") or not _is_watched()
        self.bar = tqdm(
            total=steps * recipe.epochs, initial=steps * done, desc=label,
            unit="batch", disable=bool(batch), leave=False, mininterval=0.5,
        )  # fmt: skip
        if done and not self.silent:
            print(f"{label}: taking up after epoch {done} of {recipe.epochs}")

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *exception) -> None:
        self.bar.total = self.bar.n  # else a run that is stopped leaves a red bar
        shown = not self.bar.disable  # a closed bar says that it is disabled
        self.bar.close()
        if self.last and shown:
            print(self.last, flush=True)

    def step_done(self, update) -> None:
        self.bar.update()
        if not self.bar.disable and update.cheap_to_read and self.bar.n % 20 == 0:
            loss, top1, _ = update.totals()
            self.bar.set_postfix(
                epoch=self.done + 1, loss=f"{loss:.3f}", acc=f"{top1:.1f}"
            )

    def epoch_done(self, row: dict) -> None:
        line = f"loss {row['loss']:.3f}  train {row['top1']:.1f} %"
        if row["val_top1"] is not None:
            line += f"  val {row['val_top1']:.1f} %"
        self.tell(line, row["images_per_s"])

    def tell(self, what: str, images_per_s: float) -> None:
        """One more epoch is done, and `what` came of it."""
        self.done += 1
        line = self.last = (
            f"{self.label}: epoch {self.done}/{self.recipe.epochs}  {what}"
        )
        if self.silent:
            return
        if self.bar.disable:
            print(line, flush=True)
        spent = time.perf_counter() - self.start
        left = spent / (self.done - self.skipped) * (self.recipe.epochs - self.done)
        _announce(f"{line}  {images_per_s:.0f} images/s  {left:.0f} s left")


def _is_watched() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _announce(line: str) -> None:
    target = os.environ.get("PRUNING_PROGRESS")
    if not target:
        return
    try:
        with open(target, "a", encoding="utf-8") as stream:
            stream.write(f"  {line}\n")
    except OSError as error:  # a closed terminal must not end a night's run
        os.environ.pop("PRUNING_PROGRESS")
        print(f"no more progress lines to {target}: {error}", file=sys.stderr)
