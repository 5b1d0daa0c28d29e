"""Mistakes in actors and tasks of Ray come out in their own words, whatever carries them."""

from __future__ import annotations

import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from configs import UserError
from configs.errors import Unreachable, checked
from tasks import encode, encoder
from tasks.data.actors import Worker
from tasks.data.receipts import receipt_row, receipts
from tasks.drawing import reconstruct
from tasks.scoring import classifier
from tests.helpers.builders import at, context, put_shard, small_recipe


class Halves:
    def __init__(self, error: Exception | None) -> None:
        if error is not None:
            raise error

    def __call__(self, item: int) -> float:
        if item % 2:
            raise UserError(f"{item} is odd")
        return item / 2


def _refuses(*_: Any) -> Any:
    raise Unreachable("the bucket does not answer")


def test_of_plain_items() -> None:
    worker = Worker(Halves, (None,))
    found = [pickle.loads(worker({"item": pickle.dumps(item)})["result"]) for item in (4, 3, 6)]
    assert (found[0], found[2]) == (2.0, 3.0) and isinstance(found[1], UserError) and str(found[1]) == "3 is odd"
    unmade = Worker(Halves, (Unreachable("no such weights"),))
    for _ in range(2):
        with pytest.raises(Unreachable, match=r"^no such weights$"):
            checked(pickle.loads(unmade({"item": pickle.dumps(4)})["result"]))
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        Worker(Halves, (ZeroDivisionError(),))


def test_of_parts() -> None:
    with pytest.raises(Unreachable, match=r"^the bucket does not answer$"):
        list(receipts([receipt_row(_refuses)]))


def test_of_decoding_and_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe()
    shards = put_shard(at(tmp_path), recipe)
    part = shards.files("train/")[0]
    (Path(shards.storage.path) / part.path).write_bytes(b"PAR1")
    asked = pa.table({"part": [part.path], "made_from": [part.sha256]})
    row = encode.decode_part(asked, shards, 32)
    monkeypatch.setattr(encoder.Encoder, "__init__", lambda self, job: None)
    job = context(at(tmp_path), recipe, encode.STAGE, "shard").job
    with pytest.raises(UserError, match=r"train/part-00000\.parquet is not the file that the manifest describes"):
        list(receipts(encoder.EncoderActor(job)(row).to_pylist()))
    monkeypatch.setattr(encoder.Encoder, "__init__", _refuses)
    with pytest.raises(Unreachable, match=r"^the bucket does not answer$"):
        list(receipts(encoder.EncoderActor(job)(row).to_pylist()))


def test_of_single_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "build_classifier", _refuses)
    job = context(at(tmp_path), small_recipe(), encode.STAGE, "shard").job
    [refusal] = classifier._train_remotely(asdict(job), 1)
    assert isinstance(refusal, Unreachable)
    monkeypatch.setattr(reconstruct, "_reconstruct", _refuses)
    assert isinstance(reconstruct._attempted(1, 2, 3), Unreachable)
