"""What is reported if vLLM is missing or is not the tested version."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest

from searchr1_fast.rollout import vllm_names
from searchr1_fast.rollout.vllm_names import MEMBERS, TESTED, check_members, find_vllm, missing_names


class EngineArgs:
    def __init__(self, model, seed=0): ...


class LLM:
    def sleep(self, level): ...


@pytest.fixture
def install(monkeypatch):
    """version -> a package with vLLM's name, that version and a few names, in place of vLLM."""

    def put(version: str) -> None:
        for name, values in {
            "vllm": {"__version__": version, "LLM": LLM, "__path__": []},
            "vllm.engine": {"__path__": []},
            "vllm.engine.arg_utils": {"EngineArgs": EngineArgs},
        }.items():
            module = ModuleType(name)
            module.__dict__.update(values)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(vllm_names, "NAMES", {"vllm:LLM.sleep": ("level",)})

    return put


@pytest.mark.parametrize("version", [TESTED[-1], f"{TESTED[-1]}+cu130"])
def test_the_tested_release_is_taken_in_silence(install, version):
    install(version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_vllm(["model", "seed"]).__version__ == version


def test_another_release_that_has_every_name_is_warned_of(install):
    install("9.1.0")
    with pytest.warns(UserWarning, match=rf"vLLM 9.1.0 is installed, and {TESTED[-1]} was tested"):
        assert find_vllm(["model"]).__version__ == "9.1.0"


def test_names_that_a_release_lacks_are_named_all_of_them(install, monkeypatch):
    install("9.1.0")
    names = {"vllm:LLM.sleep": ("level", "mode"), "vllm:LLM.wake_up": ("tags",), "vllm.gone:Thing": ()}
    monkeypatch.setattr(vllm_names, "NAMES", names)
    with pytest.raises(ValueError, match="rollout.engine=native") as raised:
        find_vllm(["model", "block_size"])
    missing = "vllm.LLM.sleep(mode=), vllm.LLM.wake_up, vllm.gone.Thing, vllm.engine.arg_utils.EngineArgs(block_size=)"
    expected = f"vLLM 9.1.0, which is installed, lacks {missing}; install {TESTED[-1]}, which this was tested"
    assert expected in str(raised.value)


def test_a_release_whose_own_needs_are_not_there_is_no_release_without_names(install, monkeypatch):
    install("9.1.0")
    broken = ModuleType("vllm")

    def lazy(name):
        raise ImportError("cannot import name 'Thing' from 'transformers'")

    broken.__dict__.update(__version__="9.1.0", __path__=[], __getattr__=lazy)
    monkeypatch.setitem(sys.modules, "vllm", broken)
    with pytest.raises(ValueError, match="vllm cannot be imported .*'Thing' from 'transformers'"):
        find_vllm()


def test_without_vllm_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="vllm cannot be imported.*rollout.engine=native"):
        find_vllm()


def test_names_are_looked_up_with_what_they_take():
    names = {"json:dumps": ("indent", "sort_keys"), "json:JSONDecoder.decode": (), "json:loads": ("colour",)}
    assert missing_names(names) == ["json.loads(colour=)"]


def test_members_that_an_engine_lacks_are_named():
    last = SimpleNamespace(shutdown=print, model_executor=SimpleNamespace(shutdown=print))
    core = SimpleNamespace(engine_core=last, _finalizer=SimpleNamespace(detach=print))
    check_members(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core)))
    del core._finalizer, last.model_executor
    with pytest.raises(ValueError, match="rollout.engine=native") as raised:
        check_members(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core)))
    assert f"lacks vllm.LLM().{MEMBERS[0]}, vllm.LLM().{MEMBERS[2]}; install" in str(raised.value)
