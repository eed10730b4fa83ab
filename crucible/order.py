"""The order in which an epoch's rows are read. Pure arithmetic over numpy arrays: no I/O, no state.

A position p in [0, N) is a place in the epoch; a row id is a row's place in the source. `EpochOrder.rows` maps
positions to row ids, for any positions in any order, from (shard row counts, `OrderSpec`) and nothing else:

source  position p is row p.
exact   one permutation of all rows, equal to `datasets.Dataset.shuffle(seed)` in epoch 0.
lanes   shards are permuted; their rows form one stream, which is cut into P lanes; the shards' portions inside a lane
        are permuted; rows are permuted inside windows of W portions; position p reads lane p mod P at offset p div P.

Ranks are dealt positions, never rows: rank r of R reads the positions p = r (mod R), p >= start (`deal`). So global
batch k of G rows is the positions [kG, (k+1)G) for every R that divides G, a rank's rows do not depend on its batch
size, and rank r only meets the lanes l = r (mod gcd(R, P)): P/R fixed lanes when R divides P. Slicing each global
batch into R runs would lose the last as soon as a slice is P rows long, since every slice then spans every lane. The
proofs stand beside the tests in tests/crucible/test_order.py; docs/order.md has the contract in words.

Nothing but the exact mode asks numpy for randomness: numpy may change what a Generator draws from one release to the
next (NEP 19), and two ranks with two numpys must still agree. Windows are permuted by a keyed Feistel network instead
of a drawn permutation, so that a row is found without holding its window: memory is O(shards + lanes), whatever W is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from crucible.errors import UsageError
from crucible.manifest import Manifest
from crucible.refs import canonical_json

Int64s: TypeAlias = NDArray[np.int64]
UInt64s: TypeAlias = NDArray[np.uint64]
Mode = Literal["source", "exact", "lanes"]
Reshuffle = Literal["local", "global"]

LANES = 64
"""Enough that 64 ranks each own a lane, few enough that one rank reading all of them has 64 shard windows open."""

WINDOW = 16
"""Shard portions mixed at once in a lane: with 64 lanes a global batch draws on 1,024 shards, mapped and not loaded."""

EXACT_ROWS = 1 << 24
"""More rows than this are never permuted exactly: the permutation itself would take over 128 MiB of each process."""

_ROUNDS = 8  # with 6, windows of up to 16 rows were visibly uneven (chi-square); with 8, only those under 6 rows are
_GOLDEN, _MIX1, _MIX2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_S27, _S30, _S31, _S32 = (np.uint64(s) for s in (27, 30, 31, 32))


MOST_LANES = 1 << 20
"""More ranks than any cluster has. Each epoch's order holds a number for each lane."""


@dataclass(frozen=True, slots=True)
class OrderSpec:
    """Everything but the manifest that the order of an epoch depends on."""

    mode: Mode = "source"
    seed: int = 0
    epoch: int = 0
    lanes: int = 1
    """P. Part of the plan and of a state, so it outlives a change of the default; it is not the number of ranks."""
    window: int = WINDOW
    """W, in shard portions."""
    reshuffle: Reshuffle = "local"
    """`local`: a lane keeps its rows in every epoch, so shards stay where they are. `global`: they are dealt anew."""

    def __post_init__(self) -> None:
        if self.mode not in ("source", "exact", "lanes") or self.reshuffle not in ("local", "global"):
            raise UsageError(f"no such order: mode {self.mode!r}, reshuffle {self.reshuffle!r}")
        if self.seed < 0 or self.epoch < 0:
            raise UsageError(f"seed and epoch must be 0 or more, got seed {self.seed}, epoch {self.epoch}")
        if self.lanes < 1 or self.window < 1:
            raise UsageError(f"lanes and window must be 1 or more, got {self.lanes} and {self.window}")
        if self.lanes > MOST_LANES:
            raise UsageError(f"lanes must be {MOST_LANES:,} or less, got {self.lanes}")
        if self.mode != "lanes" and self.lanes != 1:
            raise UsageError(f"order {self.mode!r} has one lane, got {self.lanes}")


def shard_rows(manifest: Manifest) -> Int64s:
    """Rows of each shard, in source order: all that an order needs to know of a manifest."""
    return np.fromiter((shard.rows for shard in manifest.shards), np.int64, len(manifest.shards))


class EpochOrder:
    """The order of one epoch: positions to row ids.

    Building it is O(S log S) in the number of shards and independent of the number of rows (exact mode: O(N), which
    is bounded by `EXACT_ROWS`); every look-up after that costs O(log S) a row, anywhere in the epoch.

    Concurrency: immutable once built; any number of threads may call `rows`.
    """

    def __init__(self, rows: Int64s | Sequence[int], spec: OrderSpec) -> None:
        self.spec = spec
        self.shard_rows: Int64s = np.asarray(rows, dtype=np.int64)
        self.starts = _starts(self.shard_rows)
        """Row id of each shard's first row."""
        self.total = int(self.shard_rows.sum())
        self._permutation: Int64s | None = None
        self._lanes: _Lanes | None = None
        if spec.mode == "exact":
            self._permutation = _exact_permutation(self.total, spec)
        elif spec.mode == "lanes":
            self._lanes = _Lanes.build(self.shard_rows, self.starts, spec)

    def rows(self, positions: Int64s) -> Int64s:
        """Row id at each position, in the shape and order of `positions`. Raises IndexError outside [0, total)."""
        if positions.size and not 0 <= int(positions.min()) <= int(positions.max()) < self.total:
            raise IndexError(f"positions must be in [0, {self.total}), got {positions.min()}..{positions.max()}")
        if self._permutation is not None:
            picked: Int64s = self._permutation[positions]
            return picked
        return positions if self._lanes is None else self._lanes.rows(positions, self.spec)

    def shards_of_rank(self, rank: int, world_size: int) -> Int64s:
        """Shards that rank `rank` reads in this epoch, each once, those it needs first in front."""
        check_rank(rank, world_size)
        if self._lanes is None:
            return np.flatnonzero(self.shard_rows)
        stride = math.gcd(world_size, self.spec.lanes)
        mine = self._lanes.lane % stride == rank % stride
        wanted: Int64s = self._lanes.shard[mine][np.lexsort((self._lanes.lane[mine], self._lanes.window[mine]))]
        _, first = np.unique(wanted, return_index=True)
        in_order: Int64s = wanted[np.sort(first)]
        return in_order

    def open_shards(self, rank: int, world_size: int) -> int:
        """How many shards the rank's reader draws on at once, at most: the windows of the lanes it meets."""
        check_rank(rank, world_size)
        shards = int(np.count_nonzero(self.shard_rows))
        if self.spec.mode == "source":
            return min(shards, 1)
        met = self.spec.lanes // math.gcd(world_size, self.spec.lanes)
        return shards if self.spec.mode == "exact" else min(shards, met * self.spec.window)


class _Lanes(NamedTuple):
    """The lanes of an epoch as flat arrays. Portions are in the order in which they are laid out in the stream."""

    lane_start: Int64s
    """First stream row of each lane, P of them."""
    start: Int64s
    """First stream row of each portion, after the portions were permuted inside their lanes."""
    source: Int64s
    """Row id of each portion's first row."""
    shard: Int64s
    lane: Int64s
    window: Int64s
    """Number of the portion's window inside its lane."""
    window_start: Int64s
    """First stream row of each window."""
    window_rows: UInt64s
    key: UInt64s
    """One key a window."""

    @classmethod
    def build(cls, rows: Int64s, starts: Int64s, spec: OrderSpec) -> _Lanes:
        total = int(rows.sum())
        dealt_in = spec.epoch if spec.reshuffle == "global" else 0
        dealt = np.argsort(_keys(spec, "shards", len(rows), epoch=dealt_in))
        stream = _starts(rows[dealt])
        # Which piece of the stream is which lane is permuted too: else neighbouring positions would read neighbouring
        # pieces, which with fewer shards than lanes means the same shard.
        laid = np.argsort(_keys(spec, "lanes", spec.lanes, epoch=dealt_in))
        pieces: Int64s = _starts(total // spec.lanes + (laid < total % spec.lanes).astype(np.int64))
        lane_start = np.empty_like(pieces)
        lane_start[laid] = pieces

        # Not np.union1d: its hash table takes 0.8 s for a million shards, this 15 ms.
        cut: Int64s = np.sort(np.concatenate([stream, pieces]))
        cut = cut[(cut < total) & (np.diff(cut, append=total) > 0)]
        piece = np.searchsorted(pieces, cut, side="right") - 1
        at = np.searchsorted(stream, cut, side="right") - 1
        shard = dealt[at]
        source: Int64s = starts[shard] + (cut - stream[at])
        length = np.diff(cut, append=total)

        # Keys are distinct, so an unstable sort still has one answer; sorting 16-bit lanes is a radix sort.
        mixed = np.argsort(_keys(spec, "portions", len(cut), epoch=spec.epoch))
        mixed = mixed[np.argsort(piece[mixed].astype(np.uint16 if spec.lanes <= 1 << 16 else np.int64), kind="stable")]
        piece, shard, source, length = piece[mixed], shard[mixed], source[mixed], length[mixed]
        start = _starts(length)
        window = (np.arange(len(start)) - np.searchsorted(piece, piece, side="left")) // spec.window
        opens = np.ones(len(start), dtype=bool)
        opens[1:] = (piece[1:] != piece[:-1]) | (window[1:] != window[:-1])
        window_start = start[opens]
        window_rows = np.diff(window_start, append=total).astype(np.uint64)
        key = _keys(spec, "rows", len(window_start), epoch=spec.epoch)
        return cls(lane_start, start, source, shard, laid[piece], window, window_start, window_rows, key)

    def rows(self, positions: Int64s, spec: OrderSpec) -> Int64s:
        stream = self.lane_start[positions % spec.lanes] + positions // spec.lanes
        window = np.searchsorted(self.window_start, stream, side="right") - 1
        base = self.window_start[window]
        inside = _permute((stream - base).astype(np.uint64), self.window_rows[window], self.key[window])
        stream = base + inside.astype(np.int64)
        portion = np.searchsorted(self.start, stream, side="right") - 1
        return self.source[portion] + (stream - self.start[portion])


# --- ranks ---


class Deal(NamedTuple):
    """The positions of one rank: first, first + stride, ... `rows` of them."""

    first: int
    stride: int
    rows: int


def check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise UsageError(f"rank must be in [0, world_size), got rank {rank} of {world_size}")


def deal(total: int, rank: int, world_size: int, *, start: int = 0) -> Deal:
    """Positions of the rank from global position `start` on: those that are `rank` modulo `world_size`.

    After every rank has read k of its positions, exactly [start, start + k * world_size) has been read (up to
    `total`), because any `world_size` neighbours hold one of each residue. So one number restores all ranks.
    """
    check_rank(rank, world_size)
    first = start + (rank - start) % world_size
    return Deal(first, world_size, max(0, -((first - total) // world_size)))


class EpochSteps(NamedTuple):
    """What an epoch gives each rank, known before step 0."""

    rows: tuple[int, ...]
    """Rows of each rank; they differ by at most one."""
    steps: tuple[int, ...]
    """Batches of each rank, the short last one included; they differ by at most one."""
    whole_steps: int
    """Batches of every rank with `drop_last`: equal on all ranks."""


def steps(rows: int, world_size: int, batch: int) -> EpochSteps:
    """How an epoch of `rows` rows comes out for `world_size` ranks that each read `batch` rows a step."""
    if world_size < 1 or batch < 1:
        raise UsageError(f"world_size and batch must be 1 or more, got {world_size} and {batch}")
    per_rank = tuple(deal(rows, rank, world_size).rows for rank in range(world_size))
    return EpochSteps(per_rank, tuple(-(-count // batch) for count in per_rank), rows // (batch * world_size))


def shards_of_rank(rows: Int64s | Sequence[int], rank: int, world_size: int, spec: OrderSpec) -> Int64s:
    """Indexes of the shards under the rank's lanes, those it reads first in front. Placement puts them on its node."""
    return EpochOrder(rows, spec).shards_of_rank(rank, world_size)


# --- permutations ---


def _exact_permutation(total: int, spec: OrderSpec) -> Int64s:
    # Epoch 0 is what `datasets` draws for the same seed; later epochs need only be other, and the same on all ranks.
    seed: Any = spec.seed if spec.epoch == 0 else np.random.SeedSequence((spec.seed, spec.epoch))
    return np.random.default_rng(seed).permutation(total)


def _starts(lengths: Int64s) -> Int64s:
    return np.cumsum(lengths) - lengths


def _keys(spec: OrderSpec, what: str, count: int, *, epoch: int) -> UInt64s:
    """`count` distinct 64-bit keys for one use in one epoch: splitmix64 from a digest. The mixer is a bijection."""
    digest = hashlib.sha256(canonical_json(["crucible order 1", what, spec.seed, epoch])).digest()
    return scattered(
        np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN + np.uint64(int.from_bytes(digest[:8], "little"))
    )


def scattered(z: UInt64s) -> UInt64s:
    """splitmix64's mixer, element-wise: other numbers for other numbers, and neighbours far apart."""
    z = (z ^ (z >> _S30)) * _MIX1
    z = (z ^ (z >> _S27)) * _MIX2
    return z ^ (z >> _S31)


def _permute(index: UInt64s, rows: UInt64s, key: UInt64s) -> UInt64s:
    """Element-wise: where the key's permutation of [0, rows) sends `index`.

    A Feistel network over a x b >= rows, a about the root of rows: each round adds to one half a number drawn from the
    other, modulo its own size, which can be undone, so the network is a bijection of [0, ab). Results at or past `rows`
    go through again until they fall inside (the walk along a cycle that starts inside must come back inside). As
    ab - rows < a, about one in the root of rows takes a second turn.
    """
    a = np.ceil(np.sqrt(rows.astype(np.float64))).astype(np.uint64)
    b = (rows + a - np.uint64(1)) // a
    result = _feistel(index, a, b, key)
    again = np.flatnonzero(result >= rows)
    while again.size:
        moved = _feistel(result[again], a[again], b[again], key[again])
        result[again] = moved
        again = again[moved >= rows[again]]
    return result


def _feistel(index: UInt64s, a: UInt64s, b: UInt64s, key: UInt64s) -> UInt64s:
    left, right = index // b, index % b
    for turn in range(_ROUNDS):
        key = key + _GOLDEN
        if turn % 2 == 0:
            left = left + _below(a, right, key)
            left = np.where(left >= a, left - a, left)
        else:
            right = right + _below(b, left, key)
            right = np.where(right >= b, right - b, right)
    return left * b + right


def _below(bound: UInt64s, value: UInt64s, key: UInt64s) -> UInt64s:
    """A number in [0, bound) drawn from (value, key), for bounds under 2**32."""
    z = (value ^ key) * _MIX1
    z = (z ^ (z >> _S32)) * _MIX2
    return ((z >> _S32) * bound) >> _S32
