"""``python -m bench NAME``: run one measurement and write its rows under ``bench/results``."""

import argparse
import os
import sys
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import torch

_PARTS = {
    "wta-crs-speed": "cases.wta_crs_speed:BENCH.run",
    "wta-crs-variance": "cases.wta_crs_variance:main",
    "sparse-grad-speed": "cases.sparse_grad_speed:BENCH.run",
    "sparse-grad-energy": "cases.sparse_grad_energy:main",
    "spt-ffn": "cases.routed_ffn_speed:BENCH.run",
    "spt-ffn-error": "cases.routed_ffn_error:main",
    "spt-attention": "cases.spt_attention:BENCH.run",
    "spt-recall": "cases.spt_attention:recall",
    "spt-smollm-recall": "cases.spt_smollm_recall:main",
    "quality-wta-crs": "cases.wta_crs_quality:main",
    "quality-sparse-grad": "cases.sparse_grad_quality:main",
    "quality-spt": "cases.spt_quality:main",
    "quality-smollm": "cases.spt_smollm:main",
    "quality-llm": "cases.llm_quality:main",
    "quantised-bytes": "cases.quantised_bytes:main",
    "launches": "cases.launches:BENCH.run",
    "host": "host:main",
    "whole-step": "cases.whole_step:BENCH.run",
    "frontier": "cases.frontier:BENCH.run",
    "planned": "cases.planned:BENCH.run",
    "gpu": "gpu:main",
    "models": "cases.models:main",
    "same-bits": "same_bits:main",
    "hostile": "hostile:main",
    "readme": "readme:main",
}
"""Name -> module and function; imported when it is run."""
_WHOLE = ("wta-crs", "sparse-grad", "spt")
"""Names that stand for all parts beginning with them."""


def main() -> None:
    """Parse the command line and run, with the tests' tiny models at hand."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", choices=(*_WHOLE, *_PARTS))
    parser.add_argument("--worker", type=int, default=0, help="number of this worker, from 0")
    parser.add_argument("--num-workers", type=int, default=1, help="workers side by side")
    parser.add_argument("--area", help="of hostile: the cases of this area alone")
    parser.add_argument("--case", default="*", help="cases whose name fits this glob")
    parser.add_argument("--tiny", action="store_true", help="a GPU's cases in tiny shapes")
    parser.add_argument("--budget", type=float, help="of gpu: seconds for all parts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.tiny and args.name != "gpu" and "LEANTUNE_RESULTS" not in os.environ:
        parser.error("--tiny makes no results: let LEANTUNE_RESULTS name a folder for its rows")
    torch.set_num_threads(args.threads)
    for name, place in _PARTS.items():
        if name == args.name or (args.name in _WHOLE and name.startswith(f"{args.name}-")):
            module, _, path = place.partition(":")
            run = attrgetter(path)(import_module(f"bench.{module}"))
            if name.startswith("quality-"):
                # Quality takes hours, and several workers share its rows.
                run(args.worker, args.num_workers)
            elif name == "hostile":
                run(args.area, args.case, args.num_workers)
            elif name == "gpu":
                run(args.budget, args.tiny)
            else:
                run(*(args.case, args.tiny) if path == "BENCH.run" else ())


if __name__ == "__main__":
    main()
