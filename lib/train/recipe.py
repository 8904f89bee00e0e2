"""How a network is trained: the settings, checked, and what follows from them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields

import torch
from torch import nn

from lib.graph.watch import dtype_of
from lib.messages import check_known
from lib.settings import ABOVE_ONE, Rule, check_rule


def setting(default=MISSING, kind=None, *, low=-math.inf, high=math.inf, choices=()):
    """A field whose values are of one kind, in [low, high) or among `choices`.

    The kind is the default's type, unless told.
    """
    rule = Rule(kind or type(default), low, high, choices)
    return field(default=default, metadata={"rule": rule})


class Checked:
    """Base of dataclasses whose fields are made by `setting`: their values are checked.

    They come as plain Python types, for a checkpoint can hold no numpy number.
    """

    def __post_init__(self):
        for entry in fields(self):
            name, rule = entry.name, entry.metadata["rule"]
            value = getattr(self, name)
            if isinstance(entry.default, tuple):
                if not isinstance(value, (list, tuple)):
                    raise ValueError(
                        f"{name} must be a tuple of numbers, got {value!r}"
                    )
                value = tuple(check_rule(name, item, rule) for item in value)
            elif value is not None or entry.default is not None:
                value = check_rule(name, value, rule)
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Recipe(Checked):
    """Settings of one training run; bad ones are refused in one line.

    lr: peak learning rate. batch_size: images a step. optimizer: "sgd" (Nesterov
    momentum) or "adam" (`adam_betas`). schedule: "cosine" to zero, "step" (times
    `gamma` at each of `milestones`, in epochs) or "constant". warmup: epochs of linear
    increase. weight_decay: on all parameters, or without norms and biases when
    `decay_norms` is False. sparsity: L1 penalty on the scales of BatchNorms, by its
    subgradient (Liu et al. 2017). distill: weight of a teacher's softened answers, at
    `temperature`, in the loss (Hinton et al. 2015). resolution: side of the images in
    pixels, None for their own. augment: random crop and flip. precision: "auto"
    (bfloat16 where the hardware has it), "float32" or "bfloat16". seed: order, crops,
    dropout. processes: see `train.fit`. sync_norms: on GPUs, BatchNorms take the
    statistics of the whole batch rather than of each process's part.
    """

    epochs: int = setting(kind=int, low=0)
    lr: float = setting(0.1, low=1e-12)
    batch_size: int = setting(128, low=1)
    optimizer: str = setting("sgd", choices=("sgd", "adam"))
    momentum: float = setting(0.9, low=0, high=1)
    adam_betas: tuple[float, float] = setting((0.9, 0.999), float, low=0, high=1)
    nesterov: bool = setting(True)
    weight_decay: float = setting(5e-4, low=0)
    decay_norms: bool = setting(True)
    sparsity: float = setting(0.0, low=0)
    schedule: str = setting("cosine", choices=("cosine", "step", "constant"))
    milestones: tuple[float, ...] = setting((), float, low=0)
    gamma: float = setting(0.1, low=0)
    warmup: float = setting(0.0, low=0)
    label_smoothing: float = setting(0.0, low=0, high=1)
    distill: float = setting(0.0, low=0, high=ABOVE_ONE)
    temperature: float = setting(4.0, low=1e-12)
    aux_weight: float = setting(0.3, low=0)
    augment: bool = setting(True)
    resolution: int | None = setting(None, int, low=1)
    precision: str = setting("auto", choices=("auto", "float32", "bfloat16"))
    seed: int = setting(0, low=0, high=2**31)
    processes: int = setting(1, low=1)
    sync_norms: bool = setting(False)

    def __new__(cls, *values, **settings):
        """Refuse unknown names before the generated `__init__` sees them."""
        check_known("recipe setting", settings, [f.name for f in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self):
        super().__post_init__()
        if len(self.adam_betas) != 2:
            raise ValueError(f"adam_betas must be two numbers, got {self.adam_betas!r}")
        if self.warmup > self.epochs:
            raise ValueError(
                f"warmup must be at most epochs ({self.epochs}), got {self.warmup:g}"
            )

    @property
    def identity(self) -> dict:
        """What decides the result, as a dict for checkpoints."""
        facts = asdict(self)
        del facts["processes"]  # a run may go on with another number
        for name in ("sync_norms", "sparsity"):  # older checkpoints do not know of them
            if not facts[name]:
                del facts[name]
        return facts

    @property
    def tag(self) -> str:
        """A name for files: epochs, rate, whatever is not the default, seed."""
        usual = {"epochs", "lr", "seed", "processes"}
        changed = [
            f"{entry.name}{_show(getattr(self, entry.name))}"
            for entry in fields(self)
            if entry.name not in usual and getattr(self, entry.name) != entry.default
        ]
        parts = [f"{self.epochs}epochs", f"lr{self.lr:g}", *changed, f"seed{self.seed}"]
        return "-".join(parts)


def _show(value) -> str:
    if isinstance(value, tuple):
        return "_".join(map(_show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def rate_at(recipe: Recipe, epoch: float) -> float:
    """The learning rate at a moment counted in epochs from 0 (fractions are steps)."""
    if epoch < recipe.warmup:
        return recipe.lr * max(epoch / recipe.warmup, 1e-3)
    if recipe.schedule == "step":
        passed = sum(epoch >= milestone for milestone in recipe.milestones)
        return recipe.lr * recipe.gamma**passed
    if recipe.schedule == "constant":
        return recipe.lr
    span = max(recipe.epochs - recipe.warmup, 1e-9)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (epoch - recipe.warmup) / span))


def make_optimizer(
    model: nn.Module, recipe: Recipe, device: torch.device
) -> torch.optim.Optimizer:
    """SGD or Adam over the parameters that require a gradient.

    On a GPU the rate is a tensor, so that a captured step follows the schedule.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter requires a gradient, there is nothing to train")
    bare = [p for p in trained if p.ndim <= 1 and not recipe.decay_norms]
    decayed = [p for p in trained if p.ndim > 1 or recipe.decay_norms]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}]
    if not recipe.decay_norms:
        groups.append({"params": bare, "weight_decay": 0.0})
    on_gpu = device.type == "cuda"
    lr = torch.tensor(recipe.lr, device=device) if on_gpu else recipe.lr
    if recipe.optimizer == "adam":
        return torch.optim.Adam(
            groups, lr=lr, betas=recipe.adam_betas, fused=True, capturable=on_gpu
        )
    nesterov = recipe.nesterov and recipe.momentum > 0
    return torch.optim.SGD(
        groups, lr=lr, momentum=recipe.momentum, nesterov=nesterov, fused=True
    )


def pick_device(device: str | torch.device | None) -> torch.device:
    """The named device, else a GPU where there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no GPU")
    return device


@contextmanager
def seeded(seed: int, stream: int, device: torch.device) -> Iterator[None]:
    """torch's generators, set from (seed, stream) while inside and put back after.

    Those of the CPU and of `device`, whichever GPU is the current one.
    """
    # far above any number of epochs, or one seed would draw what another has drawn
    cards, number = [], seed * 1_000_003 + stream
    if device.type == "cuda":
        here = torch.cuda.current_device
        cards = [here() if device.index is None else device.index]
    with torch.random.fork_rng(cards):
        torch.default_generator.manual_seed(number)
        for card in cards:
            torch.cuda.default_generators[card].manual_seed(number)
        yield


def pick_layout(model: nn.Module, device: torch.device) -> torch.memory_format:
    """channels_last, but on a CPU only where channels come in multiples of 16."""
    # Measured on ResNet-20 in bfloat16: whole, channels_last trains 1.2 times faster;
    # with a quarter of every layer removed (12, 24, 48 channels) 2.6 times slower.
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    if device.type == "cpu" and any(width % 16 for width in widths):
        return torch.contiguous_format
    return torch.channels_last


def pick_precision(precision: str, device: torch.device, model: nn.Module) -> str:
    """What to compute in: as named, or bfloat16 where the hardware has it.

    A model that is not float32 keeps its own precision, and is called by it.
    """
    own = dtype_of(model)
    if own != torch.float32:
        return str(own).removeprefix("torch.")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = any(getattr(torch.cpu, name, bool)() for name in names)
    return "bfloat16" if fast else "float32"
