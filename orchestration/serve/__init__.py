"""`latentzoom serve`: pictures over HTTP, tile by tile, as one zooms, and the page that shows them.

shelf       what was given, on disk: picture files and recipes of generated ones; ids that nobody guesses; expiry
catalogue   the models that may be chosen, loaded once
scenes      a picture under a model, ready to be drawn: its latent and the features that tiles share
deep_zoom   which pixels a tile of a level shows
desk        the threads that draw, their queue and its limits
app         the HTTP interface (FastAPI), access, metrics
page/       the page: HTML, style, script, and OpenSeadragon
"""
