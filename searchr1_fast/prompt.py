"""Turn a question into the prompt's text."""

from __future__ import annotations

from searchr1_fast.config import PromptConfig
from searchr1_fast.models import TextTokenizer
from searchr1_fast.types import Question

# Named templates; any other `prompt.template` is itself the template.
TEMPLATES = {
    "plain": "Question: {question}\n",
    # The protocol of the Search-R1 paper (arXiv 2503.09516, table 1) in words of this project's own. It shows no
    # complete answer: the original's example ("Beijing") was scored as the answer of models that gave none.
    "search_r1": (
        "Answer the question below. Whenever you get new information, first reason inside <think> and </think>. "
        "If a fact is missing, ask the search engine with <search> your query </search>; what it finds comes back "
        "between <information> and </information>. Search as often as you need. When nothing is missing, write the "
        "bare answer, without explanation, between the two answer tags <answer> and </answer>.\n"
        "Question: {question}\n"
    ),
}


class PromptBuilder:
    """Turns questions into prompts. ValueError for a template without `{question}`, or a missing chat template."""

    def __init__(self, config: PromptConfig, tokenizer: TextTokenizer) -> None:
        self.template = TEMPLATES.get(config.template, config.template)
        if "{question}" not in self.template:
            raise ValueError(
                f"prompt.template: {config.template!r} has no {{question}} and is none of {', '.join(TEMPLATES)}"
            )
        self.chat_template = config.chat_template
        self.tokenizer = tokenizer
        if self.chat_template:
            tokenizer.apply_chat_template("")  # fail now, not at the first rollout

    def __call__(self, question: Question) -> str:
        """The prompt's text; `rollout` encodes it once."""
        text = self.template.replace("{question}", question.text)  # not format(): questions hold braces
        # A chat template brings its own start text.
        return self.tokenizer.apply_chat_template(text) if self.chat_template else self.tokenizer.start_text + text
