"""Published figures, for tables that put ours beside them. Each is what its paper reports, on its paper's weights."""

from __future__ import annotations

from dataclasses import dataclass

PAPER = "Kim & Kim, CVPR 2024"
DATASETS = ("celebahq", "div2k", "lsun-bedroom", "lsun-tower")
"""Data sets that the tables below were measured on."""
KNOWN_BY_KIND = {"celebahq": "celebahq"}
"""Kind of a shard set's source → data set. A shard set of LSUN does not say which category it holds, and one of DIV2K
holds crops, not the pictures that were measured."""

# LSUN Bedroom, 50 k samples. Method → output size → figures; SelfSSIM against 128, 160 and 192 on 5 k samples.
BEDROOM: dict[str, dict[str, dict[str, float]]] = {
    "MSPIE": {
        "128x128": {"fid": 11.39, "precision": 0.6645, "recall": 0.2697},
        "160x160": {"fid": 16.45, "precision": 0.6384, "recall": 0.2309},
        "192x192": {"fid": 12.65, "precision": 0.5810, "recall": 0.2593},
    },
    "ScaleParty": {
        "128x128": {"fid": 10.15, "precision": 0.6250, "recall": 0.2063},
        "160x160": {"fid": 9.85, "precision": 0.6414, "recall": 0.2202},
        "192x192": {"fid": 9.91, "precision": 0.6477, "recall": 0.2110},
    },
    "paper": {
        "128x128": {"fid": 7.20, "precision": 0.5969, "recall": 0.3826},
        "160x160": {"fid": 7.43, "precision": 0.5852, "recall": 0.3212},
        "192x192": {"fid": 7.73, "precision": 0.5957, "recall": 0.2798},
    },
}
BEDROOM_SELFSSIM = {"MSPIE": ".10-.12", "ScaleParty": ".89-.95", "paper": ".95-.99"}

# CelebA-HQ, trained on FFHQ, 16-pixel input. Method → scale → PSNR (dB), LPIPS.
CELEBA_SR: dict[str, dict[str, dict[str, float]]] = {
    "LIIF": {
        "x5.3": {"psnr_rgb": 27.52, "lpips": 0.1207},
        "x7": {"psnr_rgb": 25.09, "lpips": 0.1678},
        "x10": {"psnr_rgb": 22.97, "lpips": 0.2246},
        "x10.7": {"psnr_rgb": 22.39, "lpips": 0.2276},
        "x12": {"psnr_rgb": 21.81, "lpips": 0.2332},
    },
    "IDM": {
        "x5.3": {"psnr_rgb": 23.34, "lpips": 0.0526},
        "x7": {"psnr_rgb": 23.55, "lpips": 0.0736},
        "x10": {"psnr_rgb": 23.46, "lpips": 0.1171},
        "x10.7": {"psnr_rgb": 23.30, "lpips": 0.1238},
        "x12": {"psnr_rgb": 23.06, "lpips": 0.1800},
    },
    "paper": {
        "x5.3": {"psnr_rgb": 24.66, "lpips": 0.0455},
        "x7": {"psnr_rgb": 24.13, "lpips": 0.0690},
        "x10": {"psnr_rgb": 23.64, "lpips": 0.1110},
        "x10.7": {"psnr_rgb": 23.62, "lpips": 0.1183},
        "x12": {"psnr_rgb": 23.52, "lpips": 0.1427},
    },
}

# LSUN at 256 pixels from 16-pixel inputs. Data set → scale → figures of the paper's method.
LSUN_SR: dict[str, dict[str, dict[str, float]]] = {
    "lsun-bedroom": {"x16": {"psnr_rgb": 20.08, "lpips": 0.3269}},
    "lsun-tower": {"x16": {"psnr_rgb": 21.24, "lpips": 0.1897}},
}

# DIV2K's 100 validation pictures, shrunk and enlarged again; ×4 has no LPIPS, the others no SSIM.
DIV2K_SR: dict[str, dict[str, dict[str, float]]] = {
    "paper": {
        "x4": {"psnr_div2k": 27.61, "ssim": 0.81},
        "x8": {"psnr_div2k": 23.82, "lpips": 0.4265},
        "x12": {"psnr_div2k": 22.73, "lpips": 0.5463},
        "x17": {"psnr_div2k": 21.83, "lpips": 0.6225},
    },
}

# SR pictures a second on one RTX 4090; IDM runs out of memory at ×200.
SPEED: dict[str, dict[str, float]] = {
    "IDM": {"x8": 0.0202, "x12": 0.0200, "x30": 0.0065, "x100": 0.0004},
    "paper": {"x8": 0.2568, "x12": 0.2510, "x30": 0.2473, "x100": 0.1833, "x200": 0.0982},
}
SPEED_CAPTION = f"Published speed: {PAPER}, super-resolution on one RTX 4090."


@dataclass(frozen=True)
class Published:
    """Rows by method → setting → figure, and what they were measured on."""

    caption: str
    rows: dict[str, dict[str, dict[str, float]]]


def speed_beside(dataset: str, task: str, sr_mode: str, lr_size: int) -> dict[str, dict[str, float]]:
    """Published pictures a second by method and scale, where the report is of the same task, data and input size."""
    is_theirs = sr_mode == "fixed-input" and bool(beside(dataset, task, sr_mode, lr_size))
    return SPEED if is_theirs else {}


def beside(dataset: str, task: str, sr_mode: str = "", lr_size: int = 0) -> list[Published]:
    """Published tables that belong beside a report: those of its data set, its task, its way to make pairs and its
    input size."""
    if (dataset, task) == ("lsun-bedroom", "generation"):
        return [Published(f"Published: {PAPER}, LSUN Bedroom, 50 000 samples, Inception 2015 and VGG16.", BEDROOM)]
    if (dataset, task, sr_mode) == ("div2k", "sr", "fixed-truth"):
        return [Published(f"Published: {PAPER}, DIV2K validation pictures; LPIPS with AlexNet.", DIV2K_SR)]
    if (task, sr_mode, lr_size) != ("sr", "fixed-input", 16):
        return []
    if dataset == "celebahq":
        faces = f"Published: {PAPER}, CelebA-HQ by models trained on FFHQ, 16-pixel input; LPIPS with AlexNet."
        return [Published(faces, CELEBA_SR)]
    if dataset in LSUN_SR:
        return [Published(f"Published: {PAPER}, LSUN, 16-pixel input.", {"paper": LSUN_SR[dataset]})]
    return []
