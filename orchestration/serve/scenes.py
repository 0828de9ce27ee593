"""Pictures under models, ready to be drawn: one latent each, and the features that all its tiles share.

A scene is made when its first tile is asked for, kept while there is room, and made anew when it is asked for again:
what is on the shelf decides it. Above a picture's own size a tile is drawn from the features; below, a photograph is
shown as it is, reduced, since there is nothing to add.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from orchestration.serve.catalogue import Catalogue, Loaded
from orchestration.serve.deep_zoom import Pyramid
from orchestration.serve.desk import Unwanted
from orchestration.serve.shelf import Entry, Shelf
from orchestration.serve.shown import Shown, shrunk
from pipeline.canvas import Pixels
from pipeline.drawing import Drawing
from pipeline.errors import UserError
from pipeline.reading import Picture, read_picture
from pipeline.sizes import Size, Window

SMALL_TILE = 128
"""Cells of features made at once, so that a place's first tile comes soon; where tiles of any size are the same."""
Look = Literal["ours", "bicubic", "original"]
"""original: of a picture that was shrunk, what it was before."""
SURE = 2.0
"""Seconds for which a scene is taken to be on the shelf still."""
LOOKED_AT = 60.0
"""Seconds for which features of a scene are made ahead after it was asked for."""
_ENCODED = 0.1
"""The part of the work that encoding is where the latent is sampled after it."""


@dataclass
class Progress:
    """How far the latent is: 0 to 1. is_stopped: whether nobody waits for it any more, since the server ends."""

    done: float = 0.0
    is_stopped: Callable[[], bool] = lambda: False

    def is_at(self, done: float) -> None:
        """Raises `Unwanted` where the work is to end."""
        if self.is_stopped():
            raise Unwanted("the server ends")
        self.done = done


class Scene:
    """One picture under one model. given: the picture file; None for a generated one, which is its latent alone. shelf:
    keeps latents that were sampled: made anew they would differ a little by what else was sampled at the time."""

    def __init__(self, entry: Entry, loaded: Loaded, given: Picture | None, cache_bytes: int, shelf: Shelf) -> None:
        self.entry, self.loaded, self._shelf = entry, loaded, shelf
        self.key = entry.id, loaded.name
        self.problem = ""  # why the latent could not be made
        self.picture = picture = None if given is None else shrunk(given, entry.shrink)
        self._original = None if given is None or picture is given else Shown(given)
        self.pyramid = Pyramid(entry.size)
        self.progress = Progress()
        self._cache_bytes = cache_bytes
        self._source = None if picture is None else Shown(picture)
        self._making = threading.Lock()
        self._drawing: Drawing | None = None
        self._focus = 0.5, 0.5  # where it was looked at last, in heights and widths
        self.last_used = time.monotonic()

    @property
    def is_ready(self) -> bool:
        """Whether the latent is there: until then the first tile of `ours` makes it."""
        return self._drawing is not None

    def drawing(self) -> Drawing:
        """At the picture's own size; `at` gives others. The first call makes the latent."""
        with self._making:
            if self._drawing is None:
                self._drawing = self._made()
            return self._drawing

    def is_drawn(self, size: Size, look: Look) -> bool:
        """Whether the picture at (H, W) comes from the latent: smaller than it is, a photograph is shown itself."""
        own = self.pyramid.size
        is_smaller = size != own and size[0] <= own[0] and size[1] <= own[1]
        return look == "ours" and not (is_smaller and self._source is not None)

    def missing(self, level: int, x: int, y: int) -> list[Window]:
        """The tiles of features that a tile of a scene that is ready needs, and that are not there: see `make`."""
        assert self._drawing is not None
        size, window = self.pyramid.level_size(level), self.pyramid.window(level, x, y)
        self._focus = (window[0] + window[2]) / (2 * size[0]), (window[1] + window[3]) / (2 * size[1])
        return self._drawing.at(size).missing(window)

    def ahead(self, num: int) -> list[Window]:
        """At most `num` tiles of features that may be asked for next: the nearest to where it was looked at last, while
        they take less than half of what features may."""
        drawing = self._drawing
        if drawing is None or 2 * drawing.feature_bytes > self._cache_bytes:
            return []
        (height, width), (y, x) = drawing.cells, self._focus

        def distance(tile: Window) -> float:
            return max(abs((tile[0] + tile[2]) / 2 - y * height), abs((tile[1] + tile[3]) / 2 - x * width))

        return heapq.nsmallest(num, drawing.missing(), key=distance)

    def make(self, tile: Window) -> None:
        """One of `missing`."""
        self.drawing().make(tile)

    def tile(self, level: int, x: int, y: int, look: Look) -> Pixels:
        """uint8 (h, w, c) of a tile. Raises `UserError` where there is none."""
        window = self.pyramid.window(level, x, y)
        return self.window(self.pyramid.level_size(level), window, look)

    def window(self, size: Size, window: Window, look: Look) -> Pixels:
        """The window (y0,x0,y1,x1) of the picture at `size`."""
        if look == "original" and self._original is not None:
            return self._original.window(size, window)
        if self.is_drawn(size, look):
            return self.drawing().at(size).pixels(window)
        if self._source is None:
            raise UserError(f"a generated picture has no {look} beside it")
        return self._source.window(size, window)

    @property
    def channels(self) -> int:
        """Of its pixels: grey or RGB, then alpha."""
        return 3 if self._source is None else self._source.channels

    @property
    def num_bytes(self) -> int:
        """Memory that this scene holds."""
        source = sum(held.num_bytes for held in (self._source, self._original) if held is not None)
        with_features = 0 if self._drawing is None else self._drawing.num_bytes
        return source + with_features

    def _made(self) -> Drawing:
        model = self.loaded.model
        latent = self._kept()
        if self.picture is not None:
            if latent is None:
                encoded = 1.0 if model.renders_condition(None) else _ENCODED
                latent = model.latent_of(
                    self.picture,
                    on_tile=lambda done, total: self.progress.is_at(encoded * done / total),
                    on_step=lambda done, total, _: self.progress.is_at(encoded + (1 - encoded) * done / total),
                )
                latent = latent if model.renders_condition(None) else self._keep(latent)
            is_exact = model.decoder is not None and model.decoder.trunk.halo is not None
            tile = SMALL_TILE if is_exact else 0
            return model.drawing_of(self.picture, latent, self.entry.size, tile=tile, cache_bytes=self._cache_bytes)
        recipe = self.entry.recipe
        if latent is None:
            latent = self._keep(
                model.sample_latents(
                    num=1,
                    seed=[recipe["seed"]],
                    num_steps=recipe["steps"],
                    sampler="dpm++",
                    latent_size=recipe["latent_size"],
                    on_step=lambda done, total, _: self.progress.is_at(done / total),
                )
            )
        return self._of_latent(latent)

    def _kept(self) -> Tensor | None:
        """The latent that was kept of this picture under this model."""
        if (data := self._shelf.latent(self.entry, self.loaded.name)) is None:
            return None
        try:
            return load_tensors(data)["latent"]
        except (SafetensorError, KeyError):  # damaged: made anew
            return None

    def _keep(self, latent: Tensor) -> Tensor:
        """The latent, or the one that somebody else kept meanwhile."""
        self._shelf.keep_latent(self.entry, self.loaded.name, save_tensors({"latent": latent.cpu().contiguous()}))
        kept = self._kept()
        return latent if kept is None else kept

    def _of_latent(self, latent: Tensor) -> Drawing:
        side = max(latent.shape[-2:])
        return self.loaded.model.drawing(latent, self.entry.size, tile=side, cache_bytes=self._cache_bytes)

    def put(self, latent: Tensor) -> None:
        """The latent (1,C,h,w) of a generated picture that was sampled with others."""
        with self._making:
            self._drawing = self._of_latent(self._keep(latent))


class Scenes:
    """The scenes in memory; `max_bytes` bounds them together, the ones used longest ago go first."""

    def __init__(self, shelf: Shelf, catalogue: Catalogue, max_bytes: int) -> None:
        self.shelf, self.catalogue, self.max_bytes = shelf, catalogue, max_bytes
        self._scenes: OrderedDict[tuple[str, str], Scene] = OrderedDict()
        self._sure: dict[tuple[str, str], tuple[tuple[str, str], float]] = {}  # keys: a scene that went is not held
        self._lock = threading.Lock()
        self._reading = [threading.Lock() for _ in range(16)]  # many ask for one picture at once: it is read once
        self._is_closed = threading.Event()
        catalogue.on_unloaded = self._forget_model

    def get(self, ident: str, address: str = "") -> Scene:
        """A picture's scene under a model, by default the one it was given with. Raises `NotThere`, `UserError`."""
        entry = self.shelf.get(ident)
        loaded = self.catalogue.get(address or entry.model)
        if entry.recipe and (address or entry.model) != entry.model:
            raise UserError("a generated picture belongs to the model that drew it")
        key = ident, loaded.name
        scene = self._held(key)
        if scene is None:
            with self._reading[hash(key) % len(self._reading)]:
                scene = self._held(key)
                if scene is None:
                    picture = None if entry.recipe else read_picture(self.shelf.data(entry), entry.name)
                    scene = self.add(entry, loaded, picture)
        with self._lock:
            if len(self._sure) > 4 * len(self._scenes) + 16:
                self._sure.clear()
            self._sure[ident, address] = key, time.monotonic()
        return scene

    def at_once(self, ident: str, address: str = "") -> Scene | None:
        """What `get` gave a moment ago, if it is here still: without a look at the disk."""
        with self._lock:
            key, moment = self._sure.get((ident, address), (None, 0.0))
        return None if key is None or time.monotonic() - moment > SURE else self._held(key)

    def _held(self, key: tuple[str, str]) -> Scene | None:
        with self._lock:
            scene = self._scenes.get(key)
            if scene is not None:
                self._scenes.move_to_end(key)
                scene.last_used = time.monotonic()
            return scene

    def ahead(self, num: int) -> list[tuple[Scene, Window]]:
        """At most `num` tiles of features to be made while there is nothing else to do: of the scene that was asked for
        last, then of the one before. None where half of the memory is taken."""
        with self._lock:
            recent = [s for s in reversed(self._scenes.values()) if time.monotonic() - s.last_used < LOOKED_AT]
        if 2 * self.num_bytes() > self.max_bytes:
            return []
        return next(([(scene, tile) for tile in tiles] for scene in recent if (tiles := scene.ahead(num))), [])

    def add(self, entry: Entry, loaded: Loaded, picture: Picture | None) -> Scene:
        """The scene of a picture that was read already."""
        shown = None if picture is None else picture.srgb()  # as pages show it
        scene = Scene(entry, loaded, shown, self.max_bytes // 4, self.shelf)
        scene.progress.is_stopped = self._is_closed.is_set
        with self._lock:
            scene = self._scenes.setdefault(scene.key, scene)
        self.tidy()
        return scene

    def close(self) -> None:
        """Have the making of latents end."""
        self._is_closed.set()

    def forget(self, ident: str) -> None:
        self._drop(lambda scene: scene.entry.id == ident)

    def _forget_model(self, loaded: Loaded) -> None:
        self._drop(lambda scene: scene.loaded is loaded)

    def _drop(self, is_one: Callable[[Scene], bool]) -> None:
        with self._lock:
            for key in [key for key, scene in self._scenes.items() if is_one(scene)]:
                del self._scenes[key]
            self._sure.clear()

    def tidy(self) -> None:
        """Let go of scenes until the rest fits; the newest stays."""
        with self._lock:
            while len(self._scenes) > 1 and sum(scene.num_bytes for scene in self._scenes.values()) > self.max_bytes:
                self._scenes.popitem(last=False)

    def num_bytes(self) -> int:
        with self._lock:
            return sum(scene.num_bytes for scene in self._scenes.values())

    def generate(self, scenes: list[Scene]) -> None:
        """Sample the latents of several generated pictures of one model, size and number of steps together."""
        recipe = scenes[0].entry.recipe

        def on_step(done: int, total: int, _: Tensor) -> None:
            for scene in scenes:
                scene.progress.is_at(done / total)

        latents = scenes[0].loaded.model.sample_latents(
            num=len(scenes),
            seed=[scene.entry.recipe["seed"] for scene in scenes],
            num_steps=recipe["steps"],
            sampler="dpm++",
            latent_size=tuple(recipe["latent_size"]),
            on_step=on_step,
        )
        for scene, latent in zip(scenes, latents):
            scene.put(latent[None])
