"""The report of a real run in a real browser.

Needs Debian's packages chromium and chromium-driver.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from megatron_sgopd.cli import main

from .conftest import Finished

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs Chromium: apt-get install chromium chromium-driver"
)

FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1600"),
    # What the browser itself would ask the network for.
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
HOSTILE = "<script>window.owned = 1</script><img src=x onerror='window.owned = 1'>\u202e{{SCRIPT}}"


class Browser:
    """Chromium, and what it asked for and complained of since the last page was opened."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def open(self, address: str) -> None:
        self.driver.get("about:blank")
        self.requests(), self.complaints()
        self.driver.get(address)
        self.wait(lambda: self.script("return document.body.dataset.ready") == "yes")

    def wait(self, condition: Callable[[], Any], seconds: float = 30) -> None:
        WebDriverWait(self.driver, seconds).until(lambda _: condition())

    def script(self, text: str) -> Any:
        return self.driver.execute_script(text)

    def at(self, id_: str) -> WebElement:
        return self.driver.find_element(By.ID, id_)

    def choose(self, id_: str, value: object) -> None:
        Select(self.at(id_)).select_by_value(str(value))

    def responses(self) -> list[str]:
        return [option.text for option in Select(self.at("responses")).options]

    def detail(self) -> dict[str, str]:
        rows = self.at("token").find_elements(By.TAG_NAME, "div")
        return {row.find_element(By.TAG_NAME, "dt").text: row.find_element(By.TAG_NAME, "dd").text for row in rows}

    def requests(self) -> list[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.driver.quit()


@pytest.fixture(scope="session")
def hostile_run(main_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, with a response of its last sampled step that wants to be more than text."""
    folder = copied(main_run.folder, tmp_path_factory.mktemp("report") / "run")
    lines = samples(folder)
    line = lines[-1]
    line |= {
        "prompt": HOSTILE,
        "response": HOSTILE,
        "extracted": HOSTILE,
        "answer": HOSTILE,
        "reason": HOSTILE,
        "outcome": 0,
    }
    line["tokens"]["text"][0] = HOSTILE
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def page(hostile_run: Path) -> str:
    assert main(["report", str(hostile_run)]) == 0
    return (hostile_run / "report.html").as_uri()


def copied(run: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "summary.json", "recipe.yaml"):
        shutil.copy(run / name, folder / name)
    return folder


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_the_page_opens_from_disk_with_all_its_charts_and_asks_for_nothing(browser: Browser, page: str) -> None:
    browser.open(page)
    drawn = browser.script(
        "return [...document.querySelectorAll('.plot')].map((p) => [p.id, p.querySelectorAll('.trace').length])"
    )
    assert len(drawn) >= 14
    without = [name for name, traces in drawn if not traces]
    assert not without, without
    assert "finished" in browser.at("runs").text and "11 of 11" in browser.at("runs").text
    assert browser.at("alarms").text == ""
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith(("data:", "blob:"))] == [page]


def test_the_viewer_shows_the_numbers_of_a_response(browser: Browser, page: str, hostile_run: Path) -> None:
    browser.open(page)
    browser.choose("step", 1)
    [first, *_] = [line for line in samples(hostile_run) if line["step"] == 1]
    tokens = first["tokens"]
    shown = browser.at("tokens").find_elements(By.CLASS_NAME, "token")
    assert [token.text for token in shown] == tokens["text"]
    classes = {"agree": "a", "conflict": "c", "neutral": "n", "undecided": "u"}
    assert "".join(classes[token.get_attribute("class").split()[1]] for token in shown) == tokens["gate"]

    browser.at("tokens").send_keys(Keys.END, Keys.ARROW_LEFT)
    place, detail = len(tokens["text"]) - 2, browser.detail()
    for name, key in (
        ("s student", "student"),
        ("q teacher", "teacher"),
        ("r reference", "reference"),
        ("b rollout", "behaviour"),
        ("delta = q − s", "delta"),
        ("A advantage", "advantage"),
    ):
        assert detail[name] == f"{tokens[key][place]:.4f}", name
    assert detail["rank under the teacher"] == str(tokens["rank"][place])
    assert classes[detail["gate"]] == tokens["gate"][place]

    ActionChains(browser.driver).move_to_element(shown[2]).perform()
    assert browser.detail()["position"].split()[0] == "3"
    order = sorted(range(len(tokens["delta"])), key=lambda i: -abs(tokens["delta"][i]))
    for index in (order[0], order[1]):
        browser.at("tokens").send_keys("n")
        assert browser.detail()["position"].split()[0] == str(index + 1)
    browser.at("tokens").send_keys(Keys.HOME, "n")
    assert browser.detail()["position"].split()[0] == str(order[0] + 1)


def test_the_viewer_filters_by_outcome_and_sorts_by_surprise(browser: Browser, page: str, hostile_run: Path) -> None:
    browser.open(page)
    steps = sorted({line["step"] for line in samples(hostile_run)})
    assert [int(option.text) for option in Select(browser.at("step")).options] == steps == [1, 3, 5, 7, 9, 11]
    seen = {"1": 0, "0": 0}
    for step in steps:
        browser.choose("step", step)
        of_step = [line for line in samples(hostile_run) if line["step"] == step]
        for outcome in seen:
            browser.choose("outcome", outcome)
            expected = sum(str(line["outcome"]) == outcome for line in of_step)
            shown = browser.responses()
            assert len(shown) == expected
            assert all(text.startswith("right") == (outcome == "1") for text in shown)
            seen[outcome] += expected
        browser.choose("outcome", "all")
        browser.choose("sort", "surprise")
        surprises = [-sum(line["tokens"]["teacher"]) / len(line["tokens"]["teacher"]) for line in of_step]
        assert [text.split("surprise ")[1].split()[0] for text in browser.responses()] == [
            f"{value:.3f}" for value in sorted(surprises, reverse=True)
        ]
        browser.choose("sort", "sampled")
    assert all(seen.values()), "a run of which one outcome was never sampled shows nothing"


def test_a_hostile_response_stays_text(browser: Browser, page: str, hostile_run: Path) -> None:
    text = Path(page.removeprefix("file://")).read_text()
    assert "window.owned" not in text, "texts of models are packed"
    browser.open(page)
    browser.choose("responses", len(browser.responses()) - 1)
    visible = HOSTILE.replace("\u202e", "⟨U+202E⟩")
    assert browser.at("prompt").text == visible
    assert visible in browser.at("response-title").text and visible in browser.at("tokens").text
    assert any(visible in option for option in browser.responses())
    assert browser.script("return window.owned") is None
    assert browser.script("return document.querySelectorAll('main script, main img, main svg image').length") == 0
    # Were it ever put in as markup, the page's own policy would not run it.
    browser.script(f"document.getElementById('prompt').innerHTML = {json.dumps(HOSTILE)}")
    time.sleep(0.5)
    assert browser.script("return window.owned") is None
    assert any("Content Security Policy" in complaint for complaint in browser.complaints())


def test_light_and_dark(browser: Browser, page: str) -> None:
    browser.open(page)
    looks = []
    for _ in range(2):
        looks.append(
            browser.script(
                "return [getComputedStyle(document.body).backgroundColor,"
                " document.querySelector('#chart-learning .bg, #chart-learning .main-svg').style.background"
                " || document.querySelector('#chart-learning')._fullLayout.paper_bgcolor]"
            )
        )
        browser.at("theme").click()
    assert looks[0][0] != looks[1][0] and looks[0][1] != looks[1][1]


def test_runs_that_differ_in_their_seed_share_a_curve(browser: Browser, main_run: Finished, tmp_path: Path) -> None:
    for seed in (1, 2):
        folder = copied(main_run.folder, tmp_path / f"sgopd/seed_{seed}")
        recipe = (folder / "recipe.yaml").read_text()
        assert "seed: 1234" in recipe
        (folder / "recipe.yaml").write_text(recipe.replace("seed: 1234", f"seed: {seed}"))
    other = copied(main_run.folder, tmp_path / "opd/seed_1")
    (other / "recipe.yaml").write_text(recipe.replace("method: sgopd", "method: opd"))
    (other / "metrics.jsonl").open("a").write('{"step": 12, "loss": 0.')
    out = tmp_path / "all.html"
    assert main(["report", *map(str, sorted(tmp_path.glob("*/seed_*"))), "--out", str(out)]) == 0
    browser.open(out.as_uri())
    legend = browser.at("chart-learning").text
    assert "sgopd (2 runs), held-out" in legend and "opd/seed_1, held-out" in legend
    assert "opd/seed_1: metrics.jsonl: its last line is cut off" in browser.at("alarms").text
    Select(browser.at("run")).select_by_visible_text("opd/seed_1")
    assert browser.complaints() == []


def test_live_follows_a_run_on_this_machine_alone(browser: Browser, main_run: Finished, tmp_path: Path) -> None:
    folder = copied(main_run.folder, tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:5]))
    (folder / "summary.json").unlink()
    command = [sys.executable, "-m", "megatron_sgopd.cli", "report", "--live", "--port", "0", str(folder)]
    server = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        # Tests that run in a shell's background have it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[1]
        assert address.startswith("http://localhost:")
        browser.open(address)
        assert "5 of 11" in browser.at("runs").text and "not at its end" in browser.at("runs").text
        browser.choose("step", 3)
        browser.choose("responses", 1)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("".join(lines[5:7]))
        browser.wait(lambda: "7 of 11" in browser.at("runs").text)
        assert Select(browser.at("step")).first_selected_option.text == "3", "what was chosen stays chosen"
        assert browser.at("responses").get_attribute("value") == "1"
        assert browser.complaints() == []
        assert all(url.startswith((address, "data:", "blob:")) for url in browser.requests())

        stranger = urllib.request.Request(address, headers={"Host": "elsewhere.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(stranger, timeout=10)
        (folder / "metrics.jsonl").write_text("broken\n")
        browser.wait(lambda: "the line at byte 0 is not JSON" in browser.at("trouble").text)
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 130
        browser.wait(lambda: "does not answer" in browser.at("trouble").text)
    finally:
        server.kill()
        server.wait()
