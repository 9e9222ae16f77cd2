"""The installed wheel alone, without any extra: converts a plain module and trains two steps."""

import importlib.metadata
import importlib.util
import sys

import torch
from torch import nn

import leantune as lt

EXTRAS = ("transformers", "peft", "datasets", "typer", "matplotlib")


def main() -> None:
    """Check what was installed, then train with each method that needs torch alone."""
    assert "site-packages" in lt.__file__, f"must be the installed package, got {lt.__file__}"
    found = [name for name in EXTRAS if importlib.util.find_spec(name)]
    assert not found, f"no extra may be installed here, got {found}"

    files = importlib.metadata.files("leantune")
    assert files, "the wheel must list its files"
    pages = [str(file) for file in files if file.suffix == ".md"]
    assert not pages, f"the wheel must hold no Markdown, got {pages}"
    version = importlib.metadata.version("leantune")
    assert version == lt.__version__, f"two versions: {version} and {lt.__version__}"

    sites = ("re:.*",)  # a plain module has no transformer blocks to find linears in
    methods = (
        lt.WTACRS(keep_ratio=0.5, min_rows=4, sites=sites),
        lt.MeProp(keep_ratio=0.5, sites=sites),
    )
    for method in methods:
        losses = train(method)
        assert losses[1] < losses[0], f"{method}: the loss must fall, got {losses}"
        print(f"{type(method).__name__}: loss {losses[0]:.4f}, then {losses[1]:.4f}")
    loaded = [name for name in EXTRAS if name in sys.modules]
    assert not loaded, f"no extra may be imported, got {loaded}"
    print(f"leantune {version}, torch {torch.__version__}: {len(files)} files, no extra needed")


def train(method: lt.WTACRS | lt.MeProp) -> tuple[float, float]:
    """Return the loss before each of two steps of a small network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 1))
    plain = dict(model.named_modules())
    session = lt.apply(model, method, seed=0)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.01)
    x, y = torch.randn(64, 16), torch.randn(64, 1)
    losses = []
    for _ in range(2):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    session.remove()
    assert dict(model.named_modules()) == plain, "remove must give the original modules back"
    return losses[0], losses[1]


if __name__ == "__main__":
    main()
