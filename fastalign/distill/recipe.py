"""A recipe: teacher, student and a list of stages; a YAML file and back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .plain import RecipeError, collected, from_plain, read_entries, to_plain
from .stages import Data, Stage, stage_from_plain
from .terms import RECORDED_TERMS


@dataclass(frozen=True)
class Cache:
    """The teacher's recorded targets, which `fastalign cache` writes and training reads instead of it.

    Attributes:
        path: a folder; each stage has one in it.
        top_k: how many of the likeliest tokens are kept at each position before a labelled token; all
            others are one bucket.
        entries: how many of the largest entries of each row of an attention map are kept; None: all.
        dtype: of stored probabilities and maps.
    """

    path: str
    top_k: int = 64
    entries: int | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("top_k", "entries"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: at least 1")


@dataclass(frozen=True)
class Models:
    """Where the two models come from, and how the student reads the image.

    Attributes:
        teacher, student: folders or hub names of standard checkpoints.
        processor: None: the student's.
        taf: teacher's adapter fetch, "linear" or "mlp"; None: the student's own projector.
        teacher_dtype: the type that the teacher's weights are loaded in.
        teacher_bits: 8 or 4: quantised by bitsandbytes; None: not.
        trust_remote_code: run code that a checkpoint brings along.
        cache: train from the teacher's recorded targets; None: run the teacher.
    """

    teacher: str
    student: str
    processor: str | None = None
    taf: Literal["linear", "mlp"] | None = None
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    student_dtype: Literal["float32", "bfloat16"] = "float32"
    teacher_bits: Literal[8, 4] | None = None
    trust_remote_code: bool = False
    cache: Cache | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything that ``fastalign distill`` runs.

    Attributes:
        output: the run's folder: one folder a stage, ``final`` the student, ``summary.json``.
        cpu: run on the CPU even where there is a GPU.
        threads: of torch on a CPU; None: torch's own choice.
        pictures: samples whose attention is drawn when a stage ends; 0: none.
    """

    models: Models
    output: str
    stages: tuple[Stage, ...]
    data: Data | None = None
    seed: int = 0
    cpu: bool = False
    threads: int | None = None
    pictures: int = 4
    folder: str = field(default=".", compare=False)

    def __post_init__(self) -> None:
        if self.pictures < 0:
            raise ValueError(f"pictures is {self.pictures}; allowed: at least 0")

    def data_of(self, stage: Stage) -> Data:
        data = stage.data or self.data
        assert data is not None  # checked when the recipe was read
        return data


_KEYS = ("models", "output", "data", "seed", "cpu", "threads", "pictures", "defaults", "stages")


def recipe_from_plain(values: Any, folder: Path = Path(".")) -> Recipe:
    """The recipe that plain values describe; relative paths are relative to ``folder``.

    ``defaults`` are entries of every stage that does not have them.

    Raises:
        RecipeError: what is wrong, with its place.
    """
    if not isinstance(values, dict):
        raise RecipeError(f"the recipe is a {type(values).__name__}; allowed: a mapping")
    problems = [
        f"the recipe has an entry {name!r}; allowed: {', '.join(_KEYS)}"
        for name in values
        if name not in _KEYS
    ]
    rest = {name: values[name] for name in _KEYS if name in values}
    stages, defaults = rest.pop("stages", None), rest.pop("defaults", None) or {}
    with collected(problems):
        recipe = from_plain(Recipe, {**rest, "stages": [], "folder": str(folder)}, "recipe")
    with collected(problems):
        defaults = _readable(defaults, problems)
    read = []
    if not isinstance(stages, list) or not stages:
        problems.append("stages is not a list of at least one stage")
    elif isinstance(defaults, dict):
        for i, stage in enumerate(stages):
            with collected(problems):
                read.append(stage_from_plain(stage, defaults, f"stages[{i}]"))
    if problems:
        raise RecipeError(*problems)
    recipe = replace(recipe, stages=tuple(read))
    names = [stage.name for stage in read]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"two stages are called {name!r}; allowed: different names")
        if not name or "/" in name or name.startswith("."):
            raise RecipeError(f"a stage is called {name!r}; allowed: a name for a folder")
    for i, stage in enumerate(read):
        if stage.data is None and recipe.data is None:
            raise RecipeError(f"stages[{i}] has no data and the recipe has none; allowed: either")
        if recipe.data_of(stage).streaming and stage.steps is None:
            raise RecipeError(
                f"stages[{i}] has streaming data and no steps, and how long a stream is nobody knows; "
                "allowed: steps: a number"
            )
        live = stage.losses.live_terms
        if recipe.models.cache is not None and live:
            raise RecipeError(
                f"stages[{i}].losses has {live} and models.cache is given; allowed with a cache: "
                f"{', '.join(RECORDED_TERMS)}"
            )
    return recipe


def _readable(defaults: Any, problems: list[str]) -> dict[str, Any]:
    """The defaults without the entries that are wrong, so that no stage repeats what they are."""
    if not isinstance(defaults, dict):
        raise RecipeError(f"defaults is {defaults!r}; allowed: a mapping")
    preset = {name: defaults[name] for name in ("preset",) if name in defaults}
    given, wrong = read_entries(
        Stage, {name: value for name, value in defaults.items() if name not in preset}, "defaults"
    )
    problems += wrong
    return preset | {name: defaults[name] for name in given}


def load_recipe(path: Path) -> Recipe:
    """Reads a YAML file.

    Raises:
        RecipeError: no such file, no YAML, or what is wrong in it.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{path} is no YAML: {error}") from None
    try:
        return recipe_from_plain(values, path.parent)
    except RecipeError as error:
        raise RecipeError(*(f"{path}: {problem}" for problem in error.problems)) from None


def recipe_to_plain(recipe: Recipe) -> dict[str, Any]:
    """Mappings, lists and scalars; ``recipe_from_plain`` gives the recipe back."""
    plain = to_plain(recipe)
    del plain["folder"]
    return plain  # type: ignore[no-any-return]


def resolve(recipe: Recipe, path: str) -> Path:
    """A path of the recipe: relative ones are relative to the recipe's own folder."""
    return Path(path) if Path(path).is_absolute() else Path(recipe.folder) / path
