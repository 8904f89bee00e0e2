"""What the processes of `test_processes.py` do: they import this, and no pytest."""

import os
import signal
import sys
import time

import torch
from torch import nn

from lib import train
from lib.data import ImageSet
from lib.train import processes

SHARES = {"lr": 0.05, "precision": "float32", "batch_size": 15}


def make_images(n=50, *, alike=False, classes=3) -> ImageSet:
    draw = torch.Generator().manual_seed(n)
    pixels = torch.randint(0, 256, (n, 8, 8, 1), dtype=torch.uint8, generator=draw)
    pixels = pixels[:1].repeat(n, 1, 1, 1) if alike else pixels
    labels = torch.randint(0, classes, (n,), generator=draw)
    names = tuple("abcdef"[:classes])
    pad = 0 if alike else 1  # crops would differ
    return ImageSet(pixels, labels, names, "toy", (0.5,), (0.25,), pad, not alike)


def make_net(*, norm=False, dropout=0.0, seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3), *([nn.BatchNorm2d(4)] if norm else []), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.Dropout(dropout), nn.Flatten(), nn.Linear(144, 3))  # fmt: skip


class Branching(nn.Module):
    """Uses one of two layers, as the first image of its part says."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.ways = nn.ModuleList([nn.Linear(64, 3), nn.Linear(64, 3)])
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.ways[processes.rank()](x.flatten(1))


class Mortal(nn.Sequential):
    """Kills its process, if it is the second, in the step that a file says."""

    steps = 0

    def forward(self, x):
        self.steps += self.training
        order = os.environ.get("KILL_IN_STEP")
        if order and processes.rank() == 1 and self.steps == int(order):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


class Stop(Exception):
    pass


def stop_later(net):
    """As `watch`: an epoch was trained and is not kept."""
    if os.path.exists("stop"):
        raise Stop
    open("stop", "w").close()
    return {}


def train_and_keep(model, name, images=None, *, epochs=2, **options):
    """Everything that a training leaves."""
    file = f"{name}.pt"
    history = train.fit(
        model, images or make_images(), make_images(37), epochs=epochs,
        checkpoint=file, label=name, **(SHARES | options),
    )  # fmt: skip
    kept = train.load_checkpoint(file)
    optimizer = kept["optimizer"]["state"]
    return {"state": model.state_dict(), "kept": kept["model"], "momentum": optimizer,
            "rows": history.rows, "device": history.made_with["device"]}  # fmt: skip


def measure(model):
    images = make_images(37)
    found = train.evaluate(model, images, batch_size=10)
    hits = train.find_hits(model, images, batch_size=10)
    few = train.evaluate(model, images)  # one batch, the second process has none
    return {**found, "few": few, "hits": hits}


def recalibrate(**options):
    net = make_net(norm=True)
    train.recalibrate(net, make_images(), batch_size=10, **options)
    return net.state_dict()


def train_arm(name):
    from lib import scop  # takes long, and only this needs it
    from lib.scop.controls import ARMS

    ARMS[name].batch_size = 16
    ARMS["deep"].components = 8
    arm = scop.build_control(name, make_images(48), epochs=2, folder="controls")
    return {"state": arm.state_dict(), "rows": arm.rows}


def select(alike):
    from lib import scop

    images = make_images(40, alike=alike)
    control = scop.build_control("constant" if alike else "noise", images)
    net = make_net(norm=True)
    net = net.double() if alike else net  # Adam makes much of rounding
    return dict(scop.select(net, images, control, layers=["0"], epochs=3, lr=0.01,
                            batch_size=8, precision="float32"))  # fmt: skip


def refuse(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "not refused"


def look_ahead():
    """What the processes find where the first one then puts something."""
    with processes.first_ahead():
        time.sleep(0.2 * processes.rank())
        found = os.path.exists("later")
    if processes.rank() == 0:
        open("later", "w").close()
    return found


def work(folder: str, before: str) -> dict:
    """What one process does alone and two do together; `before`: left by the other."""
    os.chdir(folder)
    mine = {
        "ahead": look_ahead(),
        "plain": train_and_keep(make_net(), "plain"),
        "few": train_and_keep(make_net(), "few", make_images(9), batch_size=64),
        "adam": train_and_keep(make_net(), "adam", optimizer="adam"),
        "norm": train_and_keep(make_net(norm=True, dropout=0.3), "norm", epochs=1),
        "mortal": train_and_keep(Mortal(*make_net(norm=True)), "mortal", epochs=3),
        "measured": measure(make_net()),
        "anew": recalibrate(),
        "limited": recalibrate(num_batches=3),
        "alike": select(alike=True),
        "noise": select(alike=False),
        **{name: train_arm(name) for name in ("generator", "swap_gan", "deep")},
        "least": refuse(lambda: train.fit(make_net(), make_images(), epochs=1,
                                          batch_size=1)),
        "sync": refuse(lambda: train.fit(make_net(), make_images(), epochs=1,
                                         sync_norms=True)),
        "seed": refuse(lambda: train.fit(make_net(seed=processes.rank()),
                                         make_images(), epochs=1)),
    }  # fmt: skip
    if processes.count() > 1:
        mine["branching"] = train_and_keep(Branching(), "branching", epochs=1)
    options = {"watch": stop_later, "epochs": 3}
    with processes.first_ahead():  # `stop_later` counts in a folder of its own
        os.makedirs(str(processes.rank()), exist_ok=True)
    file = os.path.abspath("stopped.pt")
    os.chdir(str(processes.rank()))
    try:
        train.fit(make_net(), make_images(), checkpoint=file, **options, **SHARES)
    except Stop:
        mine["stopped"] = len(train.load_checkpoint(file)["rows"])
    os.chdir("..")
    if before:
        with processes.first_ahead():
            if processes.rank() == 0:
                os.replace(before, "taken.pt")
        mine["taken"] = train_and_keep(make_net(), "taken", epochs=3)
    return mine


def work_together(folder, before):
    return processes.gather([work(folder, before)])


def fail(kind):
    if processes.rank() == 1:
        raise {"value": ValueError, "key": KeyError}[kind]("what went wrong")
    processes.barrier()


def train_under_torchrun(folder: str) -> None:
    """What a script of one's own does: a process group of torchrun's, then `fit`."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    os.chdir(folder)
    found = train_and_keep(make_net().double(), "apart", epochs=2)
    torch.save(found["state"], f"{processes.rank()} of {processes.count()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    train_under_torchrun(sys.argv[1])
