"""A long profile in small: same notebooks, networks and steps, generated pictures.

    .venv/bin/python .ci/miniature.py imagenet     draws the pictures, runs all of it
    .venv/bin/python .ci/miniature.py --write      the profiles PROFILE_miniature.yaml

`make miniature PROFILE=imagenet` calls the first. Whether a profile of weeks runs to
its last table is seen in minutes: 3 classes, 108 JPEGs of several sizes, 1 epoch.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from lib import paths

PROFILES = ("cifar10", "imagenet")
CLASSES = ("n01440764", "n02102040", "n03000684")  # named as ImageNet names them
COUNTS = {"train": 28, "val": 8}  # pictures a class
SIDES = {"cifar10": 32, "imagenet": 64}
# what takes the place of the profile's value, where it names the parameter at all
SMALL = {
    "dataset": "miniature", "pretrained": False, "baseline_epochs": 1,
    "control_epochs": 1, "select_epochs": 1, "finetune_epochs": 1, "warmup": 0.0,
    "select_images": 0, "feature_images": 60, "point_images": 0, "repetitions": 2,
    "batch_size": 16, "seeds": [0], "base": [0], "lots": 1, "lengths": [1],
    "depths": [0, 1], "depth_images": 0,
}  # fmt: skip
FORCED = ("baseline_epochs", "warmup", "select_images")  # their defaults are for digits


def shrink(profile: str) -> dict:
    """The content of a profile with small values in place of the long ones."""
    content = yaml.safe_load((paths.NOTEBOOKS / f"params/{profile}.yaml").read_text())
    return {book: shrink_notebook(profile, book, run) for book, run in content.items()}


def shrink_notebook(profile: str, notebook: str, changes: dict | list) -> dict | list:
    if isinstance(changes, list):
        return [shrink_run(profile, notebook, part) for part in changes]
    return shrink_run(profile, notebook, changes)


def shrink_run(profile: str, notebook: str, changes: dict) -> dict:
    from lib import settings

    declared = settings.declared_parameters(notebook)
    small = {name: SMALL.get(name, value) for name, value in changes.items()}
    small |= {n: SMALL[n] for n in FORCED if n in declared}
    if "size" in declared:
        small["size"] = SIDES[profile]
        small["resolution"] = 0
    if "depths" in small:
        small["depth_epochs"] = [int(any(small["depth_epochs"]))] * len(small["depths"])
    if "multiple" in small:
        small["multiple"] = 2
    return small


def write_profiles() -> None:
    for profile in PROFILES:
        path = paths.NOTEBOOKS / f"params/{profile}_miniature.yaml"
        head = f"# {profile}.yaml in small, on generated pictures: `make miniature`.\n"
        head += "# Written by .ci/miniature.py --write.\n"
        text = yaml.safe_dump(shrink(profile), sort_keys=False, width=88)
        path.write_text(head + text)


def draw_pictures(folder: Path) -> None:
    """JPEGs of three classes: stripes, rings and checks in noise, of several sizes."""
    if (folder / "val" / CLASSES[-1] / "7.JPEG").is_file():
        return
    draw = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for number, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for k in range(count):
                sides = draw.integers(70, 120, 2)
                picture = draw_picture(number, sides, draw)
                path = folder / split / name / f"{k}.JPEG"
                paths.write_atomic(path, lambda tmp, p=picture: p.save(tmp, "JPEG"))


def draw_picture(kind: int, sides, draw) -> Image.Image:
    y, x = np.mgrid[0 : sides[0], 0 : sides[1]] / 12
    angle, phase = draw.uniform(0, np.pi), draw.uniform(0, 6, 2)
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x
    values = [
        np.sin(2 * along + phase[0]),
        np.sin(2 * np.hypot(x - phase[0], y - phase[1])),
        np.sin(2 * along) * np.sin(2 * across),
    ][kind]
    tint = draw.uniform(40, 100, 3)
    noise = draw.normal(0, 25, (*sides, 3))
    pixels = 128 + values[..., None] * tint + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("profile", nargs="?", choices=PROFILES)
    parser.add_argument("--write", action="store_true")
    options, rest = parser.parse_known_args()
    if options.write:
        write_profiles()
        return
    if options.profile is None:
        parser.error(f"which profile: {' or '.join(PROFILES)}?")
    draw_pictures(paths.data_root() / "miniature")
    script = str(Path(__file__).with_name("reproduce.py"))
    profile = f"{options.profile}_miniature"
    os.execv(sys.executable, [sys.executable, script, profile, *rest])


if __name__ == "__main__":
    main()
