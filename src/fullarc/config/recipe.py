"""A recipe: everything a run depends on, resolved from four layers, each value with its origin.

    default  <  size  <  file  <  command line

Invariant: a resolved recipe is a pure function of those layers, and writing it out and reading it back gives the
same recipe. An unknown key or an impossible value is one sentence that names the layer and the key.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from fullarc.config.errors import FullarcError, UsageError
from fullarc.config.model import ModelConfig
from fullarc.config.sizes import SIZES
from fullarc.config.stages import (
    SFT,
    STAGE_TYPES,
    Data,
    Distil,
    EngineSettings,
    EvalSettings,
    LMStage,
    RLStage,
    SandboxSettings,
    Settings,
    Stage,
    TaskSettings,
)

SECTIONS: dict[str, type[BaseModel]] = {
    "data": Data,
    "model": ModelConfig,
    "tasks": TaskSettings,
    "engine": EngineSettings,
    "sandbox": SandboxSettings,
    "eval": EvalSettings,
}
COMMAND_LINE = "command line"
M = TypeVar("M", bound=BaseModel)


class Run(Settings):
    """The top-level keys of a recipe: which run, where, and which stages in which order."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run's folder.")
    seed: int = Field(0, ge=0, description="Every random choice derives from it.")
    size: str = Field("2m", description=f"The one dial: {', '.join(SIZES)}.")
    runs_dir: str = Field("runs", description="Folder that holds the run folders.")
    threads: int = Field(1, ge=1, description="CPU cores the trainer uses: passes computed at once.")
    arc: list[str] = Field(
        list(STAGE_TYPES), description="Stage names in order; data and eval surround them."
    )


class Recipe(Run):
    """A resolved recipe; see `load_recipe`."""

    data: Data
    model: ModelConfig
    tasks: TaskSettings
    stages: dict[str, Stage]
    engine: EngineSettings
    sandbox: SandboxSettings
    eval: EvalSettings

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.runs_dir) / self.name

    @property
    def dense_model(self) -> ModelConfig:
        """The model before its `dsa` stage: dense attention, said as index_topk == max_position_embeddings."""
        return self.model.model_copy(update={"index_topk": self.model.max_position_embeddings})


@dataclass(frozen=True)
class Resolved:
    """A recipe and, for every dotted key, where its value came from."""

    recipe: Recipe
    origins: dict[str, str]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; tables below a setting (mix, teachers) become keys too."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parse_override(text: str) -> tuple[list[str], Any]:
    """`stages.sft.steps=100` -> (["stages", "sft", "steps"], 100); the value is TOML, or a bare word."""
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise UsageError(
            f"'{text}' is not an override.", "Write key=value, for example stages.sft.steps=100."
        )
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        if not re.fullmatch(r"[\w./:@ +-]*", value):
            raise UsageError(f"'{value}' in '{text}' is not a TOML value.", "Quote it as a string.") from None
        parsed = value
    return key.replace("-", "_").split("."), parsed


def read_toml(path: Path) -> dict[str, Any]:
    """The recipe file's tables; FullarcError if it is missing or not TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FullarcError(
            f"cannot read recipe {path}: {error.strerror}.", "See recipes/ for examples."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FullarcError(f"{path} is not valid TOML: {error}.") from None


def load_recipe(path: Path | None = None, overrides: Iterable[str] = ()) -> Resolved:
    """Resolve a recipe file and `key=value` overrides into a recipe with the origin of every value.

    Raises:
        FullarcError: unknown key, wrong type, impossible or contradictory sizes; one sentence.
        UsageError: an override that is not key=value.
    """
    layers = _Layers()
    if path is not None:
        layers.add(read_toml(path), str(path))
    for override in overrides:
        keys, value = parse_override(override)
        for key in reversed(keys):
            value = {key: value}
        layers.add(value, COMMAND_LINE)
    return layers.resolve()


class _Layers:
    """Values by dotted path, the latest layer winning, with the origin of each."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self.origins: dict[str, str] = {}

    def add(self, tree: dict[str, Any], origin: str, beneath: bool = False) -> None:
        """Merge `tree` over what is there, or `beneath` it."""
        self._merge(self.tree, tree, "", origin, beneath)

    def _merge(
        self, into: dict[str, Any], tree: dict[str, Any], prefix: str, origin: str, beneath: bool
    ) -> None:
        for key, value in tree.items():
            path = f"{prefix}{key}"
            if _is_table(path):
                if not isinstance(value, dict):
                    raise FullarcError(f"{path} ({origin}) must be a table of settings, not {value!r}.")
                self._merge(into.setdefault(key, {}), value, f"{path}.", origin, beneath)
            elif not (beneath and key in into):
                if origin == COMMAND_LINE and isinstance(value, dict) and isinstance(into.get(key), dict):
                    value = into[key] | value
                into[key] = value
                self.origins[path] = origin

    def origin(self, path: str) -> str:
        """Where the value at `path` (or the nearest thing above or below it) was set."""
        for known, origin in self.origins.items():
            if known == path or known.startswith(f"{path}."):
                return origin
        parent = path.rpartition(".")[0]
        return self.origin(parent) if parent else "default"

    def resolve(self) -> Resolved:
        top = {key: value for key, value in self.tree.items() if key in Run.model_fields}
        for key in self.tree:
            if key not in top and key not in SECTIONS and key != "stages":
                raise self._unknown(key, "", [*Run.model_fields, *SECTIONS, "stages"])
        run = self._build(Run, top, "")
        stage_types = self._stage_types(run)
        size = dict(_lookup(SIZES, run.size, f"size '{run.size}' ({self.origin('size')})"))
        by_type = size.pop("stages", {})
        size["stages"] = {name: by_type[kind] for name, kind in stage_types.items() if kind in by_type}
        self.add(size, f"size {run.size}", beneath=True)
        self._derive(stage_types)
        sections: dict[str, Any] = {
            key: self._build(cls, self.tree.get(key, {}), f"{key}.") for key, cls in SECTIONS.items()
        }
        tables = self.tree.get("stages", {})
        stages: dict[str, Any] = {
            name: self._build(STAGE_TYPES[kind], tables.get(name, {}) | {"type": kind}, f"stages.{name}.")
            for name, kind in stage_types.items()
        }
        recipe = Recipe.model_construct(**dict(run), **sections, stages=stages)
        _check(recipe, self)
        origins = {
            key: self.origins.get(key) or self.origins.get(key.rpartition(".")[0], "default")
            for key in flatten(recipe.model_dump())
        }
        return Resolved(recipe, origins)

    def _stage_types(self, run: Run) -> dict[str, str]:
        """Stage name -> type, in the order of the arc; a stage's type is its name unless it says otherwise."""
        tables = self.tree.get("stages", {})
        for name in tables:
            if name not in run.arc:
                hint = _suggest(name, run.arc)
                raise FullarcError(
                    f"stages.{name} ({self.origin(f'stages.{name}')}) is not in arc = {run.arc}.{hint}"
                )
        if len(set(run.arc)) != len(run.arc):
            raise FullarcError(
                f"arc ({self.origin('arc')}) names a stage twice.",
                "Give the second one another name and a type.",
            )
        types = {}
        for name in run.arc:
            kind = tables.get(name, {}).get("type", name)
            _lookup(STAGE_TYPES, kind, f"stage type '{kind}' of arc entry '{name}' ({self.origin('arc')})")
            types[name] = kind
        return types

    def _derive(self, stage_types: dict[str, str]) -> None:
        """Fill what follows from other values: whole-row batches, enough positions, teachers that exist."""
        longest = 0
        for name, kind in stage_types.items():
            table = self.tree.setdefault("stages", {}).setdefault(name, {})
            if issubclass(STAGE_TYPES[kind], LMStage):
                longest = max(
                    longest, self._derive_batch(table, f"stages.{name}", STAGE_TYPES[kind].model_fields)
                )
            if kind == "distil" and "teachers" not in table:
                earlier = list(stage_types)[: list(stage_types).index(name)]
                default = Distil.model_fields["teachers"].default
                table["teachers"] = {task: teacher for task, teacher in default.items() if teacher in earlier}
                self.origins[f"stages.{name}.teachers"] = "derived from arc"
        path, model = "model.max_position_embeddings", self.tree.setdefault("model", {})
        if self.origin(path).startswith("size") and model.get("max_position_embeddings", 0) < longest:
            model["max_position_embeddings"] = longest
            self.origins[path] = "derived from seq_len"

    def _derive_batch(self, table: dict[str, Any], stage: str, fields: dict[str, Any]) -> int:
        """Round a batch that nobody asked for to whole rows; returns the row length (0 if it is not one)."""
        length = table.get("seq_len", fields["seq_len"].default)
        batch = table.get("batch_tokens", fields["batch_tokens"].default)
        if not isinstance(length, int) or not isinstance(batch, int) or length < 1:
            return 0  # the stage's model says what is wrong with it
        path = f"{stage}.batch_tokens"
        if batch % length and self.origins.get(path, "size").startswith("size"):
            table["batch_tokens"] = max(1, round(batch / length)) * length
            self.origins[path] = "derived from seq_len"
        return length

    def _build(self, cls: type[M], values: dict[str, Any], prefix: str) -> M:
        for key in values:
            if key not in cls.model_fields:
                raise self._unknown(key, prefix, list(cls.model_fields))
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            path = prefix + ".".join(str(part) for part in first["loc"])
            reason = first["msg"].removeprefix("Value error, ").rstrip(".")
            if not first["loc"]:
                where = prefix[:-1] or "recipe"
                raise FullarcError(f"{where} ({self.origin(where)}): {reason}.") from None
            value = f" = {first['input']!r}" if not isinstance(first["input"], dict) else ""
            raise FullarcError(f"{path}{value} ({self.origin(path)}): {reason}.") from None

    def _unknown(self, key: str, prefix: str, known: list[str]) -> FullarcError:
        origin = self.origin(prefix + key)
        hint = _suggest(key, known, prefix) or f" Known here: {', '.join(known)}."
        return FullarcError(f"{origin}: {prefix}{key} is not a setting.{hint}")


def _is_table(path: str) -> bool:
    """True for tables that layers merge into; a setting that is itself a table (mix, teachers) is replaced whole."""
    return path in SECTIONS or path == "stages" or (path.startswith("stages.") and path.count(".") == 1)


def _suggest(key: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(str(key), list(known), n=1)
    return f" Did you mean {prefix}{close[0]}?" if close else ""


def _lookup(table: dict[str, Any], key: str, what: str) -> Any:
    if key not in table:
        raise FullarcError(f"{what} does not exist.{_suggest(key, table)}", f"Known: {', '.join(table)}.")
    return table[key]


def _check(recipe: Recipe, layers: _Layers) -> None:
    """What no single section can see: lengths against positions, teachers against the arc, fast head widths."""
    net = recipe.model
    if net.qk_head_dim != net.v_head_dim:
        raise FullarcError(
            f"model.qk_nope_head_dim + qk_rope_head_dim = {net.qk_nope_head_dim} + {net.qk_rope_head_dim} must equal "
            f"model.v_head_dim = {net.v_head_dim}: PyTorch's fast attention needs equal widths.",
        )
    if recipe.engine.url and recipe.engine.dtype != EngineSettings().dtype:
        raise FullarcError(
            f"engine.dtype = '{recipe.engine.dtype}' ({layers.origin('engine.dtype')}) is for our own engine, but "
            f"engine.url names another ({layers.origin('engine.url')}).",
            "Start that one in this precision, or leave engine.url empty.",
        )
    positions = recipe.model.max_position_embeddings
    limits: list[tuple[str, int]] = [
        ("model.index_topk", recipe.model.index_topk),
        ("engine.max_len", recipe.engine.max_len),
    ]
    for name, stage in recipe.stages.items():
        if isinstance(stage, LMStage):
            limits.append((f"stages.{name}.seq_len", stage.seq_len))
            _check_parallel(name, stage, net, layers)
        if isinstance(stage, SFT) and stage.qat_bits and stage.qat_group:
            for size in ("hidden_size", "moe_intermediate_size"):
                if getattr(net, size) % stage.qat_group:
                    raise FullarcError(
                        f"stages.{name}.qat_group = {stage.qat_group} ({layers.origin(f'stages.{name}.qat_group')}) "
                        f"does not divide model.{size} = {getattr(net, size)}."
                    )
        if isinstance(stage, RLStage):
            limits.append((f"stages.{name}.max_len", stage.max_len))
            if stage.max_len > recipe.engine.max_len:
                where = f"stages.{name}.max_len = {stage.max_len} ({layers.origin(f'stages.{name}.max_len')})"
                raise FullarcError(f"{where} exceeds engine.max_len = {recipe.engine.max_len}.")
        if isinstance(stage, Distil):
            origin = layers.origin(f"stages.{name}.teachers")
            if not stage.teachers:
                raise FullarcError(
                    f"stages.{name}.teachers ({origin}) is empty.", "Put an RL stage before it in arc."
                )
            for kind, teacher in stage.teachers.items():
                if teacher not in recipe.arc[: recipe.arc.index(name)]:
                    raise FullarcError(
                        f"stages.{name}.teachers.{kind} = '{teacher}' ({origin}) is not an earlier stage of the arc."
                    )
    for path, value in limits:
        if value > positions:
            raise FullarcError(
                f"{path} = {value} ({layers.origin(path)}) exceeds model.max_position_embeddings = {positions} "
                f"({layers.origin('model.max_position_embeddings')})."
            )


def _check_parallel(name: str, stage: LMStage, net: ModelConfig, layers: _Layers) -> None:
    """Whether the model can be divided as a stage says."""
    count, ways = stage.processes, stage.parallel
    if count == 1:
        return
    where = f"stages.{name}.processes = {count} ({layers.origin(f'stages.{name}.processes')})"
    parts = len(net.index_groups) + (2 if stage.mtp_steps else 1)
    if ways == "pp" and count > parts:
        raise FullarcError(
            f"{where}: a pipeline of model.num_hidden_layers = {net.num_hidden_layers} has at most {parts} stages."
        )
    if ways == "fsdp2+ep" and net.n_routed_experts % count:
        raise FullarcError(f"{where} does not divide model.n_routed_experts = {net.n_routed_experts}.")
    if ways == "cp" and net.gqa_kv_heads:
        raise FullarcError(
            f"stages.{name}.parallel = 'cp' ({layers.origin(f'stages.{name}.parallel')}) shares latents, which the "
            f"grouped-query attention of model.gqa_kv_heads = {net.gqa_kv_heads} has none of.",
            "Choose another `parallel`, or gqa_kv_heads = 0.",
        )
