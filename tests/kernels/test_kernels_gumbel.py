"""The counter-based noise: same bits everywhere, keyed by its row alone, and Gumbel distributed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from echo_kernels import Ops
from echo_kernels.reference import gumbel_uniform

EULER = 0.5772156649


def keys(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def splitmix(seed: int, position: int, token: int) -> float:
    """The variate in Python's integers, written from the formula."""
    golden, low = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & low
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & low
        return x ^ (x >> 31)

    key = mix((mix(seed & low) + position * golden) & low)
    return ((mix((key + (token + 1) * golden) & low) >> 32) + 0.5) * 2.0**-32


def test_bits_follow_the_formula() -> None:
    for seed, position in [(0, 0), (7, 123), (2**63 - 1, 4096), (-5, 1)]:
        x = gumbel_uniform(keys(seed), keys(position), 50)[0]
        expected = torch.tensor([splitmix(seed, position, t) for t in range(50)])
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=0)


def test_floats_are_exact_to_float32(ops: Ops) -> None:
    x = gumbel_uniform(keys(3, 2**62), keys(5, 9), 60_000).double()
    expected = -(-(-x).log1p()).log()
    torch.testing.assert_close(
        ops.gumbel(keys(3, 2**62), keys(5, 9), 60_000, "cpu").double(), expected, rtol=1e-6, atol=5e-7
    )


def test_extreme_variates_stay_finite(ops: Ops) -> None:
    noise = ops.gumbel(torch.arange(200), torch.arange(200), 20_001, "cpu")
    assert noise.isfinite().all() and noise.shape == (200, 20_001) and noise.dtype is torch.float32


def test_row_depends_on_its_own_key_only(ops: Ops) -> None:
    seeds, positions = keys(5, 8, 5, 0), keys(3, 3, 4, 0)
    together = ops.gumbel(seeds, positions, 49_157, "cpu")
    for r in (3, 0, 2, 1):
        assert torch.equal(together[r], ops.gumbel(seeds[r : r + 1], positions[r : r + 1], 49_157, "cpu")[0])
    shorter = ops.gumbel(seeds, positions, 777, "cpu")
    assert torch.equal(shorter, together[:, :777])


def test_seed_and_position_are_not_interchangeable(ops: Ops) -> None:
    a, b, c = ops.gumbel(keys(1, 2, 0), keys(2, 1, 3), 1000, "cpu")
    for x, y in [(a, b), (a, c), (b, c)]:
        assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 0.15 and not torch.equal(x, y)


def test_moments(ops: Ops) -> None:
    noise = ops.gumbel(torch.arange(40), torch.arange(40) + 17, 25_000, "cpu").double()
    error = 1 / math.sqrt(noise.numel())
    assert abs(noise.mean() - EULER) < 5 * error * math.pi / math.sqrt(6)
    assert abs(noise.var() - math.pi**2 / 6) < 5 * error * 3.7  # 3.7: the deviation of the squared deviation
    below = (noise[:, :, None] < torch.tensor([-1.0, 0.0, 1.0, 3.0])).double().mean((0, 1))
    assert (below - torch.exp(-torch.exp(-torch.tensor([-1.0, 0.0, 1.0, 3.0]).double()))).abs().max() < 5 * error


def test_argmax_over_uniform_logits_is_uniform(ops: Ops) -> None:
    """Chi-square over 32 tokens: consecutive positions of a few seeds, as sampling uses them."""
    vocab, draws = 32, 16_000
    seeds = torch.arange(8).repeat_interleave(draws // 8)
    counts = ops.gumbel(seeds, torch.arange(draws) % 2000, vocab, "cpu").argmax(1).bincount(minlength=vocab).double()
    statistic = ((counts - draws / vocab) ** 2 / (draws / vocab)).sum()
    assert statistic < 61.1  # 99.9 % point at 31 degrees of freedom


def test_argmax_samples_the_softmax(ops: Ops) -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    noise = ops.gumbel(torch.full((20_000,), 11), torch.arange(20_000), 5, "cpu")
    counts = (probabilities.log() + noise).argmax(1).bincount(minlength=5)
    statistic = ((counts - 20_000 * probabilities) ** 2 / (20_000 * probabilities)).sum()
    assert statistic < 18.5  # 99.9 % point at 4 degrees of freedom


def test_cpp_matches_reference(cpp: Ops, reference: Ops) -> None:
    g = torch.Generator().manual_seed(0)
    for vocab in (1, 15, 16, 17, 1023, 1024, 1025, 49_152):
        seeds = torch.randint(0, 2**62, (6,), generator=g)
        positions = torch.randint(0, 5000, (6,), generator=g)
        actual, expected = (o.gumbel(seeds, positions, vocab, "cpu") for o in (cpp, reference))
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=5e-7)
        assert torch.equal(actual.argmax(1), expected.argmax(1))
