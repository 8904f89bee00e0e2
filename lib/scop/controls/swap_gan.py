"""Controls trained to be exchangeable with their image, block of pixels by block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.data import ImageSet
from lib.scop.controls.base import correlate, exchange
from lib.scop.controls.training import Game, Trained, make_adam
from lib.settings import CHW


class SwapGame(Game):
    """A discriminator guesses, block by block, which of two images is the control.

    KnockoffGAN's game (Jordon et al., ICLR 2019) with one swap per block of pixels. If
    no guess can beat a coin, even with the other swaps told, then any set of blocks can
    change places.
    """

    arm: "SwapGAN"

    def __init__(self, arm: "SwapGAN"):
        super().__init__(arm)
        self.judge = Judge(arm.shape, arm.block, arm.width)

    def make_optimizer(self) -> torch.optim.Optimizer:
        return make_adam(self.arm.lr, self.arm.net, self.judge)

    def step(self, x: Tensor, turn: int) -> dict[str, Tensor]:
        """One update of the discriminator, one of the generator."""
        guess = self.teach_judge(x)
        made = self.arm.make(x)
        coins = self.judge.draw_swap(x)
        told = torch.zeros_like(coins)  # no swap is given away, each has to be hidden
        logits = self.judge(*swap_blocks(x, made, coins), told, coins)
        # Towards a guess of 1/2. The source takes the judge's loss with the other sign,
        # which has no lower bound: whoever makes it guess wrongly with confidence has
        # given the swap away just as well.
        half = torch.full_like(logits, 0.5)
        confusion = F.binary_cross_entropy_with_logits(logits, half)
        # A copy of the image confuses every judge: likeness has to cost something. It
        # is measured where the swaps are, in blocks, over the images of the batch.
        means = (average_blocks(v, self.arm.block) for v in (x, made))
        alike = correlate(*means, eps=1e-6).square().mean()
        self.descend(confusion + alike, self.arm.net)
        return {"guess": guess, "confusion": confusion, "alike": alike}

    def teach_judge(self, x: Tensor) -> Tensor:
        """The mean loss of its guesses where it had no hint."""
        with torch.no_grad():
            made = self.arm.make(x)
        coins = self.judge.draw_swap(x)
        # With most of the other swaps told, the question about a block is the one that
        # a knockoff must withstand: was it swapped, given all the rest?
        told = (torch.rand_like(coins) < self.arm.hint).float()
        logits = self.judge(*swap_blocks(x, made, coins), told, coins)
        losses = F.binary_cross_entropy_with_logits(logits, coins, reduction="none")
        # a hint gives the answer away: only where there was none is it a guess
        loss = (losses * (1 - told)).sum() / (1 - told).sum().clamp(min=1)
        self.descend(loss, self.judge)
        return loss


class SwapGAN(Trained):
    """A distorted version G(x, z) of the image, trained against swaps of pixel blocks.

    Independence holds: G sees the image, never its label. The full swap and partial
    swaps of whole blocks hold as far as the discriminator was beaten; partial swaps
    within a block are not asked for. The two losses conflict: neighbouring pixels
    nearly determine one another (a valid second-order knockoff of 32 x 32 CIFAR-10
    pixels correlates with the image by 0.997 or more), and what is given up for
    decorrelation is exchangeability.
    """

    name = "swap_gan"
    Game = SwapGame
    epochs = 2
    hint = 0.9  # share of the blocks whose swap the discriminator is told as it learns
    width = 32  # of both networks
    lr = 1e-3
    batch_size = 64

    def __init__(self, images: ImageSet):
        super().__init__(images)
        self.block = pick_block(self.shape)
        self.net = Distort(self.shape[0], self.width)

    def make(self, batch: Tensor) -> Tensor:
        return self.net(batch)


class Distort(nn.Module):
    """[B, C, H, W] -> [B, C, H, W]: image and a learnt change, noise in; no norm."""

    noise = 8

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.change = nn.Sequential(
            nn.Conv2d(4 * channels + self.noise, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, 4 * channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        halved = halve(x)  # a hidden layer sees twice as far for a quarter of the work
        z = torch.randn(len(x), self.noise, *halved.shape[2:], device=x.device)
        change = F.pixel_shuffle(self.change(torch.cat([halved, z], 1)), 2)
        return x + change[:, :, : x.shape[2], : x.shape[3]]


class Judge(nn.Module):
    """Two images and a hint -> logits that a block was swapped, [B, 1, H/b, W/b]."""

    def __init__(self, shape: CHW, block: int, width: int):
        super().__init__()
        self.grid = shape[1] // block, shape[2] // block
        self.look = nn.Sequential(
            nn.Conv2d(8 * shape[0] + 8, width, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2),
            nn.AdaptiveAvgPool2d(self.grid),
            nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 1, 1),
        )  # fmt: skip

    def draw_swap(self, x: Tensor) -> Tensor:
        """A fair coin per image and block, 0.0 or 1.0, [B, 1, H/b, W/b]."""
        return (torch.rand(len(x), 1, *self.grid, device=x.device) < 0.5).float()

    def forward(self, first: Tensor, second: Tensor, told: Tensor, coins: Tensor):
        """`told` marks the blocks whose coin it is shown, both [B, 1, H/b, W/b]."""
        hint = torch.cat([told, told * (2 * coins - 1)], 1)
        hint = F.interpolate(hint, size=first.shape[2:], mode="nearest")
        return self.look(halve(torch.cat([first, second, hint], 1)))


def halve(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 4 C, H/2, W/2], pixels of a 2 x 2 square as channels."""
    return F.pixel_unshuffle(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)), 2)


def pick_block(shape: CHW) -> int:
    """The largest side of a block out of 4, 2, 1 that divides both sides of images."""
    return next(b for b in (4, 2, 1) if not (shape[1] % b or shape[2] % b))


def swap_blocks(x: Tensor, made: Tensor, coins: Tensor) -> tuple[Tensor, Tensor]:
    """Both images [B, C, H, W] with the blocks whose coin is 1 changed over."""
    mask = F.interpolate(coins, size=x.shape[2:], mode="nearest").bool()
    return exchange(x, made, mask)


def average_blocks(images: Tensor, block: int) -> Tensor:
    """Means of the blocks of images [B, C, H, W], [B, C H/b W/b]."""
    return F.avg_pool2d(images, block).flatten(1)
