"""How the champion changes: one process at a time, and with a way back whatever was killed in between."""

from __future__ import annotations

import threading

import pytest
from tiny_bundle import make_bundle

from orchestration.cli import main
from orchestration.registry import champion
from orchestration.registry import versions as registry
from orchestration.registry.lineage import lineage
from orchestration.registry.promotion import Decision
from orchestration.tracking import store as tracking
from pipeline.errors import UserError

YES = Decision(promote=True, rule="always", reasons=("it is told to",))


@pytest.fixture
def uri(tmp_path, cache, monkeypatch):
    """Five versions of one model; each is promoted as it is asked for."""
    uri = tracking.tracking_uri(None, tmp_path / "store")
    bundle = make_bundle(tmp_path / "b")
    for _ in range(5):
        registry.register(bundle, "m", tracking_uri=uri)
    monkeypatch.setattr(registry, "stored_report", lambda *_, **__: {"data": "/d", "data_digest": "d", "figures": []})
    monkeypatch.setattr(registry, "decide", lambda *_: YES)
    return uri


def promote(uri: str, version: str) -> None:
    assert registry.promote("m", tracking_uri=uri, candidate=version).promote


def now(uri: str) -> tuple[str, str]:
    """The champion, and what its lineage says was champion before."""
    version = registry.require_version("m", "champion", uri)
    return version.version, lineage(version.uri, tracking_uri=uri)["champion before"]


def before(uri: str, version: str) -> str:
    return lineage(f"models:/m/{version}", tracking_uri=uri)["champion before"]


def test_of_two_that_were_judged_at_once_one_is_promoted(uri, monkeypatch):
    """Both were better than version 1. Between its look and its move each takes its time."""
    promote(uri, "1")
    judged, moved, outcomes = threading.Barrier(2), champion.move, {}
    monkeypatch.setattr(registry, "decide", lambda *_: judged.wait() >= 0 and YES)

    def slowly(*arguments: str) -> None:
        threading.Event().wait(1.0)
        moved(*arguments)

    monkeypatch.setattr(champion, "move", slowly)

    def judge(version: str) -> None:
        try:
            outcomes[version] = registry.promote("m", tracking_uri=uri, candidate=version).promote
        except UserError as error:
            outcomes[version] = str(error)

    threads = [threading.Thread(target=judge, args=(version,)) for version in "23"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner, loser = sorted(outcomes, key=lambda version: outcomes[version] is not True)
    assert outcomes[winner] is True and "changed while it was being judged" in outcomes[loser], outcomes
    assert now(uri) == (winner, "version 1") and before(uri, loser) == "was never champion"
    assert "latentzoom.promotion" not in registry.require_version("m", loser, uri).tags
    names = [model.name for model in tracking.client(uri).search_registered_models()]
    assert names == ["m"]  # the lock was given back


def killed_at(monkeypatch, uri: str, name: str, version: str) -> None:
    """Promote `version`, and be killed at the client's call `name`."""
    with monkeypatch.context() as patch:
        client = tracking.client(uri)
        patch.setattr(client, name, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            registry.promote("m", tracking_uri=uri, candidate=version)


def test_a_promotion_that_was_killed_before_it_moved_never_happened(uri, monkeypatch):
    for version in "123":
        promote(uri, version)
    killed_at(monkeypatch, uri, "set_registered_model_alias", "4")
    killed_at(monkeypatch, uri, "set_registered_model_alias", "2")  # which was champion once
    assert now(uri) == ("3", "version 2") and before(uri, "4") == "was never champion"
    assert [registry.rollback("m", tracking_uri=uri).version for _ in range(2)] == ["2", "1"]
    assert before(uri, "2") == "version 1"  # and not 3, which the killed promotion had noted
    with pytest.raises(UserError, match="nothing to go back to"):
        registry.rollback("m", tracking_uri=uri)


def test_a_promotion_that_was_killed_after_it_moved_has_a_way_back(uri, monkeypatch):
    promote(uri, "1")
    killed_at(monkeypatch, uri, "delete_model_version_tag", "2")
    assert now(uri) == ("2", "version 1")
    promote(uri, "3")
    assert before(uri, "2") == "version 1" and now(uri) == ("3", "version 2")
    assert registry.rollback("m", tracking_uri=uri).version == "2"
    assert registry.rollback("m", tracking_uri=uri).version == "1"


def test_what_a_killed_process_held_is_taken_over(uri, monkeypatch):
    monkeypatch.setattr(champion, "LEFT_S", 0.5)
    tracking.client(uri).create_registered_model("m_champion_lock", tags={"latentzoom.owner": "gone"})
    promote(uri, "1")
    assert main(["lineage", "models:/m@champion", "--tracking-uri", uri]) == 0
