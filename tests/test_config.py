"""The configuration: overrides, mistakes named with the nearest key, round trips, and no key that nobody reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

import searchr1_fast
from searchr1_fast.config import Config, DataSet, Section, WorldConfig, load_config

PACKAGE = Path(searchr1_fast.__file__).parent


def test_defaults_without_a_file():
    assert load_config(None) == Config()


def test_file_then_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  num_steps: 7\nrun:\n  name: from-file\n")
    config = load_config(path, ["train.num_steps=9", "algorithm.normalize_std=false"])
    assert config.train.num_steps == 9
    assert config.run.name == "from-file"
    assert config.algorithm.normalize_std is False


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("optimizer.learning_rate=1e-4", lambda c: c.optimizer.learning_rate, 1e-4),
        ("optimizer.learning_rate=3E-5", lambda c: c.optimizer.learning_rate, 3e-5),
        ("optimizer.betas=[0.9, 0.95]", lambda c: c.optimizer.betas, (0.9, 0.95)),
        ("run.name=a=b", lambda c: c.run.name, "a=b"),
        ("prompt.template='Q: {question}\\n'", lambda c: c.prompt.template, "Q: {question}\\n"),
        ("eval.sets.unseen.world.seed=7", lambda c: c.eval.sets["unseen"].world.seed, 7),
        ("model.path=/a/b c", lambda c: c.model.path, "/a/b c"),
    ],
)
def test_override_values(override, read, value):
    assert read(load_config(None, [override])) == value


@pytest.mark.parametrize(
    ("override", "unknown", "nearest"),
    [
        ("train.num_step=3", "train.num_step", "num_steps"),
        ("trian.num_steps=3", "trian", "train"),
        ("rollout.temprature=1", "rollout.temprature", "temperature"),
        ("data.world.num_entites=5", "data.world.num_entites", "num_entities"),
        ("eval.sets.unseen.world.sed=5", "eval.sets.unseen.world.sed", "seed"),
    ],
)
def test_unknown_key_names_the_nearest(override, unknown, nearest):
    with pytest.raises(ValueError, match="unknown key") as caught:
        load_config(None, [override])
    assert f"unknown key `{unknown}`: did you mean `{nearest}`?" in str(caught.value)


def test_unknown_key_far_from_all_lists_what_there_is():
    with pytest.raises(ValueError, match="known here: path, dtype"):
        load_config(None, ["model.zzzzzz=1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.num_steps=0"], "`train.num_steps`.*greater than or equal to 1"),
        (["train.num_steps=many"], "`train.num_steps`.*integer"),
        (["rollout.engine=vlm"], "`rollout.engine`.*'native'"),
        (["algorithm.group_size=1"], "algorithm.group_size: GRPO compares samples"),
        (["algorithm.kl_in_reward=true"], "put the KL in the loss"),
        (["data.world.seed=1", "data.questions=q.jsonl"], "exactly one of `world` and `questions`"),
        (["data.world.seed=1", "data.corpus=c.jsonl"], "brings its own corpus"),
        (["train.num_steps"], "is not of the form section.key=value"),
        (["=3"], "is not of the form section.key=value"),
        (["run.seed=1", "run.seed.x=3"], "is a value, not a section"),
        (["run.name=[unclosed"], "not valid YAML"),
    ],
)
def test_bad_values_say_which_key_and_why(overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_config(None, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("train: [", "not valid YAML"), ("- 1\n", "must hold sections")])
def test_bad_file(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="no configuration file"):
        load_config(tmp_path / "none.yaml")


def test_empty_file_is_the_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert load_config(path) == Config()


def test_yaml_round_trip(tmp_path):
    overrides = ["eval.sets.unseen.world.split=eval", "optimizer.betas=[0.8, 0.9]", "optimizer.learning_rate=1e-7"]
    config = load_config(None, [*overrides, "prompt.template='<é> {question}: #x'"])
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config
    assert set(yaml.safe_load(config.to_yaml())["train"]) == set(type(config.train).model_fields)  # defaults included


def test_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Config().train.num_steps = 3


def holders(section: type[Section]) -> set[str]:
    """What a variable or attribute that holds this section is called in the package."""
    own = {key for key, field in Config.model_fields.items() if field.annotation is section}
    return own | {"config"} | {DataSet: {"data"}, WorldConfig: {"world"}}.get(section, set())


def attributes_read(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(holder, attribute) of every `holder.attribute` and `x.holder.attribute`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            yield getattr(node.value, "id", None) or node.value.attr, node.attr


def test_every_key_is_read_somewhere():
    """A key that nobody reads promises what the program does not do."""
    read = {
        pair
        for path in PACKAGE.rglob("*.py")
        if path.name != "config.py"
        for pair in attributes_read(ast.parse(path.read_text(encoding="utf-8")))
    }
    if ("config", "run_directory") in read:  # the property that reads both
        read |= {("run", "directory"), ("run", "name")}
    unread = [
        f"{section.__name__}.{key}"
        for section in Section.__subclasses__()
        for key in section.model_fields
        if not any((holder, key) in read for holder in holders(section))
    ]
    assert unread == []


def test_every_shipped_recipe_loads():
    recipes = sorted((PACKAGE.parent / "configs").glob("*.yaml"))
    if not recipes:
        pytest.skip("no configs/ beside the package: an installed copy, not a checkout")
    for recipe in recipes:
        load_config(recipe)


def test_an_evaluation_set_needs_a_name_that_plots_and_keys_can_carry():
    with pytest.raises(ValueError, match=r"`eval`: sets: the name 'dev/small' may hold letters"):
        load_config(None, ["eval={sets: {dev/small: {questions: x.jsonl}}}"])
