"""How noisy is a sampled gradient, and is it biased? Compared with the exact one of a batch."""

import toy

import leantune as lt


def main(num_draws: int = 64) -> dict[str, bool]:
    """Print a report for two estimators; return whether each looks biased."""
    looks_biased = {}
    for estimator in ("systematic", "topk"):
        model = toy.encoder()
        lt.apply(model, lt.WTACRS(keep_ratio=0.1, estimator=estimator), seed=0)
        first, *others = toy.batches(5, batch_size=32)
        report = lt.fidelity(model, first, num_draws, batches=others)
        print(f"\n{estimator}\n{report.table()}")
        looks_biased[estimator] = any(p.looks_biased for p in report.parameters)
    return looks_biased


if __name__ == "__main__":
    main()
