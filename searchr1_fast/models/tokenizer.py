"""Text to ids and back, for any Hugging Face `tokenizer.json`.

Tags are ordinary text: nothing here adds special tokens.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer

from searchr1_fast.files import read_object, write_object
from searchr1_fast.models.weights import resolve

SETTINGS, GENERATION = "tokenizer_config.json", "generation_config.json"


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character that stands for one in a byte-level BPE vocabulary (the GPT-2 table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TextTokenizer:
    """A `tokenizers.Tokenizer` with exact token bytes, what ends a turn, and an optional chat template.

    `eos_ids` are all the tokens that end a turn: the tokenizer's own, and those that generation_config.json lists.
    `eos_id` is the first of them, or None. `settings` and `generation` are what tokenizer_config.json and
    generation_config.json said; `save` passes them on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token: str | None = None,
        chat_template: str | None = None,
        more_eos_ids: Sequence[int] = (),
        settings: Mapping[str, Any] = MappingProxyType({}),
        generation: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.backend = tokenizer
        self.eos_token = eos_token
        own = [] if eos_token is None else [tokenizer.token_to_id(eos_token)]
        self.eos_ids = tuple(dict.fromkeys(i for i in (*own, *more_eos_ids) if i is not None))
        self.eos_id = self.eos_ids[0] if self.eos_ids else None
        self.chat_template = chat_template
        self._settings, self._generation = dict(settings), dict(generation)  # dicts can be copied and pickled
        self._is_byte_level = '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str()).get("decoder"))
        self._added = {i: token.content.encode() for i, token in tokenizer.get_added_tokens_decoder().items()}

    @functools.cached_property
    def start_text(self) -> str:
        """What the model was trained to see before every text: Llama's "<|begin_of_text|>"; "" for Qwen."""
        plain = self.backend.encode("a", add_special_tokens=False).ids
        whole = self.backend.encode("a", add_special_tokens=True).ids
        return self.decode(whole[: whole.index(plain[0])])

    @functools.cached_property
    def vocab_size(self) -> int:
        """All ids are below this; a model's embedding may be larger."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())  # there may be gaps

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """Return the ids of the text alone, with no special tokens added.

        `special_tokens`: read "<|im_start|>" as the token it names, as a chat template means it. Otherwise text is
        text: a passage that holds "<|endoftext|>" must not end a turn.
        """
        self.backend.encode_special_tokens = not special_tokens
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, prompt: str, question: str) -> list[int]:
        """Encode a prompt, reading special tokens in its template as the tokens they name, and in its question as text.

        The two cannot be encoded apart, as one token may hold the end of one and the beginning of the other. If the
        question is nothing but a special token, that token is read as text in the template as well.
        """
        if not any(special in question for special in self._specials):
            return self.encode(prompt, special_tokens=True)
        question = question.strip()  # as chat templates do
        pieces = [""]  # text and special tokens, alternating
        for number, part in enumerate(prompt.split(question)):
            first, *rest = self._split_at_specials(part)
            pieces[-1] += first if number == 0 else question + first
            pieces += rest
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            ids += [self.backend.token_to_id(piece)] if number % 2 else self.encode(piece)
        return ids

    @functools.cached_property
    def _specials(self) -> list[str]:
        """The texts of special tokens, longer ones first."""
        tokens = self.backend.get_added_tokens_decoder().values()
        return sorted((token.content for token in tokens if token.special), key=len, reverse=True)

    def _split_at_specials(self, text: str) -> list[str]:
        """Split into text, special token, text, …; it begins and ends with a text, which may be empty."""
        return re.split(f"({'|'.join(map(re.escape, self._specials))})", text)

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of the ids, with special tokens spelled out."""
        return self.backend.decode(list(token_ids), skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token adds to the text; b"" for an id that the vocabulary does not have."""
        if token_id in self._added:  # spelled out as it is, whatever the alphabet
            return self._added[token_id]
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if not self._is_byte_level:
            # A decoder may strip the leading blank of a first token; after an anchor it cannot.
            anchor = self.encode("a")
            return self.decode([*anchor, token_id]).removeprefix(self.decode(anchor)).encode()
        alphabet = _byte_alphabet()
        return bytes(alphabet[character] for character in token)

    def apply_chat_template(self, text: str) -> str:
        """Render the text as one user turn, followed by the opening of the assistant's turn.

        ValueError if the model directory has no chat template, or one that does not render.
        """
        return self._render([{"role": "user", "content": text}], add_generation_prompt=True)

    def template_end_ids(self) -> tuple[int, ...]:
        """Return the special token that the chat template puts after what an assistant said; () if it puts none.

        Base models need it: Qwen2.5's have a template with "<|im_end|>" after every turn, but list only "<|endoftext|>"
        as an end of generation, and so write the user's next turn as well.
        """
        said = "what an assistant said"
        turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": said}]
        _, found, behind = self._render(turns, add_generation_prompt=False).rpartition(said)
        end = next((special for special in self._specials if found and behind.lstrip().startswith(special)), None)
        return () if end is None else (self.backend.token_to_id(end),)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if self.chat_template is None:
            raise ValueError("the model's directory has no chat template; set prompt.chat_template=false")
        import jinja2.sandbox  # comes with transformers; needed only here

        # A template is code from wherever the model came from: it must reach nothing but its arguments.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_template_error
        names = {"bos_token": self.start_text, "eos_token": self.eos_token or "", "tools": None, "documents": None}
        try:
            template = environment.from_string(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **names)
        except (jinja2.TemplateError, TypeError) as error:  # Python's own, where values do not go together
            raise ValueError(f"the model's chat template does not render: {error}") from error

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, and generation_config.json if something ends a turn.

        What else these files said in the directory that was read (a padding token, say) is written again.
        """
        self.backend.save(str(directory / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | self._settings
        settings.pop("auto_map", None)  # names code in files that are not copied
        settings["eos_token"] = self._settings.get("eos_token") or self.eos_token
        if self.start_text:
            settings["bos_token"] = self._settings.get("bos_token") or self.start_text
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        write_object(directory / SETTINGS, settings)
        if self.eos_ids:
            write_object(directory / GENERATION, self._generation | {"eos_token_id": list(self.eos_ids)})


def _raise_template_error(message: str) -> None:
    raise ValueError(f"the chat template says: {message}")


def load_tokenizer(directory: Path | str, for_chat: bool = False) -> TextTokenizer:
    """Read a Hugging Face directory's tokenizer, or a built-in one's. ValueError for a file that is missing or broken,
    and for an end of turns that is no token.

    `for_chat`: prompts will go through its chat template, so what ends a turn in the template ends a turn.
    """
    directory = resolve(directory) if str(directory).startswith("builtin:") else Path(directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no tokenizer.json; save the tokenizer with transformers' save_pretrained")
    settings = _read_if_there(directory / SETTINGS)
    generation = _read_if_there(directory / GENERATION)
    eos, listed = settings.get("eos_token"), generation.get("eos_token_id")
    eos = eos["content"] if isinstance(eos, dict) else eos
    listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer ({error}); copy it again") from error
    if eos is not None and backend.token_to_id(eos) is None:
        raise ValueError(f"{directory / SETTINGS} ends turns with {eos!r}, and tokenizer.json has no such token")
    if unknown := [one for one in listed if not isinstance(one, int) or backend.id_to_token(one) is None]:
        raise ValueError(f"{directory / GENERATION} ends turns with {unknown[0]}, and tokenizer.json has no such id")
    options = {"settings": settings, "generation": generation}
    tokenizer = TextTokenizer(backend, eos, _chat_template(directory, settings), listed, **options)
    if not for_chat:
        return tokenizer
    return TextTokenizer(backend, eos, tokenizer.chat_template, [*listed, *tokenizer.template_end_ids()], **options)


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"  # where transformers 5 puts it
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    return template


def _read_if_there(path: Path) -> dict[str, Any]:
    """Read an object; an empty one if there is no file."""
    return read_object(path) if path.is_file() else {}
