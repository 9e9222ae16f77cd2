"""``python -m bench NAME``: run one measurement and write its rows under ``bench/results``."""

import argparse

import torch

from bench import (
    readme,
    sparse_grad_energy,
    sparse_grad_quality,
    sparse_grad_speed,
    wta_crs_quality,
    wta_crs_speed,
    wta_crs_variance,
)

_BENCHES = (
    "wta-crs",
    "wta-crs-speed",
    "wta-crs-variance",
    "quality-wta-crs",
    "sparse-grad",
    "sparse-grad-speed",
    "sparse-grad-energy",
    "quality-sparse-grad",
    "readme",
)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", choices=_BENCHES)
    parser.add_argument("--worker", type=int, default=0, help="number of this worker, from 0")
    parser.add_argument("--num-workers", type=int, default=1, help="workers side by side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.name in ("wta-crs", "wta-crs-speed"):
        wta_crs_speed.main()
    if args.name in ("wta-crs", "wta-crs-variance"):
        wta_crs_variance.main()
    if args.name == "quality-wta-crs":
        wta_crs_quality.main(args.worker, args.num_workers)
    if args.name in ("sparse-grad", "sparse-grad-speed"):
        sparse_grad_speed.main()
    if args.name in ("sparse-grad", "sparse-grad-energy"):
        sparse_grad_energy.main()
    if args.name == "quality-sparse-grad":
        sparse_grad_quality.main(args.worker, args.num_workers)
    if args.name == "readme":
        readme.main()


if __name__ == "__main__":
    main()
