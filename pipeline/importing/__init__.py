"""Weights that people already have, taken over into bundles: released, latent-diffusion and diffusers.

checkpoint.py   reads tensors out of a .ckpt without running anything in it
names.py        our parameter name → the name in a checkpoint
transfer.py     strict copying: what is missing or left over is named
settings.py     a checkpoint's YAML configuration → ModelConfig
latent_diffusion.py, diffusers_folder.py   the two families, each to a Bundle
"""
