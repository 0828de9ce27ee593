"""An actor whose answer is lost with its connection: Ray would wait for it for ever. Without Ray, whose links cannot be
cut at a chosen moment."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError

from pipeline.errors import UserError
from preprocess import workers
from preprocess.workers import ActorPool


class Reference:
    """What a call gives: done once `num_looks` have been in vain; never for None."""

    def __init__(self, value: Any, num_looks: int | None = 0) -> None:
        self.value, self.num_looks = value, num_looks

    @property
    def is_done(self) -> bool:
        if self.num_looks:
            self.num_looks -= 1
            return False
        return self.num_looks == 0


class Stream(Reference):
    """News of pieces, of which the one after `lost_after` is lost."""

    def __init__(self, pieces: list[str], lost_after: int | None) -> None:
        super().__init__(None)
        self.news, self.num_left = iter(pieces), lost_after

    @property
    def is_done(self) -> bool:
        return self.num_left != 0

    def __next__(self) -> Reference:
        if self.num_left is not None:
            self.num_left -= 1
        return Reference(next(self.news))


def actor(
    ready: int | None = 0, answer: Any = True, answer_looks: int | None = 0, lost_after: int | None = None
) -> types.SimpleNamespace:
    def call(make: Callable[..., Any]) -> Any:
        made = types.SimpleNamespace(remote=make)
        made.options = lambda **_: made
        return made

    made = types.SimpleNamespace(
        ready=call(lambda: Reference(True, ready)), work=call(lambda pieces: Stream(pieces, lost_after))
    )
    setattr(made, "__ray_ready__", call(lambda: Reference(answer, answer_looks)))  # noqa: B010
    return made


@pytest.fixture
def pool(monkeypatch) -> Callable[..., ActorPool[str, str]]:
    killed = []

    def wait(references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        done = next((one for one in references if one.is_done), None)
        return ([], references) if done is None else ([done], [one for one in references if one is not done])

    def get(reference: Reference) -> Any:
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    monkeypatch.setattr(workers, "ray", types.SimpleNamespace(wait=wait, get=get, kill=killed.append))
    monkeypatch.setattr(workers, "_BEGINS_S", 0.0)
    monkeypatch.setattr(workers, "_begins", lambda actor: getattr(actor, "begins", False))

    def make(*actors: Any, num: int = 1) -> ActorPool[str, str]:
        rest: Iterator[Any] = iter(actors)
        return ActorPool("test", lambda: next(rest), [f"{i}" for i in range(6)], num_workers=num, name_of=str,
                         finished=lambda news: news)  # fmt: skip

    return make


def test_an_answer_that_is_lost_at_the_start(pool, capsys):
    made = pool(actor(ready=None), actor())
    assert sorted(news for _, news in made.run()) == [f"{i}" for i in range(6)] and made.num_lost == 1
    assert "worker 1 died; redoing nothing" in capsys.readouterr().err


def test_one_that_ray_does_not_know_to_have_begun(pool, capsys):
    lost = actor(ready=None, answer_looks=None)
    lost.begins = True
    made = pool(lost, actor())
    assert len(list(made.run())) == 6 and made.num_lost == 1


def test_news_that_are_lost(pool, capsys):
    made = pool(actor(lost_after=1), actor())
    assert sorted(news for _, news in made.run()) == [f"{i}" for i in range(6)] and made.num_lost == 1
    assert "worker 1 died; redoing 1, 2" in capsys.readouterr().err


def test_one_that_is_at_work_for_long_is_left_alone(pool):
    """It answers no question meanwhile, or has answered just before the look."""
    made = pool(actor(ready=7, answer_looks=None))
    assert len(list(made.run())) == 6 and made.num_lost == 0
    made = pool(actor(ready=1))
    assert len(list(made.run())) == 6 and made.num_lost == 0


def test_one_that_cannot_be_asked(pool):
    made = pool(actor(ready=None, answer=ActorUnavailableError("Socket closed", None)), actor())
    assert len(list(made.run())) == 6 and made.num_lost == 1


def test_answers_that_are_always_lost_end_it(pool):
    with pytest.raises(UserError, match="workers do not start: its answer was lost on the way"):
        list(pool(*[actor(ready=None) for _ in range(9)]).run())
