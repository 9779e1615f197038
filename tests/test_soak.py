"""A long run in short: five hundred steps, 25 checkpoints and validations, and neither memory nor open files grow."""

import json
import os
import statistics
import threading
import time
from pathlib import Path

import pytest

from tests.runs import losses, make_world, run_to_end


class Sampler:
    """Called in a process: notes ten times a second how many steps are done, resident MiB and open files."""

    def __init__(self, run: Path, notes: Path):
        self.run, self.notes = run, notes

    def __call__(self) -> None:
        threading.Thread(target=self.sample, daemon=True).start()

    def sample(self) -> None:
        page, log = os.sysconf("SC_PAGE_SIZE"), self.run / "loss_data.jsonl"
        while True:
            time.sleep(0.1)
            steps = log.read_bytes().count(b"\n") if log.exists() else 0
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page / 2**20
            with self.notes.open("a") as file:
                file.write(json.dumps([steps, resident, len(os.listdir("/proc/self/fd"))]) + "\n")


@pytest.mark.slow
def test_neither_memory_nor_open_files_grow(tmp_path):
    world, notes = make_world(tmp_path), tmp_path / "notes"
    flags = ("--micro_bsz", 1, "--epoch_count", 25, "--epoch_save", 12, "--val_split", "0.1", "--lr_init", "1e-4")
    ended = run_to_end(world, *flags, name="soak", before=Sampler(world / "soak", notes), seconds=600)
    assert ended.codes == [0], ended.said
    steps = len(losses(world / "soak"))
    samples = [sample for sample in map(json.loads, notes.read_text().splitlines()) if sample[0]]
    early = [sample for sample in samples if 0.2 * steps < sample[0] < 0.4 * steps]
    late = [sample for sample in samples if 0.8 * steps < sample[0] < steps]
    assert steps > 500 and len(early) > 2 and len(late) > 2
    for which, allowed in ((1, 4), (2, 0)):  # MiB, files
        before, after = (statistics.median(sample[which] for sample in part) for part in (early, late))  # some fall into a save
        assert after <= before + allowed, samples
