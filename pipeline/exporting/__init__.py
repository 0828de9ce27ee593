"""Bundles written as others read them: a folder for the Hugging Face hub, a diffusers pipeline, ONNX.

front_matter.py        the head of a card as the hub reads it: licence, tags, metrics
hub_folder.py          a bundle with that card
diffusers_folder.py    a pipeline folder; latentzoom_pipeline.py and latentzoom_parts.py are copied into it
onnx_files.py          encoder and implicit decoder as ONNX, checked by onnxruntime
`pipeline.importing` reads all of them back.
"""
