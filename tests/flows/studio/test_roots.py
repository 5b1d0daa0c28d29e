"""The page over roots that no run on this machine made: an image of one's own, a cascade, a bucket."""

from __future__ import annotations

import base64
import io
import itertools
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import load_recipe
from infra.artifacts import Artifact
from infra.storage import Storage
from tasks.sampling.playing import Player
from tests.helpers import browser
from tests.helpers.builders import at, drawing, put, put_networks, put_shard
from tests.helpers.studio import LINE, PICTURE, studio

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.program() is None, reason="no Chromium on the path: apt-get install chromium"),
]


READ = {
    "shard": (),
    "train_vavae": ("shard",),
    "encode": ("shard", "train_vavae"),
    "train_dit": ("encode",),
}
PRINT = {stage: f"{number:016x}" for number, stage in enumerate(READ)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Shards and a LowDiff of random weights, as their stages would have left them."""
    recipe, folder = load_recipe("lowdiff_tiny"), tmp_path / "root"
    put_shard(at(folder), recipe, 40, 20)
    put_networks(at(folder), recipe)
    for stage, read in READ.items():
        made = Artifact(at(folder), stage, stage).manifest
        (folder / stage / stage).rename(folder / stage / PRINT[stage])
        inputs = {name: PRINT[name] for name in read}
        put(at(folder), recipe, stage, list(made.files), PRINT[stage], inputs, facts=made.facts)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> dict[str, str]:
    """What the commands of this test know of their machine."""
    return {"LATENTFORGE_HOME": str(tmp_path / "home")}


def picture(page: browser.Page) -> np.ndarray:
    """The first that is seen, whole."""
    source = page.wait(f"({PICTURE} || {{}}).src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def test_an_image_of_ones_own_is_seen_as_the_tokenizer_does(root: Path, place: dict[str, str], tmp_path: Path) -> None:
    photograph, text = tmp_path / "mine.jpg", tmp_path / "notes.jpg"
    Image.fromarray(drawing(0, np.random.default_rng(5), 90)[:, :70]).save(photograph)
    text.write_text("no picture")
    with studio(place, at(root)) as address, browser.browsing() as page:
        page.go(f"{address}?tab=Tokenizer")
        page.wait("document.body.innerText.includes('test/0: peak signal')")
        before = picture(page)
        page.give(photograph)
        page.wait("document.body.innerText.includes('mine.jpg: peak signal-to-noise ratio')")
        mine = picture(page)
        page.give(text)
        assert "no image that can be read" in page.wait(f"({LINE} || {{}}).innerText")
        assert np.array_equal(mine, picture(page)), "what was seen stays"
        assert page.errors == []
    assert mine.shape == before.shape and not np.array_equal(mine, before)
    assert mine[16:48, 16:48].mean() < mine.mean(), "a ring is dark in its middle"


def test_a_cascades_steps_are_chosen_by_resolution(root: Path, place: dict[str, str]) -> None:
    with studio(place, at(root)) as address, browser.browsing() as page:
        page.go(f"{address}?tab=Sample")
        page.wait("document.body.innerText.includes('2 × 2')")
        page.click("2 × 2", ".q-checkbox")
        page.click("Sample", "button")
        page.wait("document.body.innerText.includes('--seed 0 ')")
        said = page.value("document.querySelector('.nicegui-code').innerText")
        shown = picture(page)
        assert page.errors == []
    words = shlex.split(said)
    (setting,) = (after for word, after in itertools.pairwise(words) if word == "--set")
    assert [each.side for each in load_recipe("lowdiff_tiny", [setting]).sampled_resolutions] == [4]
    model, tokenizer = (Artifact(at(root), name, PRINT[name]) for name in ("train_dit", "train_vavae"))
    again = Player(model, tokenizer).draw(range(6), 2, 0, [setting])
    assert np.abs(again.astype(int) - shown).max() <= 1, "another process may round another way"


def test_a_bucket_is_a_root_as_a_folder_is(root: Path, place: dict[str, str], s3_root: str) -> None:
    bucket = Storage.at(s3_root)
    for file in root.rglob("*"):
        if file.is_file():
            bucket.write_bytes(str(file.relative_to(root)), file.read_bytes())
    with studio(place, s3_root) as address, browser.browsing() as page:
        page.go(address)
        page.wait("document.querySelectorAll('img').length > 20")
        page.click("Tokenizer")
        page.wait("document.body.innerText.includes('test/0: peak signal')")
        page.click("Sample", ".q-tab")
        page.wait("document.body.innerText.includes('hoop')")
        page.click("Sample", "button")
        page.wait(f"document.body.innerText.includes('--root {s3_root} ')")
        assert np.ptp(picture(page)) > 0
        page.click("Runs")
        page.wait("document.body.innerText.includes('No report under this root yet.')")
        assert page.errors == []
