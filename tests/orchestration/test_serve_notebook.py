"""`LatentZoom.view` in a notebook: the page inline, with the picture under the very model."""

from __future__ import annotations

import html
import io
import re

import numpy as np
import requests
import skimage.data
from PIL import Image

from pipeline import LatentZoom


def test_a_view_shows_the_picture_under_the_model(monkeypatch):
    from importlib.metadata import EntryPoint

    point = EntryPoint("page", "orchestration.serve.notebook:view", "latentzoom.viewers")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [point])  # also where it is not installed anew
    model, photo = LatentZoom.starter("sharp"), Image.fromarray(skimage.data.coffee()[:60, :80])
    shown = model.view(photo, height=500)._repr_html_()
    address = html.unescape(re.search(r'src="([^"]+)"', shown)[1])
    assert 'height="500"' in shown and 'title="latentzoom"' in shown
    base, _, ident = address.partition("/?picture=")
    assert requests.get(address, timeout=60).text.startswith("<!doctype html>")
    rendered = requests.get(f"{base}/pictures/{ident}/render", params={"scale": 3}, timeout=60)
    expected = np.asarray(model.upscale(photo, 3)).astype(int)
    assert np.abs(np.asarray(Image.open(io.BytesIO(rendered.content))) - expected).max() <= 1
    again = model.view(np.asarray(photo))
    assert again.address.startswith(base) and again.address != address  # one server for all
