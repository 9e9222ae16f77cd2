"""``leantune methods``: the registry as tables."""

from typing import Annotated, Any

import typer
from rich.markup import escape

from leantune.cli.output import DebugFlag, JsonFlag, make_table, out, print_json, reported_errors


def methods(
    name: Annotated[str | None, typer.Argument(help="one method, for its options")] = None,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """List the methods; with NAME its options, their ranges, defaults and meaning."""
    with reported_errors(debug):
        # The package's own import registers the methods.
        from leantune.core import registry

        if name is not None:
            spec = registry.get(name.replace("-", "_"))
            _show(describe_method(spec), json)
            return
        rows = [describe_method(spec) for spec in registry.list_methods().values()]
        if json:
            print_json(rows)
            return
        table = make_table("Methods", ("name", "axis", "acts on", "summary", "source"), left=5)
        for row in rows:
            table.add_row(
                row["name"], row["axis"], ", ".join(row["roles"]), row["summary"], row["source"]
            )
        out().print(table)
        out().print("Options of one: leantune methods NAME")


def describe_method(spec: Any) -> dict[str, Any]:
    """Return a method's registry entry and options as plain JSON types."""
    return {
        "name": spec.name,
        "config": spec.config.__name__,
        "axis": spec.axis,
        "roles": list(spec.roles),
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
    console.print(
        f"axis {method['axis']}, acts on {', '.join(method['roles'])}; {escape(method['source'])}"
    )
    table = make_table("Options", ("option", "default", "must be", "meaning"), left=4)
    for row in method["options"]:
        default = "none" if row["default"] is None else str(row["default"])
        table.add_row(row["name"], default, escape(row["rule"]), escape(row["help"]))
    console.print(table)
