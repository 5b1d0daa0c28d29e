"""Their latents in, our loader out: bit for bit, from folders, tars and pieces of tars, once."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from configs import Recipe, UserError, load_recipe
from flows.stages import STAGES
from infra.artifacts import Artifact
from tasks import encode, train_dit
from tasks.data import ready_latents
from tasks.data.tensors import to_numpy
from tasks.loading.loader import Loader
from tasks.plan.data import images_of
from tasks.plan.stages import works
from tasks.sources.ready_latents import ReadyLatentsSource
from tasks.stage import perform
from tests.helpers.builders import SMALL, at, context
from tests.helpers.published import save_latents
from tests.helpers.web import web_server

GIVEN = (
    "train_vavae.images=0",
    "train_vavae.pretrained=v.pt",
    "train_semvae.images=0",
    "train_semvae.pretrained=s.pt",
    "evaluate.reference=r.npz",
    "evaluate.classifier=null",
    "image.flips=true",
    "encode.rows_per_group=16",
)


def recipe(path: Path | str, *overrides: str) -> Recipe:
    source = f"data.source={{kind: latents, path: '{path}'}}"
    return load_recipe("demo_tiny", [*SMALL, source, *GIVEN, *overrides])


def loaded(artifact: Artifact, columns: list[str], rows: int) -> dict[str, np.ndarray]:
    """One epoch in the order of keys."""
    loader = Loader(artifact, "train", columns, rows, 0)
    with loader.stream() as stream:
        batch = next(stream)
        order = np.argsort(np.array(batch.keys))
        arrays = {name: np.array(batch.arrays[name])[order] for name in columns}
        return {**arrays, "label": batch.labels[order].copy()}


def archived(folder: Path, target: Path, pieces: int, mode: str = "w") -> None:
    """`tar | split`, as the authors publish it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, f"imagenet_train_256/{path.name}")
    data, target_name = buffer.getvalue(), "latents.tar.gz" if mode == "w:gz" else "latents.tar"
    target.mkdir()
    (target / "README.md").write_text("cat the pieces")
    length = -(-len(data) // pieces)
    for number in range(pieces):
        (target / f"{target_name}.part{number}").write_bytes(data[number * length : (number + 1) * length])


def check_rows(root: Path, chosen: Recipe, theirs: dict[str, Tensor]) -> None:
    made = perform(encode.STAGE, context(at(root), chosen, encode.STAGE).job)
    names = {"z": "latents", "s": "latents_sv", "f": "feats_dino"}
    columns = [name + flip for name in names for flip in ("", "_flip")]
    tables = [pq.read_table(io.BytesIO(made.read(entry.path))) for entry in made.files("train/")]
    for column in columns:
        stored = np.concatenate([to_numpy(t[column], t.schema.field(column)) for t in tables])
        expected = theirs[names[column[0]] + column[1:]].half().numpy()
        assert stored.tobytes() == expected.tobytes(), column
    assert np.concatenate([t["label"].to_numpy() for t in tables]).tolist() == theirs["labels"].tolist()
    assert len({key for t in tables for key in t["key"].to_pylist()}) == len(theirs["labels"])
    facts = made.manifest.facts
    exact = theirs["latents"].half().double()
    np.testing.assert_allclose(facts["statistics"]["z"]["mean"], exact.mean(dim=(0, 2, 3)), atol=1e-9)
    spread = theirs["latents_sv"].half().double().std(dim=(0, 2, 3), correction=0)
    np.testing.assert_allclose(facts["statistics"]["s"]["std"], spread, atol=1e-9)
    assert facts["splits"] == {"train": len(theirs["labels"]), "test": 0} and facts["flips"]
    assert str(chosen.latent_size // 2) in facts["averages"]


@pytest.mark.parametrize(("pieces", "mode"), [(0, ""), (1, "w"), (12, "w"), (3, "w:gz")])
def test_rows_are_theirs_bit_for_bit(pieces: int, mode: str, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    theirs = save_latents(shards, recipe(shards))
    place = shards
    if pieces:
        place = tmp_path / "splits"
        archived(shards, place, pieces, mode)
    check_rows(tmp_path / "root", recipe(place), theirs)


def test_our_loader_gives_their_rows_and_training_sees_them(tmp_path: Path) -> None:
    chosen = recipe(tmp_path / "shards")
    theirs = save_latents(tmp_path / "shards", chosen)
    made = perform(encode.STAGE, context(at(tmp_path), chosen, encode.STAGE).job)
    found = loaded(made, ["z", "s"], 115)
    assert found["z"].tobytes() == theirs["latents"].half().numpy().tobytes()
    assert found["s"].tobytes() == theirs["latents_sv"].half().numpy().tobytes()
    assert found["label"].tolist() == theirs["labels"].tolist()
    job = context(at(tmp_path), chosen, train_dit.STAGE, encode=made.fingerprint)
    trainee = train_dit.Diffusion(job)
    with trainee.loader.stream() as stream:
        given = trainee.inputs(next(stream), torch.device("cpu"))
    assert torch.isfinite(trainee.module(**given)["total"])


def test_a_conversion_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe(tmp_path / "shards")
    theirs = save_latents(tmp_path / "shards", chosen)
    monkeypatch.setattr(ready_latents, "_PART_ROWS", 16)
    write, written = ready_latents._write, list[str]()

    def dying(*arguments: object) -> object:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(arguments[2].name)  # type: ignore[attr-defined]
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ready_latents, "_AT_ONCE", 1)
    monkeypatch.setattr(ready_latents, "_write", dying)
    with pytest.raises(KeyboardInterrupt):
        perform(encode.STAGE, context(at(tmp_path), chosen, encode.STAGE).job)
    again = list[str]()

    def counted(*arguments: object) -> object:
        again.append(arguments[2].name)  # type: ignore[attr-defined]
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ready_latents, "_write", counted)
    check_rows(tmp_path, chosen, theirs)
    assert len(written) == 3 and not set(written) & set(again) and len(written) + len(again) == 8


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    side = recipe(tmp_path).latent_size
    cases = {
        "labels": ({"labels": torch.full((70,), 10)}, r"labels from 10 to 10, but data.classes 10", True),
        "flips": ({"latents_flip": None}, r"has no latents_flip: .*set image.flips: false", False),
        "semantic": ({"latents_sv": None}, r"has no latents_sv: the recipe has semantic channels", False),
        "features": ({"feats_dino": None}, r"no feats_dino: alignment has no targets.*align_weight: 0", False),
        "width": ({"latents": torch.zeros(70, 3, side, side)}, r"latents has rows of \(3, .*this recipe's netw", False),
        "infinite": ({"latents": torch.full((70, 8, side, side), 1e6)}, "float16 cannot hold", True),
    }
    texture = recipe(tmp_path).channel_groups["texture"]
    for name, (changed, words, late) in cases.items():
        if name == "infinite":
            changed = {"latents": torch.full((70, texture, side, side), 1e6)}
        folder = tmp_path / name
        save_latents(folder, recipe(folder), rows=(70,), **changed)
        chosen = recipe(folder)
        with pytest.raises(UserError, match=words) as refusal:
            perform(encode.STAGE, context(at(tmp_path / "root"), chosen, encode.STAGE).job) if late else encode.check(
                chosen
            )
        assert "\n" not in str(refusal.value)
    unaligned = recipe(tmp_path / "features", "encode.align_features=false")
    encode.check(unaligned)


def test_damaged_places_are_told(tmp_path: Path) -> None:
    chosen = recipe(tmp_path / "shards")
    save_latents(tmp_path / "shards", chosen, rows=(20,))
    archived(tmp_path / "shards", tmp_path / "splits", 4)
    (tmp_path / "splits" / "latents.tar.part2").unlink()
    with pytest.raises(UserError, match=r"damaged|cut short|ends early"):
        perform(encode.STAGE, context(at(tmp_path), recipe(tmp_path / "splits"), encode.STAGE).job)
    shard = next((tmp_path / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"cut short, [\d,]+ of [\d,]+ bytes"):
        encode.check(chosen)
    shard.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="not a safetensors file"):
        encode.check(chosen)
    with pytest.raises(UserError, match="no latents there"):
        ReadyLatentsSource(str(tmp_path / "nowhere")).identity()


def test_tokens_of_features_become_grids_and_places_are_alike(tmp_path: Path) -> None:
    chosen = recipe(tmp_path / "shards")
    assert chosen.foundation is not None
    side, width = chosen.latent_size, chosen.foundation.feature_dim
    tokens = torch.randn(20, side * side, width).half()
    theirs = save_latents(tmp_path / "shards", chosen, rows=(20,), feats_dino=tokens, feats_dino_flip=tokens.clone())
    grid = tokens.transpose(1, 2).reshape(20, width, side, side)
    check_rows(tmp_path, chosen, theirs | {"feats_dino": grid, "feats_dino_flip": grid})
    source = ReadyLatentsSource(f"{tmp_path}/shards/*.safetensors")
    assert source.identity() == ReadyLatentsSource(str(tmp_path / "shards")).identity()
    (name,) = source.files
    with web_server(tmp_path / "shards") as url:
        (shard,) = ReadyLatentsSource(f"{url}/{name}").shards()
        assert torch.equal(shard.values("latents", 3, 2), theirs["latents"][3:5])
    with web_server(tmp_path / "shards", ranges=False) as url, pytest.raises(UserError, match="whole files only"):
        next(ReadyLatentsSource(f"{url}/{name}").shards()).values("latents", 3, 2)


def test_stages_without_images(tmp_path: Path) -> None:
    there = [stage.name for stage in STAGES if stage.present(recipe(tmp_path))]
    assert there == ["train_vavae", "encode", "train_dit", "sample", "evaluate", "report"]
    for override, words in (
        ("train_vavae.images=64", "train_vavae.images is 64 but data.source.kind is latents"),
        ("evaluate.reference=test", "evaluate.reference is test .*name an .npz"),
        ("train_dit.validation={every: 64}", "train_dit.validation is set"),
        ("encode.posterior=mean", "encode.posterior is mean"),
    ):
        with pytest.raises(UserError, match=words):
            recipe(tmp_path, override)
    online = [
        "train_dit.model.align_depth=1",
        "train_dit.objective.align_weight=0.5",
        "train_dit.objective.align=online",
    ]
    with pytest.raises(UserError, match=r"align is online but .* no images.*encode.align_features: true"):
        recipe(tmp_path, *online)


def test_a_plan_counts_latents_by_their_headers(tmp_path: Path) -> None:
    chosen = recipe(tmp_path / "shards")
    save_latents(tmp_path / "shards", chosen, rows=(30, 12))
    found = works(chosen, images_of(chosen), 1)
    assert [each.stage for each in found] == ["train_vavae", "encode", "train_dit", "sample", "evaluate", "report"]
    converted = found[1]
    assert converted.rows.value == 42 and converted.flops.value == 0
    made = perform(encode.STAGE, context(at(tmp_path), chosen, encode.STAGE).job)
    assert converted.written.value == pytest.approx(sum(entry.bytes for entry in made.files("train/")), rel=0.02)
