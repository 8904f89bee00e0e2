"""Blocks of the comparison: every criterion on one base, as notebook 40 does it.

A block is a base with one method: scored, pruned to half of the MACs, fine-tuned. The
bases are files of `data/results/bases` or of the folder that is given; without CIFAR-10
under the data root there are none.
"""

import re
from dataclasses import replace

from steps import STEPS, Bench, Found, NotHere

METHODS = ("l1", "scop-shuffle", "unpruned", "scop-constant", "nisp-norm")
NAME = re.compile(
    r"cifar10-(?:(\d+)px-)?(\d+)images-(resnet\d+)-(\d+)epochs-lr([\d.]+)"
    r"-weight_decay([\d.]+)-warmup(\d+)-seed(\d+)\.pt"
)
LENGTH = 5  # epochs of fine-tuning


def enter_blocks(bench: Bench) -> None:
    """One step for every base and method, base after base."""
    files = {
        int(m[8]): m for p in bench.bases.glob("*.pt") if (m := NAME.match(p.name))
    }
    for seed, found in sorted(files.items()):
        if seed < 100:  # 100 and above chose the learning rate
            for method in METHODS:
                name = f"base{seed}_{found[3]}_{found[1] or 32}px_{method}"
                STEPS[name] = "block", make_block(found, method)


def make_block(found: re.Match, method: str):
    def block(bench: Bench):
        """A base, pruned by one method and fine-tuned."""
        return run_block(bench, found, method)

    return block


def run_block(bench: Bench, found: re.Match, method: str):
    try:
        from lib import criteria, models, paths, plan, scop, stages, train, verdicts
        from lib.plan import Plan
    except ImportError as error:
        raise NotHere(str(error)) from error
    side, count, net, seed = int(found[1] or 0), int(found[2]), found[3], int(found[8])
    length, images = (1, 640) if bench.small else (LENGTH, 12_800)
    if not (paths.data_root() / "cifar10").is_dir():
        raise NotHere("no cifar10 under the data root (PRUNING_DATA)")
    sets = stages.load_sets("cifar10", resolution=side)
    if len(sets.train) != count:
        raise NotHere(f"{found[0]} was trained on {count} images, here are "
                      f"{len(sets.train)}")  # fmt: skip
    model = models.build(net, image_size=sets.train.shape[1])
    model.load_state_dict(train.load_checkpoint(bench.bases / found[0])["model"])
    model = model.to(bench.device)
    if bench.small:
        sets = replace(sets, train=sets.train.take(640), test=sets.test.take(500))
    base = stages.Base(model, sets, run="gpu/blocks", net=net)
    cut = Plan()
    if method != "unpruned":
        scored = criteria.score_channels(
            method, base, scop.block_layers(model, sets.train.shape, graph=base.graph),
            select=train.Recipe(2, lr=0.004, batch_size=128, seed=seed),
            select_images=images,
        )  # fmt: skip
        cut = plan.from_scores(
            model, scored.scores, sets.train.shape, macs=0.5, residual="scatter",
            graph=base.graph,
        )  # fmt: skip
        yield Found("seconds of scoring", scored.seconds, "s")
    made = stages.recover(
        base, cut, method=method, base_id=seed, share=0.5, length=length,
        recipe=train.Recipe(
            length, lr=0.1, weight_decay=1e-4, batch_size=128, seed=seed),
    )  # fmt: skip
    (bench.out / "hits").mkdir(exist_ok=True)
    file = bench.out / "hits" / f"{made.folder.name}.txt"
    file.write_text(verdicts.pack_hits(made.hits.numpy()))
    for name, unit in (("base", "percent"), ("before", "percent"), ("after", "percent"),
                       ("val", "percent"), ("seconds", "s")):  # fmt: skip
        yield Found(name, made.row[name], unit)
