"""Weights that people already have, taken over into bundles: released, latent-diffusion and diffusers.

content.py      what a file is by its first bytes, whatever its name says
checkpoint.py   reads tensors out of a .ckpt without running anything in it
names.py        our parameter name → the name in a checkpoint
transfer.py     strict copying: what is missing or left over is named
diffusers_files.py   which file of a diffusers folder holds the weights, here or on the hub
settings.py     a checkpoint's YAML configuration → ModelConfig
latent_diffusion.py, diffusers_folder.py   the two families, each to a Bundle
"""
