"""List the commands, for `python -m benchmarks`."""

import ast
from pathlib import Path

from rich.console import Console


def commands() -> dict[str, str]:
    """Return the name of each command, with the first paragraph of its module's docstring."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        text = file.read_text(encoding="utf-8")
        if "__main__" in text and file.stem != "__main__":
            found[file.stem] = " ".join((ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].split())
    return found


if __name__ == "__main__":
    screen = Console(highlight=False)
    for name, what in commands().items():
        screen.print(f"python -m benchmarks.{name}", style="bold", markup=False)
        screen.print(f"    {what}", markup=False)
    screen.print("\nRun a command with --help to see its options.")
