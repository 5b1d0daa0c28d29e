"""Fetching weights, and `latentforge weights`."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from httpx import ReadTimeout, Request, Response
from huggingface_hub import errors
from safetensors.torch import save_file
from typer.testing import CliRunner

from configs.errors import UserError
from flows.weights import app
from infra import fetched
from infra.weights import fetch, foundation_weights, load_checkpoint, load_pretrained, load_statistics
from models.checkpoints import read
from models.formats import build
from tests.helpers.published import hub_cache
from tests.helpers.web import web_server
from tests.models.test_checkpoints import authors_model, file_of, same, weights
from tests.models.test_files import sharded

runner = CliRunner()


@pytest.fixture
def authors(tmp_path: Path) -> Path:
    """An SFD checkpoint as the authors save it."""
    path = tmp_path / "0400000.pt"
    torch.save(file_of("sfd_model"), path)
    return path


def statistics_file(path: Path, channels: int) -> Path:
    torch.save({"mean": torch.randn(1, channels, 1, 1), "std": torch.rand(1, channels, 1, 1) + 0.5}, path)
    return path


def test_paths_are_used_where_they_are(authors: Path) -> None:
    assert fetch(str(authors)) == authors == fetch(f"file://{authors}")
    with pytest.raises(UserError, match=r"nowhere\.pt: does not exist"):
        fetch("nowhere.pt")
    assert fetch(str(authors.parent)) == authors
    (authors.parent / "other.pt").touch()
    with pytest.raises(UserError, match=r"is a folder, not a file \(0400000.pt, other.pt\)"):
        fetch(str(authors.parent))


def test_urls_are_fetched_once_and_again_when_they_change(home: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/a.pt", b"first")
    local = fetch("memory://bucket/a.pt")
    assert local.read_bytes() == b"first" and home in local.parents and local.name == "a.pt"
    assert fetch("memory://bucket/a.pt") == local
    memory.pipe_file("/bucket/a.pt", b"second")
    assert fetch("memory://bucket/a.pt").read_bytes() == b"second"
    assert not list((home / "weights").rglob("*.partial"))
    with pytest.raises(UserError, match=r"memory://bucket/b\.pt"):
        fetch("memory://bucket/b.pt")
    memory.rm("/bucket", recursive=True)


def test_weights_are_known_by_their_content_and_by_a_hubs_names(tmp_path: Path, home: Path) -> None:
    from infra.weights import identities

    file = tmp_path / "weights.pt"
    file.write_bytes(b"first")
    first = identities(foundation=str(file), pretrained=None)
    assert first.keys() == {"foundation"}
    assert identities(foundation="hub", a="package", b="random", c="hf://somebody/something/file.pt") == {}
    file.write_bytes(b"other")
    assert identities(foundation=f"file://{file}") != first
    with pytest.raises(UserError, match="does not exist"):
        identities(foundation="nowhere.pt")


def test_weights_on_s3(s3_root: str, home: Path, authors: Path) -> None:
    from infra.storage import Storage

    Storage.at(s3_root).upload(str(authors), "sfd.pt")
    same(load_checkpoint(f"{s3_root}/sfd.pt").tensors, weights("sfd_model"))
    with pytest.raises(UserError, match=r"missing\.pt: no such file"):
        fetch(f"{s3_root}/missing.pt")


def test_what_a_web_server_answers(tmp_path: Path, home: Path, authors: Path) -> None:
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><title>Sign in</title>")
    with web_server(tmp_path, {"forbidden.pt": 403, "missing.pt": 404}, short=["short.pt"]) as url:
        (tmp_path / "short.pt").write_bytes(authors.read_bytes())
        same(load_checkpoint(f"{url}/{authors.name}").tensors, weights("sfd_model"))
        for name, words in (
            ("page.pt", r"a web page \(Sign in\), not a file of weights.*kept as .*; delete it to fetch again"),
            ("forbidden.pt", "reading stopped .*403"),
            ("missing.pt", "no such file; check the URL"),
            ("short.pt", "reading stopped .*Not enough data"),
        ):
            with pytest.raises(UserError, match=words) as refusal:
                load_checkpoint(f"{url}/{name}")
            assert "\n" not in str(refusal.value)
        assert not list((home / "weights").rglob("*.partial"))
        assert not list((home / "weights").rglob("short.pt"))
    with pytest.raises(UserError, match=r"reading stopped .*Cannot connect"):
        fetch(f"{url}/gone.pt")


def test_shards_are_fetched_beside_their_index(tmp_path: Path, home: Path) -> None:
    from infra.weights import identities

    index = sharded(tmp_path / "sharded", weights("dit_plain"))
    with web_server(tmp_path) as url:
        location = f"{url}/sharded/{index.name}"
        for place in (location, str(index), str(index.parent)):
            same(load_checkpoint(place).tensors, weights("dit_plain"))
        before = identities(pretrained=str(index))
        assert identities(pretrained=location) == before
        sharded(index.parent, {name: value + 1 for name, value in weights("dit_plain").items()})
        assert identities(pretrained=str(index)) != before, "shards of the same index are known by their content"
        (tmp_path / "sharded" / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(UserError, match=r"its shard model-00002-of-00002\.safetensors is not beside it"):
            identities(pretrained=str(index))
        index.write_text(index.read_text() + " ")
        with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: no such file"):
            fetch(f"{url}/sharded/./{index.name}")


def test_a_hubs_cache_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, authors: Path) -> None:
    """Files that lie where huggingface_hub keeps them are used without a network."""
    location = hub_cache(tmp_path / "hub", "SFD-Project/SFD", {"weights/0400000.pt": authors.read_bytes()})
    sharded(tmp_path / "s", weights("dit_plain"))
    hub_cache(tmp_path / "hub", "us/shards", {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    same(load_checkpoint(f"{location}/weights/0400000.pt").tensors, weights("sfd_model"))
    same(load_checkpoint("hf://us/shards/model.safetensors.index.json").tensors, weights("dit_plain"))


def test_hub_names(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    with pytest.raises(UserError, match="hf://organisation/repository/file"):
        fetch("hf://somebody/something")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the hub cannot be reached and the file is not in its local cache"):
        fetch("hf://somebody/something/model.pt@main")


def test_two_actors_put_the_same_shards_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """As those of one machine do that begin at once; the one that comes second finds the links."""
    place = tmp_path / "hub"
    sharded(tmp_path / "s", weights("dit_plain"))
    for path in (tmp_path / "s").iterdir():  # each in a folder of its own, as web servers' are kept
        (place / path.name).mkdir(parents=True)
        path.rename(place / path.name / path.name)
    get = lambda location: place / location.rpartition("/")[2] / location.rpartition("/")[2]  # noqa: E731
    link = Path.symlink_to

    def both(self: Path, target: Path) -> None:
        link(self, target)
        link(self, target)

    monkeypatch.setattr(Path, "symlink_to", both)
    index = get("model.safetensors.index.json")
    found = fetched._with_shards(index, f"https://host/{index.name}", "", get)
    same(load_checkpoint(str(found)).tensors, weights("dit_plain"))


def _answer(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    return kind("Invalid credentials", response=Response(status, request=Request("GET", "https://hub")))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (_answer(errors.GatedRepoError, 403), r"no repository me/gated to this token.*ask for access.*HF_TOKEN"),
        (_answer(errors.RepositoryNotFoundError, 401), r"no repository me/gated to this token.*check the name"),
        (_answer(errors.RevisionNotFoundError, 404), r"me/gated has no revision v2; check the name after the @"),
        (_answer(errors.RemoteEntryNotFoundError, 404), r"the hub has no a/model\.pt in me/gated; check the name"),
        (_answer(errors.HfHubHTTPError, 401), r"the hub refuses it \(Invalid credentials"),
        (errors.HFValidationError("no such name"), r"the hub refuses it \(no such name"),
        (OSError(errno.ENOSPC, "No space left on device"), r"cannot be kept here \(No space left.*HF_HOME"),
        (ReadTimeout("halfway"), r"the hub cannot be reached"),
        (errors.LocalEntryNotFoundError("away"), r"the hub cannot be reached"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_hub_answers_is_told_from_silence(error: Exception, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("infra.hubs.refusal", lambda: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError, match=told):
        fetch("hf://me/gated/a/model.pt@v2")


def test_pretrained_weights_go_into_a_network(authors: Path) -> None:
    arguments = load_checkpoint(str(authors)).arguments
    model = build("lightningdit", arguments)
    load_pretrained(model, str(authors))
    same(model.state_dict(), weights("sfd_model"))
    with pytest.raises(UserError, match=r"0400000\.pt does not fit this LightningDiT"):
        load_pretrained(build("lightningdit", arguments | {"depth": 4}), str(authors))


def test_foundation_weights(tmp_path: Path) -> None:
    assert foundation_weights("vit_small_patch14_dinov2", "hub") is None
    assert foundation_weights("vit_small_patch14_dinov2", "random") is None
    packaged = foundation_weights("efficientnet_lite0", "package")
    assert packaged is not None and len(packaged) == 296
    with pytest.raises(UserError, match="vit_small is in no package"):
        foundation_weights("vit_small", "package")
    save_file(packaged, tmp_path / "w.safetensors")
    torch.save({"state_dict": packaged}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        found = foundation_weights("efficientnet_lite0", str(tmp_path / name))
        assert found is not None
        same(found, packaged)
    (tmp_path / "w.pth").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"weights of x at .*w\.pth"):
        foundation_weights("x", str(tmp_path / "w.pth"))


def test_import_inspect_export(authors: Path, tmp_path: Path) -> None:
    ours, back = tmp_path / "new folder" / "sfd.safetensors", tmp_path / "back.pt"
    texture = statistics_file(tmp_path / "latents_stats.pt", 8)
    semantic = statistics_file(tmp_path / "latents_sv_stats.pt", 4)
    result = runner.invoke(
        app,
        ["import", str(authors), str(ours), "--statistics", str(texture), "--semantic-statistics", str(semantic)],
        catch_exceptions=False,
    )
    assert result.exit_code == 0 and "lightningdit" in result.output
    found = read(ours)
    assert found.arguments["groups"] == {"names": ["texture", "semantic"], "sizes": [8, 4]}
    assert list(found.statistics) == ["semantic", "texture"]

    result = runner.invoke(app, ["inspect", str(ours)], catch_exceptions=False)
    assert "hidden_size" in result.output and "statistics of semantic" in result.output

    (tmp_path / "out").mkdir()
    result = runner.invoke(app, ["export", str(ours), str(tmp_path / "out" / back.name)], catch_exceptions=False)
    returned = torch.load(tmp_path / "out" / back.name, weights_only=True)
    same(returned["ema"], weights("sfd_model"))
    same(returned["model"], file_of("sfd_model")["model"])
    for path in (texture, semantic):
        exported = torch.load(tmp_path / "out" / path.name, weights_only=True)
        same(exported, torch.load(path, weights_only=True))


def test_import_refuses_in_one_line(authors: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "x.safetensors")
    wrong = statistics_file(tmp_path / "stats.pt", 3)
    plain = tmp_path / "plain.pt"
    torch.save({"model": weights("dit_plain"), "config": {}}, plain)
    assert authors_model("dit_plain")["num_heads"] == 2
    for arguments, message in (
        (["import", str(authors), str(tmp_path / "x.pt")], "ends in .safetensors"),
        (["import", str(authors), target, "--statistics", str(wrong)], "3 channels, but the texture channels"),
        (["import", str(plain), target], "give --num-heads"),
        (["import", str(tmp_path / "no.pt"), target], "does not exist"),
        (["import", str(plain), target, "--num-heads", "2", "--semantic-statistics", str(wrong)], "single channel"),
    ):
        result = runner.invoke(app, arguments)
        assert isinstance(result.exception, UserError), arguments
        assert message in str(result.exception) and "\n" not in str(result.exception)
        assert not Path(target).exists()
    assert runner.invoke(app, ["import", str(plain), target, "--num-heads", "2"]).exit_code == 0
    assert read(Path(target)).arguments["num_heads"] == 2
    with pytest.raises(UserError, match="expected latent statistics"):
        load_statistics(str(plain))
