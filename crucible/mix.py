"""Which source each row of a mix comes from. Pure arithmetic over integers: no I/O, no state.

A mix reads several sources (datasets, streams) as one. `Mix.at` maps positions of the mix, any of them in any order, to
(source, index): the row is number `index` of the source's endless stream, that is row `index % length` of its pass
`index // length`. So a state of a mix is a position, and nothing before it is replayed.

Without weights the sources take turns, as in `datasets.interleave_datasets` over iterables. With weights:

shares  Sources are the leaves of a Huffman tree over integer weights. Of the first n rows that reach a node, its left
        child gets n * left / both, rounded, and its right child the rest. So of the first n rows of a mix each source
        has a number that follows from n alone, never falls as n grows, and adds up to n. It is under two rows from
        the ideal: an inner node has at most 2/3 of its parent (its sibling is no lighter than its heavier child), so
        errors of 1/2 a level stay under 1/2 / (1 - 2/3) = 3/2 in inner nodes, and under 1/2 + 3/2 in leaves.
blocks  The rows of each 1,024 positions are permuted by a key drawn from (seed, epoch, block). So the mix looks random
        nearby, and is exact at each multiple of 1,024.
lanes   A rank of R reads the positions p = r (mod R), and holds the lanes l = r (mod R) of each source (see
        crucible.order); row q of a source is in its lane q mod P. So inside a block, of 256 P positions then, rows go
        to the positions p = q (mod P). A lane of a block has room for 256 rows, and as each source has rows for each
        lane that differ by one at most, few find their lane full: they go to where there is room.
ends    The tree also says after how many rows a source has given its c-th. There the mix ends (or, without
        replacement, a phase: the source drops out and the rest go on with their weights). The row that ends it stays
        last in its block. So where a mix ends does not depend on seed or epoch.

All of it is integers, so all machines agree for ever; numpy's generators, which may change (NEP 19), are not asked.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

import numpy as np

from crucible.errors import UsageError
from crucible.order import Int64s, UInt64s, scattered
from crucible.refs import canonical_json

Stop = Literal["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"]

BLOCK = 1024
"""Positions that are permuted together, or more with lanes. Part of what a position means: it never changes."""

_LANE_BLOCK = 256  # positions of one lane that are permuted together; never changes either

_PARTS = 1 << 31  # weights are whole numbers of about this sum: two of them multiplied fit 63 bits
_END = 1 << 62  # no mix is longer, so that positions and all sums of them are int64
_RECENT = 4  # blocks that a Mix remembers
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class MixSpec:
    """Everything but the epoch that a mix depends on."""

    lengths: tuple[int, ...]
    """Rows of each source."""
    weights: tuple[float, ...] | None = None
    """How often each source is drawn beside the others; they need not add up to 1. None: one of each, in turn."""
    seed: int = 0
    stop: Stop = "first_exhausted"
    """`first_exhausted`: the mix ends with the last row of the source that is through first. `all_exhausted`: sources
    begin again until each was read once. `all_exhausted_without_replacement`: a source that is through drops out, so
    that each row comes exactly once."""
    lanes: tuple[int, ...] | None = None
    """P of each source's order, so that rows go to the ranks that hold them. Sources with another P than the largest go
    anywhere, as does all of a mix in turns. A source's rows then come in their order in each lane, not over all."""

    def __post_init__(self) -> None:
        # Plain numbers, because numpy's would wrap around below, and a state could not be written as JSON.
        object.__setattr__(self, "lengths", tuple(int(rows) for rows in self.lengths))
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        if self.lanes is not None:
            object.__setattr__(self, "lanes", tuple(int(lanes) for lanes in self.lanes))
        if self.stop not in get_args(Stop):
            raise UsageError(f"no such stopping strategy: {self.stop!r}; there are {', '.join(get_args(Stop))}")
        if not self.lengths or min(self.lengths) < 0:
            raise UsageError(f"a mix needs at least one source, and lengths of 0 or more, got {self.lengths}")
        if self.seed < 0:
            raise UsageError(f"the seed of a mix must be 0 or more, got {self.seed}")
        if self.lanes is not None and (len(self.lanes) != len(self.lengths) or min(self.lanes) < 1):
            raise UsageError(f"{len(self.lengths)} sources need as many lanes of 1 or more, got {self.lanes}")
        if self.weights is None:
            return
        if len(self.weights) != len(self.lengths):
            raise UsageError(f"{len(self.lengths)} sources need as many weights, got {len(self.weights)}")
        for source, weight in enumerate(self.weights):
            if not (math.isfinite(weight) and weight > 0):
                raise UsageError(f"source {source} has weight {weight}: weights must be above 0; leave the source out")
        if self.stop == "first_exhausted" and 0 in self.lengths:
            raise UsageError(
                f"source {self.lengths.index(0)} has no rows, so a mix that stops with the first source at its end is "
                "empty; leave the source out, or choose another stopping strategy"
            )


class Mix:
    """One epoch of a mix: positions to (source, index).

    Building it costs O(sources * log sources), or the square of the sources without replacement, whatever their
    lengths; a look-up costs O(log sources) and the arrangement of its block, which is remembered for its neighbours.

    Concurrency: any number of threads may call `at`. It pickles as its spec and epoch.
    """

    def __init__(self, spec: MixSpec, epoch: int = 0) -> None:
        """Raises UsageError for a negative epoch, or a mix of 2**62 rows or more."""
        if epoch < 0:
            raise UsageError(f"epoch must be 0 or more, got {epoch}")
        self.spec = spec
        self.epoch = epoch
        self._phases = _turns(spec) if spec.weights is None else _draws(spec, spec.weights)
        last = self._phases[-1] if self._phases else None
        self.total: int = last.start + last.rows if last else 0
        """Rows of the mix: the same in every epoch, and for every seed."""
        if self.total >= _END:
            raise UsageError(f"the mix would have {self.total} rows; raise the smallest weight, or stop earlier")
        self._starts: Int64s = np.array([phase.start for phase in self._phases], dtype=np.int64)
        self._lengths: Int64s = np.array(spec.lengths, dtype=np.int64)
        self._lanes = max(spec.lanes or (1,))
        self._in_lanes = np.array(spec.lanes or (1,) * len(spec.lengths)) == self._lanes
        self.block = max(BLOCK, _LANE_BLOCK * self._lanes)
        """Positions that are permuted together; at its multiples (counted anew where a source dropped out) shares are
        exact."""
        blocks = [-(-phase.rows // self.block) for phase in self._phases]
        self._first_block: Int64s = np.cumsum([0, *blocks], dtype=np.int64)[:-1]
        digest = hashlib.sha256(canonical_json(["crucible mix 1", spec.seed, epoch])).digest()
        self._key = int.from_bytes(digest[:8], "little")
        self._recent: dict[int, tuple[Int64s, Int64s]] = {}

    def __reduce__(self) -> tuple[type[Mix], tuple[MixSpec, int]]:
        return Mix, (self.spec, self.epoch)

    def at(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Source number and index in that source's endless stream of each position, both in the shape of `positions`.

        Raises IndexError outside [0, total).
        """
        if positions.size and not 0 <= int(positions.min()) <= int(positions.max()) < self.total:
            raise IndexError(f"positions must be in [0, {self.total}), got {positions.min()}..{positions.max()}")
        flat = positions.reshape(-1).astype(np.int64, copy=False)
        phase = np.searchsorted(self._starts, flat, side="right") - 1
        inside = flat - self._starts[phase]
        piece = phase if self.spec.weights is None else self._first_block[phase] + inside // self.block
        source, index = np.empty_like(flat), np.empty_like(flat)
        by = np.argsort(piece, kind="stable")
        cuts = np.flatnonzero(np.diff(piece[by])) + 1
        for same in np.split(by, cuts) if flat.size else ():
            at = self._phases[phase[same[0]]]
            if self.spec.weights is None:
                source[same], index[same] = at.turn(inside[same])
            else:
                sources, indexes = self._block(at, int(inside[same[0]]) // self.block, int(piece[same[0]]))
                slot = inside[same] % self.block
                source[same], index[same] = sources[slot], indexes[slot]
        return source.reshape(positions.shape), index.reshape(positions.shape)

    def before(self, position: int) -> Int64s:
        """How many rows of each source come before the position, which is in [0, total]. The sum is the position."""
        if not 0 <= position <= self.total:
            raise IndexError(f"position must be in [0, {self.total}], got {position}")
        taken = np.zeros(len(self.spec.lengths), dtype=np.int64)
        if not self._phases:
            return taken
        number = max(0, int(np.searchsorted(self._starts, position, side="right")) - 1)
        phase = self._phases[number]
        for earlier in self._phases[:number]:
            taken[earlier.sources] = earlier.taken(earlier.rows)
        inside = position - phase.start
        whole = inside if self.spec.weights is None or inside == phase.rows else inside // self.block * self.block
        taken[phase.sources] = phase.taken(whole)
        if whole < inside:
            block = whole // self.block
            sources, _ = self._block(phase, block, int(self._first_block[number]) + block)
            taken += np.bincount(sources[: inside - whole], minlength=len(taken))
        return taken

    def _block(self, phase: _Phase, block: int, number: int) -> tuple[Int64s, Int64s]:
        """Source and index of each position of the phase's block, which is number `number` of the whole mix."""
        known = self._recent.get(number)
        if known is None:
            # Scattered, because slots are numbered from it: else a block would be the one before, moved by a row.
            key = scattered(np.array([(self._key + number * _GOLDEN) % (1 << 64)], dtype=np.uint64))
            low, high = block * self.block, min(phase.rows, (block + 1) * self.block)
            sources, index = known = phase.arranged(low, high, key)
            if self._lanes > 1:
                wanted = np.where(self._in_lanes[sources], index % self._lengths[sources] % self._lanes, -1)
                picked = np.arange(high - low)
                free = high - low - (high == phase.rows)  # the row that ends a phase stays where it is
                picked[:free] = _into_lanes(
                    sources[:free], wanted[:free], (phase.start + low + picked[:free]) % self._lanes, self._lanes, key
                )
                known = sources[picked], index[picked]
            # Replaced, never changed: another thread goes on with what it has, and at worst a block is made twice.
            self._recent = dict([*self._recent.items(), (number, known)][-_RECENT:])
        return known


@dataclass(frozen=True, slots=True)
class _Phase:
    """A run of positions in which the same sources are drawn."""

    start: int
    rows: int
    sources: Int64s
    """Numbers of the sources, in their order."""
    base: Int64s
    """Rows taken from each of them before the phase."""
    tree: _Tree | None = None
    """None: they take turns."""
    last: int = 0
    """Place in `sources` of the one that the phase's last row is from."""

    def taken(self, rows: int) -> Int64s:
        """Rows taken from each source by the end of the phase's first `rows`, before blocks are permuted."""
        if self.tree is not None:
            return self.base + np.array(self.tree.counts(rows), dtype=np.int64)
        turns, more = divmod(rows, len(self.sources))
        return self.base + turns + (np.arange(len(self.sources)) < more)

    def turn(self, inside: Int64s) -> tuple[Int64s, Int64s]:
        place = inside % len(self.sources)
        return self.sources[place], self.base[place] + inside // len(self.sources)

    def arranged(self, low: int, high: int, key: UInt64s) -> tuple[Int64s, Int64s]:
        """Source and index of the rows of a block of the phase's positions, permuted."""
        base = self.taken(low)
        counts = self.taken(high) - base
        loose, last = counts.copy(), np.empty(0, dtype=np.int64)
        if high == self.rows:
            loose[self.last] -= 1
            last = np.array([self.last])
        places = np.repeat(np.arange(len(counts)), loose)
        places = np.concatenate([places[_permutation(len(places), key)], last])
        index = np.empty_like(places)
        # A source's rows come in their order: the n-th place that holds it has its n-th row of the block.
        by = _sorted(places)
        index[by] = np.arange(len(places)) + np.repeat(base - (np.cumsum(counts) - counts), counts)
        return self.sources[places], index


def _permutation(count: int, key: UInt64s) -> Int64s:
    slots: UInt64s = scattered(np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN) + key)
    return np.argsort(slots)  # they are distinct, so an unstable sort still has one answer


def _sorted(numbers: Int64s) -> Int64s:
    """A stable sort of sources or lanes: of 16 bits it is a radix sort."""
    small = not numbers.size or int(numbers.max()) < 1 << 15
    return np.argsort(numbers.astype(np.int16) if small else numbers, kind="stable")


def _into_lanes(source: Int64s, wanted: Int64s, lane_of: Int64s, lanes: int, key: UInt64s) -> Int64s:
    """Which row of a permuted block goes to each of its positions.

    `source` and `wanted` are each row's source and lane (-1 for any), `lane_of` is each position's lane. Rows of one
    source in one lane keep their order.
    """
    room = np.bincount(lane_of, minlength=lanes)
    by = _sorted(wanted)
    turn = np.empty_like(by)
    turn[by] = np.arange(len(by)) - np.searchsorted(wanted[by], wanted[by])
    moved = (wanted < 0) | (turn >= room[wanted])
    left = np.repeat(np.arange(lanes), room - np.bincount(wanted[~moved], minlength=lanes))
    key = scattered(key)
    lane = wanted.copy()
    lane[moved] = left[_permutation(len(left), key)]
    # Permuted again: a source's rows go to the lanes in turn, so a lane's rows would come at an even pace, and at the
    # same in all lanes.
    again = _permutation(len(lane), scattered(key))
    look = np.empty_like(source)
    look[_sorted(lane_of)] = source[again[_sorted(lane[again])]]
    picked = np.empty_like(by)
    picked[_sorted(look * lanes + lane_of)] = _sorted(source * lanes + lane)
    return picked


class _Fork(NamedTuple):
    """Where the rows of a node part. Numbers below the number of leaves are leaves."""

    node: int
    left: int
    right: int
    left_weight: int
    weight: int


class _Tree:
    """Divides a number of rows among leaves by their weights."""

    def __init__(self, weights: Sequence[int]) -> None:
        """Weights are 1 or more."""
        self.leaves = len(weights)
        heap = [(weight, leaf) for leaf, weight in enumerate(weights)]
        heapq.heapify(heap)
        forks: list[_Fork] = []
        while len(heap) > 1:
            (light, left), (heavy, right) = heapq.heappop(heap), heapq.heappop(heap)
            forks.append(_Fork(self.leaves + len(forks), left, right, light, light + heavy))
            heapq.heappush(heap, (light + heavy, forks[-1].node))
        self.forks = tuple(reversed(forks))
        self.above = {child: fork for fork in forks for child in (fork.left, fork.right)}

    def counts(self, rows: int) -> list[int]:
        """Rows of each leaf among the first `rows`. Adds up to `rows`; grows with it in every leaf."""
        counts = [rows] * (2 * self.leaves - 1)
        for node, left, right, left_weight, weight in self.forks:
            whole, rest = divmod(counts[node], weight)
            counts[left] = whole * left_weight + (rest * left_weight + weight // 2) // weight
            counts[right] = counts[node] - counts[left]
        return counts[: self.leaves]

    def rows(self, leaf: int, count: int) -> int:
        """The least number of rows of which the leaf has `count`, 1 or more: `counts` turned round."""
        node = leaf
        while node in self.above:
            fork = self.above[node]
            if node == fork.left:
                count = -((fork.weight // 2 - count * fork.weight) // fork.left_weight)
            else:
                count = ((count - 1) * fork.weight + fork.weight // 2) // (fork.weight - fork.left_weight) + 1
            node = fork.node
        return count


# --- phases ---


def _turns(spec: MixSpec) -> tuple[_Phase, ...]:
    """The phases of a mix in turns. `datasets` ends them so too: a source is found empty when its turn comes."""
    lengths = np.array(spec.lengths, dtype=np.int64)
    if spec.stop == "first_exhausted":
        width = len(lengths)
        rows = min((n - 1) * width + place + 1 if n else place for place, n in enumerate(spec.lengths))
        return (_Phase(0, rows, np.arange(width), np.zeros_like(lengths)),)
    if spec.stop == "all_exhausted":
        sources = np.flatnonzero(lengths)
        ends = [(spec.lengths[source] - 1) * len(sources) + place + 1 for place, source in enumerate(sources)]
        return (_Phase(0, max(ends), sources, np.zeros_like(sources)),) if ends else ()
    phases, start, turn = [], 0, 0
    for end in sorted(set(spec.lengths) - {0}):
        sources = np.flatnonzero(lengths > turn)
        phases.append(_Phase(start, (end - turn) * len(sources), sources, np.full_like(sources, turn)))
        start, turn = start + phases[-1].rows, end
    return tuple(phases)


def _draws(spec: MixSpec, weights: Sequence[float]) -> tuple[_Phase, ...]:
    """The phases of a mix by weights: one, or without replacement one for each source that drops out."""
    whole = _whole(weights)
    sources = [source for source, rows in enumerate(spec.lengths) if rows]
    base = [0] * len(sources)
    phases: list[_Phase] = []
    start = 0
    while sources:
        tree = _Tree([whole[source] for source in sources])
        ends = [tree.rows(leaf, spec.lengths[source] - base[leaf]) for leaf, source in enumerate(sources)]
        rows = (max if spec.stop == "all_exhausted" else min)(ends)
        last = ends.index(rows)
        phases.append(_Phase(start, rows, np.array(sources), np.array(base, dtype=np.int64), tree, last))
        if spec.stop != "all_exhausted_without_replacement":
            break
        base = [before + count for before, count in zip(base, tree.counts(rows), strict=True)]
        start += rows
        del sources[last], base[last]
    return tuple(phases)


def _whole(weights: Sequence[float]) -> list[int]:
    """The weights as whole numbers of the same proportions, by exact fractions so that all machines agree."""
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    return [max(1, round(weight * _PARTS / total)) for weight in exact]
