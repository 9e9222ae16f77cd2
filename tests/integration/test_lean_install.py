"""With torch and safetensors alone the library applies methods; what is missing is named.

The other packages are hidden from the import system here; an environment that has nothing else is
tested in `.ci`.
"""

import subprocess
import sys

HIDE = """
import sys
ALLOWED = {"torch", "safetensors", "leantune", *sys.stdlib_module_names}
# What torch itself brings.
ALLOWED |= {"typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec",
            "filelock", "setuptools", "pkg_resources", "functorch", "torchgen"}

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ALLOWED or name.startswith("_"):
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Hiding, sys.meta_path)
import warnings
# Torch without numpy says so.
warnings.simplefilter("ignore")
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HIDE + code], capture_output=True, text=True)


def test_a_plain_loop_runs() -> None:
    done = run("""
import torch
import leantune as lt
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 1))
session = lt.apply(model, lt.WTACRS(keep_ratio=0.5, min_rows=2, sites="*"), seed=0)
optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
for _ in range(2):
    model(torch.randn(16, 8)).square().mean().backward()
    optimizer.step()
    session.on_step()
session.merge()
print(type(model[0]).__name__, session.step)
""")
    assert done.stdout == "Linear 2\n", done.stderr


def test_what_is_missing_names_its_extra() -> None:
    done = run("""
import leantune as lt
for name in ("train", "merge_checkpoint", "TrainerCallback"):
    try:
        getattr(lt, name)
    except lt.UnsupportedError as error:
        print(error)
""")
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("pip install 'leantune[train]'" in line for line in lines), done
    done = run("from leantune.cli import main; main()")
    assert done.returncode == 1 and "pip install 'leantune[cli]'" in done.stderr
    assert "Traceback" not in done.stderr
