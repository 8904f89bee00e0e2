"""Controls trained to be exchangeable with their image, block of pixels by block."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.data import ImageSet
from lib.scop.controls.training import Game, Options, Trained, number


@dataclass(frozen=True)
class SwapOptions(Options):
    """block: side in pixels of the blocks that change places; must divide both sides of
    the images. decorrelation: weight of that loss. hint: share of the blocks whose swap
    the discriminator is told while it learns. width, lr, batch_size: of both networks.
    """

    block: int = number(4, 1)
    decorrelation: float = number(1.0, 0)
    hint: float = number(0.9, 0, 1)
    width: int = number(32, 1)
    lr: float = number(1e-3, 0, above=True)
    batch_size: int = number(64, 2)


class SwapGame(Game):
    """A discriminator guesses, block by block, which of two images is the control.

    KnockoffGAN's game (Jordon et al., ICLR 2019) with one swap per block of pixels. The
    generator is taught towards a guess of 1/2; the source takes the discriminator's
    negative loss, which has no lower bound.
    """

    def __init__(self, arm: "SwapGAN"):
        super().__init__(arm)
        self.judge = Judge(arm.shape, arm.options.block, arm.options.width)

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam for both players."""
        players = {"generator": self.arm.net, "judge": self.judge}
        rate = {"lr": self.arm.options.lr, "betas": (0.5, 0.9), "fused": True}
        return {k: torch.optim.Adam(p.parameters(), **rate) for k, p in players.items()}

    def step(self, x: Tensor, turn: int) -> dict[str, Tensor]:
        """One update of the discriminator, one of the generator."""
        guess = self.teach_judge(x)
        made = self.arm.make(x)
        swap = self.judge.draw_swap(x)
        logits = self.judge(*swap_blocks(x, made, swap), torch.zeros_like(swap), swap)
        half = torch.full_like(logits, 0.5)
        confusion = F.binary_cross_entropy_with_logits(logits, half)
        alike = correlate(x, made, self.arm.options.block).square().mean()
        self.optimizers["generator"].zero_grad()
        (confusion + self.arm.options.decorrelation * alike).backward()
        self.optimizers["generator"].step()
        return {"guess": guess, "confusion": confusion, "alike": alike}

    def teach_judge(self, x: Tensor) -> Tensor:
        """The mean loss of its guesses where it had no hint."""
        with torch.no_grad():
            made = self.arm.make(x)
        swap = self.judge.draw_swap(x)
        told = (torch.rand_like(swap) < self.arm.options.hint).float()
        logits = self.judge(*swap_blocks(x, made, swap), told, swap)
        losses = F.binary_cross_entropy_with_logits(logits, swap, reduction="none")
        loss = (losses * (1 - told)).sum() / (1 - told).sum().clamp(min=1)
        self.optimizers["judge"].zero_grad()
        loss.backward()
        self.optimizers["judge"].step()
        return loss


class SwapGAN(Trained):
    """A distorted version G(x, z) of the image, trained against swaps of pixel blocks.

    Independence holds: G sees the image, never its label. The full swap and partial
    swaps of whole blocks hold as far as the discriminator was beaten; partial swaps
    within a block are not asked for. G = identity beats every discriminator, so a
    second loss asks for little correlation between block means of image and control.
    The two conflict: neighbouring pixels nearly determine one another (a valid
    second-order knockoff of 32 x 32 CIFAR-10 pixels correlates with the image by 0.997
    or more), and what is given up for decorrelation is exchangeability.
    """

    name = "swap_gan"
    Options = SwapOptions
    Game = SwapGame
    epochs = 2

    def __init__(self, images: ImageSet, options: SwapOptions | None = None):
        super().__init__(images, options)
        block, sides = self.options.block, self.shape[1:]
        if any(side % block for side in sides):
            raise ValueError(
                f"block must divide the sides of the images, {list(sides)} pixels in "
                f"{images.name}, got {block}"
            )
        self.net = Distort(self.shape[0], self.options.width)

    def make(self, batch: Tensor) -> Tensor:
        """G(x, z) with a fresh z; no image of the batch sees another."""
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
        halved = halve(x)
        z = torch.randn(len(x), self.noise, *halved.shape[2:], device=x.device)
        change = F.pixel_shuffle(self.change(torch.cat([halved, z], 1)), 2)
        return x + change[:, :, : x.shape[2], : x.shape[3]]


class Judge(nn.Module):
    """Two images and a hint -> logits that a block was swapped, [B, 1, H/b, W/b]."""

    def __init__(self, shape: tuple[int, int, int], block: int, width: int):
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

    def forward(self, first: Tensor, second: Tensor, told: Tensor, swap: Tensor):
        """`told` marks the blocks whose `swap` it is shown, both [B, 1, H/b, W/b]."""
        hint = torch.cat([told, told * (2 * swap - 1)], 1)
        hint = F.interpolate(hint, size=first.shape[2:], mode="nearest")
        return self.look(halve(torch.cat([first, second, hint], 1)))


def halve(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 4 C, H/2, W/2], pixels of a 2 x 2 square as channels."""
    return F.pixel_unshuffle(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)), 2)


def swap_blocks(x: Tensor, made: Tensor, swap: Tensor) -> tuple[Tensor, Tensor]:
    """Both images [B, C, H, W] with the blocks marked in `swap` changed over."""
    mask = F.interpolate(swap, size=x.shape[2:], mode="nearest").bool()
    return torch.where(mask, made, x), torch.where(mask, x, made)


def correlate(x: Tensor, made: Tensor, block: int) -> Tensor:
    """Correlation over the batch of block means of image and control, [C H/b W/b]."""
    a, b = (F.avg_pool2d(images, block).flatten(1) for images in (x, made))
    a, b = a - a.mean(0), b - b.mean(0)
    spread = (a.square().mean(0).sqrt() + 1e-3) * (b.square().mean(0) + 1e-6).sqrt()
    return (a * b).mean(0) / spread
