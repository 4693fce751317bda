"""Token bytes are exact, special tokens are read only where they are meant, and a directory survives a round trip."""

import json
import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from searchr1_fast.config import PromptConfig
from searchr1_fast.models import TextTokenizer, load_tokenizer
from searchr1_fast.prompt import PromptBuilder
from searchr1_fast.types import Question

TEXTS = ["<think> the cat sat </think>\n<search> the cat </search>", "naïve café – 東京 🎈", "1837 and 1838"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    backend.add_tokens([AddedToken("<é>", special=False)])
    template = "{% for m in messages %}<|end|>{{ m.role }}: {{ m.content }}{% endfor %}|"
    return TextTokenizer(backend, eos_token="<|end|>", chat_template=template)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_token_bytes_add_up_to_the_text(tokenizer, text):
    token_ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == text.encode()
    assert tokenizer.decode(token_ids) == text


def test_added_tokens_have_the_bytes_they_spell(tokenizer):
    (added,) = tokenizer.encode("<é>")
    assert tokenizer.token_bytes(added) == "<é>".encode()
    assert tokenizer.token_bytes(tokenizer.eos_id) == b"<|end|>"
    assert tokenizer.token_bytes(10**6) == b""


def test_special_tokens_are_text_unless_they_are_meant(tokenizer):
    text = "a passage with <|end|> in it"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.eos_id in tokenizer.encode(text, special_tokens=True)
    assert tokenizer.eos_id not in tokenizer.encode(text)  # the switch is not permanent


@pytest.mark.parametrize("chat_template", [False, True])
@pytest.mark.parametrize("text", ["who is <|end|>?", " a <|end|> ", "who <é> <|end|><|end|>", "who is the cat"])
def test_special_tokens_of_a_question_are_text_and_those_of_its_template_are_not(tokenizer, chat_template, text):
    build = PromptBuilder(PromptConfig(template="the {question} cat", chat_template=chat_template), tokenizer)
    prompt = build(Question("q", text, ("x",), "test"))
    token_ids = tokenizer.encode_prompt(prompt, text)
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == prompt.encode()
    assert token_ids.count(tokenizer.eos_id) == int(chat_template)
    if chat_template:
        assert token_ids[0] == tokenizer.eos_id
        assert token_ids[1:] == tokenizer.encode(prompt.removeprefix("<|end|>"))
    else:
        assert token_ids == tokenizer.encode(prompt)


def test_round_trip_through_a_directory(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert (again.eos_id, again.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
    assert again.apply_chat_template("hi") == "<|end|>user: hi|"


def test_everything_that_ends_a_turn_is_read_and_kept(tokenizer, tmp_path):
    """As in Qwen's directories: the tokenizer names one token, and the generation settings list another before it."""
    tokenizer.save(tmp_path)
    (added,) = tokenizer.encode("<é>")
    settings = tmp_path / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": [added, tokenizer.eos_id]}))
    both = load_tokenizer(tmp_path)
    assert both.eos_ids == (tokenizer.eos_id, added)
    both.save(tmp_path)
    assert load_tokenizer(tmp_path).eos_ids == both.eos_ids
    settings.write_text(json.dumps({"eos_token_id": added}))
    assert load_tokenizer(tmp_path).eos_ids == both.eos_ids
    settings.unlink()
    assert load_tokenizer(tmp_path).eos_ids == (tokenizer.eos_id,)
    assert TextTokenizer(tokenizer.backend).eos_ids == ()


QWEN = (
    "{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = (  # as published: the turns of user and assistant end alike
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start|>' + m['role'] + '\\n\\n' + m['content'] | trim + '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant\\n\\n' }}{%- endif %}"
)


@pytest.mark.parametrize(
    ("template", "end"),
    [(QWEN, "<|im_end|>"), (LLAMA, "<|eot|>"), ("{{ messages[-1].content }} <|end|>", "<|end|>"),
     ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None), ("<|end|>{{ messages[-1].content }}", None),
     ("<|im_end|>{{ messages[0].content }}", None)],
)  # fmt: skip
def test_a_chat_ends_as_its_template_has_it(tokenizer, tmp_path, template, end):
    """Qwen2.5's base models have a template, but none of their files says that "<|im_end|>" ends anything."""
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|start|>", "<|eot|>"])
    TextTokenizer(backend, "<|end|>", template).save(tmp_path)
    plain, chat = load_tokenizer(tmp_path), load_tokenizer(tmp_path, for_chat=True)
    assert plain.eos_ids == (tokenizer.eos_id,)
    ends = () if end is None else (backend.token_to_id(end),)
    assert chat.template_end_ids() == ends
    assert chat.eos_ids == tuple(dict.fromkeys((tokenizer.eos_id, *ends)))
    chat.save(tmp_path)  # so an export ends turns as its model learned to
    assert load_tokenizer(tmp_path).eos_ids == chat.eos_ids


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages", "does not render"),
        ("{{ strftime_now('%d') }}", "'strftime_now' is undefined"),
        ("{{ raise_exception('no system turn') }}", "the chat template says: no system turn"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),  # a way to whatever the process may do
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{{ messages[0].content + 1 }}", "does not render"),
    ],
)
def test_a_template_that_does_not_render_is_one_sentence(tokenizer, template, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        TextTokenizer(tokenizer.backend, "<|end|>", template).apply_chat_template("hi")


def test_a_template_is_given_the_names_that_transformers_gives(tokenizer):
    template = "{% if tools is not none or documents is not none %}?{% endif %}{{ messages[0].content + eos_token }}"
    assert TextTokenizer(tokenizer.backend, "<|end|>", template).apply_chat_template("hi") == "hi<|end|>"


def test_it_can_be_sent_to_another_process(tokenizer):
    again = pickle.loads(pickle.dumps(TextTokenizer(tokenizer.backend, "<|end|>")))
    assert (again.encode("the cat"), again.eos_ids) == (tokenizer.encode("the cat"), tokenizer.eos_ids)


def test_one_of_several_templates_is_the_default(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path).apply_chat_template("hi") == "D"


def test_what_a_directory_says_beside_is_handed_on(tokenizer, tmp_path):
    """For example the padding token, without which transformers cannot batch two prompts."""
    for name in ("from", "to"):
        (tmp_path / name).mkdir()
    tokenizer.save(tmp_path / "from")
    more = {"pad_token": "<|end|>", "model_max_length": 77, "auto_map": {"AutoTokenizer": ["code.py", None]}}
    eos = {"content": "<|end|>", "special": True, "__type": "AddedToken"}
    for file, values in (("tokenizer_config", more | {"eos_token": eos}), ("generation_config", {"temperature": 0.7})):
        path = tmp_path / "from" / f"{file}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    load_tokenizer(tmp_path / "from").save(tmp_path / "to")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "to")
    assert (theirs.pad_token, theirs.eos_token, theirs.model_max_length) == ("<|end|>", "<|end|>", 77)
    assert len({len(ids) for ids in theirs(["the cat", "the cat sat"], padding=True).input_ids}) == 1
    assert json.loads((tmp_path / "to" / "generation_config.json").read_text())["temperature"] == 0.7
    assert "auto_map" not in json.loads((tmp_path / "to" / "tokenizer_config.json").read_text())


def test_the_token_before_every_text_is_found_kept_and_put_before_prompts(tokenizer, tmp_path):
    """As in Llama's directories: the post-processor adds it, and the chat template asks for it by name."""
    assert tokenizer.start_text == ""
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(["<|begin|>"])
    begin = backend.token_to_id("<|begin|>")
    backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}|"
    TextTokenizer(backend, "<|end|>", template).save(tmp_path)
    llama = load_tokenizer(tmp_path)
    assert llama.start_text == "<|begin|>"
    assert llama.encode("the cat") == tokenizer.encode("the cat")  # turns and observations do not start a new text
    question = Question("1", "the cat", ("a",), "test")
    for chat in (False, True):
        prompt = PromptBuilder(PromptConfig(template="Q: {question}", chat_template=chat), llama)(question)
        assert prompt == "<|begin|>Q: the cat" + "|" * chat
        token_ids = llama.encode(prompt, special_tokens=True)
        assert (token_ids[0], token_ids.count(begin)) == (begin, 1)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token, theirs("the cat").input_ids[0]) == ("<|begin|>", begin)


def test_built_in_names_are_resolved():
    assert load_tokenizer("builtin:base").eos_token == "<|endoftext|>"


def test_mistakes_are_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        TextTokenizer(tokenizer.backend).apply_chat_template("hi")
