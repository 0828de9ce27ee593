"""The models that may be chosen, by their addresses; each is loaded when it is first asked for, and stays until others
are asked for."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from orchestration.pictures.output import Dtype, load_model
from orchestration.registry import versions as registry
from orchestration.serve.batching import StepBatches
from orchestration.tracking import store as tracking
from pipeline.errors import UserError
from pipeline.model import LatentZoom
from pipeline.starter import LOOKS
from training.evaluation.report import Report

MAX_LISTED = 100
"""Registered models in the list."""
MAX_LOADED = 4
"""Models in memory, besides those that a notebook put here."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A model that may be chosen. figures: of its evaluation report, by name."""

    address: str
    title: str
    task: str = ""
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """A model in memory. name: exactly which one, with its digest. batches: what evaluates its denoiser."""

    model: LatentZoom
    name: str
    batches: list[StepBatches] = field(default_factory=list)
    is_lasting: bool = False

    def batched(self) -> Loaded:
        def wrap(run: Callable[..., Tensor]) -> StepBatches:
            self.batches.append(StepBatches(run))
            return self.batches[-1]

        self.model.run_denoiser_by(wrap)
        return self


class Catalogue:
    """`addresses` (the first is the default), the starters, and the champions of the tracking store. on_unloaded:
    called with what is let go of, so that nobody holds it longer."""

    def __init__(self, addresses: list[str], *, device: str = "", dtype: Dtype = "float32", store: str = "") -> None:
        self.device, self.dtype, self.store = device, dtype, store
        self.addresses = list(dict.fromkeys([*addresses, *(f"starter:{look}" for look in LOOKS)]))
        self.on_unloaded: Callable[[Loaded], object] = lambda loaded: None
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._loading: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def default(self) -> str:
        return self.addresses[0]

    def get(self, address: str = "") -> Loaded:
        """The model at an address of this catalogue. Raises `UserError` for others: nobody makes a server load what
        its owner did not offer."""
        address = address or self.default
        if (held := self._held(address)) is not None:
            return held
        if address not in self.addresses and address not in self._champions():
            raise UserError(f"this server offers no model {address[:100]!r}; GET /models lists them")
        with self._lock:
            loading = self._loading.setdefault(address, threading.Lock())
        with loading:  # once, while others go on with theirs
            if (held := self._held(address)) is not None:
                return held
            loaded = Loaded(*load_model(address, self.device, self.store, self.dtype)).batched()
            with self._lock:
                self._loaded[address] = loaded
                passing = [one for one in self._loaded if not self._loaded[one].is_lasting]
                gone = [self._loaded.pop(one) for one in passing[: max(0, len(passing) - MAX_LOADED)]]
        for old in gone:
            self._let_go(old)
        return loaded

    def _let_go(self, loaded: Loaded) -> None:
        for batches in loaded.batches:
            batches.close()
        self.on_unloaded(loaded)

    @property
    def num_loaded(self) -> int:
        return len(self._loaded)

    def _held(self, address: str) -> Loaded | None:
        with self._lock:
            if address in self._loaded:
                self._loaded.move_to_end(address)
            return self._loaded.get(address)

    def add(self, address: str, model: LatentZoom) -> str:
        """Offer a model that is in memory already → its address: the one given, numbered where another has it."""
        with self._lock:
            names = itertools.chain([address], (f"{address} #{number}" for number in itertools.count(2)))
            address = next(n for n in names if n not in self._loaded or self._loaded[n].model is model)
            self._loaded[address] = Loaded(model, f"{address} {id(model)}", is_lasting=True)
            self.addresses = list(dict.fromkeys([address, *self.addresses]))
        return address

    def refresh(self) -> None:
        """Let go of models whose alias names another version now. Raises `UserError` where the store is silent."""
        for address, loaded in list(self._loaded.items()):
            if loaded.is_lasting or not address.startswith("models:/") or "@" not in address:
                continue
            name, which = registry.parse_model_uri(address)
            version = registry.get_version(name, which, tracking_uri=self.store or None)
            if version is not None and not loaded.name.startswith(f"models:/{name}/{version.version} "):
                with self._lock:
                    is_old = self._loaded.get(address) is loaded
                    if is_old:
                        del self._loaded[address]
                if is_old:
                    self._let_go(loaded)

    def listed(self) -> tuple[list[Listed], str]:
        """All that may be chosen, and why those of the store are missing: "" where they are not."""
        champions: dict[str, Listed] = {}
        problem = ""
        try:
            champions = self._champions()
            self.refresh()  # what is listed is what draws
        except UserError as error:  # what is here already can be used still
            problem = str(error)
        own = [Listed(address=a, title=a, **self._known(a)) for a in self.addresses if a not in champions]
        return [*own, *champions.values()], problem

    def _known(self, address: str) -> dict[str, Any]:
        loaded = self._loaded.get(address)
        task = loaded.model.config.task if loaded else "direct" if address.startswith("starter:") else ""
        return {"task": task}

    def _champions(self) -> dict[str, Listed]:
        """Registered models with a champion, by address."""
        if not self.store:
            return {}
        with tracking.user_errors(self.store):
            models = tracking.client(self.store).search_registered_models(max_results=MAX_LISTED)
        listed = (self._champion(model.name) for model in models)
        return {found.address: found for found in listed if found is not None}

    def _champion(self, name: str) -> Listed | None:
        version = registry.get_version(name, registry.CHAMPION, tracking_uri=self.store)
        if version is None:
            return None
        figures: dict[str, float] = {}
        with contextlib.suppress(UserError):  # a report that is lost is no reason not to look at the model
            if report := registry.stored_report(version, tracking_uri=self.store):
                figures = {
                    f"{f.name} {f.setting}": f.value for f in Report.from_dict(report).figures if f.method == "ours"
                }
        return Listed(
            address=f"models:/{name}@{registry.CHAMPION}",
            title=f"{name}, version {version.version}",
            task=version.tags.get("latentzoom.task", ""),
            figures=figures,
        )
