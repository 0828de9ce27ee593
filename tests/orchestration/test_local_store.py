"""A store in a SQLite file: reading makes and changes nothing, and a folder that was moved is found again."""

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from PIL import Image
from test_registry import report
from tiny_bundle import make_bundle

from orchestration.cli import main
from orchestration.registry import versions as registry
from orchestration.registry.lineage import LOST, lineage
from orchestration.tracking import connection
from orchestration.tracking import store as tracking
from pipeline.errors import UserError

READING = {
    "generate": ["--model", "models:/m@champion", "--size", "24", "--steps", "1", "--out", "made"],
    "upscale": ["--model", "models:/m@champion", "--scale", "2", "in.png", "out.png"],
    "evaluate": ["--model", "models:/m@champion", "--task", "generation", "--data", "data", "--out", "made"],
    "promote": ["m"],
    "rollback": ["m"],
    "lineage": ["models:/m@champion"],
}


def store(folder):
    return f"sqlite:///{folder}/mlflow.db"


def registered(tmp_path, folder):
    """A store in `folder` with one champion, its report given."""
    bundle = make_bundle(tmp_path / "bundle")
    registry.register(bundle, "m", tracking_uri=store(folder), report=report(0.5), dataset=("/train", "t" * 64))
    assert registry.promote("m", tracking_uri=store(folder)).promote
    shutil.rmtree(tmp_path / "cache")  # else everything is found there
    return bundle


@pytest.mark.parametrize(
    ("verb", "where"),
    [
        *[(verb, "default") for verb in READING],
        *[("lineage", where) for where in ("mistyped", "empty file", "another data base")],
    ],
)
def test_reading_never_makes_a_store(tmp_path, monkeypatch, capsys, cache, verb, where):
    work = tmp_path / "work"
    (work / "data").mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    words, uri = "there is no store at", []
    if where == "mistyped":
        uri = ["--tracking-uri", "sqlite:///stroe/mlflow.db"]
    elif where == "empty file":
        (work / "mlflow.db").touch()
        words = "is empty, no MLflow store"
    elif where == "another data base":
        with contextlib.closing(sqlite3.connect(work / "mlflow.db")) as other, other:
            other.execute("CREATE TABLE friends (name)")
        words = "is a data base of something else"
    Image.new("RGB", (8, 8), (9, 99, 199)).save(work / "in.png")
    before = contents(tmp_path)
    assert main([verb, *READING[verb], *uri]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line and "--tracking-uri" in line
    assert contents(tmp_path) == before


def contents(folder):
    """Every file below `folder` with the hash of what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def open_folder():
    """A folder that other users may enter, unlike pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="latentzoom-store-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def without_writing(folder):
    """Nobody but root can write below `folder`, and we are not root."""
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(path.stat().st_mode & ~0o222)
    is_root = os.geteuid() == 0
    if is_root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if is_root:
            os.setresuid(0, 0, 0)
        for path in paths:
            path.chmod(path.stat().st_mode | 0o200)


def test_a_store_that_cannot_be_written_can_be_read(tmp_path, open_folder, cache):
    bundle = registered(tmp_path, open_folder)
    uri = store(open_folder)
    connection._client.cache_clear()
    before = contents(open_folder)
    with without_writing(open_folder):
        folder = registry.resolve("models:/m@champion", tracking_uri=uri)  # nor can the cache be written
        assert folder.is_relative_to(open_folder)
        assert registry.stored_report(registry.require_version("m", "1", uri), tracking_uri=uri)["num"] == 8
        fields = lineage("models:/m@champion", tracking_uri=uri)
        assert not any(LOST in value for value in fields.values())
        for write in (
            lambda: tracking.start_run(uri, "x"),
            lambda: registry.rollback("m", tracking_uri=uri),
            lambda: registry.promote("m", tracking_uri=uri),
        ):
            with pytest.raises(UserError, match="^cannot write to the store [^\n]* no permission for [^\n]*$"):
                write()
    assert contents(open_folder) == before
    assert registry.bundle_digest(bundle) == registry.bundle_digest(folder)


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_store_is_found_again_where_it_was_moved(tmp_path, cache, capsys, how):
    old, new = tmp_path / "old", tmp_path / "elsewhere" / "new"
    bundle = registered(tmp_path, old)
    new.parent.mkdir()
    shutil.move(old, new) if how == "moved" else shutil.copytree(old, new)
    before = contents(tmp_path)
    uri = store(new)
    version = registry.require_version("m", "champion", uri)
    assert registry.bundle_place(version, uri).startswith(f"{new}/")
    fields = lineage("models:/m@champion", tracking_uri=uri)
    assert fields["bundle"].startswith(f"{new}/") and "lpips" in fields["figures"]
    assert str(old) not in json.dumps({k: v for k, v in fields.items() if k != "bundle source"})
    assert contents(tmp_path) == before
    folder = registry.resolve("models:/m@champion", tracking_uri=uri)
    assert registry.bundle_digest(folder) == registry.bundle_digest(bundle)

    untouched = contents(old) if old.exists() else None
    second = registry.register(make_bundle(tmp_path / "b2", seed=2), "m", tracking_uri=uri, report=report(0.4))
    assert (contents(old) if old.exists() else None) == untouched  # nothing is written where it was
    assert registry.bundle_place(second, uri).startswith(f"{new}/mlartifacts/")
    assert "was moved or copied" in capsys.readouterr().err
    # MLflow's own tools find everything from now on
    assert tracking.client(uri).download_artifacts(version.run_id, "evaluation/report.json", str(tmp_path / "cache"))
    located = tracking.client(uri).get_model_version_download_uri("m", "1")
    assert Path(located).is_relative_to(new) and Path(located, "MLmodel").is_file()
    registry.register(make_bundle(tmp_path / "b3", seed=3), "m", tracking_uri=uri)
    assert "was moved" not in capsys.readouterr().err


def test_what_is_lost_is_named_with_its_place(tmp_path, cache, capsys):
    folder = tmp_path / "store"
    registered(tmp_path, folder)
    shutil.rmtree(folder / "mlartifacts")
    uri = ["--tracking-uri", store(folder)]
    assert main(["generate", "--model", "models:/m@champion", *uri]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "the bundle of models:/m/1 is lost: there is nothing at" in line and str(folder) in line
    assert main(["lineage", "models:/m@champion", *uri, "--json"]) == 1
    fields = json.loads(capsys.readouterr().out)
    assert fields["bundle"].startswith(f"{LOST}: the bundle of models:/m/1 is lost") and str(folder) in fields["bundle"]
    assert fields["figures"].startswith(LOST) and fields["training data"].startswith("/train")
    assert not (folder / "mlartifacts").exists()


def test_a_data_base_that_was_moved_alone_keeps_its_artifacts_where_they_are(tmp_path, cache):
    old, new = tmp_path / "old", tmp_path / "new"
    registered(tmp_path, old)
    new.mkdir()
    shutil.move(old / "mlflow.db", new / "mlflow.db")
    version = registry.register(make_bundle(tmp_path / "b2", seed=2), "m", tracking_uri=store(new))
    assert registry.bundle_place(version, store(new)).startswith(f"{old}/")
    assert registry.resolve("models:/m/1", tracking_uri=store(new)).is_dir()


@pytest.mark.slow
def test_a_removed_run_does_not_hide_the_lineage(tmp_path, cache):
    folder = tmp_path / "store"
    registered(tmp_path, folder)
    uri = store(folder)
    version = registry.require_version("m", "champion", uri)
    tracking.client(uri).delete_run(version.run_id)
    assert ", deleted)" in lineage("models:/m@champion", tracking_uri=uri)["run"]
    command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", uri, "--run-ids", version.run_id]
    subprocess.run(
        command, check=True, capture_output=True, cwd=tmp_path, env=os.environ | {"MLFLOW_TRACKING_URI": uri}
    )
    fields = lineage("models:/m@champion", tracking_uri=uri)
    assert fields["run"].startswith(f"{LOST}: {version.run_id}")
    assert fields["training data"] == f"/train (sha256 {'t' * 64})" and fields["encoder sha256"]
    assert fields["bundle"].startswith(str(folder)) and "lpips at x2 0.5" in fields["figures"]
    assert main(["lineage", "models:/m@champion", "--tracking-uri", uri]) == 0
    registry.register(make_bundle(tmp_path / "b2", seed=2), "m", tracking_uri=uri, report=report(0.4))
    assert registry.promote("m", tracking_uri=uri).promote  # against the report that the champion was registered with


def test_every_reading_verb_of_a_store_that_cannot_be_written(tmp_path, open_folder, cache, monkeypatch, capsys):
    registered(tmp_path, open_folder / "store")
    work = open_folder / "work"
    work.mkdir(parents=True)
    Image.new("RGB", (8, 8), (9, 99, 199)).save(work / "in.png")
    monkeypatch.chdir(work)
    connection._client.cache_clear()
    before = contents(open_folder / "store")
    work.chmod(0o777)
    with without_writing(open_folder / "store"):
        for verb in ("lineage", "generate", "upscale"):
            arguments = [verb, *READING[verb], "--tracking-uri", store(open_folder / "store")]
            assert main(arguments) == 0, capsys.readouterr()
    assert contents(open_folder / "store") == before
    assert {"made", "out.png"} <= {file.name for file in work.iterdir()}
