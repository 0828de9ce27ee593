"""Checkpoints are read without running anything in them, and damage is named."""

from __future__ import annotations

import io
import pickle
import pickletools
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import UserError
from pipeline.importing.checkpoint import read_checkpoint


def save(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED) -> str:
    """The zip file at `path` with its members changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return str(path)


def pickle_name(members: dict[str, bytes]) -> str:
    return next(name for name in members if name.endswith("data.pkl"))


def test_tensors_of_every_kind(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    tensors: dict[str, Tensor] = {
        "transposed": base.t(),
        "slice": base[2:4, ::2],
        "shared": base,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        **{
            str(d): torch.arange(5).to(d)
            for d in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32)
        },
        **{str(d): torch.tensor([0, 1, 1]).to(d) for d in (torch.int16, torch.int8, torch.uint8, torch.bool)},
    }
    read = read_checkpoint(save(tmp_path / "a.ckpt", {"state_dict": OrderedDict(tensors)}))
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor.detach()), name


def test_a_module_s_own_state_dict(tmp_path: Path) -> None:
    """It carries `_metadata` beside its items."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    read = read_checkpoint(save(tmp_path / "a.bin", module.state_dict()))
    assert all(torch.equal(read[name], value) for name, value in module.state_dict().items())


def test_safetensors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, str(tmp_path / "a.safetensors"))
    assert torch.equal(read_checkpoint(str(tmp_path / "a.safetensors"))["a"], torch.ones(2))


def test_framework_objects_beside_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callbacks keyed by a class, configurations and optimizers of packages that are not installed here."""
    framework = ModuleType("some_framework")

    class Callback:
        def __init__(self) -> None:
            self.best = torch.tensor(0.5)

    class Settings(dict[str, Any]):
        pass

    class Reduced:
        def __reduce__(self) -> tuple[Any, ...]:
            return Settings, (), {"state": 1}, iter([("a", 1)][:0]), iter([("key", self.__class__)])

    for kind in (Callback, Settings, Reduced):
        kind.__module__, kind.__qualname__ = "some_framework", kind.__name__
        setattr(framework, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "some_framework", framework)
    content = {
        "callbacks": {Callback: {"best_model_score": torch.tensor(1.0)}, "other": Callback()},
        "hyper_parameters": Settings(a=[1, Settings()]),
        "more": Reduced(),
        "path": tmp_path,
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "seen": {1, 2},
        "state_dict": {"weight": torch.ones(2, 2)},
    }
    path = save(tmp_path / "a.ckpt", content)
    monkeypatch.delitem(sys.modules, "some_framework")
    read = read_checkpoint(path)
    assert list(read) == ["weight"] and torch.equal(read["weight"], torch.ones(2, 2))


class Touch:
    """Unpickling this calls `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def hostile_objects(mark: Path) -> dict[str, Any]:
    """Objects that create the file `mark` when an ordinary unpickler reads them."""
    import os
    import subprocess

    code = f"open({str(mark)!r}, 'w').close()"
    return {
        "os.system": Touch(os.system, f"touch {mark}"),
        "subprocess": Touch(subprocess.check_call, ["touch", str(mark)]),
        "exec": Touch(exec, code),
        "eval": Touch(eval, code),
        "nested": OrderedDict(a=[Touch(exec, code)]),
        "open": Touch(open, str(mark), "w"),
        "getattr": Touch(getattr, Touch(__import__, "os"), "system"),
        "as a key": {Touch(exec, code): 1},
    }


@pytest.mark.parametrize("name", list(hostile_objects(Path("unused"))))
def test_a_hostile_pickle_does_not_run(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = save(tmp_path / "a.ckpt", {"state_dict": {"weight": torch.ones(1)}, "extra": hostile_objects(mark)[name]})
    assert list(read_checkpoint(path)) == ["weight"]
    assert not mark.exists()


def test_the_hostile_pickle_would_have_run(tmp_path: Path) -> None:
    """The test above means something only if these objects do harm elsewhere."""
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(hostile_objects(mark)["exec"]))
    assert mark.exists()


def test_a_hostile_entry_in_the_state_dict_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    state = {"weight": torch.ones(1), "evil": hostile_objects(mark)["exec"]}
    with pytest.raises(UserError, match="'evil' is not a tensor"):
        read_checkpoint(save(tmp_path / "a.ckpt", {"state_dict": state}))
    assert not mark.exists()


def test_naming_a_module_does_not_import_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "side_effect.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "a.ckpt"
    save(path, {"state_dict": {"weight": torch.ones(1)}, "extra": None})
    data = b"\x80\x02}(X\x01\x00\x00\x00acside_effect\nThing\nu."  # {"a": side_effect.Thing}
    assert [op.name for op, _, _ in pickletools.genops(data)].count("GLOBAL") == 1
    with pytest.raises(UserError, match="no state_dict"):
        read_checkpoint(rewrite(path, lambda members: members.update({pickle_name(members): data})))
    assert not (tmp_path / "ran").exists() and "side_effect" not in sys.modules


def test_one_read_leaves_nothing_behind_for_the_next(tmp_path: Path) -> None:
    """A pickle can set attributes on what its names resolve to; torch itself must not be among that."""
    path = tmp_path / "a.ckpt"
    good = save(tmp_path / "good.ckpt", {"weight": torch.ones(1)})
    save(path, {"weight": torch.ones(1)})
    before = torch._utils._rebuild_tensor_v2.__doc__
    # BUILD with a slot state: setattr(torch._utils._rebuild_tensor_v2, "__doc__", "changed")
    data = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x07\x00\x00\x00__doc__X\x07\x00\x00\x00changeds\x86b."
    with pytest.raises(UserError):
        read_checkpoint(rewrite(path, lambda members: members.update({pickle_name(members): data})))
    assert torch._utils._rebuild_tensor_v2.__doc__ == before
    assert torch.equal(read_checkpoint(good)["weight"], torch.ones(1))


def test_tensor_that_reaches_outside_its_storage(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save(path, {"weight": torch.ones(4)})

    def enlarge(members: dict[str, bytes]) -> None:
        name = pickle_name(members)
        assert members[name].count(b"K\x04\x85") == 1  # the size (4,)
        members[name] = members[name].replace(b"K\x04\x85", b"K\xff\x85")

    with pytest.raises(UserError, match="outside its storage"):
        read_checkpoint(rewrite(path, enlarge))


def test_tensor_larger_than_its_storage(tmp_path: Path) -> None:
    """A stride of 0 repeats one number: a file of a few bytes could ask for any amount of memory."""
    path = save(tmp_path / "a.ckpt", {"weight": torch.ones(1).expand(1 << 40)})
    with pytest.raises(UserError, match="outside its storage"):
        read_checkpoint(path)


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save(path, {"weight": torch.ones(400)})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.ckpt is a PyTorch checkpoint that was cut short"):
        read_checkpoint(str(path))
    path.write_bytes(whole)
    with pytest.raises(UserError, match="storage 0 has 8 bytes"):
        read_checkpoint(rewrite(path, lambda m: m.update({n: b"12345678" for n in m if n.endswith("data/0")})))
    path.write_bytes(whole)
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(rewrite(path, lambda m: [m.pop(n) for n in list(m) if n.endswith("data/0")] and None))
    path.write_bytes(whole)
    with pytest.raises(UserError, match="compressed"):
        read_checkpoint(rewrite(path, lambda members: None, zipfile.ZIP_DEFLATED))
    path.write_bytes(whole)
    with pytest.raises(UserError, match="big-endian"):
        read_checkpoint(rewrite(path, lambda m: m.update({n: b"big" for n in m if n.endswith("byteorder")})))


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(str(tmp_path / "none.ckpt"))
    with pytest.raises(UserError, match="no state_dict"):
        read_checkpoint(save(tmp_path / "a.ckpt", [1, 2]))
    with pytest.raises(UserError, match=r"has no data\.pkl"):
        with zipfile.ZipFile(tmp_path / "b.ckpt", "w") as archive:
            archive.writestr("a.txt", "")
        read_checkpoint(str(tmp_path / "b.ckpt"))
    (tmp_path / "c.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a safetensors file"):
        read_checkpoint(str(tmp_path / "c.safetensors"))
    old = io.BytesIO()
    torch.save({"weight": torch.ones(1)}, old, _use_new_zipfile_serialization=False)
    (tmp_path / "d.ckpt").write_bytes(old.getvalue())
    with pytest.raises(UserError, match=r"before 1\.6"):
        read_checkpoint(str(tmp_path / "d.ckpt"))


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").mkdir()
    for folder in (tmp_path, tmp_path / "x.safetensors"):
        with pytest.raises(UserError, match="is a folder; give "):
            read_checkpoint(str(folder))
