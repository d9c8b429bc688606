"""``fastalign recipes`` as a user runs it."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from fastalign import RECIPES, __version__
from fastalign.commands import build_app

runner = CliRunner()


def test_lists_every_recipe() -> None:
    result = runner.invoke(build_app(), ["recipes"])
    assert result.exit_code == 0
    for name in RECIPES:
        assert name in result.output


def test_shows_one_recipe_in_full() -> None:
    result = runner.invoke(build_app(), ["recipes", "compodistill_code"])
    assert result.exit_code == 0
    assert "sink_sigma" in result.output
    assert "pooled" in result.output


def test_json_gives_the_specs() -> None:
    result = runner.invoke(build_app(), ["recipes", "--json"])
    listed = json.loads(result.output)
    assert {name: entry["spec"] for name, entry in listed.items()} == {
        name: recipe.spec.to_dict() for name, recipe in RECIPES.items()
    }


def test_an_unknown_name_is_a_usage_error() -> None:
    result = runner.invoke(build_app(), ["recipes", "nothing"])
    assert result.exit_code == 2
    assert "allowed: compodistill" in result.output


def test_version_and_help() -> None:
    assert runner.invoke(build_app(), ["--version"]).output.strip() == __version__
    result = runner.invoke(build_app(), ["recipes", "--help"])
    assert result.exit_code == 0
    assert "named objectives" in result.output
