"""What can be measured of a picture without a model: grids, clipping, colours, edges.

Functions take pictures (N, 3, H, W) in [0, 1], sRGB, float32 or float64, and give one number a picture, (N,), computed
in that precision on the pictures' device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffusion_align.data.tending.duplicates import near_pairs, picture_hash

#: Variance of an 8-bit picture's rounding error, about: no power below it counts, so that flat pictures have no peaks.
ROUNDING_POWER = 1e-6
#: Half a step of 8 bits: no change counts that is far below it.
ROUNDING = 0.5 / 255
#: How far from a peak its neighbours lie, in rings: the window spreads a pure tone over the rings beside it.
NEIGHBOURS = (-3, -2, 2, 3)
#: Of the grids that are looked for, in pixels; sides are cut to a multiple of the largest, so that each has its ring.
PERIODS = (2, 4, 8)
#: Smallest side, in pixels, whose rings leave room for neighbours.
SMALLEST_SIDE = 32
#: Cycles a pixel from which energy counts as of high frequency: a quarter, where two pixels are half a wave.
HIGH = 0.25
#: A step in brightness between neighbouring pixels from which a pixel counts as an edge.
EDGE = 0.05
DARK, BRIGHT = 0.05, 0.95
#: Bins of each channel for the entropy of colours.
COLOUR_BINS = 8
#: Side of the grid that ``layout_features`` averages over.
LAYOUT = 8

_LUMA = (0.2126, 0.7152, 0.0722)
# IEC 61966-2-1: linear sRGB to XYZ, and the white point D65 of its rows.
_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))


def check_pictures(images: Tensor) -> None:
    """Raises ValueError where ``images`` are no pictures (N, 3, H, W) in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images: expected (N, 3, H, W) with N at least 1, got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images: expected floats in [0, 1], got {images.dtype}")
    low, high = float(images.min()), float(images.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also NaN
        raise ValueError(f"images: expected values in [0, 1], got {low:.3g} to {high:.3g}")


def luma(images: Tensor) -> Tensor:
    """Brightness (N, H, W) as it is stored: 0.2126 R + 0.7152 G + 0.0722 B (Rec. 709)."""
    return torch.einsum("nchw,c->nhw", images, images.new_tensor(_LUMA))


def spectrum_peaks(bright: Tensor) -> Tensor:
    """How far the power at 1/2, 1/4 and 1/8 cycles a pixel stands above its neighbours, in decibels, (N, 3).

    The figure is 10 log10 P(ring) - mean of 10 log10 P over the rings 2 and 3 places away on either side, with the
    mean power P of ``power_rings``.

    Args:
        bright: brightness (N, H, W).

    Raises:
        ValueError: pictures smaller than 32 pixels.
    """
    sums, counts = power_rings(bright)
    levels = 10 * (sums / counts).log10()
    highest = len(counts) - 1
    peaks = []
    for period in PERIODS:
        ring = 2 * highest // period
        around = [ring + offset for offset in NEIGHBOURS if ring + offset <= highest]
        peaks.append(levels[:, ring] - levels[:, around].mean(dim=1))
    return torch.stack(peaks, dim=1)


def high_frequency(bright: Tensor) -> Tensor:
    """Energy from a quarter of a cycle a pixel on, as a share of that of all rings but the mean's, in decibels, (N,):
    blur lowers it, noise, sharpening and hard edges of blocks raise it; contrast does not change it.

    Args:
        bright: brightness (N, H, W).

    Raises:
        ValueError: pictures smaller than 32 pixels.
    """
    sums, counts = power_rings(bright)
    first = math.ceil(HIGH * 2 * (len(counts) - 1))
    return 10 * (sums[:, first:].sum(dim=1) / sums[:, 1:].sum(dim=1)).log10()


def blockiness(bright: Tensor) -> Tensor:
    """How much brightness jumps between blocks of 8 x 8 pixels, against how much it changes elsewhere, (N,) in dB.

    20 log10 of the mean absolute change from row 8k - 1 to 8k (and column), over that between all other neighbours.
    Blocks whose steps differ from place to place have no peak in the spectrum, but they have this.

    Args:
        bright: brightness (N, H, W).
    """
    block = PERIODS[-1]
    jumps, rest = [], []
    for axis in (1, 2):
        change = bright.diff(dim=axis).abs().mean(dim=3 - axis)
        at = torch.arange(1, change.shape[1] + 1, device=bright.device) % block == 0
        jumps.append(change[:, at])
        rest.append(change[:, ~at])
    between, within = (torch.cat(parts, dim=1).mean(dim=1) + ROUNDING for parts in (jumps, rest))
    return 20 * (between / within).log10()


def power_rings(bright: Tensor) -> tuple[Tensor, Tensor]:
    """Power of brightness (N, H, W) by ring of the spectrum, (N, R) summed, and how many frequencies a ring has, (R,).

    P(f) = |FFT(w (y - mean y))|^2 / sum w^2 with a Hann window w. The ring of a frequency f holds all (fx, fy) with
    max(|fx|, |fy|) = f: a checkerboard, rows and columns of one period lie in the same ring; the last is at 1/2.

    Raises:
        ValueError: pictures smaller than 32 pixels.
    """
    height, width = (side - side % max(PERIODS) for side in bright.shape[-2:])
    side = min(height, width)
    if side < SMALLEST_SIDE:
        raise ValueError(f"pictures of {tuple(bright.shape[-2:])}: a spectrum needs {SMALLEST_SIDE} pixels a side")
    bright = bright[..., :height, :width]
    bright = bright - bright.mean(dim=(1, 2), keepdim=True)
    rows, columns = (torch.hann_window(n, dtype=bright.dtype, device=bright.device) for n in (height, width))
    window = rows[:, None] * columns[None, :]
    power = torch.fft.fft2(window * bright).abs().square() / window.square().sum() + ROUNDING_POWER
    fy, fx = (torch.fft.fftfreq(n, dtype=torch.float64, device=bright.device).abs() for n in (height, width))
    rings = (torch.maximum(fy[:, None], fx[None, :]) * side).round().long().flatten()
    sums = power.new_zeros(len(bright), side // 2 + 1).index_add_(1, rings, power.flatten(1))
    return sums, torch.bincount(rings, minlength=side // 2 + 1)


def saturation(images: Tensor) -> Tensor:
    """Mean of HSV's saturation, (max - min) / max over the channels, 0 for black."""
    high, low = images.amax(dim=1), images.amin(dim=1)
    return ((high - low) / high.clamp(min=1e-12)).mean(dim=(1, 2))


def lab(images: Tensor) -> Tensor:
    """CIE L*a*b* (N, 3, H, W) under D65."""
    rgb = images.clamp(0, 1)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = linear.new_tensor(_TO_XYZ)
    ratio = torch.einsum("nchw,kc->nkhw", linear, matrix / matrix.sum(dim=1, keepdim=True))
    edge = 6 / 29
    f = torch.where(ratio > edge**3, ratio.clamp(min=1e-12) ** (1 / 3), ratio / (3 * edge**2) + 4 / 29)
    x, y, z = f.unbind(dim=1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def edge_density(bright: Tensor) -> Tensor:
    """Share of inner pixels where brightness (N, H, W) changes by more than 0.05 a pixel (Sobel's gradient / 8)."""
    bright = bright[:, None]
    across = bright.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    gradient = F.conv2d(bright, torch.stack([across, across.T])[:, None])
    return (gradient.square().sum(dim=1).sqrt() > EDGE).double().mean(dim=(1, 2))


def colour_entropy(images: Tensor) -> Tensor:
    """Entropy in bits of a picture's colours, 8 x 8 x 8 of them: 0 for one colour, at most 9."""
    levels = (images.clamp(0, 1) * COLOUR_BINS).long().clamp(max=COLOUR_BINS - 1)
    codes = ((levels[:, 0] * COLOUR_BINS + levels[:, 1]) * COLOUR_BINS + levels[:, 2]).flatten(1)
    counts = torch.stack([torch.bincount(code, minlength=COLOUR_BINS**3) for code in codes]).double()
    share = counts / codes.shape[1]
    return -torch.special.xlogy(share, share).sum(dim=1) / math.log(2)


def layout_features(images: Tensor) -> Tensor:
    """L*a*b* averaged over an 8 x 8 grid, (N, 192): where which colour is, without a model."""
    return F.adaptive_avg_pool2d(lab(images), LAYOUT).flatten(1)


def near_duplicates(hashes: Sequence[int], seeds_per_prompt: int) -> Tensor:
    """Share of each prompt's pictures that nearly another picture of the set is, of whichever prompt, (P,) float64.

    Args:
        hashes: difference hashes of P K pictures, the K of a prompt side by side; nearly: at most 4 of 64 bits differ.
        seeds_per_prompt: K.
    """
    copies = torch.zeros(len(hashes), dtype=torch.float64)
    for pair in near_pairs(hashes):
        copies[list(pair)] = 1.0
    return copies.view(-1, seeds_per_prompt).mean(dim=1)


def picture_hashes(images: Tensor) -> list[int]:
    """Difference hashes of pictures (N, 3, H, W), as duplicates of data are found by."""
    pixels = (images.float() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [picture_hash(Image.fromarray(picture)) for picture in pixels]


def seed_distance(features: Tensor, seeds_per_prompt: int) -> Tensor:
    """Mean distance between the pictures of one prompt, (P,) float64.

    Args:
        features: (P K, D), the K pictures of a prompt side by side.
        seeds_per_prompt: K, at least 2.

    Raises:
        ValueError: K < 2, or rows that are no multiple of it.
    """
    if seeds_per_prompt < 2 or len(features) % seeds_per_prompt:
        raise ValueError(
            f"seeds_per_prompt = {seeds_per_prompt} with {len(features)} pictures: expected at least 2, and a multiple"
        )
    groups = features.double().view(-1, seeds_per_prompt, features.shape[1])
    distances = torch.cdist(groups, groups, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.sum(dim=(1, 2)) / (seeds_per_prompt * (seeds_per_prompt - 1))
