"""Methods against each other: same base, data, batches, steps and number of trained parameters; learning rate tuned for each.

    python -m rwkv_bone.compare CONFIG.json [--out DIR]

The config holds flags of train.py by their names (load_model, data_file, ctx_len, micro_bsz, threads, ...) and the fields of
`Comparison` in comparison.py. For each method every rate is tried with the first seed, the grid grows while the best is the
outermost one, and refined around it; then the other seeds run at the best rate. Half of the held-out documents (every second)
chooses the rate, the other half is what is reported. A seed sets both the order of the data, the same for all methods, and an
adapter's start.
`one_rate` runs every adapter at one rate as well, for a second table; `general` names other text, and what a method forgets is
how much the loss on it rises; `keep` keeps what each run trained.

Each run is a process of its own, forked from one that has imported everything: nothing carries over from run to run, and its
memory is its own. When it ends it becomes one line of DIR/runs.jsonl. Runs found there are not repeated, so that starting again
goes on, and a larger grid, more seeds or another method cost only what is new. From these lines are made

    table.md, table.csv   a row a method, with the training loss of steps 8 to 12 and of all (the area under its curve)
    runs.csv, curves.csv  a row a run, a row a run and step
    curves.png            curves, sweep and results in one picture
"""

import argparse
from pathlib import Path

from ..errors import Parser
from . import report
from .comparison import Comparison
from .study import Study


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="rwkv_bone.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.json")
    parser.add_argument("--out", default="", metavar="DIR", help="default: CONFIG beside the config, without .json")
    parser.add_argument("--report", action="store_true", help="run nothing: make table and picture of the runs that are done")
    args = parser.parse_args(argv)
    study = Study(Comparison.read(args.config), Path(args.out or Path(args.config).with_suffix("")))
    print(study.describe(), flush=True)
    if not args.report:
        study.run()
    report.write(study)
