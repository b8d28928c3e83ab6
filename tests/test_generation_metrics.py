"""Generation figures against torch-fidelity's own pipeline, NumPy, SciPy and closed forms."""

import os
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from torch import nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from fvar_lightning.metrics.extractors import Features, ModuleExtractor
from fvar_lightning.metrics.generation import (
    frechet_distance,
    generation_figures,
    inception_score,
    kernel_distance,
    precision_recall,
)
from fvar_lightning.metrics.statistics import FeatureStatistics, Statistics, adm_images, statistics_file

DIM, CLASSES = 16, 7


class StandIn(nn.Module):
    """A fixed random network with features and logits."""

    def __init__(self):
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        self.project = nn.Parameter(torch.randn(3 * 8 * 8, DIM, generator=rng) / 8, requires_grad=False)
        self.head = nn.Parameter(torch.randn(DIM, CLASSES, generator=rng), requires_grad=False)

    def forward(self, images):
        features = torch.relu(images.float().div(127.5).sub(1).flatten(1) @ self.project + 0.3)
        return features, features @ self.head


class FidelityStandIn(FeatureExtractorBase):
    """The same network as torch-fidelity sees it."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        self.net = StandIn()

    @staticmethod
    def get_provided_features_list():
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, images):
        values = dict(zip(("features", "logits"), self.net(images), strict=True))
        return tuple(values[name] for name in self.features_list)


def make_images(seed, count, shift=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.clip(rng.normal(128 + shift, 50, (count, 3, 8, 8)), 0, 255).astype(np.uint8))


def statistics_of(images, batch=40, **kwargs):
    extractor = ModuleExtractor(StandIn(), "standin", DIM)
    metric = FeatureStatistics(extractor.name, extractor.num_features, image_size=8, **kwargs)
    for part in images.split(batch):
        metric.update(*extractor(part))
    return metric.compute()


def from_features(features, name="x", logits=None):
    metric = FeatureStatistics(name, features.shape[1])
    metric.update(features, logits)
    return metric.compute()


class TensorDataset(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def test_agrees_with_torch_fidelity():
    torch_fidelity.register_feature_extractor("fvar-standin", FidelityStandIn)
    fake, real = make_images(0, 120, shift=12), make_images(1, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch_fidelity.calculate_metrics(
            input1=TensorDataset(fake),
            input2=TensorDataset(real),
            feature_extractor="fvar-standin",
            isc=True,
            fid=True,
            kid=True,
            prc=True,
            kid_subset_size=100,
            batch_size=20,
            cuda=False,
            cache=False,
            verbose=False,
        )
    figures = generation_figures(statistics_of(fake), statistics_of(real))
    names = {
        "fd_standin": "frechet_inception_distance",
        "kd_standin": "kernel_inception_distance_mean",
        "kd_std_standin": "kernel_inception_distance_std",
        "is_standin": "inception_score_mean",
        "is_std_standin": "inception_score_std",
        "precision_standin": "precision",
        "recall_standin": "recall",
    }
    assert set(figures.values) == set(names)
    for ours, theirs in names.items():
        assert figures.values[ours] == pytest.approx(expected[theirs], rel=1e-3), ours
    assert 0 < figures.values["precision_standin"] < 1
    assert figures.values["fd_standin"] > 0.1


def test_frechet_distance_closed_form_and_scipy():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(12, 12)) for _ in range(2))
    covs = [m @ m.T for m in (a, b)]
    means = rng.normal(size=(2, 12))
    pair = [Statistics("x", torch.tensor(m), torch.tensor(c), 100) for m, c in zip(means, covs, strict=True)]
    root = scipy.linalg.sqrtm(covs[0] @ covs[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covs[0] + covs[1] - 2 * root)
    assert frechet_distance(*pair) == pytest.approx(expected, rel=1e-8)
    variances = rng.uniform(0.1, 2, size=(2, 12))
    pair = [
        Statistics("x", torch.tensor(m), torch.diag(torch.tensor(v)), 9) for m, v in zip(means, variances, strict=True)
    ]
    expected = ((means[0] - means[1]) ** 2).sum() + ((variances[0] ** 0.5 - variances[1] ** 0.5) ** 2).sum()
    assert frechet_distance(*pair) == pytest.approx(expected, rel=1e-10)


def test_statistics_are_mean_and_covariance():
    # far from zero, where float32 sums would lose the covariance
    features = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)) + 1000
    metric = FeatureStatistics("x", 5)
    for part in features.split(70):
        metric.update(part)
    result = metric.compute()
    np.testing.assert_allclose(result.mean, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(result.covariance, np.cov(features.double().numpy(), rowvar=False), atol=1e-7)
    assert torch.equal(result.features, features)
    assert result.count == 300
    assert not metric.state_dict()


def test_kernel_distance_is_unbiased_mmd():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(30, 6)), rng.normal(0.5, 1, size=(30, 6))

    def kernel(p, q):
        return (p @ q.T / 6 + 1) ** 3

    off = ~np.eye(30, dtype=bool)
    expected = kernel(x, x)[off].mean() + kernel(y, y)[off].mean() - 2 * kernel(x, y).mean()
    mean, deviation = kernel_distance(
        *(from_features(torch.tensor(f, dtype=torch.float32)) for f in (x, y)), subset_size=30
    )
    assert mean == pytest.approx(expected, rel=1e-5)  # of features rounded to float32
    assert deviation == pytest.approx(0, abs=1e-12)  # every subset is the whole set


@pytest.mark.parametrize(("counts", "size"), [((70, 60), 30), ((40, 60), 40), ((3000, 50), 20)])
def test_kernel_distance_of_every_subset_by_itself(counts, size):
    """Small sets share one kernel matrix of all subsets, large ones do not: both give torch-fidelity's figures."""
    rng = np.random.default_rng(5)
    x, y = (rng.normal(shift, 1, size=(n, 6)).astype(np.float32) for n, shift in zip(counts, (0, 0.3), strict=True))
    draw, off, expected = np.random.RandomState(11), ~np.eye(size, dtype=bool), []
    for _ in range(20):
        a, b = (f[draw.choice(len(f), size, replace=False)].astype(np.float64) for f in (x, y))
        aa, bb, ab = ((p @ q.T / 6 + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        expected.append(aa[off].mean() + bb[off].mean() - 2 * ab.mean())
    stats = [from_features(torch.from_numpy(f)) for f in (x, y)]
    mean, deviation = kernel_distance(*stats, subsets=20, subset_size=size, seed=11)
    assert mean == pytest.approx(np.mean(expected), rel=1e-11)
    assert deviation == pytest.approx(np.std(expected), rel=1e-11)


def test_precision_recall_by_brute_force():
    rng = np.random.default_rng(4)
    fake, real = rng.normal(0, 0.5, size=(50, 3)), rng.normal(size=(60, 3))

    def covered(points, by, k=3):
        inside = 0
        for p in points:
            radii = [np.sort(np.linalg.norm(by - c, axis=1))[k] for c in by]
            inside += any(np.linalg.norm(p - c) <= r for c, r in zip(by, radii, strict=True))
        return inside / len(points)

    stats = [from_features(torch.tensor(f, dtype=torch.float32)) for f in (fake, real)]
    precision, recall = precision_recall(*stats, batch_size=13)
    assert precision == pytest.approx(covered(fake, real))
    assert recall == pytest.approx(covered(real, fake))
    assert precision > recall


def test_inception_score_closed_form():
    # certain of one of C equally frequent classes: C; the same answer for every image: 1
    logits = 1000 * nn.functional.one_hot(torch.arange(50) % 5, 5).float()
    features = torch.zeros(50, 2)
    assert inception_score(from_features(features, logits=logits), splits=1)[0] == pytest.approx(5)
    assert inception_score(from_features(features, logits=torch.randn(1, 5).expand(50, 5)))[0] == pytest.approx(1)


def test_set_against_itself_and_against_noise():
    images = make_images(0, 80)
    values = generation_figures(statistics_of(images), statistics_of(images.flip(0))).values
    assert values["fd_standin"] == pytest.approx(0, abs=1e-5)
    assert values["precision_standin"] == values["recall_standin"] == 1
    noise = torch.randint(0, 40, (80, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    values = generation_figures(statistics_of(noise), statistics_of(images)).values
    assert values["precision_standin"] == values["recall_standin"] == 0
    assert values["fd_standin"] > 1


def test_merged_ranks_equal_one():
    # features of one pass: of batches of other sizes their last bits differ on some processors
    seen = ModuleExtractor(StandIn(), "standin", DIM)(make_images(0, 90))
    parts = [Features(*(x[part] for x in seen)) for part in (slice(None, 30), slice(30, None), slice(None))]
    metrics = [FeatureStatistics("standin", DIM) for _ in parts]
    for metric, part in zip(metrics, parts, strict=True):
        metric.update(*part)
    metrics[0].merge_state(metrics[1])
    merged, whole = metrics[0].compute(), metrics[2].compute()
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-10, atol=1e-12)
    assert merged.count == 90
    assert sorted(merged.features[:, 0].tolist()) == sorted(whole.features[:, 0].tolist())


def _rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    extractor = ModuleExtractor(StandIn(), "standin", DIM)
    metric = FeatureStatistics("standin", DIM, image_size=8)
    images = make_images(0, 60)
    # the second rank has no images: it still takes part
    metric.update(*extractor(images if rank == 0 else images[:0]))
    result = metric.compute()
    result.save(f"{folder}/{rank}.npz")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_same_statistics(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    whole = statistics_of(make_images(0, 60), batch=60)
    for rank in range(2):
        result = Statistics.load(tmp_path / f"{rank}.npz")
        torch.testing.assert_close(result.covariance, whole.covariance, rtol=1e-10, atol=1e-12)
        assert torch.equal(result.features, whole.features)
        assert torch.equal(result.logits, whole.logits)


def test_fewer_samples_than_features_is_reported():
    figures = generation_figures(statistics_of(make_images(0, 12)), statistics_of(make_images(1, 80)))
    assert any("12 generated images for 16 features" in w for w in figures.warnings)
    assert not any("real images" in w for w in figures.warnings)
    assert np.isfinite(list(figures.values.values())).all()


def test_another_extractor_or_resolution_is_refused():
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="extractor is 'b'"):
        generation_figures(from_features(features, "a"), from_features(features, "b"))
    sized = [FeatureStatistics("a", 4, image_size=s) for s in (64, 256)]
    for metric in sized:
        metric.update(features)
    with pytest.raises(ValueError, match="image_size is 256"):
        frechet_distance(*(m.compute() for m in sized))
    with pytest.raises(ValueError, match="4 features"):
        frechet_distance(from_features(features[:, :3]), from_features(features))


def test_figures_without_kept_features():
    stats = statistics_of(make_images(0, 50), keep_features=False)
    figures = generation_figures(stats, stats)
    assert set(figures.values) == {"fd_standin"}
    assert any("keeps no features" in w for w in figures.warnings)
    with pytest.raises(ValueError, match="keep no features"):
        kernel_distance(stats, stats)
    with pytest.raises(ValueError, match="keep no logits"):
        inception_score(stats)


def test_inception_figures_have_the_known_names():
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    stats = from_features(features, "inception", logits=features)
    names = set(generation_figures(stats, stats).values)
    assert {"fid_inception", "kid_inception", "is_inception", "precision_inception", "recall_inception"} <= names


def test_bad_numbers_are_refused():
    stats = from_features(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match=r"subset_size must lie in 2\.\.20.*got 21"):
        kernel_distance(stats, stats, subset_size=21)
    with pytest.raises(ValueError, match=r"neighbours must lie in 1\.\.19"):
        precision_recall(stats, stats, neighbours=20)
    with pytest.raises(ValueError, match="features must be"):
        FeatureStatistics("x", 4).update(torch.zeros(2, 5))
    single = FeatureStatistics("x", 4)
    single.update(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="at least two images, got 1"):
        single.compute()


def test_files_round_trip(tmp_path):
    stats = statistics_of(make_images(0, 20))
    path = statistics_file(tmp_path / "cache", "my photos/v2", stats.extractor, 8)
    stats.save(path)
    assert os.listdir(path.parent) == [path.name]
    loaded = Statistics.load(path)
    for name in ("mean", "covariance", "features", "logits"):
        assert torch.equal(getattr(loaded, name), getattr(stats, name)), name
    assert (loaded.extractor, loaded.count, loaded.image_size) == ("standin", 20, 8)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="holds no feature statistics"):
        Statistics.load(path)


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    stats = statistics_of(make_images(0, 20))
    path = tmp_path / "real.npz"
    stats.save(path)
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        stats.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["real.npz"]


def test_adm_reference(tmp_path):
    rng = np.random.default_rng(0)
    features, images = rng.normal(size=(40, 6)), rng.integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    mu, sigma = features.mean(0), np.cov(features, rowvar=False)
    np.savez(tmp_path / "ref.npz", arr_0=images, mu=mu, sigma=sigma, mu_s=mu[:2], sigma_s=sigma[:2, :2])
    loaded = Statistics.load(tmp_path / "ref.npz")
    assert (loaded.extractor, loaded.image_size, loaded.count) == ("inception", 32, None)
    np.testing.assert_array_equal(loaded.covariance, sigma)
    np.testing.assert_array_equal(adm_images(tmp_path / "ref.npz"), images)
    ours = from_features(torch.tensor(features, dtype=torch.float32), "inception")
    assert frechet_distance(ours, loaded) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="'inception'"):
        frechet_distance(from_features(torch.tensor(features, dtype=torch.float32), "other"), loaded)
    np.savez(tmp_path / "no.npz", a=mu)
    with pytest.raises(ValueError, match="not arr_0"):
        adm_images(tmp_path / "no.npz")
