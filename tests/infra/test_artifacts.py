"""Artifacts and storage: complete means manifest, fingerprints mean content, refusals are plain."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from configs import UserError, load_recipe
from infra.artifacts import MANIFEST, Artifact, Manifest, fingerprint
from infra.storage import Storage
from tasks.stage import Context, Job, Outcome, Stage, perform


def _make(root: Path) -> Artifact:
    artifact = Artifact(Storage.at(str(root)).url, "demo", "0123456789abcdef")
    entry = artifact.storage.write_bytes("a/b.bin", b"content", rows=3)
    artifact.complete(Manifest("demo", 1, artifact.fingerprint, {}, {}, {}, (entry,), rows=3, scores={"psnr": 20.0}))
    return artifact


def test_a_manifest_makes_an_artifact(tmp_path: Path) -> None:
    artifact = _make(tmp_path)
    assert artifact.is_complete()
    assert artifact.manifest.rows == 3
    assert artifact.manifest.size == 7
    assert artifact.read("a/b.bin") == b"content"
    assert [entry.path for entry in artifact.files(prefix="a/")] == ["a/b.bin"]
    artifact.discard()
    assert not artifact.is_complete()
    with pytest.raises(UserError, match="not complete"):
        _ = Artifact(artifact.root, artifact.stage, artifact.fingerprint).manifest


def test_changed_missing_and_foreign_content_is_refused(tmp_path: Path) -> None:
    artifact = _make(tmp_path)
    artifact.storage.write_bytes("a/b.bin", b"c0ntent")
    with pytest.raises(UserError, match=r"a/b\.bin is not the file .*expected SHA-256 ed7002b439e9…, found \w{12}…"):
        artifact.read("a/b.bin")
    artifact.storage.write_bytes("a/b.bin", b"cut")
    with pytest.raises(UserError, match=r"expected 7 bytes, found 3\)"):
        artifact.read("a/b.bin")
    artifact.storage.delete("a/b.bin")
    with pytest.raises(UserError, match=r"a/b\.bin is missing"):
        artifact.read("a/b.bin")
    with pytest.raises(UserError, match="no file 'other'"):
        artifact.read("other")
    moved = replace(artifact, fingerprint="f" * 16)
    moved.storage.write_bytes(MANIFEST, artifact.storage.read_bytes(MANIFEST))
    with pytest.raises(UserError, match="belongs to demo/0123456789abcdef"):
        _ = moved.manifest
    artifact.storage.write_bytes(MANIFEST, b'{"stage": ')
    with pytest.raises(UserError, match="damaged"):
        _ = Artifact(artifact.root, artifact.stage, artifact.fingerprint).manifest


def test_a_fingerprint_is_its_content() -> None:
    base = fingerprint("encode", 1, {"encode": {"seed": 0, "x": 1}}, {"shard": "a"})
    assert base == fingerprint("encode", 1, {"encode": {"x": 1, "seed": 0}}, {"shard": "a"})
    assert len({base, fingerprint("encode", 2, {"encode": {"seed": 0, "x": 1}}, {"shard": "a"})}) == 2
    assert len({base, fingerprint("encode", 1, {"encode": {"seed": 1, "x": 1}}, {"shard": "a"})}) == 2
    assert len({base, fingerprint("encode", 1, {"encode": {"seed": 0, "x": 1}}, {"shard": "b"})}) == 2


def test_a_partial_write_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage.at(str(tmp_path))

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        storage.write_bytes("shard.parquet", b"x" * 100)
    assert storage.names() == []
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    ("root", "words"),
    [("nosuch://place", "nosuch"), ("/proc/nowhere", "cannot write"), ("/dev/null/x", "cannot write")],
)
def test_a_bad_root_is_one_clear_line(root: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        Storage.at(root).check_writable()
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def _job(root: Path, stage: Stage) -> Job:
    recipe = load_recipe("demo_tiny")
    return stage.job(recipe, Storage.at(str(root)).url, {})


def test_a_stage_is_performed_once(tmp_path: Path) -> None:
    calls: list[str] = []

    def run(context: Context) -> Outcome:
        calls.append(context.recipe.name)
        return Outcome([context.out.write_bytes("x", b"1")], rows=1, facts={"answer": [1, 2]}, scores={"good": 1.0})

    stage = Stage("count", 1, ("image",), (), run)
    job = _job(tmp_path, stage)
    artifact = perform(stage, job)
    assert perform(stage, Job(**json.loads(json.dumps(job.__dict__)))) == artifact
    assert calls == ["demo_tiny"]
    assert artifact.manifest.facts == {"answer": [1, 2]}
    assert artifact.manifest.sections == {"image": {"size": 32, "flips": False}}


def test_a_failed_stage_leaves_nothing_to_trust(tmp_path: Path) -> None:
    def run(context: Context) -> Outcome:
        context.out.write_bytes("half", b"1")
        raise UserError("data.source.path: not there")

    stage = Stage("count", 1, (), (), run)
    with pytest.raises(UserError, match="not there"):
        perform(stage, _job(tmp_path, stage))
    assert not Artifact(Storage.at(str(tmp_path)).url, "count", _job(tmp_path, stage).fingerprint).is_complete()


def test_storage_on_s3(s3_root: str) -> None:
    storage = Storage.at(s3_root)
    storage.check_writable()
    entry = storage.write_bytes("part/x.bin", b"12345")
    assert storage.names() == ["part/x.bin"]
    assert storage.read_bytes("part/x.bin") == b"12345"
    assert entry.bytes == 5
    storage.delete()
    assert storage.names() == []


@pytest.mark.parametrize("odd", ["run*", "run?", "run[12]"])
@pytest.mark.parametrize("bucket", [False, True], ids=["disk", "bucket"])
def test_to_delete_below_a_root_of_odd_name_leaves_its_neighbours(
    odd: str, bucket: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    above = request.getfixturevalue("s3_root") if bucket else str(tmp_path)
    root, neighbour = Storage.at(f"{above}/{odd}"), Storage.at(f"{above}/run1")
    for storage in (root, neighbour):
        for name in ("sample/a/part", "sample/a/deep/part", "sample/b"):
            storage.write_bytes(name, b"x")
    root.delete("sample/a")
    assert root.names() == ["sample/b"] and len(neighbour.names()) == 3
    root.delete("sample/nothing")
    root.delete()
    assert root.names() == [] and len(neighbour.names()) == 3


def test_wrong_keys_are_refused(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-value")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match="AWS_ACCESS_KEY_ID") as refused:
        Storage.at(s3_root).check_writable()
    assert "wrong-secret-value" not in str(refused.value)


@pytest.mark.parametrize("bucket", [False, True])
def test_tables_beyond_memory_are_the_same_file(bucket: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    storage = Storage.at(request.getfixturevalue("s3_root") if bucket else str(tmp_path / "root"))
    table = pa.table({"x": [1, 2, 3]})
    for pieces in ([table.slice(0, 2), table.slice(2)], []):
        whole = pa.concat_tables([table.slice(0, 0), *pieces])
        at_once = storage.write_table("one.parquet", whole, 2)
        assert replace(storage.write_tables("two.parquet", pieces, table.schema, 2), path="one.parquet") == at_once
        assert storage.read_bytes("two.parquet") == storage.read_bytes("one.parquet")
