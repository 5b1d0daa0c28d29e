"""`compute.actors.compile` compiles what encodes and samples, and graphs stay for the next process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from infra.artifacts import Artifact
from infra.compiled import FOLDER, keep_compiled, once_a_machine
from models.execution import prepare
from tasks import encode, networks, sample
from tasks.encoder import Encoder, layout
from tasks.networks import WEIGHTS, build_semantic_vae
from tasks.sampling.sampler import Sampler
from tasks.scoring.features import FeatureExtractor, FeatureNetworks
from tests.helpers.builders import at, context, put_networks, put_weights, small_recipe

SETTINGS = ("encode.align_features=true", "foundation.weights=random", "sample.steps=2")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Traced whole, without the generation of code."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setenv(FOLDER, str(tmp_path / "compiled"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def made() -> int:
    return counters["stats"]["unique_graphs"]


def test_encoding(traced: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One graph each for the tokenizer's encoder, the foundation model and the Semantic VAE's blocks, of both views and
    all batches."""
    found = {}
    for compiled in (False, True):
        recipe = small_recipe(*SETTINGS, "image.flips=true", f"compute.actors.compile={compiled}".lower())
        put_networks(at(tmp_path), recipe)
        assert recipe.train_semvae is not None and recipe.foundation is not None
        torch.manual_seed(0)  # of the Semantic VAE and of the random foundation model
        semantic = build_semantic_vae(recipe.train_semvae.model, recipe.foundation.feature_dim)
        put_weights(at(tmp_path), recipe, "train_semvae", {WEIGHTS: semantic})
        encoder = Encoder(context(at(tmp_path), recipe, encode.STAGE, "train_vavae", "train_semvae").job)
        encoder.batch = 2
        pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
        found[compiled] = encoder.encode(["a", "b", "c"], pixels)
    assert made() == 3, "the third is that of the Semantic VAE's blocks"
    said = capsys.readouterr().out
    assert "compiling Encoder for 2 × 3 × 32 × 32 float32" in said and "compiled FoundationModel" in said
    assert found[False].keys() == found[True].keys() == {"z", "z_flip", "s", "s_flip", "f", "f_flip"}
    for name, values in found[False].items():
        np.testing.assert_allclose(found[True][name], values, rtol=2e-3, atol=2e-3)


def test_scoring(traced: None, tmp_path: Path) -> None:
    """One graph for the features' network and one each for the tokenizer's two sides."""
    recipe = small_recipe(*SETTINGS)
    put_networks(at(tmp_path), recipe)
    tokenizer = Artifact(at(tmp_path), "train_vavae", "train_vavae")
    section = recipe.evaluate.features.model_copy(update={"weights": "random"})
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        asked = FeatureNetworks(32, section, tokenizer=tokenizer, compiled=compiled)
        extractor = FeatureExtractor(asked)
        found.append([extractor.look(np.arange(3), pixels, reconstruct) for reconstruct in (False, True)])
        assert made() == (3 if compiled else 0)
    for plain, quick in zip(*found, strict=True):
        np.testing.assert_allclose(quick.features, plain.features, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found[1][1].psnr, found[0][1].psnr, rtol=1e-3)


def test_sampling(traced: None, tmp_path: Path) -> None:
    """One graph for all blocks and one for the decoder, whichever image or step."""
    images = []
    for compiled in (False, True):
        recipe = small_recipe(*SETTINGS, f"compute.actors.compile={compiled}".lower())
        put_networks(at(tmp_path), recipe)
        sampler = Sampler.of(context(at(tmp_path), recipe, sample.STAGE, "train_vavae", "encode", "train_dit"))
        images.append([pixels.astype(int) for _, _, pixels in sampler.stream([np.arange(2), np.arange(2, 4)])])
    assert made() == 2
    assert np.abs(np.array(images[0]) - np.array(images[1])).max() <= 1


@pytest.mark.parametrize(
    ("device", "compiled", "expected"),
    [
        (CPU, False, torch.channels_last),
        (CPU, True, torch.channels_last),
        (CUDA, True, torch.channels_last),
        (CUDA, False, torch.contiguous_format),
    ],
)
def test_channels_lie_side_by_side_where_it_pays(
    device: torch.device, compiled: bool, expected: torch.memory_format
) -> None:
    assert layout(device, compiled) == expected


def test_cuda_graphs_change_nothing_without_cuda(tmp_path: Path) -> None:
    recipe = small_recipe(*SETTINGS, "compute.actors.cuda_graphs=true")
    put_networks(at(tmp_path), recipe)
    sampler = Sampler.of(context(at(tmp_path), recipe, sample.STAGE, "train_vavae", "encode", "train_dit"))
    assert sampler.integrator._runs[id(sampler.integrator.model)] is sampler.integrator.model
    assert sampler.images(np.arange(2))[1].shape == (2, 32, 32, 3)


def test_graphs_go_to_the_home_unless_it_is_said_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTFORGE_HOME", str(tmp_path))
    monkeypatch.setenv(FOLDER, "")
    monkeypatch.delenv(FOLDER)
    assert keep_compiled() == tmp_path / "compiled" == Path(os.environ[FOLDER])
    monkeypatch.setenv(FOLDER, default_cache_dir())  # as torch does when its compiler is imported
    assert keep_compiled() == tmp_path / "compiled"
    monkeypatch.setenv(FOLDER, str(tmp_path / "shared"))
    assert keep_compiled() == tmp_path / "shared" and (tmp_path / "shared").is_dir()


def test_the_first_of_a_machine_compiles_and_the_others_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LATENTFORGE_HOME", str(tmp_path))
    entered: list[str] = []
    both = threading.Barrier(3)

    def other(patience: float = 60.0) -> None:
        with once_a_machine("Block for 2 × 3", patience):
            entered.append("other")
            both.wait(60)  # those that waited go on side by side

    with once_a_machine("Block for 2 × 3"):
        with once_a_machine("Block for 4 × 3"):
            pass  # another graph is nobody's business
        threads = [threading.Thread(target=other) for _ in range(2)]
        for each in threads:
            each.start()
        waiting = 0
        while waiting < 2:  # one that came later would compile, as the first of those that are left
            waiting += capsys.readouterr().out.count("another process is compiling Block for 2 × 3")
            time.sleep(0.01)
        assert not entered
    both.wait(60)
    for each in threads:
        each.join()
    assert entered == ["other", "other"]


def test_who_has_waited_too_long_compiles_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LATENTFORGE_HOME", str(tmp_path))
    with once_a_machine("Block"), once_a_machine("Block", patience=0.05):
        assert "Block is not compiled after 0 s: compiling it here, too" in capsys.readouterr().out


def test_frozen_networks_take_turns_and_trainings_do_not(traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    @contextmanager
    def turn(what: str) -> Iterator[None]:
        turns.append(what)
        yield

    monkeypatch.setattr(networks, "once_a_machine", turn)
    for frozen in (True, False):
        network = torch.nn.Sequential(torch.nn.Linear(4, 4))
        if frozen:
            networks.ready(network.requires_grad_(False), True)
        else:
            prepare(network, compile=True)
        for _ in range(2):
            network(torch.zeros(2, 4))
    assert turns == ["Sequential for 2 × 4 float32"]


_NEXT = """
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from tasks.networks import ready
torch.manual_seed(0)
network = ready(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()).eval().requires_grad_(False), True)
network(torch.ones(2, 8))
print("hits", counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow  # generates code
def test_the_next_process_compiles_nothing(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != FOLDER}
    environment["LATENTFORGE_HOME"] = str(tmp_path)
    start = partial(subprocess.Popen, env=environment, stdout=subprocess.PIPE, text=True)
    together = [start([sys.executable, "-c", _NEXT]) for _ in range(2)]
    hits = sorted((each.communicate()[0].split("hits ")[1].strip() == "0" for each in together), reverse=True)
    assert hits == [True, False], "of two at the same time, one compiles"
    assert (tmp_path / "compiled").is_dir()
