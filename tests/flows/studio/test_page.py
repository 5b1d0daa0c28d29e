"""The page in a real browser over a finished run: every tab, one picture of one seed, and a root that breaks."""

from __future__ import annotations

import base64
import io
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.flows.conftest import Workplace
from tests.helpers import browser
from tests.helpers.studio import LINE, PICTURE, studio

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.program() is None, reason="no Chromium on the path: apt-get install chromium"),
]


def _sampled(page: browser.Page, seed: int) -> np.ndarray:
    """The picture that the tab shows of this seed, whole."""
    page.fill("Seed", str(seed))
    page.click("Sample", "button")
    page.wait(f"document.body.innerText.includes('seed {seed}') && document.body.innerText.includes('--seed {seed} ')")
    source = page.wait(f"({PICTURE} || {{}}).src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def test_one_seed_gives_one_picture_and_the_command_makes_it(finished: Workplace, tmp_path: Path) -> None:
    with studio(finished.environment, finished.undisturbed) as address, browser.browsing() as page:
        page.go(f"{address}?tab=Sample")
        page.wait("document.body.innerText.includes('T-shirt/top')")
        first, other, again = (_sampled(page, seed) for seed in (1, 2, 1))
        assert np.array_equal(first, again) and not np.array_equal(first, other)
        assert np.ptp(first) > 50, "a picture of something"
        line = page.value("document.querySelector('.nicegui-code').innerText").splitlines()[0]
        assert page.errors == []
    words = shlex.split(line)
    assert words[:4] == ["latentforge", "sample", "--recipe", "demo_tiny"]
    output = tmp_path / "again.png"
    finished.flows(*words[1:-1], str(output))
    made = np.asarray(Image.open(output))
    assert made.shape == first.shape
    assert np.abs(made.astype(int) - first).max() <= 1, "another process may round another way"


def test_every_tab_shows_what_there_is(finished: Workplace) -> None:
    with studio(finished.environment, finished.undisturbed) as address, browser.browsing() as page:
        page.go(address)
        page.wait("document.querySelectorAll('img').length > 20")
        page.fill("Search by key", "no such key")
        assert "No such image" in page.wait(f"({LINE} || {{}}).innerText")
        page.click("Tokenizer")
        page.wait("document.body.innerText.includes('peak signal-to-noise ratio')")
        page.click("Runs")
        page.wait("document.querySelector('canvas')")
        report = page.wait("([...document.querySelectorAll('a')].find(e => e.innerText.trim() == 'open') || {}).href")
        assert page.errors == []
        page.go(report)
        page.wait("document.body.innerText.includes('Fashion-MNIST in minutes')")
        page.go(report.replace("report.html", "manifest.json"))
        assert page.text().startswith("no such page"), "only pages and pictures are served"


def test_it_outlives_a_root_whose_files_vanish(finished: Workplace, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(finished.undisturbed, root)
    with studio(finished.environment, str(root)) as address, browser.browsing() as page:
        page.go(address)
        page.wait("document.querySelectorAll('img').length > 20")
        shutil.rmtree(root / "shard")
        page.click("test", "button")
        said = page.wait(f"({LINE} || {{}}).innerText")
        assert "cannot be read" in said and "Traceback" not in page.text()
        (root / "train_dit" / finished.first["train_dit"] / "manifest.json").write_text("{")
        page.click("Sample", ".q-tab")
        page.wait("document.body.innerText.includes('No finished train_dit')")
