"""One answer out of those of several engines, for what they tell of themselves: loads, metrics, how they are set up.

Counts are added up, lists are put one behind the other, and of the rest the first engine speaks for all: they have the
same weights and options. Metrics stay apart, each engine's under a label `worker_addr` as SGLang's router has it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Merge = Callable[[list[Any]], Any]
COUNTS = ("max_running_requests", "max_queued_requests", "max_total_num_tokens")


def _ranks(lists: list[Any]) -> list[Any]:
    """SGLang's /get_load: a row for each data-parallel rank."""
    return [row | {"dp_rank": rank} for rank, row in enumerate(row for rows in lists for row in rows)]


def _loads(told: list[Any]) -> dict[str, Any]:
    """SGLang's /v1/loads, in which sums stand twice."""
    sums = {name: sum(one["aggregate"][name] for one in told) for name in told[0]["aggregate"]}
    return told[0] | {"loads": _ranks([one["loads"] for one in told]), "aggregate": sums} | sums


def _server(told: list[Any]) -> dict[str, Any]:
    """SGLang's /server_info of a data-parallel server."""
    states = [state for one in told for state in one["internal_states"]]
    sums = {name: sum(one[name] for one in told) for name in COUNTS}
    return told[0] | sums | {"dp_size": len(told), "internal_states": states}


MERGES: Mapping[str, Merge] = {
    "/get_load": _ranks,
    "/v1/loads": _loads,
    "/load": lambda told: {"server_load": sum(one["server_load"] for one in told)},
    "/server_info": _server,
    "/get_server_info": _server,
}


def merged(path: str, bodies: Sequence[bytes]) -> bytes:
    """The answer to `path` out of the engines' own; that of the first if they are not written as ours are."""
    try:
        return json.dumps(MERGES[path]([json.loads(body) for body in bodies])).encode()
    except (ValueError, KeyError, TypeError):
        return bodies[0]


def read_object(body: bytes) -> dict[str, Any]:
    """A JSON object; {} for anything else."""
    try:
        told = json.loads(body)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def metrics(texts: Mapping[str, str]) -> str:
    """Prometheus' text of engines by their URLs: every sample once for each, each family in one place."""
    families: dict[str, list[str]] = {}
    for url, text in texts.items():
        family: list[str] = []
        for line in text.splitlines():
            if line.startswith("#"):
                family = families.setdefault(line, [])
            elif line:
                name, value = line.rsplit(" ", 1)
                name, _, labels = name.removesuffix("}").partition("{")
                told = ",".join(filter(None, [labels, f'worker_addr="{url}"']))
                family.append(f"{name}{{{told}}} {value}")
    return "".join(f"{head}\n" + "".join(f"{line}\n" for line in lines) for head, lines in families.items())
