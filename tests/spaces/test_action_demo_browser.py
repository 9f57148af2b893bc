"""The Space as people see it: the real page in a real, headless Chromium."""

import base64
import csv
import io
import json
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from hf_vla import Policy
from hf_vla.models.images import to_rgb

from .conftest import BAD, GOOD, SHIPPED, scene

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning:selenium"),
]
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
)
TABS = ("Table", "Path", "Per dimension", "What the model computed", "Meaning")


class Page:
    """One browser with the page open; every wait is for something that is to be seen."""

    def __init__(self, url, width=1280, height=800):
        self.url, options = url, webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for flag in (*FLAGS, f"window-size={width},{height}"):
            options.add_argument(f"--{flag}")
        if width < 500:  # windows cannot be as narrow
            metrics = {"width": width, "height": height, "pixelRatio": 1.0}
            options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))

    def wait(self, condition, seconds=60):
        wait = WebDriverWait(self.driver, seconds, 0.1, ignored_exceptions=(Exception,))
        try:
            return wait.until(lambda _: condition())
        except TimeoutException:
            console = [entry["message"] for entry in self.driver.get_log("browser")]
            text = self.find("body").text
            raise AssertionError(f"Waited {seconds} s; the console says {console}, the page {text!r}") from None

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def find_all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def open(self, query=""):
        left = self.driver.current_url.startswith("http")
        self.driver.get(self.url + "/" + query)
        self.wait(lambda: self.find("#predict").is_enabled(), 180)  # the form is filled
        if not self.find_all("#dataset"):
            self.find("#more > button").click()
            self.wait(lambda: self.find_all("#dataset"))
        if left:  # a page that is left logs the connections which it aborts
            self.driver.get_log("browser")
        return self

    def value(self, name):
        return self.find(f"#{name} textarea, #{name} input").get_attribute("value")

    def write(self, name, text):
        field = self.find(f"#{name} textarea, #{name} input")
        field.send_keys(Keys.CONTROL + "a")
        field.send_keys(Keys.DELETE, text, Keys.TAB)
        self.wait(lambda: self.value(name) == text)

    def slide(self, name, steps):
        """Move a slider by the arrow key."""
        self.find(f"#{name} input[type=range]").send_keys(Keys.ARROW_RIGHT * steps)

    def choose(self, name, text):
        """Take an item of a list, which is opened anew where an update of the form has closed it."""

        def chosen():
            if self.value(name) != text:
                if not self.find_all("ul[role=listbox] li"):
                    self.find(f"#{name} input").click()
                next(item for item in self.find_all("ul[role=listbox] li") if item.text.strip().endswith(text)).click()
            return self.value(name) == text

        self.wait(chosen)

    def picture(self):
        return self.find("#picture0 img").get_attribute("src")

    def upload(self, path):
        """Give a picture in place of the one that is there."""
        for button in self.find_all("#picture0 button[aria-label*=Clear], #picture0 button[aria-label*=Remove]"):
            button.click()
        self.wait(lambda: self.find_all("#picture0 input[type=file]"))
        self.find("#picture0 input[type=file]").send_keys(str(path))

    def predict(self):
        """Press the button and return the prediction that its file holds."""
        before = self.record_link()
        self.find("#predict").click()
        self.wait(lambda: self.record_link() not in (None, before))
        return self.record()

    def record_link(self):
        links = self.find_all("#files a[download='actions.json']")
        return links[0].get_attribute("href") if links else None

    def record(self):
        return json.loads(base64.b64decode(self.record_link().split(",", 1)[1]))

    def tab(self, name):
        visible = [tab for tab in self.find_all("#results button[role=tab]") if tab.text == name]
        if visible:
            visible[0].click()
        else:
            self.find("#results .overflow-menu > button").click()
            self.wait(lambda: [each for each in self.find_all(".overflow-dropdown button") if each.text == name])
            next(each for each in self.find_all(".overflow-dropdown button") if each.text == name).click()

    def table(self, name="table"):
        rows = self.find_all(f"#{name} tr")
        return [[cell.get_attribute("textContent") for cell in row.find_elements(By.XPATH, "./*")] for row in rows]

    def said(self):
        """Sentences that have popped up."""
        return " ".join(toast.text for toast in self.find_all(".toast-body"))

    def sized(self, selector):
        """Whether a picture is loaded and drawn large enough to be read."""
        image = self.find(selector)
        return int(image.get_property("naturalWidth")) > 300 and image.size["width"] > 200

    def errors(self):
        return [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def hosts(self):
        """Hosts that were asked for anything."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        return {urlsplit(url).netloc for url in urls if not url.startswith(("data:", "blob:"))}


@pytest.fixture(scope="module")
def shared_page(server):
    """A browser for the tests that need none of their own; where the page does not open, none of them begins."""
    page = Page(server.url)
    try:
        yield page.open()
    finally:
        page.driver.quit()


@pytest.fixture
def page(shared_page):
    return shared_page.open()


@pytest.fixture
def make_page(server):
    """Opens further browsers, of other visitors."""
    pages = []

    def make(query="", **size):
        pages.append(Page(server.url, **size))
        return pages[-1].open(query)

    yield make
    for each in pages:
        each.driver.quit()


def expected_chunk(checkpoint, picture, task, state, seed=0):
    """What the Policy answers."""
    policy = Policy(checkpoint.model, checkpoint.processor, checkpoint.key(), seed=seed)
    (camera,) = checkpoint.cameras()
    observation = {f"observation.images.{camera}": np.asarray(to_rgb(picture)), "task": task}
    if checkpoint.codec.takes_state:
        observation["observation.state"] = np.array(state)
    return policy.predict_chunk(observation)


def opened(path):
    with Image.open(path) as file:
        return to_rgb(file)


def test_the_page_loads_by_itself_alone_and_without_errors(make_page, server):
    page = make_page()
    assert "hf_vla" in page.driver.title and "Press the button" in page.find("#summary").text
    page.predict()
    assert page.hosts() == {urlsplit(server.url).netloc} and page.errors() == []


@pytest.mark.parametrize("name", SHIPPED)
def test_each_model_predicts_at_the_press_of_the_button(page, server, served, name):
    checkpoint = served[name]
    (path,), frame = checkpoint.pictures.values(), checkpoint.example
    page.choose("model", name)
    page.wait(lambda: page.value("instruction") == frame["task"] and page.find_all("#picture0 img"))
    record = page.predict()
    expected = expected_chunk(checkpoint, opened(path), frame["task"], frame["state"])
    assert np.array_equal(np.float32(record["actions"]), expected) and len(record["samples"]) == 4

    headers, *rows = page.table()
    assert headers == ["step", "seconds", *record["names"]]
    assert [row[2:] for row in rows] == [[f"{value:+.4f}" for value in action] for action in expected.tolist()]
    link = page.find("#files a[download='actions.csv']").get_attribute("href")
    lines = list(csv.DictReader(io.StringIO(base64.b64decode(link.split(",", 1)[1]).decode())))
    assert [[f"{float(line[key]):+.4f}" for key in record["names"]] for line in lines[: len(rows)]] == [
        row[2:] for row in rows
    ]
    summary = page.find("#summary").text
    assert f"{len(rows)} actions" in summary and " ms on cpu" in summary
    assert ("The model says" in summary) == (name == "divla_metaworld")

    page.tab("Path")
    page.wait(lambda: page.sized("#path img"))
    if name == "spatialvla_robosuite":
        assert "where camera and hand were" in page.find("#path-note").text and not page.find_all("#overlay img")
    else:
        page.wait(lambda: page.sized("#overlay img"))
    page.tab("Per dimension")
    page.wait(lambda: page.sized("#dimensions img"))
    page.tab("What the model computed")
    if checkpoint.denoises:
        page.wait(lambda: page.sized("#denoising img"))
        first = page.find("#denoising img").get_attribute("src")
        page.slide("denoising-step", 4)
        page.wait(lambda: page.find("#denoising img").get_attribute("src") != first)
    else:
        page.wait(lambda: page.sized("#sphere img") and page.sized("#sure img"))
        assert page.table("tokens")[1][1:4] == [
            str(record["tokens"][0]["id"]), "chosen", f"{record['tokens'][0]['probability']:.3f}",
        ]  # fmt: skip
        assert bool(page.find_all("#depth img")) == (name == "spatialvla_metaworld")
        first = page.find("#sphere img").get_attribute("src")
        page.slide("action", 3)
        page.wait(lambda: page.find("#sphere img").get_attribute("src") != first)
        token = next(each for each in record["tokens"] if each["action"] == 3)
        page.wait(lambda: page.table("tokens")[1][1] == str(token["id"]))
    page.tab("Meaning")
    page.wait(lambda: "robot units" in page.find("#meaning").text)
    assert page.errors() == [] and page.said() == ""
    files = {path.suffix for path in server.uploads.rglob("*") if path.is_file()}
    assert not files & {".json", ".csv"}  # what was answered is nowhere on the disk


@pytest.mark.parametrize("name", GOOD)
def test_unusual_pictures_give_the_right_numbers(page, served, good_pictures, name):
    checkpoint = served["tinyvla_metaworld"]
    before = page.picture()
    page.upload(good_pictures[name])
    page.wait(lambda: page.picture() != before)
    record = page.predict()
    expected = expected_chunk(checkpoint, opened(good_pictures[name]), record["instruction"], record["state"])
    assert np.array_equal(np.float32(record["actions"]), expected)
    example = expected_chunk(
        checkpoint, opened(checkpoint.pictures["corner4"]), record["instruction"], record["state"]
    )
    assert not np.array_equal(expected, example)
    page.tab("Path")
    page.wait(lambda: "where camera and hand were" in page.find("#path-note").text)
    assert not page.find_all("#overlay img") and page.said() == ""


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_are_answered_by_a_sentence(page, bad_pictures, name):
    page.upload(bad_pictures[name])
    page.wait(lambda: BAD[name] in page.said())
    page.wait(lambda: not page.find_all("#picture0 img"))  # it is gone from the form, too
    page.find("#predict").click()
    page.wait(lambda: "Give a picture" in page.said())
    assert "Traceback" not in page.driver.page_source


def test_bad_numbers_are_answered_by_a_sentence(page):
    page.write("state", "1 2 drei")
    page.find("#predict").click()
    page.wait(lambda: "'drei' is not a number" in page.said())


def test_two_visitors_at_once_see_their_own_answers(make_page, page, served):
    checkpoint, other = served["tinyvla_metaworld"], make_page()
    states = {page: "0.1 0.6 0.2 0.9", other: "-0.2 0.5 0.1 0.3"}
    for each, state in states.items():
        each.write("state", state)
        each.write("instruction", f"Open a drawer {state[:3]}")
    before = {each: each.record_link() for each in states}
    for each in states:  # both are pressed before either has answered
        each.find("#predict").click()
    picture = opened(checkpoint.pictures["corner4"])
    for each, state in states.items():
        each.wait(lambda each=each: each.record_link() not in (None, before[each]))
        record, numbers = each.record(), [float(number) for number in state.split()]
        assert record["state"] == numbers and record["instruction"] == f"Open a drawer {state[:3]}"
        assert np.array_equal(
            np.float32(record["actions"]), expected_chunk(checkpoint, picture, record["instruction"], numbers)
        )
    for each in states:  # what is drawn later is of one's own prediction, too
        each.tab("What the model computed")
        each.wait(lambda each=each: each.sized("#denoising img"))
        each.slide("denoising-step", 7)
    each.wait(
        lambda: page.find("#denoising img").get_attribute("src") != other.find("#denoising img").get_attribute("src")
    )


def test_a_link_restores_the_form_and_the_answer(page, make_page):
    page.choose("model", "divla_metaworld")
    page.wait(lambda: page.find("#steps input").get_attribute("value") == "8")
    page.write("instruction", "Öffne 50 % & mehr?")
    page.write("state", "0.1 0.5 0.25 0.75")
    page.write("seed", "41")
    page.write("steps", "5")
    record = page.predict()
    page.wait(lambda: page.value("link").startswith(page.url + "/?"))
    link = page.value("link")
    assert page.driver.current_url == link and parse_qs(urlsplit(link).query)["seed"] == ["41"]
    visitor = make_page(link.removeprefix(page.url + "/"))
    assert [visitor.value(each) for each in ("model", "instruction", "state", "seed", "steps")] == [
        *("divla_metaworld", "Öffne 50 % & mehr?", "0.1 0.5 0.25 0.75", "41", "5"),
    ]
    again = visitor.predict()
    assert again["samples"] == record["samples"] and again["reasoning"] == record["reasoning"]


@pytest.mark.parametrize(
    ("query", "sentence"),
    [("?model=../../etc", "is not served here"), ("?seed=many", "not usable"), ("?samples=1e9", "not usable"),
     ("?model=divla_metaworld&dataset=x", "not usable"), ("?picture=own", "a picture of somebody's own")],
)  # fmt: skip
def test_a_broken_link_opens_the_page_and_says_so(page, query, sentence):
    page.open(query)
    page.wait(lambda: sentence in page.said())
    assert page.value("model") in SHIPPED and page.value("seed") == "0"


def test_another_model_keeps_what_one_gave(page, tmp_path):
    scene().save(tmp_path / "own.png")
    before = page.picture()
    page.upload(tmp_path / "own.png")
    page.wait(lambda: page.picture() != before)
    own = page.picture()
    page.write("instruction", "My own words")
    page.choose("model", "spatialvla_metaworld")
    page.wait(lambda: not page.find_all("#state textarea, #state input"))  # it takes none
    assert page.value("instruction") == "My own words" and page.picture() == own
    record = page.predict()
    assert record["instruction"] == "My own words" and "picture=own" in page.driver.current_url


def test_an_example_fills_the_form(page):
    page.write("instruction", "My own words")
    next(each for each in page.find_all("#examples button") if "robosuite" in each.text).click()
    page.wait(
        lambda: page.value("model") == "spatialvla_robosuite" and page.value("instruction") == "pick up the red cube"
    )
    assert page.predict()["dataset"] == "robosuite_lift"


def test_a_phone_shows_all_without_scrolling_sideways(make_page):
    page = make_page("?model=spatialvla_robosuite", width=375, height=740)
    bottom = page.driver.execute_script("return document.querySelector('#predict').getBoundingClientRect().bottom")
    assert bottom <= 740  # the button is in sight at once
    page.predict()
    for name in TABS:
        page.tab(name)
        page.wait(lambda name=name: page.find("#results button[aria-selected=true]").text == name)
        widths = page.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert widths == [375, 375], name
    assert page.errors() == []
