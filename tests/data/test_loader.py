"""Sample order and all randomness depend only on recipe and step."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffit_train.data.loader import Batch, LatentLoader, SampleOrder
from diffit_train.data.manifest import Manifest, ShardEntry
from diffit_train.data.shards import Shard, read_shard
from diffit_train.errors import DiffitError, UserError
from tests.benchmarks.loader import virtual_wait
from tests.benchmarks.order import (
    BATCH,
    classes_seen,
    expected_classes,
    permuted,
    sorted_labels,
)
from tests.made import make_manifest, make_shards


@st.composite
def orders(drawing: st.DrawFn) -> SampleOrder:
    counts = drawing(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    streams = drawing(st.sampled_from([1, 2, 4, 8]))
    batch = streams * drawing(st.integers(1, 3))
    if sum(counts) < batch:
        counts.append(batch)
    window, seed = drawing(st.integers(1, 50)), drawing(st.integers(0, 1000))
    return SampleOrder(counts, batch, streams, window, seed)


def _batch(order: SampleOrder, step: int) -> list[tuple[int, int]]:
    return [
        sample for stream in range(order.streams) for sample in order.stream_samples(step, stream)
    ]


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 3))
def test_an_epoch_uses_each_sample_at_most_once_and_drops_less_than_a_batch(
    order: SampleOrder, epoch: int
) -> None:
    first = epoch * order.steps_per_epoch
    used = [s for i in range(order.steps_per_epoch) for s in _batch(order, first + i)]
    assert len(used) == len(set(used)) > order.samples - order.batch_size
    assert all(0 <= offset < order.counts[shard] for shard, offset in used)


@settings(max_examples=30, deadline=None)
@given(orders(), st.integers(0, 50))
def test_every_stream_gives_the_same_number_of_samples(order: SampleOrder, step: int) -> None:
    for stream in range(order.streams):
        assert len(order.stream_samples(step, stream)) == order.batch_size // order.streams


@settings(max_examples=30, deadline=None)
@given(orders(), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_the_order_depends_on_the_step_alone(order: SampleOrder, steps: list[int]) -> None:
    """Jumping around, as after a restart, gives the same as going straight through."""
    fresh = [
        SampleOrder(
            order.counts.tolist(), order.batch_size, order.streams, order.window, order.seed
        )
        for _ in steps
    ]
    for step, new in zip(steps, fresh, strict=True):
        assert _batch(order, step) == _batch(new, step)


def test_epochs_and_seeds_differ_and_leave_out_other_samples() -> None:
    order = SampleOrder([10] * 7, 16, 4, 8, seed=0)
    epochs = [[s for i in range(4) for s in _batch(order, epoch * 4 + i)] for epoch in range(6)]
    assert len({tuple(e) for e in epochs}) == 6
    everything = {(shard, offset) for shard in range(7) for offset in range(10)}
    assert len({frozenset(everything - set(e)) for e in epochs}) > 1
    assert _batch(SampleOrder([10] * 7, 16, 4, 8, seed=1), 0) != _batch(order, 0)


def test_samples_are_shuffled_but_each_stream_reads_few_shards() -> None:
    order = SampleOrder([100] * 16, 32, 8, 100, seed=0)
    stream = [s for step in range(order.steps_per_epoch) for s in order.stream_samples(step, 3)]
    assert len({shard for shard, _ in stream}) <= 3
    assert stream != sorted(stream)


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 3))
def test_no_window_touches_more_shards_than_are_cached(order: SampleOrder, epoch: int) -> None:
    for stream in range(order.streams):
        first = epoch * order.steps_per_epoch
        steps = range(first, first + order.steps_per_epoch)
        row = [sample for step in steps for sample in order.stream_samples(step, stream)]
        begin = order.window - order._shift(stream)
        for start, stop in itertools.pairwise([0, *range(begin, len(row), order.window), len(row)]):
            touched = {shard for shard, _ in row[start:stop]}
            assert len(touched) <= order.shards_per_window()


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 40))
def test_windows_tell_which_shards_a_step_needs(order: SampleOrder, first: int) -> None:
    for stream in range(order.streams):
        windows, current = order.windows(stream, first), []
        for step in range(first, first + 3 * order.steps_per_epoch):
            current = [w for w in current if w.last_step >= step]
            while not current or current[-1].last_step <= step:
                current.append(next(windows))
            needed = {shard for w in current if w.first_step <= step for shard in w.shards}
            assert {shard for shard, _ in order.stream_samples(step, stream)} <= needed
            assert all(len(w.shards) <= order.shards_per_window() for w in current)


def test_streams_turn_over_their_windows_at_different_steps() -> None:
    order = SampleOrder([512] * 2502, 256, 256, 1024, 0)
    for rank in (0, 5):
        windows = [order.windows(stream, 0) for stream in order.rank_streams(rank, 8)]
        starts = [w.first_step for row in windows for w in itertools.islice(row, 4)]
        assert max(starts.count(step) for step in set(starts) - {0}) <= 2


def test_shards_are_read_ahead_within_memory_and_at_once_after_a_restart(
    latents: tuple[str, Manifest],
) -> None:
    url, manifest = latents
    order = SampleOrder([s.count for s in manifest.shards], 8, 4, 5, seed=3)
    lock, now, most = threading.Lock(), 0, 0

    def read(url: str, entry: ShardEntry) -> Shard:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.1)
        with lock:
            now -= 1
        return read_shard(url, entry)

    loader = LatentLoader(url, manifest, order, order.rank_streams(0, 1), 2, _as_it_is, read)
    loader._fetch(2)
    assert 3 <= len(loader._shards) <= 4 * order.shards_per_window()
    loader._pool.shutdown()
    assert most >= 3


def test_a_short_last_shard_does_not_enlarge_the_cache() -> None:
    """ImageNet in shards of 512 leaves 143; a shard of one image used to keep all shards cached."""
    assert SampleOrder([512] * 100 + [1], 64, 64, 1024, 0).shards_per_window() <= 5


def test_few_shards_reduce_the_streams() -> None:
    assert SampleOrder([50, 50, 50], 64, 64, 8, 0).streams == 2
    assert SampleOrder([50] * 100, 64, 64, 8, 0).streams == 64
    assert SampleOrder([99], 64, 64, 8, 0).streams == 1


def test_ranks_share_the_streams_and_concatenate_to_the_global_batch() -> None:
    order = SampleOrder([10] * 8, 16, 8, 8, seed=0)
    for world in range(1, 9):
        streams = [stream for rank in range(world) for stream in order.rank_streams(rank, world)]
        assert streams == list(range(8))
        shares = [2 * len(order.rank_streams(rank, world)) for rank in range(world)]
        assert max(shares) == order.largest_share(world)
        assert max(shares) - min(shares) in (0, 2)
    with pytest.raises(UserError, match=r"9 workers .* 8 shuffle streams .*scaling\.workers"):
        order.rank_streams(0, 9)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"train\.batch_size is 64, .* 10 images"):
        SampleOrder([10], 64, 1, 8, 0)


def _as_it_is(batch: Batch) -> Batch:
    return batch


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Manifest]:
    url = str(tmp_path_factory.mktemp("latents"))
    return url, make_manifest(make_shards(url, [9, 12, 8, 11]))


def _keys(latents: tuple[str, Manifest], world: int, first: int, last: int) -> list[list[int]]:
    """Keys of the global batches, gathered from all ranks."""
    url, manifest = latents
    batches: list[list[int]] = [[] for _ in range(first, last)]
    for rank in range(world):
        order = SampleOrder([s.count for s in manifest.shards], 8, 4, 5, seed=3)
        with LatentLoader(
            url, manifest, order, order.rank_streams(rank, world), first, _as_it_is
        ) as loader:
            for batch in loader:
                batches[batch.step - first] += batch.keys.tolist()
                assert (batch.labels == batch.keys % 3).all()
                assert batch.moments.shape == (2 * len(batch.streams), 1, 4, 2, 2)
                assert batch.shards
                if batch.step == last - 1:
                    break
    return batches


def test_global_batches_are_the_same_at_any_world_size_and_after_a_restart(
    latents: tuple[str, Manifest],
) -> None:
    whole = _keys(latents, 1, 0, 14)
    assert _keys(latents, 2, 0, 14) == whole
    assert _keys(latents, 4, 0, 14) == whole
    assert _keys(latents, 2, 6, 14) == whole[6:]


def test_a_damaged_shard_reaches_the_consumer(
    latents: tuple[str, Manifest], tmp_path: Path
) -> None:
    url, manifest = latents
    for shard in manifest.shards[:3]:
        (tmp_path / shard.name).write_bytes((Path(url) / shard.name).read_bytes())
    order = SampleOrder([s.count for s in manifest.shards], 8, 4, 5, seed=3)
    loader = LatentLoader(str(tmp_path), manifest, order, order.rank_streams(0, 1), 0, _as_it_is)
    with pytest.raises(DiffitError, match=r"shard-000003\.tar"), loader:
        for batch in loader:
            assert batch.step < 20


def test_batches_of_a_sorted_source_hold_its_classes_like_a_uniform_draw() -> None:
    labels = sorted_labels(200_000, 400)
    expected = expected_classes(400, 4 * BATCH)
    for first in (0, 300):
        assert classes_seen(labels, 64, first, 4) < 0.7 * expected
        result = classes_seen(permuted(labels), 64, first, 4)
        assert result == pytest.approx(expected, rel=0.04)


def test_a_rank_of_eight_hardly_waits_for_shards_that_take_a_quarter_of_a_second() -> None:
    assert virtual_wait(64, readers=1, look_ahead=False, steps=600) > 0.1
    assert virtual_wait(256, readers=16, look_ahead=True, steps=600) < 0.01
