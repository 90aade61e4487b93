"""The prompt formats of the World and G1 models: one table for training documents and for `wkv.inference.Chat`.

    chat         System: {system}\\n\\nUser: {question}\\n\\nAssistant: {answer}\\n\\nUser: {question}\\n\\nAssistant:
    question     Question: {question}\\n\\nAnswer: {answer}\\n\\nQuestion: {question}\\n\\nAnswer:
    instruction  Instruction: {question}\\n\\nInput: {input}\\n\\nResponse:

"chat" is that of all World models and, with thoughts (`THINK`), of the G1 models; the others are older World formats.
A blank line ends a message and therefore never stands inside one; `clean` sees to that. No blank follows the last
label: the model writes it. Source: RWKV-LM, `RWKV7-G1x-templates.txt`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from wkv.errors import WkvError

SEPARATOR = "\n\n"
# What follows the label of the answer in a prompt. The models were trained to write the closing ">" themselves.
THINK = {"none": "", "fake": " <think>\n</think", "empty": " <think></think", "on": " <think"}
THOUGHT = "<think>"  # how an answer with a thought begins


def clean(text: str) -> str:
    """Text as it may stand inside a message: Unix line ends, no blank lines, nothing around it."""
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n")).strip()


@dataclass(frozen=True)
class Template:
    """A prompt format: the labels that stand before the parts of a conversation.

    Args:
        name: in `TEMPLATES`.
        question: the label of what the model is asked, such as "User:".
        answer: the label of what it writes.
        system: the label of what tells the model how to behave; empty: the format has no place for it.
        input: the label of the material of a question; empty: the material follows the question in a new line.
        thinks: whether models that know the format think before they answer.
    """

    name: str
    question: str
    answer: str
    system: str = ""
    input: str = ""
    thinks: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends an answer, the next question first."""
        return tuple(SEPARATOR + label for label in (self.question, self.system) if label)

    def opening(self, system: str | None) -> str:
        """The beginning that tells the model how to behave; nothing if that is None or blank.

        Raises:
            WkvError: if the format has no place for it.
        """
        if not clean(system or ""):
            return ""
        if not self.system:
            raise WkvError(f"the template {self.name!r} has no system message; leave it out, or use {_CHAT.name!r}")
        return f"{self.system} {clean(system or '')}{SEPARATOR}"

    def turn(self, question: str, input_text: str = "", think: str = "none") -> str:
        """One question, up to where the model's answer begins.

        Args:
            question: what the user says. "(think a bit)" or "(think a lot)" at its end sets how long G1 models think.
            input_text: the material it is about, perhaps none.
            think: "none" leaves it to the model; "on" makes it think first; "fake" and "empty" give it a finished
                thought with nothing in it, with and without a line end.

        Raises:
            WkvError: for an impossible `think`, and for texts that are none or, of questions, blank.
        """
        self.check_think(think)
        for text in (question, input_text):
            if not isinstance(text, str):
                raise WkvError(f"a message must be a text that is not empty, found {type(text).__name__}")
        if not clean(question):
            raise WkvError("a message must be a text that is not empty, found a blank one")
        asked = f"{self.question} {clean(question)}"
        if clean(input_text):
            asked += f"{SEPARATOR}{self.input} {clean(input_text)}" if self.input else f"\n{clean(input_text)}"
        return f"{asked}{SEPARATOR}{self.answer}{THINK[think]}"

    def check_think(self, think: str) -> None:
        """Raise `WkvError` if the format has no such way to ask."""
        if think not in THINK:
            raise WkvError(f"think must be one of {', '.join(THINK)}, found {think!r}")
        if think != "none" and not self.thinks:
            raise WkvError(f"the template {self.name!r} knows no thoughts; use think='none', or {_CHAT.name!r}")


_CHAT = Template("chat", "User:", "Assistant:", system="System:", thinks=True)
TEMPLATES = {
    template.name: template
    for template in (
        _CHAT,
        Template("question", "Question:", "Answer:"),
        Template("instruction", "Instruction:", "Response:", input="Input:"),
    )
}


def find_template(name: str) -> Template:
    """The template of that name. Raises `WkvError` if there is none."""
    if name not in TEMPLATES:
        raise WkvError(f"template must be one of {', '.join(TEMPLATES)}, found {name!r}")
    return TEMPLATES[name]
