"""Controls that redraw an image's leading principal coordinates and copy the others.

Principal coordinates are uncorrelated, so there is room between an image and its
control that pixels do not leave.
"""

from math import prod

import torch
from torch import Tensor, nn

from lib.data import ImageSet, batches
from lib.kernels import mmd2
from lib.scop.controls.base import correlate, exchange
from lib.scop.controls.training import Game, Trained

WIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)  # of the kernels, in s.d.
LARGEST = 8192  # pixels times channels: the covariance then takes 512 MiB


class Reduced(Trained):
    """The leading coordinates, whitened; an arm says in `redraw` what becomes of them.

    ValueError: more components than have a variance, images above `LARGEST` values.
    """

    components = 64  # how many leading coordinates are redrawn

    def __init__(self, images: ImageSet):
        super().__init__(images)
        size, kept = prod(self.shape), self.components
        if not kept <= min(size, len(images) - 1):
            raise ValueError(
                f"components must be at most {min(size, len(images) - 1)} with "
                f"{len(images)} images of {size} values, got {kept}"
            )
        if size > LARGEST:
            raise ValueError(
                f"control '{self.name}' needs images of at most {LARGEST} values, "
                f"{images.name} has {size}"
            )
        self.register_buffer("center", torch.zeros(size))
        self.register_buffer("axes", torch.zeros(size, kept))
        self.register_buffer("spread", torch.ones(kept))

    def prepare(self, images: ImageSet) -> None:
        center, axes, variances = find_axes(images, self.components)
        if variances[-1] <= 1e-10 * variances[0]:
            found = int((variances > 1e-10 * variances[0]).sum())
            raise ValueError(
                f"components must be at most {found}, no other direction of "
                f"{images.name} has a variance; got {self.components}"
            )
        self.center.copy_(center)
        self.axes.copy_(axes)
        self.spread.copy_(variances.sqrt())

    def whiten(self, batch: Tensor) -> Tensor:
        """The leading coordinates [B, k] of images, mean 0 and variance 1."""
        return (batch.flatten(1) - self.center) @ self.axes / self.spread

    def redraw(self, u: Tensor) -> Tensor:
        """Control coordinates [B, k] of whitened coordinates [B, k]."""
        raise NotImplementedError

    def make(self, batch: Tensor) -> Tensor:
        # by the difference: what lies off the axes is copied, not built up again
        u = self.whiten(batch)
        moved = ((self.redraw(u) - u) * self.spread) @ self.axes.T
        return batch + moved.view(batch.shape)


class Gaussian(Reduced):
    """Second-order knockoffs in the principal coordinates; trailing ones are copied.

    Independence holds: the label is never read, the control is made of the image and
    noise. The full swap and every partial swap of principal coordinates hold to second
    order, exactly for Gaussian images; pixels are not the coordinates that may be
    swapped. A coordinate becomes noise of its variance v_j, that is s_j = v_j.
    """

    name = "gaussian"

    def redraw(self, u: Tensor) -> Tensor:
        return torch.randn_like(u)


class DeepGame(Game):
    """Deep Knockoffs' losses (Romano, Sesia, Candes 2020) on whitened coordinates."""

    arm: "Deep"

    def make_optimizer(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        machine = self.arm.machine.parameters()
        return torch.optim.SGD(machine, lr=self.arm.lr, momentum=0.9)

    def step(self, x: Tensor, turn: int) -> dict[str, Tensor]:
        u = self.arm.whiten(x)
        made = self.arm.redraw(u)
        losses = {
            "exchange": measure_swaps(u, made),
            "moments": compare_moments(u, made),
            "decorrelation": correlate(u, made, eps=1e-6).square().mean(),
        }
        self.descend(sum(losses.values()), self.arm.machine)
        return losses


class Deep(Reduced):
    """A deep knockoff machine on the leading principal coordinates, trailing copied.

    Independence holds: the machine sees the image and noise, never the label. The full
    swap and partial swaps of principal coordinates hold as far as the training brought
    the losses down, beyond second order. The target of every correlation between a
    whitened coordinate and its control is 0, the least that whitened Gaussian
    coordinates allow.
    """

    name = "deep"
    Game = DeepGame
    epochs = 8
    least = 4
    width = 320  # of the machine's layers
    lr = 0.01
    batch_size = 400

    def __init__(self, images: ImageSet):
        super().__init__(images)
        size, width = self.components, self.width
        layers, taken = [], 2 * size  # coordinates and noise
        for _ in range(6):
            layers += [nn.Linear(taken, width, bias=False), nn.BatchNorm1d(width)]
            layers.append(nn.PReLU())
            taken = width
        self.machine = nn.Sequential(*layers, nn.Linear(width, size))

    def redraw(self, u: Tensor) -> Tensor:
        return self.machine(torch.cat([u, torch.randn_like(u)], 1))


def find_axes(images: ImageSet, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [p], leading axes [p, count] and variances [count] of normalised pixels.

    float64, from the covariance of all images, summed in parts.
    """
    size, where = prod(images.shape), images.images.device
    total = torch.zeros(size, dtype=torch.float64, device=where)
    second = torch.zeros(size, size, dtype=torch.float64, device=where)
    for x, _ in batches(images, 1000, device=where):
        rows = x.flatten(1).double()
        total += rows.sum(0)
        second.addmm_(rows.T, rows)
    mean = total / len(images)
    second.div_(len(images)).addr_(mean, mean, alpha=-1)
    values, axes = torch.linalg.eigh(second)
    values, axes = values[-count:].flip(0), axes[:, -count:].flip(1)
    # The sign of an eigenvector is the solver's whim; controls should not turn with it.
    peaks = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return mean, axes * peaks.sign(), values.clamp(min=0)


def measure_swaps(u: Tensor, made: Tensor) -> Tensor:
    """MMD of one half of the pairs against the other, fully and partially swapped.

    The sum of two distances; which of the coordinates [B, k] change places in the
    partial swap is drawn anew.
    """
    # The swapped pairs are others than the unswapped ones: an MMD compares independent
    # samples, and two arrangements of the same rows are not.
    half = len(u) // 2
    pairs = torch.cat([u[:half], made[:half]], 1)
    a, b = u[half : 2 * half], made[half : 2 * half]
    coins = torch.rand(u.shape[1], device=u.device) < 0.5
    others = torch.cat([b, a], 1), torch.cat(exchange(a, b, coins), 1)
    # Biased, as it is never negative, and its root, whose slope does not fade as the
    # distance falls; the clamp keeps that slope finite at 0.
    squares = [mmd2(pairs, other, WIDTHS, unbiased=False) for other in others]
    return sum(square.clamp(min=1e-12).sqrt() for square in squares)


def compare_moments(u: Tensor, made: Tensor) -> Tensor:
    """How far mean and covariances of the controls are from those of a knockoff.

    Coordinates are whitened: covariance 1 of the controls, and 0 between a coordinate
    and the control of another one. Its own control is `decorrelation`'s business.
    """
    count, size = u.shape
    one = torch.eye(size, device=u.device)
    a, b = u - u.mean(0), made - made.mean(0)
    own, cross = b.T @ b / count - one, a.T @ b / count * (1 - one)
    gap = (u.mean(0) - made.mean(0)).square().sum()
    return gap + (own.square().sum() + cross.square().sum()) / size
