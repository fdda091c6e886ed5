"""What the look in a browser finds in pages with known faults, and in a page of a data set."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from browser.look import look_at

from place import cli

PIXEL = "R0lGODlhAQABAIAAAAAAAP///yH5BAAAAAAALAAAAAABAAEAAAIBAAA="
DRAWN = '<svg width="40" height="40"><rect width="20" height="20"/></svg>'
FAULTS = {
    '<div style="width: 700px">wide</div>': "400 px: the page is 708 px wide in 400: div 'wide'",
    "<script>console.error('odd', 7)</script>": "1400 px: console: odd 7",
    "<script>none.there</script>": "1400 px: console: ReferenceError: none is not defined",
    '<link rel="stylesheet" href="https://example.org/a.css">': "console: Failed to load resource",
    '<img src="gone.png" alt="a plot">': "1400 px: a picture did not load: img 'a plot'",
    f'<img src="data:image/gif;base64,{PIXEL}" alt="a plot">': "1400 px: a picture is empty: img 'a plot'",
    '<svg class="plot"></svg>': "1400 px: a picture is empty: svg.plot",
    '<canvas class="plot"></canvas>': "1400 px: a picture is empty: canvas.plot",
    f'<div style="display: none">{DRAWN}</div>': "1400 px: a picture is ",
}


@pytest.mark.browser
def test_each_fault_is_found_and_what_scrolls_within_its_box_is_none(tmp_path: Path) -> None:
    pages = []
    for number, body in enumerate([*FAULTS, f'{DRAWN}<div style="overflow-x: auto">{[*FAULTS][0]}</div>']):
        pages.append(tmp_path / f"{number}.html")
        pages[-1].write_text(f"<!doctype html><title>page</title><body>{body}")
    found = look_at(pages)
    for page, words in zip(pages, FAULTS.values()):
        assert [line for line in found if line.startswith(f"{page} ") and words in line], words
    assert not [line for line in found if line.startswith(f"{pages[-1]} ")]


def test_without_a_browser_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="^no browser: none of chromium, .* is installed; apt-get install"):
        look_at([])


@pytest.mark.browser
def test_the_page_of_a_data_set_is_whole_in_a_browser(prepared: Path, tmp_path: Path) -> None:
    data = shutil.copytree(prepared, tmp_path / "data")
    assert cli.main(["data", "inspect", str(data)]) == 0
    assert look_at([data / "inspect.html"]) == []
