"""``leantune methods``: the registry as tables."""

from typing import Annotated, Any

import typer
from rich.markup import escape

from leantune.cli.options import DebugFlag, JsonFlag
from leantune.cli.output import out, print_json, print_text, reported_errors

_NEEDS_GPU = ", on an NVIDIA GPU"


def methods(
    name: Annotated[str | None, typer.Argument(help="one method, for its options")] = None,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """List the methods; with NAME its options, their ranges, defaults and meaning."""
    with reported_errors(debug):
        from leantune.core import registry

        if name is not None:
            spec = registry.get(name.replace("-", "_"))
            _show(describe_method(spec), json)
            return
        rows = [describe_method(spec) for spec in registry.list_methods().values()]
        if json:
            print_json(rows)
            return
        cells = [
            (
                row["name"],
                f"{row['axis']} of {', '.join(row['roles'])}"
                + (_NEEDS_GPU if row["needs_gpu"] else ""),
                f"{escape(row['summary'])} [dim]({escape(row['source'])})[/]",
            )
            for row in rows
        ]
        print_text("Methods", ("name", "axis of site", "what it does"), cells)
        out().print("Options of one: leantune methods NAME")


def describe_method(spec: Any) -> dict[str, Any]:
    """Return a method's registry entry and options as plain JSON types."""
    return {
        "name": spec.name,
        "config": spec.config.__name__,
        "axis": spec.axis,
        "roles": list(spec.roles),
        "needs_gpu": spec.needs_gpu,
        "summary": spec.summary,
        "source": spec.source,
        "options": spec.config.describe(),
    }


def _show(method: dict[str, Any], json: bool) -> None:
    if json:
        print_json(method)
        return
    console = out()
    console.print(f"[bold]{method['name']}[/] - {escape(method['summary'])}")
    where = f"acts on {', '.join(method['roles'])}{_NEEDS_GPU if method['needs_gpu'] else ''}"
    console.print(f"axis {method['axis']}, {where}; {escape(method['source'])}")
    rows = [
        (
            row["name"],
            "none" if row["default"] is None else escape(str(row["default"])),
            escape(f"{row['help']}; {row['rule']}"),
        )
        for row in method["options"]
    ]
    print_text("Options", ("option", "default", "meaning; what it must be"), rows)
