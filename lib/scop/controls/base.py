"""What a control is, and the arms that need no training.

A control is a batch of images that carries no information about the label. Arms differ
in what they guarantee; each says so in its docstring, in these words:

- *independence*: the control says nothing about the label beyond what the image says;
- *full swap*: (X, X~) and (X~, X) are equally distributed;
- *partial swap*: so they are when only some coordinates change places. Independence and
  all partial swaps together make a knockoff (Candes et al. 2018, def. 3.1).
"""

import torch
from torch import Tensor, nn

from lib.settings import CHW
from lib.train.checkpoint import digest_tensors


def exchange(x: Tensor, control: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both, of one shape, with the entries marked in `mask` (bool) changed over."""
    return torch.where(mask, control, x), torch.where(mask, x, control)


def correlate(x: Tensor, control: Tensor, *, eps: float = 0.0) -> Tensor:
    """Correlation over the rows of each column with its control's, [p] for two [n, p].

    eps is added to both variances, for losses; without it a constant gives nan, if
    float64 keeps rounding from looking like a spread.
    """
    a, b = x - x.mean(0), control - control.mean(0)
    spread = (a.square().mean(0) + eps).sqrt() * (b.square().mean(0) + eps).sqrt()
    return (a * b).mean(0) / spread


class Control(nn.Module):
    """Makes a control batch for a batch of images; `sample` is the one way in.

    Random choices come from torch's global generator.
    """

    name = ""
    paired = True  # False for the arm that has no control stream at all

    def __init__(self, shape: CHW):
        super().__init__()
        self.shape = tuple(shape)

    @torch.no_grad()
    def sample(self, batch: Tensor) -> Tensor:
        """A control for every image of a batch [B, C, H, W], as `lib.data.batches` has.

        The same shape, dtype and device: the arm moves to where the batch lies.
        `ValueError` when the images or what the arm makes have another shape.
        """
        if tuple(batch.shape[1:]) != self.shape:
            raise ValueError(
                f"control '{self.name}' was built for images of shape "
                f"{list(self.shape)}, got {list(batch.shape[1:])}"
            )
        self.to(batch.device)
        with torch.autocast(batch.device.type, enabled=False):
            made = self.make(batch.float()).to(batch.dtype)
        if made.shape != batch.shape:
            raise ValueError(
                f"control '{self.name}' made a batch of shape {list(made.shape)} for "
                f"images of shape {list(batch.shape)}; both must agree"
            )
        return made.contiguous(memory_format=torch.channels_last)

    def make(self, batch: Tensor) -> Tensor:
        """What an arm does; float32 in and out."""
        raise NotImplementedError

    def digest(self) -> str:
        """A hash of the arm and everything it learnt."""
        learnt = self.state_dict()
        facts = [self.name, str(self.shape), *learnt]
        return digest_tensors(" ".join(facts), *learnt.values())


class NoControl(Control):
    """No control stream, so nothing is guaranteed: `lib.scop.selection.GatedNorm`."""

    name = "none"
    paired = False

    def make(self, batch: Tensor) -> Tensor:
        raise ValueError("control 'none' has no control images to sample")


class Constant(Control):
    """The mean image, always the same: a control stream that carries nothing.

    Independence holds, neither swap does. What an arm is better by than this one, its
    control images are worth, for all else is the same.
    """

    name = "constant"

    def make(self, batch: Tensor) -> Tensor:
        return torch.zeros_like(batch)  # normalised images have mean 0


class Noise(Control):
    """White Gaussian noise of the images' mean and variance per channel.

    Independence holds. Neither swap holds: noise does not have the correlations of
    images, so the full swap already gives it away.
    """

    name = "noise"

    def make(self, batch: Tensor) -> Tensor:
        return torch.randn_like(batch)  # normalised images have mean 0 and variance 1


class Shuffle(Control):
    """The other images of the batch, in random order (no image is its own control).

    Independence of the image holds, so independence of its label does, up to the
    finite batch; the full swap holds; partial swaps fail, because coordinates of two
    images are not correlated as those of one. The vendor's MindSpore port does this.
    """

    name = "shuffle"

    def make(self, batch: Tensor) -> Tensor:
        if len(batch) < 2:
            raise ValueError("control 'shuffle' needs two images or more in a batch")
        # one cycle through all images, so that none is left in its own place
        order = torch.rand(len(batch), device=batch.device).argsort()
        made = torch.empty_like(batch)
        made[order] = batch[order.roll(1)]
        return made
