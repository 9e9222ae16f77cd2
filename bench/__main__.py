"""``python -m bench NAME``: run one measurement and write its rows under ``bench/results``."""

import argparse
from collections.abc import Callable

import torch

from bench import (
    readme,
    routed_ffn_speed,
    same_bits,
    sparse_grad_energy,
    sparse_grad_quality,
    sparse_grad_speed,
    spt_attention,
    spt_quality,
    wta_crs_options,
    wta_crs_quality,
    wta_crs_speed,
    wta_crs_variance,
)

_PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "wta-crs-speed": lambda args: wta_crs_speed.main(),
    "wta-crs-variance": lambda args: wta_crs_variance.main(),
    "wta-crs-options": lambda args: wta_crs_options.main(args.order, args.seconds, args.num_train),
    "wta-crs-options-time": lambda args: wta_crs_options.measure_times(),
    "wta-crs-options-summary": lambda args: print(wta_crs_options.summary()),
    "sparse-grad-speed": lambda args: sparse_grad_speed.main(),
    "sparse-grad-energy": lambda args: sparse_grad_energy.main(),
    "spt-ffn": lambda args: routed_ffn_speed.main(),
    "spt-attention": lambda args: spt_attention.speed(),
    "spt-recall": lambda args: spt_attention.recall(),
    "quality-wta-crs": lambda args: wta_crs_quality.main(args.worker, args.num_workers),
    "quality-sparse-grad": lambda args: sparse_grad_quality.main(args.worker, args.num_workers),
    "quality-spt": lambda args: spt_quality.main(args.worker, args.num_workers),
    "same-bits": lambda args: same_bits.main(),
    "readme": lambda args: readme.main(),
}
_WHOLE = ("wta-crs", "sparse-grad", "spt")
"""Names that stand for all parts beginning with them."""


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", choices=(*_WHOLE, *_PARTS))
    parser.add_argument("--worker", type=int, default=0, help="number of this worker, from 0")
    parser.add_argument("--num-workers", type=int, default=1, help="workers side by side")
    parser.add_argument("--order", default="stsb:01234,sst2:01234,cola:01234")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no run that ends later")
    parser.add_argument("--num-train", type=int, default=0, help="rows to train on; 0 for all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, run in _PARTS.items():
        if name == args.name or (args.name in _WHOLE and name.startswith(f"{args.name}-")):
            run(args)


if __name__ == "__main__":
    main()
