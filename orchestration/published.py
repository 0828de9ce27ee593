"""Published figures, for tables that put ours beside them. Each is what its paper reports, on its paper's weights."""

from __future__ import annotations

PAPER = "Kim & Kim, CVPR 2024"

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

CAPTIONS = {
    "generation": "Published rows: LSUN Bedroom, 50 000 samples, Inception 2015 and VGG16 weights.",
    "sr": "Published rows: CelebA-HQ, trained on FFHQ, 16-pixel input; LPIPS with AlexNet.",
}


def rows(task: str) -> dict[str, dict[str, dict[str, float]]]:
    """Published rows that belong beside a report of this task."""
    return {"generation": BEDROOM, "sr": CELEBA_SR}.get(task, {})
