"""The report in a real Chromium: at two widths, light and dark, with a model that attacks its readers.

Chromium comes by tests/reporting/install.sh. Not covered: other browsers.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browsing, find_chromium
from folders import write_everything, write_run

ROOT = Path(__file__).parents[2]
WIDTHS = (390, 1280)
WORDS = "[...document.querySelectorAll({!r})].map(one => one.textContent)"


def report(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "report.py"), str(folder), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_everything(tmp_path_factory.mktemp("runs") / "<b>run")
    done = report(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder / 'report.html'}\n"
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if find_chromium() is None:
        pytest.skip("no Chromium on this machine: bash tests/reporting/install.sh, as root")
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_asks_for_nothing_and_is_readable(browser: Browser, everything: Path, width: int, scheme: str) -> None:
    """No sideways scrolling, no request but the file, no complaint, and every text at 4.5 : 1 or better."""
    url = everything.as_uri()
    browser.open(url, width=width, scheme=scheme)
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.requests() == [url] and browser.complaints() == []
    assert browser.value("performance.getEntriesByType('resource').length") == 0
    assert browser.value(CONTRAST) == []
    background = browser.value("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(18, 22, 28)" if scheme == "dark" else "rgb(255, 255, 255)")
    assert browser.value("document.querySelectorAll('figure svg').length") == EXPECTED_PLOTS
    low = browser.value("Math.min(...[...document.querySelectorAll('figure svg')].map(s => s.clientHeight))")
    assert low > 100, "a plot has no height"


EXPECTED_PLOTS = 3 + 6 + 1 + 1
"""Of probability and length; of the figures that move, of `folders.figures`; of held-out accuracy; of the time."""

CONTRAST = """
(() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = one => {
    for (; one; one = one.parentElement) {
      const colour = rgb(getComputedStyle(one).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
  };
  const weak = [];
  for (const one of document.querySelectorAll('body *')) {
    if (![...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())) continue;
    const style = getComputedStyle(one);
    const [a, b] = [rgb(one.closest('svg') ? style.fill : style.color), behind(one)].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) weak.push(`${one.tagName} ${one.textContent.slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return weak;
})()
"""


def test_what_the_model_says_is_text(browser: Browser, everything: Path) -> None:
    browser.open(everything.as_uri(), width=1280)
    assert browser.value("document.title") == "<b>run – RLSC"
    assert browser.value("document.querySelectorAll('script, img, i, mark b, h1 b').length") == 0
    assert "<script>" not in everything.read_text()
    said = browser.value(WORDS.format(".said pre"))
    assert any("<script>document.title = 'owned'</script><img src=x onerror=alert(1)> & " in text for text in said)
    assert set(browser.value(WORDS.format("mark"))) == {"\\boxed{<b>7</b>}"}


def test_what_is_on_the_page(browser: Browser, everything: Path) -> None:
    """Base 2 of 4 right, trained 2 of 4; the gain's interval is evaluation's own."""
    browser.open(everything.as_uri(), width=1280)
    rows = browser.value(
        "[...document.querySelectorAll('#benchmarks tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    assert rows[1][:4] == ["AIME24 greedy", "4", "50.0 [49.0, 51.0]", "50.0 [49.0, 51.0]"]
    assert rows[1][4].startswith("+0.0 [-") and rows[1][6] == "13.3 → 26.7"
    assert browser.value(WORDS.format("#guard td"))[:2] == ["3", "repetition"]
    assert browser.value(WORDS.format(".tile"))[0].split() == ["confidence", "F0.1", "→", "0.5"]
    titles = browser.value(WORDS.format("figure strong"))
    assert "p(y|x) of a whole response" in titles and "guard/unheard_of" in titles
    constant = browser.value("document.querySelector('#curves > p').innerText")
    assert "confidence/identical_share 0.5, rollout/truncated_share 0." in constant
    captions = browser.value(WORDS.format("#probability figcaption"))
    # exp(-1) = 0.368 for each response of step 1, exp(-1/5) = 0.819 for those of step 5, of 1 and 5 tokens
    assert "Mean 0.368 → 0.819" in captions[0] and "Mean 1.0 → 5.0" in captions[2]
    assert browser.value(WORDS.format("#settings tr.default td"))[:2] == ["load", "checkpoints/base"]


def test_a_run_that_has_only_begun(browser: Browser, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=0, status="running")
    done = report(folder, "--output", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    browser.open((tmp_path / "page.html").as_uri(), width=390)
    assert browser.value("document.querySelector('#guard p').innerText") == "Nothing."
    assert browser.value("document.querySelectorAll('svg').length") == 0 and browser.complaints() == []


def test_what_cannot_be_reported(tmp_path: Path) -> None:
    done = report(tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"report: error: {tmp_path} is no run's folder")
    folder = write_run(tmp_path / "run")
    done = report(folder, "--output", tmp_path / "nowhere" / "page.html")
    assert done.returncode == 2 and "No such file or directory" in done.stderr


def test_a_journal_that_is_damaged_costs_its_own_sections(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "rollouts" / "step-000001.jsonl").write_text('{"prompt_index":0}\n')
    done = report(folder)
    assert done.returncode == 0, done.stderr
    page = (folder / "report.html").read_text()
    assert page.count("step-000001.jsonl, line 1, is no sample of a rollout journal") == 1
    assert page.count("checkpoints/hf has no tokenizer") == 1 and "confidence/mean" in page
