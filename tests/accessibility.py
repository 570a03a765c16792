"""What axe-core finds wrong with a page, and which hosts a page asks."""

from collections.abc import Collection
from typing import Any

GRAVE = ("serious", "critical")


def violations(tab: Any, axe: str, ignored: Collection[str] = ()) -> list[str]:
    """Serious and critical violations, each with the elements concerned. `ignored` are rules by id."""
    tab.evaluate(axe)
    found = tab.evaluate("axe.run({resultTypes: ['violations']})")
    assert len(found["passes"]) > 10  # it has looked at something
    return [
        f"{rule['id']} ({rule['impact']}): {[node['html'][:200] for node in rule['nodes']]}"
        for rule in found["violations"]
        if rule["impact"] in GRAVE and rule["id"] not in ignored
    ]


class Requests(list[str]):
    """Addresses that a tab asks for, from now on."""

    def __init__(self, tab: Any) -> None:
        super().__init__()
        tab.on("request", lambda request: self.append(request.url))
        tab.on("websocket", lambda socket: self.append(socket.url))

    def outside(self, *own: str) -> list[str]:
        """Those that neither begin with one of `own` nor are part of the page itself."""
        return [address for address in self if not address.startswith((*own, "data:", "blob:"))]
