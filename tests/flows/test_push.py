"""`export --to hf://…` against the hub's own HTTP calls: private, with the usual token, and back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from configs import UserError
from flows import share
from tests.flows.conftest import REPOSITORY
from tests.flows.test_share import LABELS, ROWS, SEED, made
from tests.helpers.hub import Hub, Repository, hub

TOKEN = "hf_planted0123456789f9c1"
PLACE = "hf://us/clothes"


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that this process asks, with nobody logged in."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with hub(TOKEN) as running:
        told = {
            "ENDPOINT": running.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": running.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }
        for name, value in told.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        yield running


@pytest.fixture
def logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def test_the_command_pushes_by_a_login_and_tells_its_token_to_nobody(played: Hub, tmp_path: Path) -> None:
    run, _ = made(tmp_path, "demo_tiny")
    login, home = tmp_path / "login", tmp_path / "home"
    login.mkdir()
    (login / "token").write_text(TOKEN)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": played.url, "HF_HOME": str(login), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "flows", "export", run, "--to", PLACE],
        cwd=REPOSITORY,
        env={**environment, "LATENTFORGE_HOME": str(home), "HF_HUB_VERBOSITY": "debug"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pushed = played.repositories["us/clothes"]
    assert pushed.visibility == "private"
    told = {"README.md", "model_index.json", "pipeline.py", "grid.png", "vae/config.json"}
    assert told <= set(pushed.files) and any(name.endswith(".safetensors") for name in pushed.files)
    assert f"{played.url}/us/clothes/commit/{pushed.commit}" in done.stdout
    left = [path for path in home.rglob("*") if path.is_file()]
    said = [done.stdout.encode(), done.stderr.encode(), *pushed.files.values()]
    said += map(Path.read_bytes, left)
    assert not [each for each in said if TOKEN.encode() in each]


def test_what_was_pushed_is_sampled_from_there(played: Hub, logged_in: None, tmp_path: Path) -> None:
    run, pixels = made(tmp_path, "demo_tiny")
    share.export(run, PLACE, "demo")
    assert np.array_equal(share.load(PLACE)(LABELS, ROWS, SEED, output_type="np").images, pixels)
    assert not list((tmp_path / "hub").rglob("*.py")), "code of a repository is not even fetched"


def test_nothing_is_public_unless_it_is_said(played: Hub, logged_in: None, tmp_path: Path) -> None:
    run, _ = made(tmp_path, "demo_tiny")
    played.repositories["us/clothes"] = there = Repository("public")
    with pytest.raises(UserError, match=r"repository is public; .* with --public"):
        share.export(run, PLACE, "demo")
    assert there.files == {} and played.objects == {}
    share.export(run, PLACE, "demo", public=True)
    share.export(run, "hf://us/shirts", "demo", public=True)
    assert there.files and played.repositories["us/shirts"].visibility == "public"


def test_what_the_hub_refuses_is_one_line(played: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = made(tmp_path, "demo_tiny")
    with pytest.raises(UserError, match=r"refused .*401.*; set HF_TOKEN or log in with `hf auth"):
        share.export(run, PLACE, "demo")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"the hub refused .*401") as wrong:
        share.export(run, PLACE, "demo")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    played.full = True
    with pytest.raises(UserError, match=r"the hub refused .*Error while uploading") as full:
        share.export(run, PLACE, "demo")
    for told in (wrong, full):
        assert "\n" not in str(told.value) and "hf_" not in str(told.value)
    with pytest.raises(UserError, match="hf://us/nothing: not on the hub"):
        share.load("hf://us/nothing")
