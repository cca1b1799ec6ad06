import base64
import builtins
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from test_recorder import trained

import gradsurgery as gs


@pytest.fixture(scope="module")
def recorder():
    return trained(steps=30)[0]


def rows(page, heading):
    """First cell → the other cells, of the first table below a heading."""
    section = page.partition(f"<h2>{heading}</h2>")[2].partition("<h2>")[0]
    body = section.partition("<tbody>")[2].partition("</tbody>")[0]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", body)]
    return {first: [re.sub(r"<[^>]*>", "", cell) for cell in others] for first, *others in cells}


def test_the_page_is_one_file_and_loads_nothing(recorder, tmp_path):
    path = gs.report(recorder, tmp_path / "page.html", title="Tasks & <gates>", families={"a": "x", "b": "y", "c": "x"})
    page = path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]
    assert "<title>Tasks &amp; &lt;gates&gt;</title>" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "<script" not in page
    pictures = re.findall(r'alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(pictures) == 4
    for _, data in pictures:
        svg = base64.b64decode(data)
        assert ET.fromstring(svg).tag.endswith("svg")
        for link in re.findall(rb'href="([^"]+)"', svg):
            assert link.startswith((b"#", b"data:"))
    assert "What it took" not in page


def test_the_same_recording_gives_the_same_page(recorder, tmp_path):
    one, other = (gs.report(recorder, tmp_path / name).read_bytes() for name in ("one", "other"))
    assert one == other


def test_its_numbers_are_those_of_the_recording(recorder, tmp_path):
    page = gs.report(recorder, tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"<b>{recorder.conflict_rate():.0%}</b> of pairs in conflict" in page
    assert f"<b>{recorder.operation_rate():.0%}</b> of pairs operated on" in page
    groups = rows(page, "Where")
    assert list(groups) == list(recorder.groups)
    for name, (conflict, operated, cosine) in groups.items():
        assert conflict == f"{recorder.conflict_rate([name]):.0%}"
        assert operated == f"{recorder.operation_rate([name]):.0%}"
        c = recorder.groups.index(name)
        assert cosine == f"{np.nanmean(recorder.cosines[:, c]):.2f}"
    pairs = rows(page, "Who is in conflict")
    shares = {}
    for i, one in enumerate(recorder.tasks):
        for j, other in enumerate(recorder.tasks[:i]):
            values = recorder.cosines[:, :, i, j]
            shares[f"{other} and {one}"] = (values < 0).sum() / np.isfinite(values).sum()
    assert {name: cells[0] for name, cells in pairs.items()} == {name: f"{share:.0%}" for name, share in shares.items()}
    assert [shares[name] for name in pairs] == sorted(shares.values(), reverse=True)
    tasks = rows(page, "What the rule did")
    for i, name in enumerate(recorder.tasks):
        share = recorder.operated[:, :, i].sum() / np.isfinite(recorder.cosines[:, :, i]).sum()
        assert tasks[name][0] == f"{share:.0%}"


def test_it_says_what_steps_took(recorder, tmp_path):
    seconds = {"PCGrad": [0.3, 0.2, 9.0], "plain": [0.2, 0.1, 0.3]}
    page = gs.report(recorder, tmp_path / "page.html", seconds=seconds).read_text(encoding="utf-8")
    assert rows(page, "What it took") == {"PCGrad": ["300 ms", "1.50", "3"], "plain": ["200 ms", "1.00", "3"]}
    assert "<b>300 ms</b> a step of PCGrad" in page


def test_a_rule_that_only_sums_did_nothing(tmp_path):
    page = gs.report(trained(gs.Sum(), steps=3)[0], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "It added no part of one task's gradient to another's" in page


def test_a_recording_without_steps_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no steps. Make the Recorder before the training loop"):
        gs.report(gs.Recorder(), tmp_path / "page.html")


def test_no_times_are_an_error(recorder, tmp_path):
    with pytest.raises(ValueError, match=r"`seconds\['plain'\]` must be the times of steps. Found none."):
        gs.report(recorder, tmp_path / "page.html", seconds={"plain": []})


def test_without_matplotlib_it_says_what_to_install(recorder, tmp_path, monkeypatch):
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(ImportError, match=re.escape('pip install "gradsurgery[plots]"')):
        gs.report(recorder, tmp_path / "page.html")
