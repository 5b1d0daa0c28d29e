"""A proxy that refuses, and a network that is not there, are told once and at once, whatever was to be fetched."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm  # noqa: F401  # takes longer than what is measured here

from configs import UserError, load_recipe
from flows import share
from infra import environment, hubs, proxies, reach
from infra.storage import Storage
from infra.weights import fetch
from tasks.foreign.hubs import check_hubs
from tasks.sources import fashion_mnist
from tests.helpers.web import web_server

_SECONDS = 10.0
"""For what takes milliseconds, on a machine that is busy."""


@contextmanager
def proxy(
    answer: bytes = b"", tunnel: tuple[str, int] | None = None, together: int = 1
) -> Iterator[tuple[str, list[str]]]:
    """A real proxy: answers every request with these bytes, or opens a tunnel there; its address and its requests.

    together: it stays silent until so many ask at the same time.
    """
    asked: list[str] = []
    gate = threading.Barrier(together)

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass

    def serve(connection: socket.socket) -> None:
        with connection:
            request = connection.recv(65536)
            asked.append(request.split(b"\r\n")[0].decode())
            gate.wait()
            if tunnel is None:
                connection.sendall(answer)
                return
            with socket.create_connection(tunnel) as onward:
                if request.startswith(b"CONNECT"):
                    connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                else:
                    onward.sendall(request.replace(b"http://weights.example.com", b"", 1))
                threading.Thread(target=pump, args=(connection, onward), daemon=True).start()
                pump(onward, connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", asked


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", hubs.OFFLINE, "LATENTFORGE_FASHION_MNIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(reach, "_passed", set())
    monkeypatch.setenv("TORCH_HOME", str(home / "torch"))
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "hub"))


@pytest.fixture
def dead() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def _set(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://me:geheim@{place}")
    proxies.spare_loopback()


def _fashion_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN", "/nowhere")
    monkeypatch.setattr(fashion_mnist, "home", lambda: Path("/nowhere"))
    fashion_mnist.resolve(None)


def _lpips(_: pytest.MonkeyPatch) -> None:
    hubs.check_torch("train_vavae.objective.lpips_weights", "https://download.pytorch.org/models/vgg16-397923af.pth")


FETCHES: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "data set": _fashion_mnist,
    "weights": lambda _: fetch("https://example.com/model.safetensors"),
    "Inception": lambda _: fetch("http://example.com/weights-inception-2015-12-05-6726825d.pth"),
    "hub": lambda _: fetch("hf://organisation/repository/model.safetensors"),
    "timm": lambda _: hubs.check_timm("foundation.weights", "vit_base_patch14_reg4_dinov2.lvd142m"),
    "LPIPS": _lpips,
    "export": lambda _: share._push(Path("folder"), "hf://organisation/name", False),
    "an export": lambda _: share._fetched("hf://organisation/name"),
    "bucket": lambda _: Storage.at("s3://bucket/prefix").check_writable(),
}


@pytest.mark.parametrize("fetched", FETCHES)
def test_a_dead_proxy_is_told_at_once(fetched: str, dead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, dead)
    started = time.monotonic()
    with pytest.raises(
        UserError, match=rf"https?_proxy is http://{dead}, where nothing answers.*refused.*NO_PROXY"
    ) as told:
        FETCHES[fetched](monkeypatch)
    assert time.monotonic() - started < _SECONDS
    assert "\n" not in str(told.value) and "geheim" not in str(told.value)


@pytest.mark.parametrize("fetched", [name for name in FETCHES if name not in ("data set", "Inception")])
@pytest.mark.parametrize("status", [403, 407, 502])
def test_a_proxy_that_refuses_is_told_at_once(fetched: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy(f"HTTP/1.1 {status} No\r\n\r\n".encode()) as (place, asked):
        _set(monkeypatch, place)
        with pytest.raises(
            UserError, match=rf"https_proxy is http://{place}, and that proxy answers {status} when asked"
        ):
            FETCHES[fetched](monkeypatch)
        assert len(asked) == 1 and asked[0].startswith("CONNECT ")


def test_a_file_goes_through_a_proxy_that_lets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with web_server(tmp_path) as url:
        _, _, port = url.rpartition(":")
        with proxy(tunnel=("127.0.0.1", int(port.strip("/")))) as (place, asked):
            _set(monkeypatch, place)
            assert Storage.at("http://weights.example.com").read_bytes("file") == b"content"
            assert [line for line in asked if line] == ["GET http://weights.example.com/file HTTP/1.1"]


def test_what_has_passed_once_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy(b"HTTP/1.1 200 OK\r\n\r\n") as (place, asked):
        _set(monkeypatch, place)
        assert [reach.refusal("https://example.com/x") for _ in range(3)] == [None] * 3
        assert asked == ["CONNECT example.com:443 HTTP/1.1"]


def test_a_network_that_is_not_there(dead: str) -> None:
    said = reach.refusal(f"https://{dead}")
    assert said is not None and "127.0.0.1 cannot be reached (Connection refused)" in said


def test_dead_proxies_are_noted_where_nothing_needs_them(dead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "proxies" not in environment.checks()
    _set(monkeypatch, dead)
    (finding,) = environment.look({"proxies": environment.checks()["proxies"]})
    assert finding.level == "note" and f"http_proxy is http://{dead}, where nothing answers" in finding.text
    with proxy() as (place, _):
        _set(monkeypatch, place)
        (finding,) = environment.look({"proxies": environment.check_proxies})
        assert finding.level == "fine"


# --------------------------------------------------------------------------------------------------------------- hubs

FROM_HUB = "input_size: 56, weights: hub, layer: null"
ONLINE = ("encode.latents=online", "encode.align_features=false", "train_dit.objective.align_weight=0")
IN_PLACE = ("train_vavae.objective.perceptual_layers=[2]", "train_vavae.objective.align_weight=0")
DINO = f"foundation={{name: vit_base_patch14_reg4_dinov2.lvd142m, feature_dim: 768, {FROM_HUB}}}"


def test_what_stages_take_from_hubs_is_looked_for_first(dead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, dead)
    perceptual = "train_vavae.objective.perceptual_weight=1.0"
    judged = f"evaluate.features={{name: vit_small_patch14_dinov2.lvd142m, feature_dim: 384, {FROM_HUB}}}"
    recipe = load_recipe("demo_tiny", [DINO, perceptual, judged, "evaluate_tokenizer.lpips_weights=hub"])
    assert recipe.foundation is not None and recipe.foundation.weights == "hub"
    with pytest.raises(UserError) as told:
        check_hubs(recipe, ["train_vavae", "evaluate", "evaluate_tokenizer"])
    for field in (
        "foundation.weights", "evaluate.features.weights", "train_vavae.objective.lpips_weights",
        "evaluate_tokenizer.lpips_weights",
    ):  # fmt: skip
        assert f"{field} is hub, but" in str(told.value)
    with pytest.raises(UserError, match=r"foundation\.weights is hub, but"):
        check_hubs(load_recipe("demo_tiny", [DINO]), ["evaluate_tokenizer"])  # for its probes
    check_hubs(load_recipe("demo_tiny", [DINO, "evaluate_tokenizer.probe_images=0"]), ["evaluate_tokenizer"])
    check_hubs(recipe, ["shard", "sample", "report"])  # need none of them
    check_hubs(recipe, ["train_dit"])  # takes latents and features as they are stored
    with pytest.raises(UserError, match=r"foundation\.weights is hub, but"):
        check_hubs(load_recipe("demo_tiny", [DINO, *ONLINE]), ["train_dit"])
    with pytest.raises(UserError) as told:
        check_hubs(load_recipe("demo_tiny", [DINO, perceptual, *IN_PLACE]), ["train_vavae"])
    assert "foundation.weights is hub" in str(told.value) and "lpips" not in str(told.value)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # whose machines will fetch
    check_hubs(recipe, ["train_vavae", "evaluate"])


def test_all_is_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that says nothing costs a command a few seconds, however much the recipe fetches."""
    with proxy(b"HTTP/1.1 403 No\r\n\r\n", together=3) as (place, _):
        _set(monkeypatch, place)
        urls = [f"https://{name}.example.com" for name in "abc"]
        said = reach.proxy_refusals(urls)
        assert list(said) == urls and all("answers 403" in reason for reason in said.values())
    perceptual = ["train_vavae.objective.perceptual_weight=1.0", "evaluate_tokenizer.lpips_weights=hub"]
    with proxy(b"HTTP/1.1 403 No\r\n\r\n", together=3) as (place, asked):
        _set(monkeypatch, place)
        with pytest.raises(UserError, match="answers 403") as told:
            check_hubs(load_recipe("demo_tiny", [DINO, *perceptual]), ["train_vavae", "evaluate_tokenizer"])
        assert "no answer" not in str(told.value) and len(asked) == 3


def test_weights_that_lie_here_need_no_hub(home: Path, dead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    snapshot = home / "hub" / "models--timm--vit_base_patch14_reg4_dinov2.lvd142m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"x")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    vgg = home / "torch" / "hub" / "checkpoints" / "vgg16-397923af.pth"
    vgg.parent.mkdir(parents=True)
    vgg.write_bytes(b"x")
    _set(monkeypatch, dead)
    monkeypatch.setenv(hubs.OFFLINE, "")
    recipe = load_recipe("demo_tiny", [DINO, "train_vavae.objective.perceptual_weight=1.0"])
    check_hubs(recipe, ["train_vavae"])
    assert os.environ[hubs.OFFLINE] == "1", "workers take what is here and do not ask"
    started = time.monotonic()
    kept = fetch("hf://timm/vit_base_patch14_reg4_dinov2.lvd142m/model.safetensors")
    assert kept.read_bytes() == b"x" and time.monotonic() - started < _SECONDS


def test_a_set_that_cannot_be_fetched_is_told_before_servers_start(dead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import shard

    monkeypatch.setattr(fashion_mnist, "DEBIAN", "/nowhere")
    monkeypatch.setattr(fashion_mnist, "home", lambda: Path("/nowhere"))
    _set(monkeypatch, dead)
    recipe = load_recipe("demo_tiny")
    with pytest.raises(UserError, match=r"Fashion-MNIST is not on this machine and cannot be fetched: http_proxy is"):
        shard.check(recipe)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # whose machines will fetch
    shard.check(recipe)
