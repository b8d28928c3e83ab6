"""The page of `fvar demo`: what it serves and refuses over HTTP, and what people do with it, in headless Chromium."""

import io
import json
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fvar_lightning.__main__ import run
from fvar_lightning.commands.model import ModelOptions, ReadyModel
from fvar_lightning.data.pixels import to_uint8
from fvar_lightning.generation.editing import edit
from fvar_lightning.generation.sampling import generate
from fvar_lightning.weights.pretrained import save_pretrained
from test_checkpoints import NAMES, SAMPLING, tiny_var
from test_edit_command import edit_vae, picture

gradio = pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")  # Gradio's own client

SIDE = 12
MODELS = ("tiny", "other")


class Served:
    """A page at its address, and how often its model made a scale."""

    def __init__(self, url: str, folder: str, config: dict[str, Any], models: dict[str, ReadyModel]) -> None:
        self.url, self.folder, self.config, self.models = url, folder, config, models
        self.steps = 0
        self.gate = threading.Event()
        self.gate.set()
        var = models["tiny"].var
        step = var.step

        def counted(*args: Any) -> torch.Tensor:
            self.steps += 1
            self.gate.wait(60)
            return step(*args)

        var.step = counted  # type: ignore[method-assign]

    def event(self, name: str) -> int:
        """Number of the first event that a handler of a name answers."""
        return next(i for i, event in enumerate(self.config["dependencies"]) if event["api_name"] == name)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from fvar_lightning.commands.demo.server import served

    models = {}
    for name, classes in zip(MODELS, (NAMES, ["a", "b", "c"]), strict=True):
        folder = tmp_path_factory.mktemp(name)
        save_pretrained(folder, tiny_var(), edit_vae(), class_names=classes, sampling=SAMPLING)
        models[name] = ModelOptions(str(folder)).load()
    with served(models, "127.0.0.1", free_port()) as blocks:
        url = blocks.local_url.rstrip("/")
        yield Served(url, blocks.GRADIO_CACHE, httpx.get(f"{url}/config").json(), models)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def expected(label: int, seed: int = 0, **options: Any) -> np.ndarray:
    """By the library, without the page."""
    (image,) = generate(tiny_var(), edit_vae(), torch.tensor([label]), seeds=[seed], **(SAMPLING | options))
    return to_uint8(image).permute(1, 2, 0).numpy()


def pixels(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


# Over HTTP


def join(page: Served, event: int, data: list[Any], visitor: str = "visitor") -> Any:
    content = {"data": data, "fn_index": event, "session_hash": visitor, "trigger_id": None, "event_data": None}
    return httpx.post(f"{page.url}/gradio_api/queue/join", json=content, timeout=30)


def answer(page: Served, event: int, data: list[Any], visitor: str) -> dict[str, Any]:
    """What an event gives."""
    assert join(page, event, data, visitor).status_code == 200
    return listen(page, visitor)


def listen(page: Served, visitor: str) -> dict[str, Any]:
    """What comes of the event that a visitor waits for."""
    address = f"{page.url}/gradio_api/queue/data"
    with httpx.stream("GET", address, params={"session_hash": visitor}, timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:") and (message := json.loads(line[5:]))["msg"] == "process_completed":
                return message
    raise AssertionError("no answer")


def wishes(label: int = 0) -> list[Any]:
    return [MODELS[0], label, 0, 2.0, 5, 0.5, False]


def test_it_listens_on_this_machine_alone(page: Served) -> None:
    assert page.url.startswith("http://127.0.0.1:")
    assert page.config["analytics_enabled"] is False
    response = httpx.get(page.url)
    assert response.headers["content-security-policy"].startswith("default-src 'self'")
    assert not re.findall(r"<(?:script|link)[^>]+(?:src|href)=\"https?://(?!127\.0\.0\.1)", response.text)


def test_files_of_the_machine_are_not_served(page: Served, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    here = Path(__file__).resolve()
    for path in ("/etc/hostname", str(tmp_path / "secret.txt"), str(here), here.name, f"{page.folder}/../x",
                 f"{page.folder}/..{tmp_path}/secret.txt", "http://127.0.0.1:1/", f"{page.url}/config"):  # fmt: skip
        response = httpx.get(f"{page.url}/gradio_api/file={path}")
        assert response.status_code in (403, 404), path
        assert "secret" not in response.text.replace("secret.txt", "")
    for path in ("/docs", "/openapi.json", "/monitoring", "/gradio_api/proxy=https://example.com"):
        assert httpx.get(page.url + path).status_code in (400, 403, 404), path


@pytest.mark.parametrize("path", ["/etc/hostname", "{tmp}/photo.png", "file://{tmp}/photo.png", "../photo.png"])
def test_a_file_that_a_visitor_names_is_not_read(path: str, page: Served, tmp_path: Path) -> None:
    Image.fromarray(picture(SIDE, SIDE)).save(tmp_path / "photo.png")
    named = {"path": path.format(tmp=tmp_path), "orig_name": "photo.png", "meta": {"_type": "gradio.FileData"}}
    message = answer(page, page.event("uploaded"), [MODELS[0], named], f"reader{path}")
    assert not message["success"]
    assert str(tmp_path) not in json.dumps(message)


def test_no_address_is_fetched_for_a_visitor(page: Served) -> None:
    for path in ("http://127.0.0.1:1/a.png", "HTTPS://example.com/a.png"):
        named = {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
        response = join(page, page.event("uploaded"), [MODELS[0], named])
        assert (response.status_code, response.text) == (400, "a file must be one that was uploaded")


def test_nothing_large_is_taken(page: Served) -> None:
    big = {"files": ("a.png", b"0" * (21 << 20))}
    assert httpx.post(f"{page.url}/gradio_api/upload", files=big, timeout=30).status_code == 413
    assert join(page, 0, ["0" * (5 << 20)]).status_code == 413


def test_nobody_passes_the_queue_by(page: Served) -> None:
    assert httpx.get(f"{page.url}/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}
    for route in ("run/predict", "api/predict", "run/watched", "api/watched"):
        content = {"data": wishes(), "fn_index": page.event("watched"), "session_hash": "hasty"}
        assert httpx.post(f"{page.url}/gradio_api/{route}", json=content).status_code >= 400
    assert page.steps == 0


def test_the_queue_is_limited(page: Served) -> None:
    page.gate.clear()
    try:
        codes = [join(page, page.event("watched"), wishes(), f"v{i}").status_code for i in range(40)]
    finally:
        page.gate.set()
    assert codes[:30] == [200] * 30
    assert codes[-1] != 200
    for i, code in enumerate(codes):  # the queue is empty again
        assert code != 200 or listen(page, f"v{i}")["success"]


def test_a_port_that_is_taken(page: Served) -> None:
    from fvar_lightning.commands.demo.server import served

    port = int(page.url.rsplit(":", 1)[1])
    with pytest.raises(ValueError, match=f"port {port} of host '127.0.0.1' cannot be listened on"), served(
        page.models, "127.0.0.1", port
    ):  # fmt: skip
        pass


def test_the_command(
    page: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fvar_lightning.commands.demo import server

    calls: list[tuple[Any, ...]] = []

    @contextmanager
    def recorded(*arguments: Any) -> Iterator[Any]:
        calls.append(arguments)
        yield SimpleNamespace(local_url=page.url, block_thread=lambda: None)

    monkeypatch.setattr(server, "served", recorded)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        for name in MODELS:
            save_pretrained(tmp_path / name, tiny_var(), edit_vae())
        models = [str(tmp_path / name) for name in MODELS]
        run(["demo", "--model", *models, "--precision", "bfloat16"])
        run(["demo", "--model", models[0], "--host", "0.0.0.0", "--port", "8001"])
    finally:
        signal.signal(signal.SIGTERM, handler)
    (several, host, port), (single, *elsewhere) = calls
    assert (list(several), host, port) == (models, "127.0.0.1", 7860)
    assert several[models[1]].settings["precision"] == "bfloat16"
    assert (list(single), elsewhere) == (models[:1], ["0.0.0.0", 8001])
    assert f"the demo is at {page.url}" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run(["demo"])
    assert "checkpoint 'quickstart/fvar/last.ckpt' does not exist" in capsys.readouterr().err


# In a browser


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    with tempfile.TemporaryDirectory() as folder:
        for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                     "disable-background-networking", "disable-component-update", "disable-sync",
                     "disable-dev-shm-usage", f"user-data-dir={folder}", "window-size=1280,1400"):  # fmt: skip
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
        yield browser
        browser.quit()


class Visitor:
    """What a visitor does in a window of their own."""

    def __init__(self, driver: Any, url: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        self.driver = driver
        self.wait = WebDriverWait(driver, 60, poll_frequency=0.1)
        driver.switch_to.new_window("window")
        self.window = driver.current_window_handle
        driver.get(url)
        self.one("button.make")

    def look(self) -> None:
        self.driver.switch_to.window(self.window)

    def all(self, css: str) -> list[Any]:
        """Elements that are seen."""
        return [element for element in self.driver.find_elements("css selector", css) if element.is_displayed()]

    def one(self, css: str) -> Any:
        """The first of them, as soon as it is there."""
        return self.wait.until(lambda _: self.all(css))[0]

    def tab(self, title: str) -> None:
        self.driver.execute_script("window.scrollTo(0, 0)")
        next(button for button in self.all("button[role=tab]") if button.text == title).click()
        self.wait.until(lambda _: self.one("button[role=tab][aria-selected=true]").text == title)
        self.one("button.upload, #focus")

    def choose(self, css: str, name: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.one(f"{css} input").send_keys(Keys.CONTROL, "a")
        self.one(f"{css} input").send_keys(name, Keys.ENTER)

    def click(self, css: str) -> None:
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.one(css))
        self.one(css).click()

    def sources(self, css: str) -> list[str]:
        """Addresses of the pictures that are seen."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].filter(e => e.offsetParent).map(e => e.src)",
            f"{css} img",
        )

    def shown(self, css: str) -> list[np.ndarray]:
        """Pixels of their files."""
        return [pixels(httpx.get(source).content) for source in self.wait.until(lambda _: self.sources(css))]

    def new_picture(self, css: str, action: Callable[[], Any]) -> np.ndarray:
        """The picture that replaces one, or comes where there was none, after an action."""
        before = self.sources(css)
        action()
        self.wait.until(lambda _: self.sources(css) not in ([], before))
        return self.shown(css)[0]

    def upload(self, file: Path) -> None:
        near = self.one("button.upload").find_element("xpath", "./..")
        near.find_element("css selector", "input[type=file]").send_keys(str(file))

    def told(self, words: str) -> None:
        """Wait for a message, and put it away."""
        self.wait.until(lambda _: any(words in toast.text for toast in self.all("[data-testid=toast-body]")))
        for button in self.all("[data-testid=toast-close]"):
            button.click()


@pytest.fixture
def visitors(page: Served, driver: Any) -> Iterator[list[Visitor]]:
    """Two, in windows that are closed afterwards: a browser opens six connections to a host and no more."""
    first = driver.current_window_handle
    both = [Visitor(driver, page.url) for _ in range(2)]
    yield both
    for visitor in both:
        visitor.look()
        driver.close()
    driver.switch_to.window(first)


@pytest.fixture
def visitor(visitors: list[Visitor]) -> Visitor:
    return visitors[1]


@pytest.mark.slow
def test_class_image_focus_scales(page: Served, visitor: Visitor, driver: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    visitor.choose(".class", "ein Käfer")
    image = visitor.new_picture(".result", lambda: visitor.click("button.make"))
    assert np.array_equal(image, expected(2))
    assert visitor.shown("#scales")[0].shape[1] == 12 + 3 * 132
    command = visitor.one(".command textarea")
    assert "--classes 'ein Käfer' --count 1" in command.get_attribute("value")
    steps = page.steps
    slider = visitor.one("#focus input[type=range]")
    blurred = visitor.new_picture(".result", lambda: slider.send_keys(Keys.END))
    assert np.array_equal(blurred, expected(2, focus=2.0))
    visitor.wait.until(lambda _: "--focus 2.0" in command.get_attribute("value"))
    assert page.steps == steps  # nothing was sampled anew
    asked = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    addresses = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert len(addresses) > 10
    assert not [a for a in addresses if a.startswith("http") and not a.startswith(page.url)]


@pytest.mark.slow
def test_only_what_is_painted_changes(visitor: Visitor, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains

    array = picture(SIDE, SIDE)
    Image.fromarray(array).save(tmp_path / "photo.png")
    visitor.tab("In-paint")
    visitor.click("button.make")
    visitor.told("upload a photograph first")
    visitor.upload(tmp_path / "photo.png")
    visitor.one("#canvas button[aria-label='Clear canvas']")
    time.sleep(1)  # until it is drawn, of which the page says nothing
    canvas = visitor.one("#canvas canvas")
    stroke = ActionChains(visitor.driver).move_to_element_with_offset(canvas, -60, 0).click_and_hold()
    stroke.move_by_offset(60, 20).move_by_offset(60, 0).release().perform()
    visitor.choose(".class", "dog")
    made = visitor.new_picture(".result", lambda: visitor.click("button.make"))
    visitor.all(".label-wrap")[-1].click()  # the files that the command names
    photograph, mask = visitor.shown(".file")
    assert np.array_equal(photograph, array)
    touched = mask[..., 0] > 0
    assert 2 < touched.sum() < touched.size / 2
    rows, columns = touched.nonzero()
    assert (columns.max() - columns.min()) > (rows.max() - rows.min())  # as the brush went
    assert np.array_equal(made[~touched], array[~touched])
    assert not np.array_equal(made[touched], array[touched])
    hole = torch.from_numpy(touched)
    tensor = torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1
    (alone,) = edit(tiny_var(), edit_vae(), tensor, hole, torch.tensor([1]), seeds=[0], **SAMPLING)
    assert np.array_equal(made, to_uint8(alone).permute(1, 2, 0).numpy())


@pytest.mark.slow
def test_a_frame_around_a_photograph(visitor: Visitor, tmp_path: Path) -> None:
    array = picture(10, 10)
    Image.fromarray(array).save(tmp_path / "photo.png")
    visitor.tab("Out-paint")
    visitor.new_picture(".photograph", lambda: visitor.upload(tmp_path / "photo.png"))
    made = visitor.new_picture(".result", lambda: visitor.click("button.make"))
    assert np.array_equal(made[1:11, 1:11], array)  # an eighth of the side by default


@pytest.mark.slow
def test_the_pyramid_of_a_photograph(visitor: Visitor, tmp_path: Path) -> None:
    Image.fromarray(picture(300, 280)).save(tmp_path / "photo.png")
    visitor.tab("Refocus a photograph")
    disk = visitor.new_picture("#pyramid", lambda: visitor.upload(tmp_path / "photo.png"))
    assert disk.shape[1] > 10 * 148
    gaussian = visitor.new_picture("#pyramid", lambda: visitor.click("#psf label:nth-of-type(2)"))
    assert gaussian.shape == disk.shape
    row = 148
    assert np.array_equal(disk[22 : 22 + row], gaussian[22 : 22 + row])  # downsampled, without any
    assert not np.array_equal(disk[22 + row :], gaussian[22 + row :])


@pytest.mark.slow
def test_two_visitors_see_their_own(page: Served, visitors: list[Visitor]) -> None:
    from selenium.webdriver.common.keys import Keys

    one, two = visitors
    one.look()
    one.choose(".class", "dog")
    assert np.array_equal(one.new_picture(".result", lambda: one.click("button.make")), expected(1))
    two.look()
    assert two.sources(".result") == []
    two.tab("Out-paint")
    two.click("button.take")
    two.told("generate an image first")
    two.tab("Generate")
    two.choose(".class", "ein Käfer")
    page.gate.clear()  # both wait at once
    try:
        two.click("button.make")
        one.look()
        one.choose(".class", "cat")
        before = one.sources(".result")
        one.click("button.make")
    finally:
        page.gate.set()
    one.wait.until(lambda _: one.sources(".result") not in ([], before))
    assert np.array_equal(one.shown(".result")[0], expected(0))
    two.look()
    assert np.array_equal(two.shown(".result")[0], expected(2))
    for visitor, label in ((one, 0), (two, 2)):
        visitor.look()
        slider = visitor.one("#focus input[type=range]")
        blurred = visitor.new_picture(".result", lambda slider=slider: slider.send_keys(Keys.END))
        assert np.array_equal(blurred, expected(label, focus=2.0))


@pytest.mark.slow
def test_uploads_that_are_refused_are_told_of(visitor: Visitor, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "large.png").write_bytes(b"0" * (21 << 20))
    (tmp_path / "text.txt").write_text("no picture")
    Image.new("1", (8000, 7000)).save(tmp_path / "bomb.png")
    Image.fromarray(picture(16, 16)).save(tmp_path / "photo.png")
    visitor.tab("Out-paint")
    for name, message in (
        ("broken.png", "the file cannot be read as a picture"),
        ("large.png", "exceed the maximum allowed size of 20.0 Mb"),
        ("text.txt", "Invalid file type"),
        ("bomb.png", "measures 8000 x 7000 px: up to 50 megapixels"),
    ):
        visitor.upload(tmp_path / name)
        visitor.told(message)
        assert visitor.sources(".photograph") == []
    visitor.new_picture(".photograph", lambda: visitor.upload(tmp_path / "photo.png"))


@pytest.mark.slow
def test_another_model(visitor: Visitor) -> None:
    visitor.new_picture(".result", lambda: visitor.click("button.make"))
    visitor.choose("#model", "other")
    visitor.wait.until(lambda _: visitor.one(".class input").get_attribute("value") == "a")
    visitor.wait.until(lambda _: visitor.sources(".result") == [])
    visitor.choose(".class", "c")
    assert np.array_equal(visitor.new_picture(".result", lambda: visitor.click("button.make")), expected(2))
