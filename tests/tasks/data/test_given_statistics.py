"""Statistics as an input: what weights were trained on goes before what latents here measure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from configs import Recipe, UserError, load_recipe
from flows.stages import STAGES
from flows.weights import app
from models.checkpoints import Checkpoint, Statistics, write
from tasks import sample, train_dit, train_vavae
from tasks.data.given_statistics import differences, external, given_statistics
from tasks.data.statistics import LatentStatistics, statistics_hash
from tasks.networks import build_autoencoder, build_network
from tasks.sampling.sampler import Sampler
from tasks.stage import perform
from tests.helpers.builders import SMALL, at, context, put, put_networks
from tests.helpers.published import hub_cache, save_lightningdit, save_sfd, save_statistics, save_tokenizer
from tests.helpers.web import web_server

MEAN, STD = torch.linspace(-0.5, 0.5, 48), torch.linspace(0.5, 1.5, 48)


def sizes() -> tuple[int, int]:
    texture, semantic = load_recipe("demo_tiny").channel_groups.values()
    return texture, semantic


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    texture, semantic = sizes()
    return {
        "texture": str(save_statistics(tmp_path / "latents_stats.pt", MEAN[:texture], STD[:texture])),
        "semantic": str(save_statistics(tmp_path / "latents_sv_stats.pt", MEAN[-semantic:], STD[-semantic:])),
    }


def recipe(*overrides: str) -> Recipe:
    return load_recipe("demo_tiny", [*SMALL, *overrides])


def given(files: dict[str, str], *overrides: str) -> Recipe:
    named = [f"train_dit.statistics.{group}={path}" for group, path in files.items()]
    return recipe("train_dit.images=0", "train_dit.pretrained=w.pt", *named, *overrides)


def test_files_are_read_by_group(files: dict[str, str]) -> None:
    found = given_statistics(given(files))
    assert found is not None and found[1] == "files"
    texture, semantic = sizes()
    assert found[0].columns == ("z", "s")
    expected = torch.cat([MEAN[:texture], MEAN[-semantic:]]).numpy()
    assert np.array_equal(found[0].mean(), expected)
    assert given_statistics(recipe()) is None and external(recipe()) == {}
    assert external(given(files)).keys() == {"texture_statistics", "semantic_statistics"}


def test_what_does_not_fit_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    swapped = dict(zip(files, reversed(files.values()), strict=True))
    with pytest.raises(UserError, match=r"train_dit.statistics.texture .*latents_sv_stats.pt: statistics of \d+ chan"):
        given_statistics(given(swapped))
    with pytest.raises(UserError, match=r"train_dit.statistics.semantic: .*nowhere\.pt: does not exist"):
        given_statistics(given(files | {"semantic": str(tmp_path / "nowhere.pt")}))
    with pytest.raises(UserError, match=r"train_dit.statistics.semantic is not set but train_semvae is"):
        given({"texture": files["texture"]})
    with pytest.raises(UserError, match=r"semantic is set but train_semvae is not"):
        load_recipe("lightningdit_xl_64ep", [f"train_dit.statistics.{name}={path}" for name, path in files.items()])
    with pytest.raises(UserError, match="statistics is weights but pretrained is not set"):
        recipe("train_dit.statistics=weights")


def test_statistics_that_travel_in_weights_are_used(tmp_path: Path) -> None:
    texture, semantic = sizes()
    plain = recipe()
    travelling = {
        "texture": Statistics(MEAN[:texture], STD[:texture]),
        "semantic": Statistics(MEAN[-semantic:], STD[-semantic:]),
    }
    network = build_network(plain, plain.train_dit.model)
    for name, statistics in (("with", travelling), ("without", {})):
        checkpoint = Checkpoint("lightningdit", dict(network.state_dict()), {"depth": 2}, statistics=statistics)
        write(tmp_path / f"{name}.safetensors", checkpoint)
    ours = recipe(f"train_dit.pretrained={tmp_path}/with.safetensors")
    found = given_statistics(ours)
    assert found is not None and found[1] == "weights"
    assert np.array_equal(found[0].std()[:texture], STD[:texture].numpy())
    assert external(ours) == {"statistics": found[0].hash}
    assert given_statistics(recipe(f"train_dit.pretrained={tmp_path}/without.safetensors")) is None
    asked = recipe(f"train_dit.pretrained={tmp_path}/without.safetensors", "train_dit.statistics=weights")
    with pytest.raises(UserError, match=r"statistics is weights, but none travel in .*without\.safetensors"):
        given_statistics(asked)


def test_differences_are_told_by_group(capsys: pytest.CaptureFixture[str]) -> None:
    own = LatentStatistics({"z": {"mean": [0.0, 1.0], "std": [1.0, 2.0]}, "s": {"mean": [0.0], "std": [1.0]}})
    other = LatentStatistics({"z": {"mean": [0.0, 1.5], "std": [1.25, 1.0]}, "s": {"mean": [0.01], "std": [1.0]}})
    found = differences(other, own)
    assert found["texture"] == pytest.approx({"mean": 0.25, "std": 1.0})
    assert found["semantic"] == pytest.approx({"mean": 0.01, "std": 0.0})


def test_stages_drop_out_where_all_is_given(files: dict[str, str]) -> None:
    def there(chosen: Recipe) -> list[str]:
        return [stage.name for stage in STAGES if stage.present(chosen)]

    tokenizer = ("train_vavae.images=0", "train_vavae.pretrained=v.pt")
    whole = ["shard", "train_vavae", "train_semvae", "encode", "train_dit", "sample", "evaluate", "report"]
    assert there(recipe()) == there(recipe(*tokenizer)) == there(given(files)) == whole
    assert there(given(files, *tokenizer)) == ["shard", "train_vavae", "train_dit", "sample", "evaluate", "report"]
    aside = ("evaluate.reference=r.npz", "evaluate.classifier=null")
    assert there(given(files, *tokenizer, *aside)) == ["train_vavae", "train_dit", "sample", "evaluate", "report"]
    further = [each for each in aside if each] + ["train_dit.images=64"]
    assert there(given(files, *tokenizer, *further)) == whole


def test_given_weights_and_statistics_make_the_images_of_our_own_road(files: dict[str, str], tmp_path: Path) -> None:
    """The same weights, statistics and noise: with latents that have these statistics, and without any latents."""
    plain = recipe("train_vavae.images=0", "train_vavae.pretrained=v.pt")
    put_networks(at(tmp_path), plain)
    chosen = given(files, "train_vavae.images=0", "train_vavae.pretrained=v.pt")
    found = given_statistics(chosen)
    assert found is not None
    facts = {"statistics": dict(found[0].values), "statistics_hash": statistics_hash(found[0].values)}
    weights = context(at(tmp_path), plain, sample.STAGE, "train_dit").input("train_dit")
    put(at(tmp_path), plain, "train_dit", list(weights.manifest.files), facts=facts)
    put(at(tmp_path), plain, "encode", [], facts=facts)
    ours = context(at(tmp_path), plain, sample.STAGE, "train_vavae", "encode", "train_dit")
    sample.check_statistics(ours)

    from safetensors.torch import load

    averages = load(weights.read("ema.safetensors"))
    theirs = save_lightningdit(tmp_path / "w.pt", averages, {n: v + 1 for n, v in averages.items()}, {})
    imported = chosen.model_copy(update={"train_dit": chosen.train_dit.model_copy(update={"pretrained": str(theirs)})})
    model = perform(train_dit.STAGE, context(at(tmp_path), imported, train_dit.STAGE).job)
    assert model.manifest.facts["statistics_from"] == "files"
    bare = context(at(tmp_path), imported, sample.STAGE, "train_vavae", train_dit=model.fingerprint)
    sample.check_statistics(bare)
    indices = np.arange(4)
    expected, made = Sampler.of(ours).images(indices)[1], Sampler.of(bare).images(indices)[1]
    assert np.array_equal(made, expected) and made.std() > 0
    other = LatentStatistics({name: {**v, "mean": [m + 1 for m in v["mean"]]} for name, v in found[0].values.items()})
    moved = {"statistics": dict(other.values), "statistics_hash": other.hash}
    put(at(tmp_path), plain, "train_dit", list(weights.manifest.files), facts=moved)
    assert not np.array_equal(Sampler.of(ours).images(indices)[1], expected), "statistics matter"
    with pytest.raises(UserError, match="was made for latents with statistics"):
        sample.check_statistics(ours)


def test_training_further_takes_given_statistics_and_tells_how_far_they_are(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {name: {"mean": [0.1] * count, "std": [0.9] * count} for name, count in zip("zs", sizes(), strict=True)}
    facts = {"statistics": own, "statistics_hash": statistics_hash(own)}
    chosen = given(files, "train_dit.images=64")
    latents = put(at(tmp_path), chosen, "encode", [], facts=facts)
    found, recorded = train_dit.standard(chosen, latents)
    assert recorded["statistics_hash"] == found.hash != facts["statistics_hash"]
    assert recorded["statistics_from"] == "files" and set(recorded["statistics_differences"]) == {"texture", "semantic"}
    put(at(tmp_path), chosen, "train_dit", [], facts=recorded)
    sample.check_statistics(context(at(tmp_path), chosen, sample.STAGE, "encode", "train_dit"))
    told = capsys.readouterr().out
    assert "statistics of texture from files: means are up to" in told and "statistics of semantic from files" in told
    assert "are these the latents that the weights were trained on?" in told, "sampling says so"
    monkeypatch.setattr(train_dit, "train", lambda context, section: None)
    bare = chosen.train_dit.model_copy(update={"pretrained": None})
    train_dit.run(context(at(tmp_path), chosen.model_copy(update={"train_dit": bare}), train_dit.STAGE, "encode"))
    again = capsys.readouterr().out
    assert [line for line in told.splitlines() if "statistics of" in line] == again.splitlines(), "training does, too"


def test_the_remedy_for_weights_without_statistics_works(files: dict[str, str], tmp_path: Path) -> None:
    """`weights is …, but none travel in …: put them there with weights import --statistics`, run as it says."""
    plain = recipe()
    network = build_network(plain, plain.train_dit.model)
    write(tmp_path / "bare.safetensors", Checkpoint("lightningdit", dict(network.state_dict())))
    asked = "train_dit.statistics=weights"
    with pytest.raises(UserError, match="weights import --statistics") as refusal:
        given_statistics(recipe(f"train_dit.pretrained={tmp_path}/bare.safetensors", asked))
    assert "`weights import --statistics`" in str(refusal.value)
    save_lightningdit(tmp_path / "theirs.pt", network.state_dict(), network.state_dict(), {})
    options = ["--statistics", files["texture"], "--semantic-statistics", files["semantic"]]
    options += ["--semantic-channels", str(sizes()[1])]
    done = CliRunner().invoke(
        app, ["import", f"{tmp_path}/theirs.pt", f"{tmp_path}/with.safetensors", *options], catch_exceptions=False
    )
    assert done.exit_code == 0
    found = given_statistics(recipe(f"train_dit.pretrained={tmp_path}/with.safetensors", asked))
    assert found is not None and np.array_equal(found[0].mean()[: sizes()[0]], MEAN[: sizes()[0]].numpy())


@pytest.mark.parametrize("place", ["folder", "web", "hub"])
def test_all_that_is_given_comes_from_a_folder_a_web_server_or_a_hubs_cache(
    place: str, files: dict[str, str], tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizer, diffusion weights, guide and statistics as the authors' codes write them."""
    plain = recipe()
    network = build_network(plain, plain.train_dit.model)
    model = {"model_type": "LightningDiT-XL/1", "semantic_chans": sizes()[1]}
    save_sfd(tmp_path / "0400000.pt", network.state_dict(), network.state_dict(), model)
    save_tokenizer(tmp_path / "ldm.ckpt", build_autoencoder(plain.train_vavae.model).state_dict())
    names = ["0400000.pt", "ldm.ckpt", "latents_stats.pt", "latents_sv_stats.pt"]
    with web_server(tmp_path) as url:
        where = str(tmp_path)
        if place == "web":
            where = url
        elif place == "hub":
            where = hub_cache(tmp_path / "hub", "SFD-Project/SFD", {n: (tmp_path / n).read_bytes() for n in names})
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        own = plain.train_dit.model.model_dump_json(exclude_none=True)
        chosen = recipe(
            "train_vavae.images=0",
            f"train_vavae.pretrained={where}/ldm.ckpt",
            "train_dit.images=0",
            f"train_dit.pretrained={where}/0400000.pt",
            f"train_dit.statistics.texture={where}/latents_stats.pt",
            f"train_dit.statistics.semantic={where}/latents_sv_stats.pt",
            f"sample.guidance={{method: autoguidance, scale: 2.0, weights: '{where}/0400000.pt', model: {own}}}",
        )
        for stage in (train_vavae, train_dit, sample):
            stage.check(chosen)
        found = given_statistics(chosen)
    assert found is not None and np.array_equal(found[0].std()[-sizes()[1] :], STD[-sizes()[1] :].numpy())
