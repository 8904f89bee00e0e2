"""Controls: what stands in for an image. Each says what it guarantees."""

from lib.scop.controls.base import Constant, Control, NoControl, Noise, Shuffle
from lib.scop.controls.build import ARMS, build_control
