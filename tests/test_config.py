"""The configuration: overrides, mistakes named with the nearest key, round trips, and no key that nobody reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

import searchr1_fast
from searchr1_fast.config import Config, DataSet, LoraConfig, OffloadConfig, Section, WorldConfig, load_config

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
        ("train.num_step=3", "train.num_step", "train.num_steps"),
        ("trian.num_steps=3", "trian", "train"),
        ("rollout.temprature=1", "rollout.temprature", "rollout.temperature"),
        ("data.world.num_entites=5", "data.world.num_entites", "data.world.num_entities"),
        ("eval.sets.unseen.world.sed=5", "eval.sets.unseen.world.sed", "eval.sets.unseen.world.seed"),
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
        (["train.num_steps=0"], "`train.num_steps`.*greater than or equal to 1, got 0$"),
        (["train.num_steps=many"], "`train.num_steps`.*integer"),
        (["rollout.engine=vlm"], "`rollout.engine`.*'native'"),
        (["algorithm.group_size=1"], "^algorithm.group_size: GRPO compares samples"),
        (["algorithm.kl_in_reward=true"], "put the KL in the loss"),
        (["checkpoint.best=unseen/em"], "checkpoint.best: `unseen/em` must begin with the name of an evaluation set"),
        (["data.world.seed=1", "data.questions=q.jsonl"], "^`data`: give exactly one .* world, set it to null$"),
        (["eval.sets={dev: {}}"], "^`eval.sets.dev`: give exactly one of `world` and `questions`; .* set it to null$"),
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
    (tmp_path / "demo.yaml").touch()
    with pytest.raises(ValueError, match=r"no configuration file .*/dmeo\.yaml; did you mean .*/demo\.yaml\?$"):
        load_config(tmp_path / "dmeo.yaml")


def write_files(folder: Path, **texts: str) -> Path:
    """Files by name (`_` for `/`), and the path of the last of them."""
    for name, text in texts.items():
        path = folder / f"{name.replace('_', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


def test_what_comes_later_wins_key_by_key(tmp_path):
    path = write_files(
        tmp_path,
        one="train: {num_steps: 1, questions_per_step: 1, num_minibatches: 1, eval_every: 1}\nrun: {name: one}",
        two="train: {questions_per_step: 2, num_minibatches: 2, eval_every: 2}",
        run="extends: [one.yaml, two.yaml]\ntrain: {num_minibatches: 3, eval_every: 3}",
    )
    config = load_config(path, ["train.eval_every=4"])
    train = config.train
    assert (train.num_steps, train.questions_per_step, train.num_minibatches, train.eval_every) == (1, 2, 3, 4)
    assert config.run.name == "one"
    assert train.tokens_per_microbatch == Config().train.tokens_per_microbatch


def test_lists_and_nulls_replace_and_sets_of_evaluation_join(tmp_path):
    path = write_files(
        tmp_path,
        base="data: {world: {hops: [1, 2, 3]}}\nretrieval: {index: x}\noptimizer: {betas: [0.1, 0.2]}\n"
        "eval: {sets: {a: {questions: a.jsonl}}}",
        run="extends: base.yaml\ndata: {world: null, questions: q.jsonl}\nretrieval: {index: null}\n"
        "optimizer: {betas: [0.3, 0.4]}\neval: {sets: {a: {limit: 5}, b: {questions: b.jsonl}}}",
    )
    config = load_config(path)
    assert (config.data, config.retrieval.index) == (DataSet(questions="q.jsonl"), None)
    assert config.optimizer.betas == (0.3, 0.4)
    assert config.eval.sets == {"a": DataSet(questions="a.jsonl", limit=5), "b": DataSet(questions="b.jsonl")}


def test_paths_are_those_of_the_file_that_names_them(tmp_path, monkeypatch):
    path = write_files(
        tmp_path / "somewhere",
        base="run: {name: base, seed: 7}",
        parts_middle="extends: ../base.yaml\nrun: {name: middle}",
        run="extends: parts/middle.yaml",
    )
    monkeypatch.chdir(tmp_path)
    assert (load_config(path).run.name, load_config(path).run.seed) == ("middle", 7)
    absolute = write_files(tmp_path / "elsewhere", run=f"extends: {path}")
    assert load_config(absolute) == load_config(path)


def test_two_files_may_stand_on_the_same_one(tmp_path):
    path = write_files(
        tmp_path, base="run: {seed: 1}", a="extends: base.yaml", b="extends: base.yaml", run="extends: [a.yaml, b.yaml]"
    )
    assert load_config(path).run.seed == 1


def test_files_that_extend_each_other_in_a_ring_are_refused(tmp_path):
    path = write_files(tmp_path, a="extends: b.yaml", b="extends: c.yaml", c="extends: b.yaml", run="extends: a.yaml")
    with pytest.raises(ValueError, match=r"b\.yaml extends itself: b\.yaml -> c\.yaml -> b\.yaml$"):
        load_config(path)
    with pytest.raises(ValueError, match=r"extends itself: own\.yaml -> own\.yaml"):
        load_config(write_files(tmp_path, own="extends: ./own.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: none.yaml", r"no configuration file .*none\.yaml; .*run\.yaml extends it"),
        ("extends: {a: b}", r"run\.yaml: `extends` must be the path of a configuration file, or a list of paths"),
        ("extends: [1]", "`extends` must be the path"),
        ("extends: ''", "`extends` must be the path"),
        ("extends: bad.yaml", r"bad\.yaml must hold sections"),
        ("extend: base.yaml", "unknown key `extend`: did you mean `extends`"),
        (
            "run: {extends: base.yaml}",
            r"unknown key `run\.extends`: known here|unknown key `run\.extends`: did you mean",
        ),
    ],
)
def test_bad_extends(tmp_path, text, message):
    path = write_files(tmp_path, bad="- 1", base="{}", run=text)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_an_override_cannot_extend(tmp_path):
    with pytest.raises(ValueError, match="unknown key `extends`"):
        load_config(None, [f"extends={write_files(tmp_path, base='{}')}"])


def test_a_run_s_own_file_stands_alone(tmp_path):
    config = load_config(write_files(tmp_path, base="run: {seed: 3}", run="extends: base.yaml"))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "base.yaml").unlink()
    assert load_config(tmp_path / "config.yaml") == config


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
    """Names that the package gives to variables and attributes that hold this section."""
    own = {key for key, field in Config.model_fields.items() if field.annotation is section}
    others = {DataSet: "data", WorldConfig: "world", OffloadConfig: "offload", LoraConfig: "lora"}
    return own | {"config"} | ({others[section]} if section in others else set())


def attributes_read(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(holder, attribute) of every `holder.attribute` and `x.holder.attribute`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            yield getattr(node.value, "id", None) or node.value.attr, node.attr


def test_every_key_is_read_somewhere():
    """A key that nothing reads promises what the program does not do."""
    read = {
        pair
        for path in PACKAGE.rglob("*.py")
        if path.name not in ("config.py", "config_sections.py")
        for pair in attributes_read(ast.parse(path.read_text(encoding="utf-8")))
    }
    if ("config", "run_directory") in read:  # a property, which reads both
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
