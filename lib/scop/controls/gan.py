"""Images that never were: an unconditional GAN, as in SCOP's released code."""

import copy
import itertools

import torch
from torch import Tensor, nn

from lib.data import ImageSet
from lib.scop.controls.training import Game, Trained, make_adam
from lib.settings import CHW


class GanGame(Game):
    """Wasserstein GAN with gradient penalty (Gulrajani et al. 2017)."""

    arm: "Generator"

    def __init__(self, arm: "Generator"):
        super().__init__(arm)
        # The arm samples with a running average of the player's weights: late in a
        # short training the two players still move each other about.
        self.player = copy.deepcopy(arm.net)
        self.critic = make_critic(arm.shape, arm.width)

    def make_optimizer(self) -> torch.optim.Optimizer:
        return make_adam(self.arm.lr, self.player, self.critic)

    def step(self, x: Tensor, turn: int) -> dict[str, Tensor]:
        """The critic's turn, then the generator's."""
        real = (x * self.arm.std + self.arm.mean) * 2 - 1
        seen = self.teach_critic(real, turn)
        loss = -self.critic(self.arm.draw(len(x), self.player)).mean()
        self.descend(loss, self.player)
        self.follow(len(x))
        return seen

    @torch.no_grad()
    def follow(self, count: int) -> None:
        """Move the average towards the player."""
        share = 1 - self.arm.average
        pairs = zip(self.arm.net.parameters(), self.player.parameters(), strict=True)
        for mean, weight in pairs:
            mean.lerp_(weight, share)
        # The player's running statistics are not those of averaged weights, so that
        # the BatchNorms measure their own, on images that are thrown away.
        self.arm.draw(count, self.arm.net)

    def teach_critic(self, real: Tensor, turn: int) -> dict[str, Tensor]:
        """One update; the distance it sees, and the penalty when it is due."""
        arm = self.arm
        with torch.no_grad():
            fake = arm.draw(len(real), self.player)
        distance = self.critic(real).mean() - self.critic(fake).mean()
        seen, loss = {"distance": distance}, -distance
        # A gradient through a gradient costs as much as the rest: at every few updates,
        # with so much more weight, it is the same penalty on average.
        if turn % arm.penalty_every == 0:
            seen["penalty"] = self.penalise(real, fake)
            loss = loss + arm.penalty_every * arm.penalty * seen["penalty"]
        self.descend(loss, self.critic)
        return seen

    def penalise(self, real: Tensor, fake: Tensor) -> Tensor:
        """Mean (|gradient| - 1)^2 of the critic between real and made images."""
        share = torch.rand(len(real), 1, 1, 1, device=real.device)
        between = (real + share * (fake - real)).requires_grad_()
        score = self.critic(between).sum()
        (gradient,) = torch.autograd.grad(score, between, create_graph=True)
        return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


class Generator(Trained):
    """Images drawn from noise, G(z), whatever image they are the control of.

    Independence holds trivially: G never sees the image. The full swap holds as far as
    the GAN matches the distribution of images, partial swaps cannot: coordinates of two
    unrelated images are not correlated as those of one. A fresh z for every sample.

    It trains in seconds on one core. The released generator has width 64, its source
    five updates of the critic for one of the generator, penalty_every 1, average 0,
    lr 1e-4, batch_size 64; the released code leaves the pixels in [-1, 1].
    """

    name = "generator"
    Game = GanGame
    epochs = 3
    latent = 128
    width = 16  # channels before the last layer, of generator and critic
    penalty = 10.0  # weight of the critic's gradient norm ...
    penalty_every = 4  # ... at one update in so many, with so much more weight
    average = 0.95  # what is kept of the sampling weights at an update
    lr = 2e-3  # of both players
    batch_size = 32

    def __init__(self, images: ImageSet):
        super().__init__(images)
        self.net = make_generator(self.shape, self.latent, self.width)
        stats = torch.tensor([images.mean, images.std])[:, :, None, None]
        self.register_buffer("mean", stats[0])
        self.register_buffer("std", stats[1])

    def draw(self, count: int, net: nn.Module) -> Tensor:
        """`count` fresh images [count, C, H, W] of `net`, pixels in [-1, 1]."""
        z = torch.randn(count, self.latent, device=self.mean.device)
        made, (height, width) = net(z), self.shape[1:]
        top, left = (made.shape[2] - height) // 2, (made.shape[3] - width) // 2
        return made[:, :, top : top + height, left : left + width]

    def make(self, batch: Tensor) -> Tensor:
        made = self.draw(len(batch), self.net)
        return ((made + 1) / 2 - self.mean) / self.std


def make_generator(shape: CHW, latent: int, width: int) -> nn.Sequential:
    """z [B, latent] -> [B, C, 8s, 8t] in [-1, 1], the least that covers (H, W)."""
    channels, rows, columns = shape[0], -(-shape[1] // 8), -(-shape[2] // 8)
    start = 4 * width * rows * columns
    layers = [nn.Linear(latent, start), nn.BatchNorm1d(start), nn.ReLU()]
    layers.append(nn.Unflatten(1, (4 * width, rows, columns)))
    for wide in (4 * width, 2 * width):
        layers.append(nn.ConvTranspose2d(wide, wide // 2, 2, stride=2))
        layers += [nn.BatchNorm2d(wide // 2), nn.ReLU()]
    last = nn.ConvTranspose2d(width, channels, 2, stride=2)
    return nn.Sequential(*layers, last, nn.Tanh())


def make_critic(shape: CHW, width: int) -> nn.Sequential:
    """[B, C, H, W] -> [B, 1]; no norm, the penalty is on each image's own gradient."""
    wides = shape[0], width, 2 * width, 4 * width
    layers = []
    for taken, given in itertools.pairwise(wides):
        conv = nn.Conv2d(taken, given, 3, stride=2, padding=1)
        layers += [conv, nn.LeakyReLU(0.2)]
    places = -(-shape[1] // 8) * -(-shape[2] // 8)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * places, 1))
