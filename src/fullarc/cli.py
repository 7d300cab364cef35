"""The command line: verbs, and nothing else. Every verb imports what it needs when it is called.

Exit codes: 0 done, 1 crash, 2 usage, 3 a recipe or an input is wrong, 4 interrupted and resumable.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fullarc.config.errors import FullarcError
from fullarc.config.machine import environment

# verbs whose own module reads the rest of the command line: verb -> (module:function(argv) -> exit code, help)
DELEGATED = {
    "tasks": ("fullarc.tasks.cli:main", "list, show, export or check tasks"),
    "serve": ("fullarc.rollout.serve:main", "serve a checkpoint to OpenAI-compatible clients"),
    "chat": ("fullarc.agent.cli:chat", "talk to a checkpoint"),
    "agent": ("fullarc.agent.cli:agent", "let a checkpoint do a task in a sandbox"),
    "eval": ("fullarc.evals.cli:main", "score a checkpoint"),
    "bench": ("fullarc.evals.bench:main", "measure claims against their baselines"),
    "quantize": ("fullarc.quantize:main", "write a checkpoint with INT4 or INT8 weights"),
    "view": ("fullarc.view.cli:main", "write or open the report of a run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code; errors for people are one sentence on stderr."""
    for name, value in environment().items():
        os.environ.setdefault(name, value)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words and words[0] in DELEGATED:
            return int(_load(DELEGATED[words[0]][0])(words[1:]) or 0)
        parser = _parser()
        arguments, rest = parser.parse_known_args(words)
        if rest and not (hasattr(arguments, "set") and all("=" in w and w[0] != "-" for w in rest)):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:  # overrides after an option, which argparse does not hand to an optional positional
            arguments.set += rest
        return int(arguments.handler(arguments) or 0)
    except FullarcError as error:
        print(f"fullarc: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fullarc: stopped.", file=sys.stderr)
        return 4
    except BrokenPipeError:  # the reader of a pipe (`| head`) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _load(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fullarc",
        description="Raw text to agent, the way GLM-5 did it.",
        epilog="Start with: fullarc run recipes/laptop.toml",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    run = verbs.add_parser("run", help="run a recipe, or go on with it")
    _recipe_arguments(run)
    run.add_argument(
        "--from",
        dest="restart_from",
        default="",
        metavar="STAGE",
        help="redo from this stage; old files move to aside/",
    )
    run.add_argument("--resume", action="store_true", help="go on with an existing run (always the default)")
    run.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and where each value came from"
    )
    run.add_argument("--json", action="store_true", help="print the result (or the dry run) as JSON")
    run.set_defaults(handler=_run)

    train = verbs.add_parser("train", help="run one stage alone")
    train.add_argument("stage", metavar="STAGE")
    _recipe_arguments(train)
    train.add_argument(
        "--model", type=Path, metavar="DIR", help="start from this checkpoint, not the previous stage's"
    )
    train.add_argument(
        "--nproc", type=int, metavar="N", help="train in N processes (the stage's `processes`)"
    )
    train.set_defaults(handler=_train)

    data = verbs.add_parser("data", help="build the token rows of a recipe")
    data.add_argument("action", choices=["build"])
    _recipe_arguments(data)
    data.set_defaults(handler=lambda a: _only(a, "data", None))

    explain = verbs.add_parser("explain", help="explain a stage, a loss or a recipe key")
    explain.add_argument("what", nargs="?", default="", help="e.g. agentic_rl, opd, stages.sft.lr, model")
    explain.add_argument("--json", action="store_true")
    explain.set_defaults(handler=_explain)

    doctor = verbs.add_parser("doctor", help="what this machine has, what is missing and how to get it")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(handler=_doctor)

    for verb, (_, text) in DELEGATED.items():
        verbs.add_parser(verb, help=text, add_help=False)
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file, see recipes/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. stages.sft.steps=100 seed=3")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="the same, as an option"
    )
    parser.add_argument("--name", help="name of the run's folder")


def _resolve(arguments: argparse.Namespace) -> Any:
    from fullarc.config.recipe import load_recipe

    named = [f"name={json.dumps(arguments.name)}"] if arguments.name else []
    return load_recipe(arguments.recipe, [*arguments.overrides, *arguments.set, *named])


def _run(arguments: argparse.Namespace) -> int:
    resolved = _resolve(arguments)
    if arguments.dry_run:
        from fullarc.config.show import to_toml

        plain = {"recipe": resolved.recipe.model_dump(mode="json"), "origins": resolved.origins}
        print(
            json.dumps(plain, indent=1) if arguments.json else to_toml(resolved),
            end="\n" if arguments.json else "",
        )
        return 0
    from fullarc.arc import run
    from fullarc.progress import Progress

    with Progress() as reporter:
        folder = run(
            resolved, source=str(arguments.recipe), restart_from=arguments.restart_from, reporter=reporter
        )
    report = folder / "report.html"
    print(
        json.dumps({"run": str(folder), "report": str(report)})
        if arguments.json
        else f"Done. The report is {report}"
    )
    return 0


def _train(arguments: argparse.Namespace) -> int:
    if arguments.nproc is not None:
        arguments.set.append(f"stages.{arguments.stage}.processes={arguments.nproc}")
    return _only(arguments, arguments.stage, arguments.model)


def _only(arguments: argparse.Namespace, step: str, model: Path | None) -> int:
    from fullarc.arc import run
    from fullarc.progress import Progress

    with Progress() as reporter:
        folder = run(
            _resolve(arguments), source=str(arguments.recipe), only=step, model_in=model, reporter=reporter
        )
    print(f"Done: {step} of {folder}")
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from fullarc.explain import explain

    found = explain(arguments.what)
    print(json.dumps(found, indent=1, default=str) if arguments.json else found["text"])
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from fullarc.doctor import examine

    checks = examine()
    if arguments.json:
        print(json.dumps(checks, indent=1))
    else:
        for check in checks:
            mark = "ok     " if check["ok"] else "MISSING" if check["required"] else "optional"
            print(f"{mark}  {check['name']}: {check['found']}{'' if check['ok'] else ' ' + check['fix']}")
    return 0 if all(check["ok"] or not check["required"] for check in checks) else 3


if __name__ == "__main__":
    sys.exit(main())
