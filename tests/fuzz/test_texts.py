"""Texts of other people's making where a browser, a spreadsheet or a log would make something of them."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import UserError, load_recipe
from configs.addresses import holds_credentials
from configs.load import assign
from infra.storage import Storage
from infra.weights import load_checkpoint
from tasks.comparing.comparison import ComparedRun, as_csv, page
from tasks.data.formats import looks_like_picture, what_instead
from tasks.sources.csv_file import CsvSource
from tasks.sources.labels import NO_LABEL, counted_labels, why_not
from tasks.sources.names import class_order, is_leftover, normal, split_in
from tests.helpers.odd_sources import jpeg, listed, recipe_of, tree

HOSTILE = ["<script>alert(1)</script>", "\"><img src=x onerror='alert(1)'>", "</td></table><b>", "{{ 7*7 }}", "&lt;b"]
LABELS = st.one_of(st.none(), st.integers(), st.text(max_size=30), st.from_regex(r"-?\d{1,40}", fullmatch=True))


@pytest.mark.parametrize("text", HOSTILE)
def test_names_reach_pages_as_text(text: str) -> None:
    run = ComparedRun(text, {"fid": 2.0, text: 1.0}, 0, {"fid": [(1.0, 1.0, 2.0)]})
    made = page(text, text, [run], ["fid", text], {text: b"png"}, {text: 1.0}, {text: {text: text}}, text).decode()
    if "<" in text:
        assert text not in made
    assert "49" not in text and "alert(1)</script>" not in made and "<img src=x" not in made


def test_names_reach_spreadsheets_as_text() -> None:
    names = ["=cmd|' /C calc'!A0", "+1", "-1+1", "@SUM(A1)", "\t=1", "plain"]
    rows = list(csv.reader(io.StringIO(as_csv([ComparedRun(name, {name: 1.0}) for name in names]).decode())))[1:]
    assert [row[0] for row in rows] == [*(f"'{name}" for name in names[:-1]), "plain"]
    assert [row[4] for row in rows] == [row[0] for row in rows]


def test_names_of_classes_reach_messages_as_they_are(tmp_path: Path) -> None:
    """And terminals cannot be steered by them."""
    tree(tmp_path / "images", {"a\x1b[2Jb": 2, "<b>c": 2})
    listing = listed(recipe_of("folder", tmp_path / "images", 2))
    assert listing.classes == ("<b>c", "a\x1b[2Jb")
    with pytest.raises(UserError) as refused:
        listed(recipe_of("folder", tmp_path / "images", 3))
    assert "\x1b" not in str(refused.value)


SECRETS = [
    "s3://AKIA:geheim@bucket/x",
    "https://user:geheim@host/x",
    "https://geheim@host/x.safetensors",
    "https://host/x?X-Amz-Credential=a&X-Amz-Signature=geheim",
    "https://host/x?sv=1&sig=geheim",
    "https://host/x?access_token=geheim",
    "https://host/x?api_key=geheim",
    "https://host/x?AWSAccessKeyId=geheim&Expires=1",
    "postgresql://u:geheim@host/db",
]


@pytest.mark.parametrize("address", SECRETS)
@pytest.mark.parametrize(
    "field", ["data.source.path", "train_dit.pretrained", "foundation.weights", "evaluate.reference"]
)
def test_addresses_with_credentials_are_refused_without_being_repeated(address: str, field: str) -> None:
    """Before anything is fetched or written; whatever the field, as all of a recipe goes into manifests and MLflow."""
    overrides = (
        [f"{field}={address}"] if field != "data.source.path" else [f"data.source={{kind: folder, path: '{address}'}}"]
    )
    with pytest.raises(UserError, match="holds credentials") as refused:
        load_recipe("demo_tiny", overrides)
    assert "geheim" not in str(refused.value) and field in str(refused.value)
    for read in (Storage.at, load_checkpoint):
        with pytest.raises(UserError, match="credentials") as refused:
            read(address)
        assert "geheim" not in str(refused.value)


def test_ordinary_addresses_hold_none() -> None:
    plain = [
        "s3://bucket/a:b@c/d",
        "hf://org/repo/file.pt@main",
        "/a/b@c",
        "https://host/a?b=c&keys=1",
        "http://h:80/x",
    ]
    assert [address for address in plain if holds_credentials(address)] == []


def test_a_list_from_elsewhere_names_its_own_files_only(tmp_path: Path) -> None:
    """Neither files of this machine, nor what only this machine can reach."""
    (tmp_path / "a.jpg").write_bytes(jpeg())
    place = Storage.at("memory://lists")
    names = ["own.jpg", str(tmp_path / "a.jpg"), f"file://{tmp_path}/a.jpg", "http://127.0.0.1:1/a.jpg"]
    place.write_bytes("own.jpg", jpeg())
    place.write_bytes("labels.csv", "\n".join(["path,label", *(f"{name},0" for name in names)]).encode())
    listing = CsvSource("memory://lists/labels.csv").listing()
    assert listing.images["key"].to_pylist() == ["own.jpg"]
    assert {one.key for one in listing.refused} == set(names[1:])
    assert {one.reason for one in listing.refused} == {"outside the CSV's storage"}
    (tmp_path / "labels.csv").write_text(f"path,label\n{tmp_path}/a.jpg,0\n")
    assert CsvSource(str(tmp_path / "labels.csv")).listing().images.num_rows == 1, "one's own list may name any file"


@settings(max_examples=150, deadline=None)
@given(st.lists(LABELS, max_size=20), st.integers(0, 3))
def test_any_labels_come_to_numbers_of_their_classes(texts: list[str | int | None], first: int) -> None:
    counts = Counter(texts)
    found = counted_labels(counts, first)
    number_of = dict(zip(counts, found.numbers, strict=True))
    numbers = [number_of[text] for text in texts]
    assert len(numbers) == len(texts) and len(found.classes) <= 1_000_000
    for text, number in zip(texts, numbers, strict=True):
        assert number == NO_LABEL or 0 <= number < len(found.classes)
        assert number != NO_LABEL or all(isinstance(part, str) for part in why_not(text))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=10), st.binary(max_size=80))
def test_any_names_and_heads_are_told_apart(names: list[str], head: bytes) -> None:
    assert sorted(class_order(names)) == sorted(set(names))
    for name in names:
        assert split_in(normal(name)) in (None, "train", "validation", "test")
        is_leftover(name)
    looks_like_picture(head)
    assert what_instead(head) is None or len(what_instead(head) or ()) == 2


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_any_override_is_laid_on_or_refused(text: str) -> None:
    for override in (text, f"data.classes={text}", f"{text}=1", f"a.b={text}"):
        values = {"data": {"classes": 1}, "a": {}}
        try:
            assign(values, override)
        except UserError as refused:
            assert len(str(refused)) < 1000
        else:
            yaml.safe_dump(values)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=20), st.text(max_size=8), st.sampled_from(["train", "test", "", "x"])), max_size=6
    )
)
def test_any_csv_is_listed_or_refused(rows: list[tuple[str, str, str]]) -> None:
    import tempfile

    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([("path", "label", "split"), *rows])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.csv"
        path.write_bytes(text.getvalue().encode("utf-8", "replace"))
        try:
            listing = CsvSource(str(path)).listing()
        except UserError:
            return
        assert listing.images.num_rows + len(listing.refused) <= len(rows)
