"""Experts have equal widths, hold what belongs together, and depend on the seed alone."""

import builtins
import itertools

import numpy as np
import pytest
import torch

from prunepath.config import nearest_divisors
from prunepath.conversion.partition import partition_neurons
from prunepath.errors import NativeLibraryError, PrunePathError


def planted(num_clusters, size, num_features, noise, seed=0):
    """Points [num_clusters * size, num_features] around distant centres, shuffled, and their clusters."""
    generator = np.random.default_rng(seed)
    clusters = generator.permutation(np.repeat(np.arange(num_clusters), size))
    centres = generator.standard_normal((num_clusters, num_features))
    points = centres[clusters] + noise * generator.standard_normal((clusters.size, num_features))
    return points.astype(np.float32), clusters


def same_groups(labels, expected):
    pairs = set(zip(labels.tolist(), expected.tolist(), strict=True))
    return len(pairs) == len(set(labels.tolist())) == len(set(expected.tolist()))


def groups(permutation, num_experts):
    return permutation.reshape(num_experts, -1)


def host():
    from prunepath import _host

    return _host


@pytest.mark.parametrize(
    ("num_points", "num_features", "num_clusters"),
    [(1, 1, 1), (6, 1, 6), (6, 5, 1), (12, 3, 4), (70, 17, 35), (130, 33, 13), (192, 100, 64), (512, 7, 2)],
)
def test_every_cluster_has_the_same_size(num_points, num_features, num_clusters):
    points = np.random.default_rng(0).standard_normal((num_points, num_features)).astype(np.float32)
    labels = host().balanced_kmeans(points, num_clusters)
    assert labels.dtype == np.int32
    assert np.bincount(labels, minlength=num_clusters).tolist() == [num_points // num_clusters] * num_clusters


@pytest.mark.parametrize("skew", [0.0, 0.9])
def test_sizes_are_equal_where_nearest_centres_are_not(skew):
    """Most points in one dense spot: nearly all of them have to settle for another cluster."""
    generator = np.random.default_rng(1)
    points = generator.standard_normal((400, 8)).astype(np.float32)
    points[generator.random(400) < skew] *= 1e-3
    labels = host().balanced_kmeans(points, 20)
    assert np.bincount(labels).tolist() == [20] * 20


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("seed", range(3))
def test_planted_clusters_are_recovered(seed, offset):
    points, clusters = planted(32, 12, 40, noise=0.2, seed=seed)
    assert same_groups(host().balanced_kmeans(points + np.float32(offset), 32, seed=seed), clusters)


def test_objective_is_the_smallest_of_all_partitions():
    """9 points in 3 clusters have 280 partitions: the best of a few seeds is the best of them all."""
    points = np.random.default_rng(3).standard_normal((9, 2)).astype(np.float32)

    def score(labels):
        return host().within_cluster_sum_of_squares(points, np.array(labels, np.int32), 3)

    best = min(
        score(labels)
        for labels in itertools.product(range(3), repeat=9)
        if sorted(labels) == [0] * 3 + [1] * 3 + [2] * 3
    )
    found = min(score(host().balanced_kmeans(points, 3, seed=seed)) for seed in range(5))
    assert found == pytest.approx(best, rel=1e-6)


def test_objective_is_the_sum_of_squares_and_far_below_a_random_partition():
    points, _ = planted(16, 16, 24, noise=1.0)
    labels = host().balanced_kmeans(points, 16)
    means = np.stack([points[labels == cluster].mean(0) for cluster in range(16)])
    found = host().within_cluster_sum_of_squares(points, labels, 16)
    assert found == pytest.approx(((points - means[labels]) ** 2).sum(), rel=1e-4)
    shuffled = np.random.default_rng(0).permutation(labels)
    # The planted clusters leave half of the variance.
    assert found < 0.6 * host().within_cluster_sum_of_squares(points, shuffled, 16)


def test_no_swap_of_two_points_lowers_the_objective_much():
    points = np.random.default_rng(5).standard_normal((60, 6)).astype(np.float32)
    labels = host().balanced_kmeans(points, 6)
    found = host().within_cluster_sum_of_squares(points, labels, 6)
    for i, j in itertools.combinations(range(60), 2):
        swapped = labels.copy()
        swapped[[i, j]] = labels[[j, i]]
        assert host().within_cluster_sum_of_squares(points, swapped, 6) > 0.99 * found


def test_result_depends_on_the_seed_and_not_on_the_threads():
    points = np.random.default_rng(0).standard_normal((480, 50)).astype(np.float32)
    first = host().balanced_kmeans(points, 24, seed=1, num_threads=1)
    for num_threads in (2, 3, 7, 0):
        again = host().balanced_kmeans(points, 24, seed=1, num_threads=num_threads)
        assert again.tolist() == first.tolist()
    assert host().balanced_kmeans(points, 24, seed=2).tolist() != first.tolist()


def test_equal_points_are_divided_evenly():
    labels = host().balanced_kmeans(np.ones((64, 3), np.float32), 8)
    assert np.bincount(labels).tolist() == [8] * 8


def test_non_contiguous_points_are_read_in_their_order():
    points = np.random.default_rng(0).standard_normal((30, 48)).astype(np.float32)
    expected = host().balanced_kmeans(np.ascontiguousarray(points.T[::2]), 4)
    assert host().balanced_kmeans(points.T[::2], 4).tolist() == expected.tolist()


def test_progress_counts_up_to_its_total():
    seen = []
    points = np.random.default_rng(0).standard_normal((120, 10)).astype(np.float32)
    host().balanced_kmeans(points, 10, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(set(seen))
    assert seen[-1][0] == seen[-1][1]


def test_what_progress_raises_stops_the_work_and_propagates():
    calls = []

    def stop(done, total):
        calls.append(done)
        raise KeyError("stop")

    points = np.random.default_rng(0).standard_normal((120, 10)).astype(np.float32)
    with pytest.raises(KeyError, match="stop"):
        host().balanced_kmeans(points, 10, progress=stop)
    assert calls == [1]


@pytest.mark.parametrize(
    ("points", "num_clusters", "options", "message"),
    [
        (np.zeros((10, 2)), 3, {}, "num_clusters to divide the number of points 10, got 3"),
        (np.zeros((10, 2)), 0, {}, "num_clusters"),
        (np.zeros((10, 2)), -2, {}, "num_clusters"),
        (np.zeros((0, 2)), 1, {}, r"got \[0, 2\]"),
        (np.zeros((4, 0)), 1, {}, r"got \[4, 0\]"),
        (np.zeros(4), 1, {}, "1 dimensions"),
        (np.full((4, 2), np.nan), 2, {}, "finite"),
        (np.full((4, 2), [np.inf, 0]), 2, {}, "finite"),
        (np.zeros((4, 2)), 2, {"max_iterations": 0}, "max_iterations"),
        (np.zeros((4, 2)), 2, {"num_threads": -1}, "num_threads"),
    ],
)
def test_bad_input_of_the_clustering_is_named(points, num_clusters, options, message):
    with pytest.raises(ValueError, match=message):
        host().balanced_kmeans(points.astype(np.float32), num_clusters, **options)


@pytest.mark.parametrize("labels", [[0, 1, 2, 0], [0, -1, 0, 0], [0, 0, 0]])
def test_bad_labels_of_the_objective_are_refused(labels):
    with pytest.raises(ValueError, match="labels"):
        host().within_cluster_sum_of_squares(np.zeros((4, 2), np.float32), np.array(labels, np.int32), 2)


@pytest.mark.parametrize("method", ["coactivation", "weights", "contiguous", "random"])
@pytest.mark.parametrize("num_experts", [1, 4, 12, 48])
def test_every_method_gives_a_permutation_in_order_within_experts(method, num_experts):
    generator = torch.Generator().manual_seed(0)
    permutation = partition_neurons(
        method,
        num_experts,
        intermediate_size=48,
        profiles=torch.randn(20, 48, generator=generator),
        weights=torch.randn(48, 16, generator=generator),
    )
    assert permutation.dtype == torch.int64
    assert permutation.sort().values.tolist() == list(range(48))
    within = groups(permutation, num_experts)
    assert torch.equal(within, within.sort(dim=1).values)


def test_contiguous_is_the_identity_and_random_follows_its_seed():
    assert partition_neurons("contiguous", 3, intermediate_size=12).tolist() == list(range(12))
    first, again, other = (
        partition_neurons("random", 8, intermediate_size=64, seed=seed).tolist() for seed in (0, 0, 1)
    )
    assert first == again != other
    assert first != list(range(64))


def test_coactivation_groups_neurons_that_act_on_the_same_tokens_whatever_sign_and_scale():
    """Magnitudes follow one of 8 signals; sign, scale and a constant offset of the magnitude differ by neuron."""
    generator = torch.Generator().manual_seed(0)
    expected = torch.arange(64)[torch.randperm(64, generator=generator)] % 8
    signals = torch.rand(200, 8, generator=generator)
    magnitudes = signals[:, expected] * torch.logspace(-2, 2, 64)
    magnitudes += torch.rand(64, generator=generator) * torch.logspace(-2, 2, 64)
    signs = torch.randint(0, 2, (200, 64), generator=generator) * 2 - 1
    profiles = signs * magnitudes
    before = profiles.clone()
    permutation = partition_neurons("coactivation", 8, intermediate_size=64, profiles=profiles)
    for expert in groups(permutation, 8):
        assert len(set(expected[expert].tolist())) == 1
    assert torch.equal(profiles, before)


def test_weights_groups_rows_of_one_direction():
    generator = torch.Generator().manual_seed(0)
    expected = torch.arange(60)[torch.randperm(60, generator=generator)] % 6
    rows = torch.randn(6, 32, generator=generator)[expected] * torch.logspace(-3, 3, 60)[:, None]
    permutation = partition_neurons("weights", 6, intermediate_size=60, weights=rows.to(torch.bfloat16))
    for expert in groups(permutation, 6):
        assert len(set(expected[expert].tolist())) == 1


def test_constant_neurons_have_no_direction():
    """Dead and constant neurons fill the experts that the others leave room in, and do not break those up."""
    generator = torch.Generator().manual_seed(0)
    profiles = torch.rand(50, 4, generator=generator).repeat_interleave(4, dim=1)
    constants = torch.tensor([0.0, 0.0, 0.1, -0.3, 0.7, 1.3, -1.7, 3.1]).expand(50, 8)
    permutation = partition_neurons(
        "coactivation", 6, intermediate_size=24, profiles=torch.cat([constants, profiles], 1)
    )
    live = [set(expert.tolist()) for expert in groups(permutation, 6) if expert.max() >= 8]
    assert sorted(map(sorted, live)) == [list(range(first, first + 4)) for first in (8, 12, 16, 20)]


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_fewer_tokens_than_experts(num_tokens):
    profiles = torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(0))
    permutation = partition_neurons("coactivation", 16, intermediate_size=64, profiles=profiles)
    assert permutation.sort().values.tolist() == list(range(64))


def test_negative_seed_is_a_seed_like_any_other():
    profiles = torch.randn(30, 48, generator=torch.Generator().manual_seed(0))
    first, again = (
        partition_neurons("coactivation", 8, intermediate_size=48, profiles=profiles, seed=-1) for _ in range(2)
    )
    assert torch.equal(first, again)


def test_progress_reaches_the_caller():
    seen = []
    profiles = torch.randn(30, 48, generator=torch.Generator().manual_seed(0))
    partition_neurons(
        "coactivation", 8, intermediate_size=48, profiles=profiles, progress=lambda *step: seen.append(step)
    )
    assert seen and seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    ("intermediate_size", "num_experts", "expected"),
    [(12, 5, (4, 6)), (12, 4, (4, 4)), (14336, 225, (224, 256)), (13, 4, (1, 13)), (12, 0, (1, 1)), (12, 99, (12, 12))],
)
def test_nearest_nearest_divisors(intermediate_size, num_experts, expected):
    assert nearest_divisors(intermediate_size, num_experts) == expected


@pytest.mark.parametrize("method", ["coactivation", "contiguous"])
@pytest.mark.parametrize(
    ("num_experts", "nearest"),
    [(5, "4 and 6"), (0, "1"), (-3, "1"), (24, "12")],
)
def test_invalid_num_experts_names_the_nearest(method, num_experts, nearest):
    with pytest.raises(
        PrunePathError, match=rf"divide intermediate_size 12, got {num_experts}; nearest valid: {nearest}\."
    ):
        partition_neurons(method, num_experts, intermediate_size=12, profiles=torch.zeros(3, 12))


@pytest.mark.parametrize(
    ("method", "inputs", "message"),
    [
        ("spectral", {}, "coactivation, weights, contiguous, random, got 'spectral'"),
        ("coactivation", {}, r"profiles of shape \[P, 8\].*got None"),
        ("coactivation", {"profiles": torch.zeros(8, 4)}, r"profiles of shape \[P, 8\], got \[8, 4\]"),
        ("coactivation", {"profiles": torch.zeros(0, 8)}, r"got \[0, 8\]"),
        ("weights", {}, r"weights of shape \[8, F\].*got None"),
        ("weights", {"weights": torch.zeros(4, 8)}, r"weights of shape \[8, F\], got \[4, 8\]"),
    ],
)
def test_bad_input_of_a_partition_is_named(method, inputs, message):
    with pytest.raises(PrunePathError, match=message):
        partition_neurons(method, 2, intermediate_size=8, **inputs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    values = torch.zeros(8, 8)
    values[:, 3] = bad
    with pytest.raises(PrunePathError, match="finite profiles, got NaN or infinity in 1 of 8 neurons"):
        partition_neurons("coactivation", 2, intermediate_size=8, profiles=values)
    with pytest.raises(PrunePathError, match="finite weights, got NaN or infinity in 8 of 8 neurons"):
        partition_neurons("weights", 2, intermediate_size=8, weights=values)


def test_missing_library_is_one_sentence(monkeypatch):
    real_import = builtins.__import__

    def without_host(name, *args, **kwargs):
        if name == "prunepath" and "_host" in (args[2] or ()):
            raise ImportError("cannot import name '_host'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_host)
    with pytest.raises(NativeLibraryError, match=r"_host.*does not load.*pip install \."):
        partition_neurons("weights", 2, intermediate_size=4, weights=torch.eye(4))
    assert partition_neurons("contiguous", 2, intermediate_size=4).tolist() == [0, 1, 2, 3]
