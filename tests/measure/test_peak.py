"""Step times as ratios within a round, on a clock that the tests control."""

import time

import pytest
import torch

from leantune.errors import ConfigError
from leantune.measure.peak import compare_steps


class Clock:
    """A machine that gets slower with every round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_steps: int) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self.num_steps = num_steps
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def step(self, name: str, cost: float):
        def run() -> None:
            slowdown = 1 + len(self.calls) // self.num_steps
            self.calls.append(name)
            self.now += cost * slowdown

        return run


def test_drift_of_the_machine_does_not_reach_the_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 3)
    steps = {"exact": clock.step("exact", 1.0), "same": clock.step("same", 1.0)}
    steps["slow"] = clock.step("slow", 3.0)
    stats = compare_steps(steps, reference="exact", rounds=5, warmup=0)
    assert list(stats) == ["exact", "same", "slow"]
    for name, ratio in (("exact", 1), ("same", 1), ("slow", 3)):
        s = stats[name]
        assert (s.ratio, s.ratio_p20, s.ratio_p80) == pytest.approx((ratio,) * 3)
        # the rounds take 1 to 5 units
        assert s.median_ms == pytest.approx(3000 * ratio)
        assert (s.p20_ms, s.p80_ms) == pytest.approx((1800 * ratio, 4200 * ratio))
        assert s.num_rounds == 5
    assert stats["slow"].to_dict()["ratio"] == stats["slow"].ratio


def test_every_variant_takes_every_place_in_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 3)
    steps = {name: clock.step(name, 1.0) for name in "abc"}
    compare_steps(steps, reference="b", rounds=4, warmup=1)
    assert "".join(clock.calls) == "abc" + "abc" + "bca" + "cab" + "abc"


def test_real_steps_tell_equal_from_three_times_slower() -> None:
    def wait(seconds: float):
        return lambda: time.sleep(seconds)

    steps = {"exact": wait(0.01), "same": wait(0.01), "slow": wait(0.03)}
    stats = compare_steps(steps, reference="exact", rounds=9, warmup=1)
    assert 0.7 < stats["same"].ratio < 1.4
    assert 2.0 < stats["slow"].ratio < 4.5
    assert stats["slow"].median_ms >= 30
    if not torch.cuda.is_available():
        assert stats["slow"].peak_bytes is None and stats["slow"].resident_bytes is None


@pytest.mark.gpu
def test_peak_is_the_allocators_on_cuda() -> None:
    num_bytes = 64 * 2**20

    def allocate() -> None:
        torch.empty(num_bytes, dtype=torch.uint8, device="cuda").fill_(0)

    stats = compare_steps({"exact": allocate}, reference="exact", rounds=2)["exact"]
    assert stats.peak_bytes is not None and stats.resident_bytes is not None
    assert stats.peak_bytes - stats.resident_bytes == num_bytes


def test_bad_arguments_name_themselves() -> None:
    steps = {"exact": lambda: None}
    with pytest.raises(ConfigError, match=r"reference must be one of \['exact'\], got 'plain'"):
        compare_steps(steps, reference="plain")
    with pytest.raises(ConfigError, match="rounds must be at least 1, got 0"):
        compare_steps(steps, reference="exact", rounds=0)
    with pytest.raises(ConfigError, match="warmup must be at least 0, got -1"):
        compare_steps(steps, reference="exact", warmup=-1)
