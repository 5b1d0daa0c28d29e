"""Files are known by what is in them; nothing of theirs is imported, and nothing runs."""

from __future__ import annotations

import argparse
import datetime
import gzip
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.files import Foreign, file_in, plain, read_content
from tests.helpers.published import foreign_classes, omegaconf

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.half)}


def same(found: Any, expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("name", ["w.safetensors", "w.sft", "w.bin", "w", "w.pt"])
def test_the_suffix_says_nothing(name: str, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / name)
    same(read_content(tmp_path / name).values, TENSORS)
    for zipped in (True, False):
        torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=zipped)
        same(read_content(tmp_path / name).values, TENSORS)


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_are_data(zipped: bool, tmp_path: Path) -> None:
    plainly = {"model": {"model_type": "LightningDiT-B/1", "semantic_chans": 16}, "sizes": [1, [2]], "none": None}
    with omegaconf() as config, foreign_classes("easydict.EasyDict", base=dict) as (easy,):
        content = {
            "ema": TENSORS,
            "config": config(plainly),
            "easy": easy(a=easy(b=1)),
            "args": argparse.Namespace(lr=5e-5, where=Path("/x")),
            "loss": np.float64(0.5),
            "curve": np.arange(3.0),
            "when": datetime.date(2026, 1, 1),
        }
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    before = set(sys.modules)
    found = read_content(tmp_path / "a.pt")
    assert not {name for name in set(sys.modules) - before if "omegaconf" in name or "easydict" in name}
    same(found.values["ema"], TENSORS)
    assert plain(found.values["config"]) == plainly
    assert plain(found.values["easy"]) == {"a": {"b": 1}}
    assert plain(found.values["args"])["lr"] == 5e-5
    assert found.values["loss"] == 0.5 and found.values["curve"].tolist() == [0, 1, 2]
    assert isinstance(found.values["when"], Foreign)
    assert {"omegaconf.dictconfig.DictConfig", "datetime.date"} <= set(found.foreign)
    assert not any(name.startswith("torch.") for name in found.foreign)


class Trap:
    """What a hostile file holds: reading it the careless way calls this."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, subprocess.check_call, io.open, exec])
def test_nothing_runs(function: Any, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    argument = {
        os.mkdir: str(touched),
        subprocess.check_call: ["touch", str(touched)],
        io.open: str(touched),
        exec: f"open({str(touched)!r}, 'w')",
    }[function]
    arguments = (argument, "w") if function is io.open else (argument,)
    torch.save({"model": TENSORS, "extra": Trap(function, *arguments)}, tmp_path / "trap.pt")
    try:
        same(read_content(tmp_path / "trap.pt").values["model"], TENSORS)
    except ValueError as refusal:
        assert "trap.pt: refused, because it holds an object of" in str(refusal)
        assert "\n" not in str(refusal)
    assert not touched.exists()


def test_the_way_out_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that a refusal gives, run as given, makes a file that reads."""
    content = {"ema": {"deep": TENSORS}, "kept": [TENSORS["b"]], "when": datetime.date(2026, 1, 1)}
    monkeypatch.chdir(tmp_path)
    for odd, protocol in ((content, 4), (content | {"here": Trap(os.getcwd)}, 2)):
        torch.save(odd, "odd.pt", pickle_protocol=protocol)
        with pytest.raises(ValueError, match=r"odd\.pt: refused") as refusal:
            read_content(Path("odd.pt"))
        command = str(refusal.value).split('python -c "', 1)[1].split('", then', 1)[0]
        exec(command, {})
        found = read_content(Path("tensors.pt")).values
        same(found["ema"]["deep"], TENSORS)
        assert torch.equal(found["kept"][0], TENSORS["b"])


def sharded(folder: Path, tensors: dict[str, Tensor]) -> Path:
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    folder.mkdir(exist_ok=True)
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    index = folder / "model.safetensors.index.json"
    weights = {name: file for file, own in shards.items() for name in own}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weights}))
    return index


def test_shards_are_read_by_their_index_or_folder(tmp_path: Path) -> None:
    index = sharded(tmp_path / "s", TENSORS)
    same(read_content(index).values, TENSORS)
    assert file_in(index.parent) == index
    (index.parent / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is not beside it; fetch all of its 2"):
        read_content(index)
    index.write_text(json.dumps({"weight_map": {"a.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="no plain file name"):
        read_content(index)
    index.write_text(json.dumps({"weight_map": {"c": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match=r"lack 1 tensors \(such as c\)"):
        read_content(index)


def test_a_folder_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "only.pt").touch()
    assert file_in(tmp_path) == tmp_path / "only.pt"
    (tmp_path / "other.pt").touch()
    with pytest.raises(ValueError, match=r"is a folder, not a file \(only.pt, other.pt\); name one file"):
        file_in(tmp_path)
    deepspeed = tmp_path / "deepspeed" / "global_step10"
    deepspeed.mkdir(parents=True)
    (deepspeed / "mp_rank_00_model_states.pt").touch()
    (deepspeed.parent / "latest").touch()
    with pytest.raises(ValueError, match=r"name global_step10/mp_rank_00_model_states.pt in it \(DeepSpeed's\)"):
        file_in(deepspeed.parent)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 2701234567\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (POINTER, r"Git LFS pointer of a file of 2,701,234,567 bytes.*git lfs pull"),
        (b"/annex/objects/MD5E-s1--a", "git-annex pointer"),
        (b"<!DOCTYPE html>\n<html><title> Sign in </title>", r"a web page \(Sign in\), not a file of weights"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
        (b'{"error": "Invalid username or password."}', "JSON without a weight_map.*Invalid username"),
        (b"{cut short", "neither JSON nor weights"),
        (b"not a checkpoint", "begins with b'not a checkp'"),
        (b"PK\x03\x04 cut short", r"damaged or cut short \(14 bytes"),
        (gzip.compress(b"x" * 600, mtime=0), "a gzip archive"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"\x80\x02}q\x00X", "not a torch checkpoint, or damaged"),
    ],
)
def test_what_holds_no_weights_is_told(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"w\.safetensors: .*{words}") as refusal:
        read_content(path)
    assert "\n" not in str(refusal.value) and str(refusal.value).count("w.safetensors") == 1


def test_archives_and_programs_are_told_from_checkpoints(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("weights/model.pt", b"x")
    with pytest.raises(ValueError, match=r"a zip archive \(weights/model.pt\)"):
        read_content(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("net/data.pkl", b"x")
        archive.writestr("net/constants.pkl", b"x")
    with pytest.raises(ValueError, match="TorchScript program"):
        read_content(tmp_path / "script.pt")


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_told(kind: str, share: float, tmp_path: Path) -> None:
    path, tensors = tmp_path / "w.pt", {"a": torch.randn(5000)}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    words = rf"cut short, {int(share * len(whole)):,} of {len(whole):,} bytes" if kind == "safetensors" else "damaged"
    with pytest.raises(ValueError, match=rf"w\.pt: .*{words}.*fetch it again"):
        read_content(path)
