"""Records of what was handed out: they prove an epoch, and they name what is wrong with one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import crucible
from crucible import reading
from crucible.cli.app import cli
from crucible.dataset import IterableDataset
from crucible.errors import UsageError
from crucible.iterate import ShardReader
from crucible.proof import SUFFIX, Verdict, epochs_of, read_plan, read_records, verdict
from crucible.share import End
from tests.fakes.shards import number_split

unhurried = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROWS = [30, 7, 41, 22]
TOTAL = sum(ROWS)


@pytest.fixture
def split(tmp_path: Path) -> Any:
    return number_split(tmp_path, ROWS)


def judged(folder: Path, epoch: int = 0) -> Verdict:
    (group,) = [one for one in epochs_of(read_records([folder])) if one[0].epoch == epoch]
    return verdict(group, lambda record: read_plan([folder], record))


def take(dataset: Any, count: int | None) -> list[Any]:
    iterator = iter(dataset)
    return list(iterator) if count is None else [next(iterator) for _ in range(count)]


class TestProven:
    @unhurried
    @given(
        st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=3),
        st.sampled_from(["exact", "pad", "mask"]),
        st.integers(0, 1),
        st.data(),
    )
    def test_runs_on_any_ranks_that_go_on_from_each_others_states(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        runs: list[tuple[int, int, int]],
        end: End,
        epoch: int,
        data: st.DataObject,
    ) -> None:
        folder = tmp_path_factory.mktemp("records")
        manifest, source = number_split(tmp_path_factory.mktemp("split"), ROWS)
        base = IterableDataset(manifest, source).shuffle(3, mode="lanes", lanes=4, window=2).certify(folder)
        base.set_epoch(epoch)
        state = base.state_dict()
        for number, (world, batch, further) in enumerate(runs):
            last = number == len(runs) - 1
            ranks = [base.shard(rank, world).batch(batch, end=end) for rank in range(world)]
            for one in ranks:
                one.load_state_dict(state)
            left = len(list(range(state["position"], TOTAL, world * batch)))
            steps = None if last else data.draw(st.integers(0, max(0, left - 1)))
            for one in ranks:
                take(one, steps)
            if not last:
                state = ranks[0].state_dict()
                for one in ranks[1:]:  # some went further than the state that was saved
                    iterator = iter(one)
                    for _ in range(min(further, 0)):
                        next(iterator)
        found = judged(folder, epoch)
        assert found.proven, found
        assert found.spans[0][0] == 0
        assert found.spans[-1][1] == TOTAL

    def test_steps_past_the_saved_state_were_rolled_back_and_do_not_count(self, split: Any, tmp_path: Path) -> None:
        folder = tmp_path / "records"
        base = IterableDataset(*split).certify(folder)
        first = [base.shard(rank, 2).batch(5) for rank in range(2)]
        states = []
        for one in first:
            for step, _ in enumerate(one):
                if step == 3:
                    states.append(one.state_dict())
                if step == 6:
                    break
        assert states[0] == states[1]
        for rank in range(3):
            one = base.shard(rank, 3).batch(4)
            one.load_state_dict(states[0])
            list(one)
        found = judged(folder)
        assert found.proven
        assert found.spans == ((0, 40, 2), (40, TOTAL, 3))

    def test_a_run_that_died_before_its_first_state_is_passed_over(self, split: Any, tmp_path: Path) -> None:
        base = IterableDataset(*split).certify(tmp_path / "records")
        take(base.batch(5), 2)
        take(base.batch(5), None)
        assert judged(tmp_path / "records").proven

    def test_filters_and_mixes_are_proven_and_counted(self, split: Any, tmp_path: Path) -> None:
        one = IterableDataset(*split).filter(lambda row: row["id"] % 4 != 0)
        (tmp_path / "b").mkdir()
        other = IterableDataset(*number_split(tmp_path / "b", [9, 5]))
        mix = crucible.interleave_datasets([one, other], [3, 1], stopping_strategy="all_exhausted_without_replacement")
        for rank in range(2):
            list(mix.certify(tmp_path / "records").shard(rank, 2).batch(4, end="mask"))
        found = judged(tmp_path / "records")
        assert found.proven
        assert found.filtered == 25
        assert found.total == TOTAL + 14
        assert found.padded == -(TOTAL + 14) % 8

    def test_epochs_and_datasets_in_one_folder_are_told_apart(self, split: Any, tmp_path: Path) -> None:
        base = IterableDataset(*split).certify(tmp_path / "records")
        shuffled = base.shuffle(5)
        for epoch in range(2):
            shuffled.set_epoch(epoch)
            list(shuffled.batch(10))
        list(base)
        groups = epochs_of(read_records([tmp_path / "records"]))
        assert [group[0].epoch for group in groups] in ([0, 0, 1], [0, 1, 0])
        assert all(verdict(group, lambda record: read_plan([tmp_path / "records"], record)).proven for group in groups)

    def test_a_certificate_without_a_folder_is_kept_in_the_process(self, split: Any) -> None:
        plain = IterableDataset(*split)
        list(plain)
        assert plain.certificate() is None
        kept = plain.certify().batch(10)
        take(kept, 3)
        told = kept.certificate()
        assert told is not None
        assert told["units"] == 3
        assert told["sum"]["rows"] == 30
        assert len(json.dumps(told)) < 2000


class TestNotProven:
    @pytest.fixture
    def broken(self, split: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Verdict]:
        """`broken(change)`: the verdict over two ranks when `change` is done to the row ids of one block of rank 1."""

        def run(change: Callable[[Any], Any]) -> Verdict:
            blocks = reading.read_blocks

            def read_blocks(walk: Any, share: Any, *others: Any) -> Iterator[Any]:
                for number, block in enumerate(blocks(walk, share, *others)):
                    yield block._replace(ids=change(block.ids)) if share.rank == 1 and not number else block

            monkeypatch.setattr("crucible.dataset.read_blocks", read_blocks)
            base = IterableDataset(*split).shuffle(3, mode="lanes").certify(tmp_path / "records")
            for rank in range(2):
                list(base.shard(rank, 2).batch(10))
            return judged(tmp_path / "records")

        return run

    def test_a_lost_row_is_named(self, broken: Callable[..., Verdict]) -> None:
        lost: list[int] = []

        def drop(ids: Any) -> Any:
            lost.append(int(ids[7]))
            return np.delete(ids, 7)

        (finding,) = broken(drop).findings
        assert (finding.record.share.rank, finding.lacking, finding.lost, finding.again) == (1, 1, (lost[0],), ())

    def test_a_repeated_row_is_named(self, broken: Callable[..., Verdict]) -> None:
        again: list[int] = []

        def repeat(ids: Any) -> Any:
            again.append(int(ids[3]))
            return np.insert(ids, 5, ids[3])

        (finding,) = broken(repeat).findings
        assert (finding.lacking, finding.again) == (-1, (again[0],))

    def test_a_row_in_the_place_of_another_is_named_with_it(self, broken: Callable[..., Verdict]) -> None:
        both: list[tuple[int, int]] = []

        def swap(ids: Any) -> Any:
            made = ids.copy()
            made[4] = (ids[4] + 1) % TOTAL
            both.append((int(ids[4]), int(made[4])))
            return made

        (finding,) = broken(swap).findings
        assert (finding.lacking, finding.lost, finding.again) == (0, (both[0][0],), (both[0][1],))

    def test_many_wrong_rows_are_told_by_their_number(self, broken: Callable[..., Verdict]) -> None:
        (finding,) = broken(lambda ids: ids[:-4]).findings
        assert finding.lacking == 4

    def test_a_rank_without_a_record_is_missed(self, split: Any, tmp_path: Path) -> None:
        base = IterableDataset(*split).certify(tmp_path / "records")
        for rank in (0, 2):
            list(base.shard(rank, 3).batch(4))
        found = judged(tmp_path / "records")
        assert not found.proven
        assert found.missing == ((0, TOTAL, 1, 0),)

    def test_an_epoch_that_was_not_finished_lacks_its_end(self, split: Any, tmp_path: Path) -> None:
        base = IterableDataset(*split).certify(tmp_path / "records")
        take(base.batch(10), 4)
        (finding,) = judged(tmp_path / "records").findings
        assert finding.short == 6

    def test_a_later_run_alone_does_not_prove_the_beginning(self, split: Any, tmp_path: Path) -> None:
        late = IterableDataset(*split).certify(tmp_path / "records").batch(10)
        late.load_state_dict(late.state_after(4))
        list(late)
        found = judged(tmp_path / "records")
        assert found.missing == ((0, 40, -1, -1),)

    def test_rows_that_could_not_be_decoded_are_counted_apart(self, tmp_path: Path) -> None:
        from tests.fakes.shards import write_split

        features = json.dumps({"image": {"_type": "Image"}})
        media = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        rows = pa.table({"image": pa.array([{"bytes": b"no image", "path": None}] * 3, media)})
        bad = IterableDataset(*write_split(tmp_path, [rows], features=features)).decode(on_error="skip")
        assert list(bad.certify(tmp_path / "records")) == []
        found = judged(tmp_path / "records")
        assert found.proven
        assert found.skipped == 3


class TestFiles:
    def test_a_reader_that_gives_fewer_rows_than_it_was_asked_for_is_caught_at_once(
        self, split: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = ShardReader.take
        monkeypatch.setattr(ShardReader, "take", lambda self, ids: whole(self, ids).slice(1))
        with pytest.raises(AssertionError):
            list(IterableDataset(*split))

    def test_a_killed_process_leaves_its_last_word(self, split: Any, tmp_path: Path) -> None:
        import pickle

        base = IterableDataset(*split).certify(tmp_path / "records").batch(10)
        (tmp_path / "stream").write_bytes(pickle.dumps(base))
        code = (
            "import pickle, sys, time; it = iter(ds := pickle.load(open(sys.argv[1], 'rb')))\n"
            "for _ in range(3): next(it)\n"
            "ds.state_dict(); print('saved', flush=True); next(it); time.sleep(60)"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "stream")]
        root = Path(__file__).resolve().parents[2]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "saved\n"
            os.kill(process.pid, signal.SIGKILL)
        finally:
            process.kill()
            process.communicate(timeout=10)
        (record,) = read_records([tmp_path / "records"])
        assert record.units >= 3
        base.load_state_dict(base.state_after(3))
        list(base)
        assert judged(tmp_path / "records").proven

    @pytest.mark.parametrize("cut", [1, 40, 300])
    def test_a_torn_word_is_passed_over_for_the_one_before(self, split: Any, tmp_path: Path, cut: int) -> None:
        base = IterableDataset(*split).certify(tmp_path / "records").batch(50)
        list(base)
        (file,) = (tmp_path / "records").glob(f"*{SUFFIX}")
        lines = file.read_bytes().split(b"\n")
        assert len([line for line in lines if line.strip()]) >= 1
        file.write_bytes(lines[0] + b"\n" + lines[0][:cut] + b"\n")
        assert read_records([file])[0].total == TOTAL
        file.write_bytes(lines[0][:cut])
        with pytest.raises(UsageError, match="holds no record"):
            read_records([file])

    def test_the_command_proves_or_exits_with_one(self, split: Any, tmp_path: Path) -> None:
        folder = tmp_path / "records"
        base = IterableDataset(*split).certify(folder)
        list(base.shard(0, 2).batch(4))
        run = CliRunner().invoke(cli, ["verify-epoch", str(folder)])
        assert run.exit_code == 1
        assert "NOT PROVEN" in run.output
        assert "no record of rank 1" in run.output
        list(base.shard(1, 2).batch(4))
        run = CliRunner().invoke(cli, ["verify-epoch", str(folder), "--json"])
        told = json.loads(run.stdout)
        assert (run.exit_code, told["proven"], told["rows"]) == (0, True, TOTAL)
        assert "every row delivered exactly once" in CliRunner().invoke(cli, ["verify-epoch", str(folder)]).output
        for wrong in ([str(tmp_path / "nowhere")], [str(folder), "--epoch", "3"], []):
            assert CliRunner().invoke(cli, ["verify-epoch", *wrong]).exit_code == 2

    def test_the_environment_asks_for_records_of_every_dataset(
        self, split: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CRUCIBLE_CERTIFICATES", str(tmp_path / "all"))
        list(IterableDataset(*split))
        assert judged(tmp_path / "all").proven

    def test_a_folder_that_cannot_be_written_is_told_before_the_first_row(self, split: Any, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(crucible.errors.StoreError, match="file"):
            next(iter(IterableDataset(*split).certify(tmp_path / "file" / "records")))
