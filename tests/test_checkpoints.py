"""Files of weights: official VAR's, safetensors, pretrained folders, training checkpoints; what is refused and how."""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from fvar_lightning.generation.sampling import generate
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tokenizer.alias import AliasTokenizer
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.var import VAR
from fvar_lightning.weights.checkpoints import load_fvar_checkpoint, load_initial_weights, load_tokenizer
from fvar_lightning.weights.describe import build, describe
from fvar_lightning.weights.export import export
from fvar_lightning.weights.models import from_pretrained
from fvar_lightning.weights.official import KNOWN_PATCH_NUMS, export_var_checkpoint, load_var_checkpoint, read_var
from fvar_lightning.weights.pretrained import save_pretrained, save_safetensors

SIDES = (1, 2, 3)
SCHEDULE = FocusSchedule(SIDES, patch_size=4, focus_states=2, max_radius=2.0)


def tiny_vae(**changes: Any) -> VQVAE:
    arguments = {"vocab_size": 16, "z_channels": 4, "ch": 8, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "num_phi": 2}
    vae = seeded(VQVAE(changes.pop("schedule", SCHEDULE), **(arguments | changes))).eval()
    vae.codebook.updates.fill_(vae.codebook.warmup_steps + 1)
    return vae


def tiny_var(**changes: Any) -> VAR:
    arguments = {"vocab_size": 16, "z_channels": 4, "num_classes": 3, "depth": 2, "width": 32, "heads": 4}
    return seeded(VAR(changes.pop("patch_nums", SIDES), **(arguments | changes))).eval()


def seeded(network: Any) -> Any:
    """The same weights every time, larger than initialised ones, which hardly tell classes apart."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in network.state_dict().items():
            if x.is_floating_point() and not name.endswith("zero_k_bias"):
                x.copy_(0.3 * torch.randn(x.shape, generator=generator))
    return network


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def pictures(vae: VQVAE, var: VAR, **sampling: Any) -> torch.Tensor:
    return generate(var, vae, torch.tensor([0, 2]), seeds=[5, 6], **sampling)


@pytest.fixture
def official(tmp_path: Path) -> tuple[Path, Path]:
    """Files of official VAR of tiny networks."""
    files = tmp_path / "vae.pth", tmp_path / "var.pth"
    with pytest.warns(UserWarning, match="ch_mult"):
        export_var_checkpoint(tiny_vae(), tiny_var(), *files)
    return files


def rewrite(file: Path, **changes: Any) -> None:
    """Change entries of a file; None removes one."""
    contents = torch.load(file, weights_only=True) | changes
    torch.save({name: value for name, value in contents.items() if value is not None}, file)


# Descriptions


@pytest.mark.parametrize(
    "network",
    [
        tiny_vae(),
        tiny_vae(targets="full", decay=0.9, warmup_steps=7, revive_after=3),
        AliasTokenizer(SCHEDULE, ch=8, num_res_blocks=2, momentum=0.5),
        tiny_var(),
        tiny_var(shared_aln=True, attn_l2_norm=False, mlp_ratio=2.5, drop_path_rate=0.3),
        tiny_vae(schedule=FocusSchedule(SIDES, patch_size=4, focus_states=3, schedule=[4.0, 1.0, 0.0])),
    ],
)
def test_a_description_in_json_builds_the_same_network(network: Any) -> None:
    again = build(json.loads(json.dumps(describe(network))))
    assert str(again) == str(network)
    assert describe(again) == describe(network)
    if not isinstance(network, VAR):
        assert again.schedule == network.schedule
        assert getattr(again, "targets", None) == getattr(network, "targets", None)


@pytest.mark.parametrize("description", [{"kind": "structure"}, {"kind": "var", "depth": 2}, {"kind": "gan"}, {}])
def test_a_description_of_nothing_is_refused(description: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"description|kind must be"):
        build(description)


# Official files


def test_official_files_there_and_back(tmp_path: Path) -> None:
    vae, var = tiny_vae(targets="feature"), tiny_var()
    files = tmp_path / "sub" / "vae.pth", tmp_path / "sub" / "var.pth"
    with pytest.warns(UserWarning, match="ch_mult"):
        export_var_checkpoint(vae, var, *files)
    vae_again, var_again = load_var_checkpoint(*files)
    assert var_again is not None
    assert_same(var, var_again)
    assert vae_again.schedule == FocusSchedule(SIDES, patch_size=4, focus_states=1)
    assert torch.equal(pictures(vae, var), pictures(vae_again, var_again))
    assert not any(p.requires_grad for p in vae_again.parameters())
    assert sorted(p.name for p in files[0].parent.iterdir()) == ["vae.pth", "var.pth"]


@pytest.mark.parametrize(
    ("sides", "num_phi", "first"),
    [((1, 2, 4), 4, "qresi_ls.0."), ((1, 4), 4, "qresi_ls.0."), ((1, 2, 4), 1, "qresi."), ((1, 2, 4), 3, "0.")],
)
def test_phis_are_named_as_official_var_shares_them(
    sides: tuple[int, ...], num_phi: int, first: str, tmp_path: Path
) -> None:
    """By share_quant_resi, 4 unless told otherwise: with fewer scales than phis too."""
    schedule = FocusSchedule(sides, patch_size=4, focus_states=1)
    vae, file = tiny_vae(schedule=schedule, targets="feature", num_phi=num_phi), tmp_path / "vae.pth"
    with pytest.warns(UserWarning, match="ch_mult"):
        export_var_checkpoint(vae, None, file)
    names = {name for name in torch.load(file, weights_only=True) if "quant_resi" in name}
    assert f"quantize.quant_resi.{first}weight" in names
    assert len(names) == 2 * num_phi
    again, _ = load_var_checkpoint(file, patch_nums=sides)
    size = schedule.image_size
    tokens = vae.encode(torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    for ours, theirs in zip(again.decode_stages(tokens), vae.decode_stages(tokens), strict=True):
        assert torch.equal(ours, theirs)


def test_a_loaded_codebook_is_not_initialised_anew(official: tuple[Path, Path]) -> None:
    vae, _ = load_var_checkpoint(*official)
    assert not vae.train().quantizer.codebook.needs_init
    assert not vae.quantizer.codebook.warming_up


def test_training_checkpoints_of_the_official_code(official: tuple[Path, Path], tmp_path: Path) -> None:
    states = [torch.load(file, weights_only=True) for file in official]
    trainer = {"config": {"prog_it": 0}, "vae_local": states[0], "var_wo_ddp": states[1], "var_opt": {}}
    file = tmp_path / "ar-ckpt-last.pth"
    torch.save({"epoch": 3, "iter": 0, "trainer": trainer, "args": {"depth": 2}}, file)
    for plain, nested in zip(load_var_checkpoint(*official), load_var_checkpoint(file, file), strict=True):
        assert_same(plain, nested)


def test_files_in_the_format_before_torch_1_6(official: tuple[Path, Path]) -> None:
    before = load_var_checkpoint(*official)
    for file in official:
        torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    for new, old in zip(before, load_var_checkpoint(*official), strict=True):
        assert_same(new, old)


@pytest.mark.parametrize(
    ("depth", "shared_aln", "sides"), [(12, False, 0), (16, False, 0), (30, False, 0), (36, True, 1)]
)
def test_released_sizes_are_recognised(depth: int, shared_aln: bool, sides: int) -> None:
    patch_nums = KNOWN_PATCH_NUMS[sides]
    with torch.device("meta"):
        var = VAR(patch_nums, depth=depth, shared_aln=shared_aln)
    description, _ = read_var(var.state_dict(), "var.pth")
    assert description == {k: v for k, v in describe(var).items() if k != "drop_path_rate"}
    assert (description["width"], description["heads"]) == (64 * depth, depth)


def test_heads_without_cosine_attention_are_a_64th_of_the_width(tmp_path: Path) -> None:
    var = tiny_var(width=192, heads=3, attn_l2_norm=False)
    assert read_var(var.state_dict(), "var.pth", SIDES)[0]["heads"] == 3
    with pytest.raises(ValueError, match=r"heads must be width / 64 = 3 .* got 4"):
        export_var_checkpoint(
            tiny_vae(), tiny_var(width=192, heads=4, attn_l2_norm=False), tmp_path / "vae.pth", tmp_path / "var.pth"
        )
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_alone(official: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"patch_nums cannot be known from .* a tokenizer of 3 scales"):
        load_var_checkpoint(official[0])
    vae, var = load_var_checkpoint(official[0], patch_nums=(1, 2, 4))
    assert var is None
    assert vae.schedule.patch_nums == (1, 2, 4)
    for known in (KNOWN_PATCH_NUMS[0], KNOWN_PATCH_NUMS[2]):
        with pytest.warns(UserWarning, match="ch_mult"):
            export_var_checkpoint(tiny_vae(schedule=FocusSchedule(known, patch_size=4)), None, tmp_path / "vae.pth")
        assert load_var_checkpoint(tmp_path / "vae.pth")[0].schedule.patch_nums == known


def test_patch_nums_of_a_transformer_whose_file_does_not_hold_them(official: tuple[Path, Path], tmp_path: Path) -> None:
    rewrite(official[1], lvl_1L=None, attn_bias_for_masking=None)
    with pytest.raises(ValueError, match=r"patch_nums cannot be known from .* 3 scales of 14 tokens"):
        load_var_checkpoint(*official)
    assert load_var_checkpoint(*official, patch_nums=SIDES)[0].schedule.patch_nums == SIDES
    with pytest.raises(ValueError, match=r"patch_nums \(1, 2, 4\) contradicts .* 3 scales of 14 tokens"):
        load_var_checkpoint(*official, patch_nums=(1, 2, 4))
    for known in KNOWN_PATCH_NUMS:
        assert read_var(tiny_var(patch_nums=known).state_dict(), "")[0]["patch_nums"] == list(known)


def test_contradicting_patch_nums_are_refused(official: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"patch_nums \(1, 2, 4\) contradicts .*: \(1, 2, 3\)"):
        load_var_checkpoint(*official, patch_nums=(1, 2, 4))
    with pytest.warns(UserWarning, match="ch_mult"):
        export_var_checkpoint(tiny_vae(num_phi=3), None, tmp_path / "vae.pth")
    with pytest.raises(ValueError, match=r"patch_nums \(1, 2\) contradicts .* every one of 3 scales"):
        load_var_checkpoint(tmp_path / "vae.pth", patch_nums=(1, 2))


def test_files_that_do_not_fit_each_other_are_refused(official: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ch_mult"):
        export_var_checkpoint(tiny_vae(vocab_size=32), None, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="vocab_size of the student and of the tokenizer must be equal, got 16 and 32"):
        load_var_checkpoint(tmp_path / "other.pth", official[1])
    with pytest.raises(ValueError, match="z_channels"):
        export_var_checkpoint(tiny_vae(z_channels=8), tiny_var(), *official)
    with pytest.raises(ValueError, match="var and var_path go together"):
        export_var_checkpoint(tiny_vae(), tiny_var(), official[0])


def test_swapped_files_are_refused(official: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"official VAR's transformer, but official VAR's tokenizer"):
        load_var_checkpoint(*reversed(official))
    with pytest.raises(ValueError, match=r"official VAR's tokenizer, but official VAR's transformer"):
        load_var_checkpoint(official[1])


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code was run')",))


def test_what_is_no_checkpoint_is_refused(official: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "file.pth"
    with pytest.raises(ValueError, match="does not exist"):
        load_var_checkpoint(file)
    with pytest.raises(ValueError, match="is a folder"):
        load_var_checkpoint(tmp_path)
    whole = official[0].read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"no checkpoint", pickle.dumps(Malicious(), protocol=2)):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="cannot be read as weights"):
            load_var_checkpoint(file)
    torch.save([torch.zeros(2)], file)
    with pytest.raises(ValueError, match="holds a list"):
        load_var_checkpoint(file)
    torch.save({"state_dict": {}, "epoch": 1}, file)
    with pytest.raises(ValueError, match=r"does not hold .* tokenizer, but \['epoch', 'state_dict'\]"):
        load_var_checkpoint(file)


def test_incomplete_weights_are_refused(official: tuple[Path, Path]) -> None:
    for name, change, message in (
        ("word_embed.weight", None, "lacks 'word_embed.weight'"),
        ("blocks.1.ffn.fc2.bias", None, r"does not fit: missing blocks.1.ffn.fc2.bias"),
        ("head.bias", torch.zeros(5), r"of another shape head.bias \(5,\) instead of \(16,\)"),
        ("extra", torch.zeros(5), "unexpected extra"),
        ("extra", "a word", r"holds more than the weights .* \['extra'\]"),
    ):
        before = official[1].read_bytes()
        rewrite(official[1], **{name: change})
        with pytest.raises(ValueError, match=message):
            load_var_checkpoint(*official)
        official[1].write_bytes(before)


def test_a_failed_write_leaves_the_old_file(official: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = [file.read_bytes() for file in official]

    def full(contents: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="ch_mult"), pytest.raises(OSError, match="no space"):
        export_var_checkpoint(tiny_vae(), tiny_var(), *official)
    assert [file.read_bytes() for file in official] == before
    assert sorted(p.name for p in official[0].parent.iterdir()) == ["vae.pth", "var.pth"]


def test_export_leaves_bfloat16_and_memory_formats_behind(official: tuple[Path, Path]) -> None:
    vae = tiny_vae().to(memory_format=torch.channels_last)
    with pytest.warns(UserWarning, match="ch_mult"):
        export_var_checkpoint(vae, tiny_var().bfloat16(), *official)
    for file in official:
        for tensor in torch.load(file, weights_only=True).values():
            assert tensor.is_contiguous()
            assert tensor.dtype in (torch.float32, torch.int64)


# Tokenizers of any origin


def test_load_tokenizer_takes_official_files(official: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"patch_nums cannot be known"):
        load_tokenizer(official[0])
    with pytest.raises(ValueError, match="official VAR's tokenizer, but official VAR's transformer"):
        load_tokenizer(official[1])
    vae = load_tokenizer(official[0], schedule=SCHEDULE, targets="full")
    assert isinstance(vae, VQVAE)
    assert (vae.schedule, vae.targets) == (SCHEDULE, "full")
    assert_same(vae.decoder, load_var_checkpoint(*official)[0].decoder)


def test_load_tokenizer_takes_training_checkpoints_and_pretrained_folders(tmp_path: Path) -> None:
    vae = tiny_vae()
    state = {f"tokenizer.{name}": x for name, x in vae.state_dict().items()} | {"psnr.total": torch.zeros(())}
    torch.save({"tokenizer": describe(vae), "state_dict": state}, tmp_path / "tokenizer.ckpt")
    save_pretrained(tmp_path / "model", tiny_var(), vae)
    for path in (tmp_path / "tokenizer.ckpt", tmp_path / "model", tmp_path / "model" / "model.safetensors"):
        loaded = load_tokenizer(path, schedule=SCHEDULE)
        assert_same(loaded, vae)
        assert not any(p.requires_grad for p in loaded.parameters())
        assert not loaded.training
        other = FocusSchedule(SIDES, patch_size=SCHEDULE.patch_size, focus_states=1)
        assert load_tokenizer(path, schedule=other).schedule == other
        with pytest.raises(ValueError, match="patch_size of the schedule must be the tokenizer's"):
            load_tokenizer(path, schedule=FocusSchedule(SIDES, patch_size=8, focus_states=2))
    torch.save({"state_dict": state}, tmp_path / "tokenizer.ckpt")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.ckpt")


def test_a_tokenizer_that_stopped_before_its_codes_were_set_is_refused(tmp_path: Path) -> None:
    vae = tiny_vae(warmup_steps=7)
    vae.codebook.updates.fill_(7)
    state = {f"tokenizer.{name}": x for name, x in vae.state_dict().items()}
    torch.save({"tokenizer": describe(vae), "state_dict": state}, tmp_path / "tokenizer.ckpt")
    with pytest.raises(ValueError, match="has no codes yet: they are set after warmup_steps 7, and it stopped after 7"):
        load_tokenizer(tmp_path / "tokenizer.ckpt")


# Pretrained folders and safetensors

SAMPLING = {"guidance": 2.0, "top_k": 5, "top_p": 0.5}
NAMES = ["cat", "dog", "ein Käfer"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_pretrained(folder, tiny_var(), tiny_vae(), class_names=NAMES, sampling=SAMPLING)
    return folder


@pytest.mark.parametrize("single", [False, True])
def test_pretrained_there_and_back(tmp_path: Path, single: bool) -> None:
    vae, var = tiny_vae().to(memory_format=torch.channels_last), tiny_var(shared_aln=True)
    path = tmp_path / ("model.safetensors" if single else "model")
    (save_safetensors if single else save_pretrained)(path, var, vae, class_names=NAMES, sampling=SAMPLING)
    var_again, vae_again, info = from_pretrained(path)
    assert_same(var, var_again)
    assert_same(vae, vae_again)
    assert vae_again.schedule == SCHEDULE
    assert info == (NAMES, SAMPLING)
    torch.testing.assert_close(pictures(vae, var, **SAMPLING), pictures(vae_again, var_again, **info.sampling))


def test_the_two_configurations_of_a_folder_agree(model: Path) -> None:
    from safetensors import safe_open

    assert sorted(p.name for p in model.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    with safe_open(model / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["config"]) == json.loads((model / "config.json").read_text())


def test_defaults_without_names_and_sampling(tmp_path: Path) -> None:
    save_pretrained(tmp_path, tiny_var(), tiny_vae())
    assert from_pretrained(str(tmp_path)).info == (["0", "1", "2"], {})


def test_what_does_not_fit_is_not_saved(tmp_path: Path) -> None:
    for message, var, options in (
        ("class_names must name 3 classes, got 2", tiny_var(), {"class_names": ["a", "b"]}),
        ("sampling may hold .* got temperature", tiny_var(), {"sampling": {"temperature": 1.0}}),
        ("vocab_size", tiny_var(vocab_size=99), {}),
    ):
        with pytest.raises(ValueError, match=message):
            save_pretrained(tmp_path, var, tiny_vae(), **options)
    assert not list(tmp_path.iterdir())


def test_broken_folders_are_refused(model: Path, tmp_path: Path) -> None:
    config, weights = model / "config.json", model / "model.safetensors"
    good, whole = json.loads(config.read_text()), weights.read_bytes()
    for message, changed in (
        ("lacks 'vae'", {k: v for k, v in good.items() if k != "vae"}),
        ("class_names must name 3", good | {"class_names": ["a"]}),
        ("var in .* does not fit: of another shape", good | {"var": good["var"] | {"width": 64}}),
        ("unknown entries", good | {"var": good["var"] | {"colour": "red"}}),
        (
            "must describe a var .* got .'structure', 'var'",
            good | {"var": good["vae"], "vae": good["var"]},
        ),
        ("holds no configuration", []),
    ):
        config.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            from_pretrained(model)
    config.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        from_pretrained(model)
    config.write_text(json.dumps(good))
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        from_pretrained(model)
    weights.unlink()
    with pytest.raises(ValueError, match=r"must hold config.json and model.safetensors"):
        from_pretrained(model)
    with pytest.raises(ValueError, match="does not exist"):
        from_pretrained(weights)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no configuration"):
        from_pretrained(tmp_path / "a.safetensors")


def test_missing_packages_are_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"fvar-lightning\[hub\]"):
        from_pretrained("someone/fvar-cats")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"fvar-lightning\[hub\]"):
        from_pretrained(model)


# Training checkpoints of stage 2


class Task(LightningModule):
    """What a FVARTask leaves in a checkpoint, trained on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"class_names": NAMES, "guidance": 3.0, "top_k": 9, "top_p": 0.5, "depth": 2})
        self.vae, self.student = tiny_vae().requires_grad_(False), tiny_var()
        self.teacher = nn.Linear(2, 2)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["networks"] = {"student": describe(self.student), "vae": describe(self.vae)}

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.student.pos_1LC.square().sum()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(4, 1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=0.1)


def trained(folder: Path, *callbacks: Any) -> tuple[Path, VAR]:
    """A checkpoint after four steps, and the student at the time."""
    task = Task()
    states = []

    class Watch(ModelCheckpoint):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *rest)
            states.append({name: x.clone() for name, x in task.student.state_dict().items()})

    saving = Watch(dirpath=folder, filename="last", every_n_train_steps=4)
    trainer = Trainer(
        max_steps=4, callbacks=[*callbacks, saving], logger=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task)
    task.student.load_state_dict(states[-1])
    return folder / "last.ckpt", task.student


@pytest.mark.filterwarnings("ignore")
def test_averaged_and_raw_weights(tmp_path: Path) -> None:
    file, student = trained(tmp_path, EMAWeightAveraging(decay=0.5, use_buffers=False))
    raw, averaged = (load_fvar_checkpoint(file, weights).var for weights in ("raw", "ema"))
    assert_same(raw, student)
    # x <- 0.8 x per step; the average starts at the first step's result, then halves its distance
    start, mean = 0.8, 0.8
    for step in (2, 3, 4):
        mean = 0.5 * mean + 0.5 * start**step
    ratio = averaged.pos_1LC / raw.pos_1LC
    torch.testing.assert_close(ratio, torch.full_like(ratio, mean / start**4))
    assert_same(averaged.head, raw.head)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_swapped_networks_is_refused(tmp_path: Path) -> None:
    file, _ = trained(tmp_path)
    contents = torch.load(file, weights_only=True)
    contents["networks"]["student"] = contents["networks"]["vae"]
    own = {name: x for name, x in contents["state_dict"].items() if name.startswith("vae.")}
    contents["state_dict"] = own | {name.replace("vae.", "student.", 1): x for name, x in own.items()}
    torch.save(contents, file)
    with pytest.raises(ValueError, match="describes other networks than a student and a structure tokenizer"):
        load_fvar_checkpoint(file)


def test_a_checkpoint_without_averages(tmp_path: Path) -> None:
    file, student = trained(tmp_path)
    for weights in ("raw", "ema"):
        var, vae, info = load_fvar_checkpoint(file, weights)
        assert_same(var, student)
        assert_same(vae, tiny_vae())
        assert info == (NAMES, {"guidance": 3.0, "top_k": 9, "top_p": 0.5})
    with pytest.raises(ValueError, match="weights must be one of"):
        load_fvar_checkpoint(file, "mean")
    assert_same(load_tokenizer(file), tiny_vae())


def task_checkpoint(file: Path, var: VAR, vae: VQVAE) -> Path:
    """What export and load_initial_weights read of a FVARTask's checkpoint."""
    state = {f"student.{k}": x for k, x in var.state_dict().items()} | {
        f"vae.{k}": x for k, x in vae.state_dict().items()
    }
    networks = {"student": describe(var), "vae": describe(vae)}
    torch.save({"networks": networks, "state_dict": state, "hyper_parameters": {"class_names": NAMES}}, file)
    return file


def test_export_in_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    var, vae = tiny_var(), tiny_vae()
    file = str(task_checkpoint(tmp_path / "last.ckpt", var, vae))
    export(file, str(tmp_path / "folder"))
    export(file, str(tmp_path / "one.safetensors"), format="safetensors")
    with pytest.warns(UserWarning, match="ch_mult"):
        export(file, str(tmp_path / "var"), format="var")
    assert f"wrote {tmp_path / 'var' / 'vae_ch8v16z4.pth'}" in capsys.readouterr().out
    for path in ("folder", "one.safetensors"):
        assert_same(from_pretrained(tmp_path / path).var, var)
        assert from_pretrained(tmp_path / path).info.class_names == NAMES
    again = load_var_checkpoint(tmp_path / "var" / "vae_ch8v16z4.pth", tmp_path / "var" / "var_d2.pth")
    assert_same(again[1], var)
    with pytest.raises(ValueError, match=r"output must be a file that ends in .safetensors"):
        export(file, str(tmp_path / "one"), format="safetensors")
    with pytest.raises(ValueError, match="format must be"):
        export(file, str(tmp_path / "one"), format="onnx")  # type: ignore[arg-type]
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"is not of a FVARTask, it holds \['state_dict'\]"):
        export(str(tmp_path / "other.ckpt"), str(tmp_path / "folder"))


# Fine-tuning


def sources(tmp_path: Path, var: VAR) -> list[Path]:
    """The same transformer in a file of every kind."""
    with pytest.warns(UserWarning, match="ch_mult"):
        export_var_checkpoint(tiny_vae(), var, tmp_path / "vae.pth", tmp_path / "var.pth")
    save_pretrained(tmp_path / "model", var, tiny_vae())
    return [tmp_path / "var.pth", tmp_path / "model", task_checkpoint(tmp_path / "task.ckpt", var, tiny_vae())]


def test_initial_weights_for_other_classes(tmp_path: Path) -> None:
    trained = tiny_var(num_classes=7)
    for path in sources(tmp_path, trained):
        var = VAR(SIDES, vocab_size=16, z_channels=4, num_classes=3, depth=2, width=32, heads=4, drop_path_rate=0.4)
        fresh = var.class_emb.weight.detach().clone()
        load_initial_weights(var, path)
        assert torch.equal(var.class_emb.weight[:-1], fresh[:-1])
        assert torch.equal(var.class_emb.weight[-1], trained.class_emb.weight[-1])
        rest = {name: x for name, x in trained.state_dict().items() if name != "class_emb.weight"}
        for name, tensor in rest.items():
            assert torch.equal(tensor, var.state_dict()[name]), name
        assert var.blocks[-1].drop_path_rate == 0.4


def test_initial_weights_for_the_same_number_of_classes(tmp_path: Path) -> None:
    trained = tiny_var()
    for path in sources(tmp_path, trained):
        var = VAR(SIDES, vocab_size=16, z_channels=4, num_classes=3, depth=2, width=32, heads=4)
        load_initial_weights(var, path)
        assert_same(var, trained)


def test_initial_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    for path in sources(tmp_path, tiny_var()):
        with pytest.raises(ValueError, match=r"is another: depth is 2, not 3, width is 32, not 64"):
            load_initial_weights(tiny_var(width=64, depth=3), path)
        with pytest.raises(ValueError, match=r"patch_nums"):
            load_initial_weights(tiny_var(patch_nums=(1, 2, 4)), path)
    with pytest.raises(ValueError, match=r"official VAR's transformer, but official VAR's tokenizer"):
        load_initial_weights(tiny_var(), tmp_path / "vae.pth")
