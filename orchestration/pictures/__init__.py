"""What `upscale` and `generate` do: where pictures come from and go to, and the work between."""
