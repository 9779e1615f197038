"""Speed of reading rows: jsonl_to_binidx and open_documents in rows/s and MB/s, and jsonl_to_binidx's peak memory.

    python benchmarks/reading.py [--mb 300] [--data ../shared/data/gsm8k/train.jsonl] [--before FOLDER] [--out FILE]

The rows are those of --data, over and over. --before is a folder with an earlier version of the package, measured in the same
run; each version converts on one process and on two, and its three files are compared with the other's. The last lines
say where the time goes, and what pyrwkv-tokenizer takes for the same texts alone.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONVERT = """
import sys, time
from rwkv_bone.data.jsonl_to_binidx import main
start = time.perf_counter()
main([sys.argv[1], sys.argv[2], "--workers", sys.argv[3]])
print("measured", time.perf_counter() - start, open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
OPEN = """
import sys, time
from rwkv_bone.data.documents import open_documents
from rwkv_bone.data.samples import Samples
from rwkv_bone.data.tokenizer import open_tokenizer
start = time.perf_counter()
documents = open_documents(sys.argv[1], tokenizer=open_tokenizer())
Samples(documents, "chunk", 512)
print("measured", time.perf_counter() - start, open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
PARTS = """
import gc, sys, time
from rwkv_bone.data.encode import RowEncoder
from rwkv_bone.data.files import read_batches
from rwkv_bone.data.rows import Tally
from rwkv_bone.data.tokenizer import open_tokenizer
from pyrwkv_tokenizer import RWKVTokenizer
pyrwkv = RWKVTokenizer().tokenizer.encode_batch
encoder, tally, parts, size = RowEncoder(open_tokenizer()), Tally(), {}, 0
gc.disable()  # as RowEncoder.encode does
def timed(part, function, *args):
    start = time.process_time()
    result = function(*args)
    parts[part] = parts.get(part, 0.0) + time.process_time() - start
    return result
for batch in read_batches([sys.argv[1]]):
    rows = timed("JSON", lambda: [row for _, row in batch.rows()])
    talks = timed("recognising rows", lambda: [encoder.reader(row, tally) for row in rows])
    stretches = [piece for pieces, _ in timed("templates", encoder.template.pieces, talks) for piece in pieces]
    timed("tokenizer", encoder.tokenizer.encode_documents, stretches, [1] * len(stretches))
    timed("all", encoder.encode, batch)
    timed("pyrwkv-tokenizer", pyrwkv, stretches)
    size += len(batch.content)
    if size > 30e6:
        break
peer = parts.pop("pyrwkv-tokenizer")
parts["the rest"] = 2 * parts["all"] - sum(parts.values())
print("; ".join(f"{part} {1e9 * seconds / size:.1f}" for part, seconds in parts.items()))
print("measured", peer, size)
"""


def measure(program: str, folder: Path, *args, **environment) -> tuple[float, int, float, str]:
    """Seconds, what the program prints last, CPU seconds (the ones to compare on a busy machine), what it prints before."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    argv = [sys.executable, "-c", program, *map(str, args)]
    done = subprocess.run(argv, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder), **environment}, check=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    said, measured = done.stdout.split("measured")
    seconds, number = measured.split()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return float(seconds), int(number), cpu, said.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=300)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/gsm8k/train.jsonl")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, content = Path(name), args.data.read_bytes()
        path, copies = folder / "rows.jsonl", max(1, args.mb * 1_000_000 // len(content))
        with path.open("wb") as file:
            file.writelines(content for _ in range(copies))
        rows, size = copies * content.count(b"\n"), copies * len(content) / 1e6
        lines = [f"{rows:,} rows, {size:.0f} MB of {args.data.name}; {os.cpu_count()} cores; {time.strftime('%Y-%m-%d')}"]
        lines.append(f"{'':34}{'s':>8}{'rows/s':>12}{'MB/s':>8}{'CPU s':>8}{'peak MiB':>10}")
        versions = {"before": args.before.resolve()} if args.before else {}
        for label, root in (versions | {"now": ROOT}).items():
            for what, program, options in (
                ("jsonl_to_binidx, 1 process", CONVERT, (folder / f"{label}1", 1)),
                ("jsonl_to_binidx, 2 processes", CONVERT, (folder / f"{label}2", 2)),
                ("open_documents and Samples", OPEN, ()),
            ):
                seconds, peak, cpu, _ = measure(program, root, path, *options)
                lines.append(f"{label:7}{what:27}{seconds:8.1f}{rows / seconds:12,.0f}{size / seconds:8.1f}"
                             f"{cpu:8.1f}{peak / 1024:10.0f}")  # fmt: skip
                print(lines[-1], flush=True)
        for first in sorted(folder.glob("*1.*")):
            assert first.read_bytes() == (folder / f"now2{''.join(first.suffixes)}").read_bytes(), f"{first.name} differs"
        seconds, share, _, said = measure(PARTS, ROOT, path, RAYON_NUM_THREADS="1")
        lines.append(f"CPU ms a MB of jsonl, on one thread: {said}")
        lines.append(f"pyrwkv-tokenizer alone: {share / 1e6 / seconds:.1f} MB/s of jsonl on one thread")
    print("\n".join(lines))
    if args.out:
        Path(args.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
