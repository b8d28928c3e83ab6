"""Models from and to the Hugging Face hub, by its own client against a stand-in of it; and the model card."""

import json
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from fvar_lightning.__main__ import run
from fvar_lightning.weights.card import ModelCard
from fvar_lightning.weights.identity import file_sha256
from fvar_lightning.weights.models import find_model, from_pretrained
from fvar_lightning.weights.official import export_var_checkpoint
from fvar_lightning.weights.pretrained import save_pretrained
from hub_server import COMMIT, TOKEN, Repositories, serving
from test_checkpoints import NAMES, SAMPLING, assert_same, task_checkpoint, tiny_vae, tiny_var


class Hub(NamedTuple):
    repositories: Repositories
    tokens: list[str | None]


class Client(NamedTuple):
    port: int
    cache: Path


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """huggingface_hub, told by its environment of a port of this machine, where nobody listens yet, and of a cache."""
    cache = tmp_path_factory.mktemp("cache")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        patch.setenv("HF_HUB_CACHE", str(cache))
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.delenv("HF_TOKEN", raising=False)
        for name in hub_modules():
            patch.delitem(sys.modules, name)
        yield Client(port, cache)
        for name in hub_modules():
            del sys.modules[name]


def hub_modules() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]


@pytest.fixture
def hub(client: Client) -> Iterator[Hub]:
    repositories: Repositories = {}
    with serving(repositories, client.port) as tokens:
        yield Hub(repositories, tokens)
    for folder in client.cache.glob("models--*"):
        shutil.rmtree(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def official_folder(folder: Path, *depths: int) -> Path:
    for depth in depths:
        with pytest.warns(UserWarning, match="ch_mult"):
            export_var_checkpoint(
                tiny_vae(targets="feature"), tiny_var(depth=depth), folder / "vae_ch160v4096z32.pth",
                folder / f"var_d{depth}.pth",
            )  # fmt: skip
    return folder


def test_a_repository_of_ours(hub: Hub, tmp_path: Path) -> None:
    save_pretrained(tmp_path / "model", tiny_var(), tiny_vae(), class_names=NAMES, sampling=SAMPLING)
    hub.repositories["someone/fvar-cats"] = contents(tmp_path / "model")
    var, vae, info = from_pretrained("someone/fvar-cats", revision="main")
    with pytest.raises(ValueError, match=r"revision is of a repository of the hub, and .* is here: got 'main'"):
        from_pretrained(tmp_path / "model", revision="main")
    assert_same(var, tiny_var())
    assert_same(vae, tiny_vae())
    assert info == (NAMES, SAMPLING)
    assert find_model("someone/fvar-cats").revision == COMMIT
    hub.repositories.clear()
    assert_same(from_pretrained("someone/fvar-cats").var, tiny_var())  # of the cache


def test_a_repository_of_official_var(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.repositories["FoundationVision/var"] = contents(official_folder(tmp_path / "official", 2, 3))
    var, vae, info = from_pretrained("FoundationVision/var", depth=3)
    assert_same(var, tiny_var(depth=3))
    assert_same(vae.decoder, tiny_vae().decoder)
    assert info == (["0", "1", "2"], {"guidance": 1.5, "top_k": 900, "top_p": 0.96, "more_smooth": False})
    assert [file.name for file in client.cache.rglob("var_d*.pth")] == ["var_d3.pth"]
    with pytest.raises(ValueError, match=r"repository 'FoundationVision/var' must hold vae\*.pth and var_d5.pth"):
        from_pretrained("FoundationVision/var", depth=5)
    with pytest.raises(ValueError, match=r"must hold config.json and .* official VAR's files from it, give a depth"):
        from_pretrained("FoundationVision/var")


def test_official_weights_are_a_command_away(hub: Hub, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ch_mult"):
        export_var_checkpoint(
            tiny_vae(targets="feature"),
            tiny_var(num_classes=1000),
            tmp_path / "vae_ch160v4096z32.pth",
            tmp_path / "var_d2.pth",
        )
    hub.repositories["FoundationVision/var"] = contents(tmp_path)
    given = ["--model", "FoundationVision/var", "--depth", "2", "--classes", "Golden Retriever", "388", "--count", "1"]
    run(["generate", *given, "--output", str(tmp_path / "out")])
    file = tmp_path / "out" / "0207_golden_retriever_000000.png"
    assert (tmp_path / "out" / "0388_giant_panda_000001.png").is_file()
    with Image.open(file) as image:
        found = image.text  # type: ignore[attr-defined]
    assert found.items() >= {"model": "FoundationVision/var", "depth": "2", "revision": COMMIT}.items()
    run([*shlex.split(found["command"])[1:], "--output", str(tmp_path / "again")])
    assert (tmp_path / "again" / file.name).is_file()


def test_without_a_network_the_files_are_named(client: Client) -> None:
    message = r"whose vae\*.pth and var_d16.pth can be had \(without a network, give a folder that holds them\)"
    with pytest.raises(ValueError, match=message):
        from_pretrained("FoundationVision/var", depth=16)


@pytest.mark.parametrize("name", ["nobody/nothing", "no/such/folder", "./none", "nothing"])
def test_what_is_nowhere(hub: Hub, name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is neither a local folder nor a repository of the hub"):
        from_pretrained(name)


# Local folders of official files, and single files


def test_a_folder_of_official_files(tmp_path: Path) -> None:
    folder = official_folder(tmp_path, 2)
    assert_same(from_pretrained(folder).var, tiny_var())
    official_folder(tmp_path, 3)
    with pytest.raises(ValueError, match=r"give a depth to choose one\), got vae_ch.*, var_d2.pth, var_d3.pth"):
        from_pretrained(folder)
    assert_same(from_pretrained(folder, depth=3).var, tiny_var(depth=3))
    with pytest.raises(ValueError, match=r"one of official VAR's two files: give the folder"):
        from_pretrained(folder / "var_d2.pth")
    with pytest.raises(ValueError, match=r"depth chooses among official VAR's files in a folder, and .* is a file"):
        from_pretrained(folder / "var_d2.pth", depth=2)


def test_a_thousand_classes_are_those_of_imagenet(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ch_mult"):
        export_var_checkpoint(
            tiny_vae(targets="feature"), tiny_var(num_classes=1000), tmp_path / "vae.pth", tmp_path / "var_d2.pth"
        )
    names = from_pretrained(tmp_path).info.class_names
    assert (len(names), names[207], names[388]) == (1000, "golden retriever", "giant panda")


def test_a_training_checkpoint(tmp_path: Path) -> None:
    file = task_checkpoint(tmp_path / "last.ckpt", tiny_var(), tiny_vae())
    assert_same(from_pretrained(file, weights="raw").var, tiny_var())
    assert from_pretrained(file).info.class_names == NAMES
    with pytest.raises(ValueError, match=r"weights must be one of .* got 'mean'"):
        from_pretrained(file, weights="mean")  # type: ignore[arg-type]


# Publishing


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return task_checkpoint(tmp_path / "last.ckpt", tiny_var(), tiny_vae())


def export(checkpoint: Path, output: Path, **options: Any) -> None:
    arguments = {"ckpt_path": checkpoint, "output": output} | options
    run(["export", *(f"--{name}={value}" for name, value in arguments.items())])


def test_what_is_pushed_can_be_had(
    hub: Hub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    output = tmp_path / "model"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    export(checkpoint, output, push="someone/fvar-cats", license="mit")
    printed = capsys.readouterr().out
    assert f"pushed to https://huggingface.co/someone/fvar-cats/commit/{COMMIT}" in printed
    assert set(hub.tokens) == {f"Bearer {TOKEN}"}
    assert TOKEN not in printed
    published = hub.repositories["someone/fvar-cats"]
    assert published == {name: x for name, x in contents(output).items() if name != "notes.txt"}
    assert set(published) == {"README.md", "config.json", "model.safetensors"}
    assert_same(from_pretrained("someone/fvar-cats").var, tiny_var())


@pytest.mark.parametrize(
    ("message", "token", "options"),
    [
        ("push needs a token that may write, in the environment variable HF_TOKEN", "", {"push": "a/b"}),
        ("push must be a repository of the hub, 'owner/name', got 'cats'", "hf_secret", {"push": "cats"}),
        ("go with format 'pretrained', got format 'var'", "hf_secret", {"push": "a/b", "format": "var"}),
        ("go with format 'pretrained', got format 'var'", "", {"license": "mit", "format": "var"}),
        ("must be a report that `fvar test` wrote", "", {"figures": "none.json"}),
    ],
)  # fmt: skip
def test_a_push_that_cannot_be_writes_nothing(
    message: str, token: str, options: dict[str, str], hub: Hub, checkpoint: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit, match="2"):
        export(checkpoint, tmp_path / "model", **options)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    assert not hub.tokens


def test_a_hub_that_refuses(
    hub: Hub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(SystemExit, match="2"):
        export(checkpoint, tmp_path / "model", push="someone/fvar-cats")
    message = capsys.readouterr().err
    assert "model' is written, but 'someone/fvar-cats' did not take it: HfHubHTTPError" in message
    assert "hf_secret" not in message


# The model card


def test_a_card_says_what_the_networks_tell(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard as HubCard

    save_pretrained(tmp_path, tiny_var(), tiny_vae(), class_names=NAMES, sampling=SAMPLING)
    card = HubCard.load(tmp_path / "README.md")
    assert card.data.license is None
    assert card.data.library_name == "fvar-lightning"
    assert {"class-conditional", "var", "fvar"} <= set(card.data.tags)
    parameters = [sum(x.numel() for x in network.parameters()) for network in (tiny_var(), tiny_vae())]
    for wanted in (
        "# VAR of depth 2, 12 px",
        f"| parameters | {parameters[0]:,} (transformer), {parameters[1]:,} (tokenizer) |",
        "| tokens | 14 in 3 scales of side 1, 2, 3 |",
        "views focused to radii of 2, 0 px",
        "`guidance=2.0, top_k=5, top_p=0.5`",
        "Classes, by label: cat, dog, ein Käfer.",
        "## Figures\n\nNone stated.",
        "## Training data\n\nNot stated.",
        "no text prompts",
        "fvar generate --model owner/name --classes cat\n",
    ):
        assert wanted in card.content


def test_a_card_says_what_it_was_told(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard as HubCard

    vae = tiny_vae(targets="feature")
    told = ModelCard("cc-by-nc-4.0", "Forty cats.", {"fd_lite0": 12.34567}, {"samples": 50_000, "real": "a|b"})
    names = [f"class {i}" for i in range(30)]
    save_pretrained(tmp_path, tiny_var(num_classes=30), vae, class_names=names, card=told)
    card = HubCard.load(tmp_path / "README.md")
    assert card.data.license == "cc-by-nc-4.0"
    assert "fvar" not in card.data.tags
    assert "FVAR" not in card.content
    for wanted in (
        "Forty cats.",
        "| fd_lite0 | 12.35 |",
        "| samples | 50000 |",
        r"| real | a\|b |",
        "19 and 10 more",
        "features of the sharp image, as in VAR",
    ):
        assert wanted in card.content


def test_figures_must_be_of_the_exported_weights(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report: dict[str, Any] = {
        "values": {"fd_lite0": 7.0}, "warnings": ["few images"], "settings": {"samples": 8, "weights": "ema"},
        "checkpoint": {"sha256": file_sha256(checkpoint)},
    }  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(report))
    export(checkpoint, tmp_path / "model", figures=tmp_path / "report.json")
    card = (tmp_path / "model" / "README.md").read_text()
    for wanted in ("| fd_lite0 | 7 |", "| samples | 8 |", "| warnings | few images |"):
        assert wanted in card
    (tmp_path / "report.json").write_text(json.dumps(report | {"checkpoint": {"sha256": "0"}}))
    with pytest.raises(SystemExit, match="2"):
        export(checkpoint, tmp_path / "other", figures=tmp_path / "report.json")
    assert "are of other weights than" in capsys.readouterr().err
