"""A root over months: what lies there, what needs what, what may go, what is damaged, and why two of a stage differ."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from configs import UserError, load_recipe
from configs.load import read_recorded
from infra import differences, integrity, inventory
from infra.artifacts import Artifact, Manifest
from infra.locks import alone, held
from infra.storage import Storage
from tasks.dag import PIPELINE, load_stage

DAY = 86400.0
EXTERNAL = {"shard": {"listing": "a" * 16}}


def make(root: str, stage: str, inputs: dict[str, str], overrides: Sequence[str] = (), days: float = 0.0) -> str:
    """A small artifact of a real stage and recipe, written some days ago; its fingerprint."""
    found = load_stage(stage)
    verb = replace(found, external=(lambda _: EXTERNAL[stage]) if stage in EXTERNAL else None)
    job = verb.job(load_recipe("demo_tiny", overrides), Storage.at(root).url, inputs)
    artifact = Artifact(job.root, stage, job.fingerprint)
    entry = artifact.storage.write_bytes("part.bin", stage.encode() * 10)
    artifact.complete(
        Manifest(stage, verb.version, job.fingerprint, job.recipe, job.sections, job.inputs, (entry,), rows=1)
    )
    age(artifact, days)
    return job.fingerprint


def age(artifact: Artifact, days: float) -> None:
    then = time.time() - days * DAY
    for path in Path(artifact.storage.path).rglob("*"):
        os.utime(path, (then, then))


def make_all(root: str, overrides: Sequence[str] = (), days: float = 0.0) -> dict[str, str]:
    """A whole run of the DAG; fingerprints by stage."""
    made: dict[str, str] = {}
    for name in PIPELINE:
        inputs = {stage: made[stage] for stage in load_stage(name).inputs if stage in made}
        made[name] = make(root, name, inputs, overrides, days)
    return made


def gone(entries: dict[str, inventory.Entry], **rules: object) -> set[str]:
    return {each.artifact.stage for each in inventory.choose(entries, **rules).gone}  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- what lies there


def test_what_lies_there_and_what_uses_it(tmp_path: Path) -> None:
    made = make_all(str(tmp_path), days=3)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("not an artifact")
    half = Artifact(Storage.at(str(tmp_path)).url, "sample", "0123456789abcdef")
    half.storage.write_bytes("part", b"12345")
    entries = inventory.read(str(tmp_path))
    assert set(entries) == {f"{stage}/{name}" for stage, name in made.items()} | {
        half.uri.partition("/sample")[1][1:] + "/0123456789abcdef"
    }
    users = inventory.users(entries)
    assert f"train_dit/{made['train_dit']}" in users[f"encode/{made['encode']}"]
    assert users[f"report/{made['report']}"] == []
    unfinished = entries["sample/0123456789abcdef"]
    assert (unfinished.bytes, unfinished.fault, unfinished.manifest) == (5, "not finished", None)
    assert abs(time.time() - 3 * DAY - entries[f"shard/{made['shard']}"].written) < 60


def test_the_same_on_a_bucket(s3_root: str) -> None:
    made = make_all_on_bucket(s3_root)
    entries = inventory.read(s3_root)
    assert set(entries) == made
    assert all(abs(time.time() - each.written) < 600 for each in entries.values()), "buckets say when, too"
    assert not integrity.faults(entries.values())["shard/" + next(iter(made)).partition("/")[2]]


def make_all_on_bucket(root: str) -> set[str]:
    artifact = Artifact(root, "shard", "0" * 16)
    entry = artifact.storage.write_bytes("part.bin", b"content")
    artifact.complete(Manifest("shard", 1, artifact.fingerprint, {}, {}, {}, (entry,), rows=1))
    return {"shard/" + "0" * 16}


def test_an_artifact_is_meant_by_its_name_its_beginning_or_its_address(tmp_path: Path) -> None:
    made = make_all(str(tmp_path))
    entries = inventory.read(str(tmp_path))
    whole = f"encode/{made['encode']}"
    for wanted in (whole, whole[:12], made["encode"], made["encode"][:8], f"{Storage.at(str(tmp_path)).url}/{whole}/"):
        assert inventory.one(entries, wanted).name == whole
    with pytest.raises(UserError, match="no artifact nothing"):
        inventory.one(entries, "nothing")
    make(str(tmp_path), "shard", {}, ["shard.seed=7"])
    with pytest.raises(UserError, match="shard/ may be shard/"):
        inventory.one(inventory.read(str(tmp_path)), "shard/")


# ----------------------------------------------------------------------------------------------------- what may go


def test_the_newest_stay_with_all_that_they_need(tmp_path: Path) -> None:
    old = make_all(str(tmp_path), ["sample.seed=1"], days=30)
    new = make_all(str(tmp_path), ["sample.seed=2"], days=10)
    assert old["train_dit"] == new["train_dit"], "only the samples differ"
    choice = inventory.choose(inventory.read(str(tmp_path)), keep_last=1)
    assert [each.name for each in choice.gone] == [f"{s}/{old[s]}" for s in ("report", "evaluate", "sample")]
    assert choice.kept[f"shard/{new['shard']}"]


def test_a_kept_report_keeps_what_it_needs_though_that_is_old(tmp_path: Path) -> None:
    made = make_all(str(tmp_path), days=90)
    age(Artifact(Storage.at(str(tmp_path)).url, "report", made["report"]), days=1)
    entries = inventory.read(str(tmp_path))
    assert gone(entries, older_than=30 * DAY) == set()
    assert (
        inventory.choose(entries, older_than=30 * DAY).kept[f"shard/{made['shard']}"]
        == f"report/{made['report']} needs it"
    )
    age(Artifact(Storage.at(str(tmp_path)).url, "report", made["report"]), days=31)
    assert gone(inventory.read(str(tmp_path)), older_than=30 * DAY) == set(PIPELINE)


def test_two_rules_let_go_what_both_let_go(tmp_path: Path) -> None:
    make_all(str(tmp_path), ["sample.seed=1"], days=30)
    make_all(str(tmp_path), ["sample.seed=2"], days=20)
    make_all(str(tmp_path), ["sample.seed=3"], days=10)
    entries = inventory.read(str(tmp_path))
    assert len(inventory.choose(entries, keep_last=1).gone) == 6
    assert len(inventory.choose(entries, keep_last=1, older_than=25 * DAY).gone) == 3


def test_what_a_running_flow_reads_stays(tmp_path: Path, home: Path) -> None:
    """A stage that is being made says what it reads; a lock or a young file says that it is being made."""
    made = make_all(str(tmp_path), days=60)
    half = Artifact(Storage.at(str(tmp_path)).url, "train_dit", "f" * 16)
    inputs = {"encode": made["encode"], "train_vavae": made["train_vavae"]}
    half.storage.write_bytes(inventory.RUN_FILE, json.dumps({"uri": "", "run": "", "inputs": inputs}).encode())
    age(half, days=40)
    entries = inventory.read(str(tmp_path))
    left = gone(entries, older_than=30 * DAY)
    assert left.isdisjoint({"encode", "train_vavae", "shard"}) and {"report", "sample", "train_dit"} <= left
    assert f"train_dit/{half.fingerprint}" in inventory.choose(entries, older_than=30 * DAY).kept
    assert gone(entries, older_than=30 * DAY, unfinished=True) == set(PIPELINE), "only who says so loses a killed stage"
    with alone(half.uri):
        assert held(half.uri)
        left = gone(entries, older_than=30 * DAY, unfinished=True, locked=held)
    assert "encode" not in left and "report" in left and not held(half.uri)
    age(half, days=0.01)
    assert "encode" not in gone(inventory.read(str(tmp_path)), older_than=0.0, unfinished=True)


def test_only_what_is_named_goes_and_only_if_nothing_needs_it(tmp_path: Path) -> None:
    made = make_all(str(tmp_path), days=9)
    entries = inventory.read(str(tmp_path))
    assert gone(entries, named=[f"report/{made['report']}"]) == {"report"}
    choice = inventory.choose(entries, named=[f"encode/{made['encode']}"])
    assert not choice.gone and choice.kept[f"encode/{made['encode']}"].endswith("needs it")


# ------------------------------------------------------------------------------------------------- what is damaged


def test_damage_is_found_by_file(tmp_path: Path) -> None:
    made = make_all(str(tmp_path))
    place = {stage: tmp_path / stage / name / "part.bin" for stage, name in made.items()}
    place["encode"].write_bytes(b"x" * len(place["encode"].read_bytes()))
    place["sample"].unlink()
    place["shard"].write_bytes(place["shard"].read_bytes()[:-1])
    place["report"].write_bytes(place["report"].read_bytes() + b"!")
    (tmp_path / "evaluate" / made["evaluate"] / "manifest.json").write_text("{")
    read: list[int] = []
    found = integrity.faults(inventory.read(str(tmp_path)).values(), read.append)
    told = {name.partition("/")[0]: faults for name, faults in found.items() if faults}
    (words,) = told["encode"]
    hashes = re.fullmatch(r"part.bin has SHA-256 (\w{12})…, expected (\w{12})…", words)
    assert hashes and hashes[1] != hashes[2]
    assert told["sample"] == ["part.bin is missing, expected 60 bytes"]
    assert told["shard"] == ["part.bin has 49 bytes, expected 50 bytes"]
    assert told["report"] == ["part.bin has 61 bytes, expected 60 bytes"]
    assert "is damaged" in told["evaluate"][0]
    assert set(told) == {"encode", "sample", "shard", "report", "evaluate"} and len(found) == len(PIPELINE)


# ------------------------------------------------------------------------------------------------ why two differ


@pytest.mark.parametrize(
    ("override", "stage", "expected"),
    [
        ("train_dit.learning_rate=0.0007", "train_dit", ["train_dit: train_dit.learning_rate: {} → 0.0007"]),
        ("encode.posterior=mean", "report", ["encode: encode.posterior: sample → mean"]),
        ("sample.guidance.scale=7.5", "evaluate", ["sample: sample.guidance.scale: {} → 7.5"]),
    ],
)
def test_a_field_is_named_wherever_in_the_dag_it_is(
    tmp_path: Path, override: str, stage: str, expected: list[str]
) -> None:
    first, second = make_all(str(tmp_path)), make_all(str(tmp_path), [override])
    entries = inventory.read(str(tmp_path))
    told = why(entries, stage, first, second)
    field = override.partition("=")[0]
    value = read_value(load_recipe("demo_tiny").model_dump(mode="json"), field)
    assert told == [each.format(value) for each in expected]


def why(entries: dict[str, inventory.Entry], stage: str, first: dict[str, str], second: dict[str, str]) -> list[str]:
    a, b = entries[f"{stage}/{first[stage]}"], entries[f"{stage}/{second[stage]}"]
    return [str(each) for each in differences.why(entries, a, b)]


def read_value(values: dict[str, object], path: str) -> object:
    for part in path.split("."):
        values = values[part]  # type: ignore[assignment]
    return values


def test_other_data_another_version_and_a_field_that_came_later_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    before = make(root, "shard", {})
    monkeypatch.setitem(EXTERNAL, "shard", {"listing": "b" * 16})
    after = make(root, "shard", {})
    entries = inventory.read(root)
    assert why(entries, "shard", {"shard": before}, {"shard": after}) == [
        f"shard: external.listing: {'a' * 16} → {'b' * 16}"
    ]
    manifest = entries[f"shard/{after}"].manifest
    assert manifest is not None
    later = {**manifest.sections, "shard": {**manifest.sections["shard"], "flavour": [1, {"sweet": True}]}}
    changed = replace(manifest, stage_version=manifest.stage_version + 1, fingerprint="c" * 16, sections=later)
    Artifact(Storage.at(root).url, "shard", "c" * 16).complete(changed)
    version = manifest.stage_version
    assert why(inventory.read(root), "shard", {"shard": after}, {"shard": "c" * 16}) == [
        f"shard: version {version} → {version + 1}, the stage's code writes something else",
        "shard: shard.flavour.0: nothing → 1",
        "shard: shard.flavour.1.sweet: nothing → True",
    ]


def test_an_input_that_is_gone_is_named_by_its_fingerprint(tmp_path: Path) -> None:
    first = make_all(str(tmp_path))
    second = make_all(str(tmp_path), ["shard.seed=9"])
    Artifact(Storage.at(str(tmp_path)).url, "shard", first["shard"]).discard()
    entries = inventory.read(str(tmp_path))
    told = why(entries, "encode", first, second)
    assert f"encode: input shard {first['shard']} → {second['shard']}" in told
    with pytest.raises(UserError, match="different stages"):
        differences.why(entries, entries[f"encode/{first['encode']}"], entries[f"sample/{first['sample']}"])


def test_a_manifests_recipe_makes_the_same_artifact_again(tmp_path: Path) -> None:
    """What `show --recipe` prints is what `--force` needs to make a damaged artifact anew."""
    made = make_all(str(tmp_path), ["sample.seed=5"])
    manifest = inventory.read(str(tmp_path))[f"sample/{made['sample']}"].manifest
    assert manifest is not None
    stage = replace(load_stage("sample"), external=None)
    assert stage.fingerprint(read_recorded(manifest.recipe), manifest.inputs)[0] == made["sample"]


def test_what_a_begun_stage_names_beside_its_inputs_is_kept(tmp_path: Path) -> None:
    """A set that grows from another reads it, though none of its inputs is one."""
    made = make_all(str(tmp_path), days=60)
    half = Artifact(Storage.at(str(tmp_path)).url, "shard", "f" * 16)
    begun = {"uri": "", "run": "", "inputs": {}, "sections": {"shard": {"grows": made["shard"]}}}
    half.storage.write_bytes(inventory.RUN_FILE, json.dumps(begun).encode())
    age(half, days=40)
    entries = inventory.read(str(tmp_path))
    assert entries[f"shard/{half.fingerprint}"].made_from == (f"shard/{made['shard']}",)
    assert "shard" not in gone(entries, older_than=30 * DAY)
    assert "shard" in gone(entries, older_than=30 * DAY, unfinished=True)
