"""One picture: from the bytes of a file to uint8 pixels of the size that is asked for.

The same for sets in memory and for streamed ones.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

BROKEN_IMAGE = (
    *(OSError, SyntaxError, EOFError, ValueError, RuntimeError, MemoryError),
    Image.DecompressionBombError,
)
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of random crops: Szegedy et al. 2015


@dataclass(frozen=True)
class Fit:
    """What every picture of a set is brought to: [height, width, channels].

    The shorter side is scaled to `shorter` pixels and the centre cut out. area: random
    crops for training are 8 to 100 % of the picture, scaled, as torchvision trains on
    ImageNet. sides: scaled to these in turn afterwards, as `ImageSet.scale` does.
    """

    height: int
    width: int
    channels: int
    shorter: int
    interpolation: str = "bilinear"
    area: bool = False
    sides: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of what comes out."""
        height, width = (self.sides[-1:] * 2) or (self.height, self.width)
        return height, width, self.channels


def describe_image(image: Image.Image) -> tuple[int, int, int]:
    """(H, W, C) from the header: C = 1 for grey, else 3. ValueError: not 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"mode {image.mode}, expected 8 bits a channel")
    return image.height, image.width, 1 if image.mode in ("1", "L") else 3


def explain(error: Exception) -> str:
    """What is wrong with a picture, in one line."""
    return str(error).partition("\n")[0] or type(error).__name__


def decode(content: bytes, channels: int) -> Tensor:
    """uint8 [channels, H, W] of a file's bytes, whatever its name says it is."""
    with Image.open(io.BytesIO(content)) as image:
        describe_image(image)
        # torchvision is faster than PIL, and a few grey levels off here and there
        if image.format == "JPEG" and image.mode in ("L", "RGB"):
            from torchvision import io as vision

            raw = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            modes = vision.ImageReadMode
            return vision.decode_jpeg(raw, modes.GRAY if channels == 1 else modes.RGB)
        pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels).view(*pixels.shape[:2], channels).permute(2, 0, 1)


def show(content: bytes, fit: Fit, key: tuple[int, ...] | None = None) -> Tensor:
    """uint8 [H, W, C] of a file's bytes; `key` draws the crop of a `fit` by area."""
    pixels = decode(content, fit.channels)
    size = [fit.height, fit.width]
    if fit.area and key is not None:
        pixels = crop_area(pixels, fit, key)
    elif (*pixels.shape[1:], min(size)) != (*size, fit.shorter):
        from torchvision.transforms.v2 import functional as F

        scaled = F.resize(pixels, [fit.shorter], _pick(fit), antialias=True)
        pixels = F.center_crop(scaled, size)
    pixels = pixels.permute(1, 2, 0)
    for side in fit.sides:
        pixels = scale_pixels(pixels[None], side)[0]
    return pixels


def crop_area(pixels: Tensor, fit: Fit, key: tuple[int, ...]) -> Tensor:
    """The crop of [C, H, W] that `key`, whole numbers >= 0, draws, scaled."""
    from torchvision.transforms import RandomResizedCrop
    from torchvision.transforms.v2 import functional as F

    # torchvision draws from the global generator alone: it is lent out and put back
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(state[0]))
        box = RandomResizedCrop.get_params(pixels, AREA, RATIO)
    size = [fit.height, fit.width]
    return F.resized_crop(pixels, *box, size, _pick(fit), antialias=True)


def scale_pixels(images: Tensor, side: int) -> Tensor:
    """uint8 [N, H, W, C] -> [N, side, side, C]: bilinear, antialiased, rounded."""
    pixels, size = images.permute(0, 3, 1, 2).float(), (side, side)
    pixels = torch.nn.functional.interpolate(
        pixels, size, mode="bilinear", antialias=True
    )
    return pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def _pick(fit: Fit) -> Any:
    from torchvision.transforms import InterpolationMode

    return InterpolationMode(fit.interpolation)
