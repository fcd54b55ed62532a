"""Renders the texts that models read, from `templates/*.md` (Appendix A).

Every wording is a file, so that it can be read, replaced and hashed: a template's version is its content hash. What is
put into a template is data: it is never rendered a second time, never escaped, and any character passes through. Only a
line that imitates the rendering (`User: ...`, the closing question) gets a quote mark, as in e-mail: `> User: ...`.
"""

import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from critrm.errors import ConfigError
from critrm.types import Message

TEMPLATES_PATH = Path(__file__).with_name("templates")
LABELS = {"system": "System", "user": "User", "assistant": "Chatbot"}
"""The names of the speakers in the paper's plain rendering."""
BREAKS = "\n\r\v\f\x1c-\x1e\x85\u2028\u2029"
"""What ends a line, as a regular expression's character range; the same as `str.splitlines` knows."""

# Sandboxed, because a template may come with somebody else's recipe.
_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)


@dataclass(frozen=True, slots=True)
class Template:
    """A template's text, under the name or path it was asked for."""

    name: str
    source: str

    @property
    def version(self) -> str:
        """The content hash, 12 hex digits; part of a critique's key."""
        return hashlib.sha256(self.source.encode("utf-8")).hexdigest()[:12]


def load_template(template: str | Path | Template, *, needs: tuple[str, ...] = ()) -> Template:
    """Read a template of ours by name (`critique`), or any file by its path (`my/critique.md`, `./mine`).

    Args:
        template: the name or path; a template that is already loaded is checked and returned.
        needs: variables that the template has to use.

    Raises:
        ConfigError: there is no such template, it is not valid, or it lacks a variable.
    """
    if not isinstance(template, Template):
        template = Template(str(template), _read_source(template))
    try:
        found = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(template.source))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"template {template.name}, line {error.lineno}: {error.message}") from None
    missing = [f"{{{{ {name} }}}}" for name in needs if name not in found]
    if missing:
        raise ConfigError(f"template {template.name} lacks {' and '.join(missing)}: put it where the text belongs")
    return template


def _read_source(template: str | Path) -> str:
    path = Path(template)
    if isinstance(template, str) and not path.suffix and path.name == template:
        path = TEMPLATES_PATH / f"{template}.md"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        ours = ", ".join(sorted(file.stem for file in TEMPLATES_PATH.glob("*.md")))
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"template {template}: {reason}. Give a path to a file, or one of: {ours}.") from None


def template_version(template: str | Path | Template) -> str:
    """The content hash of a template, 12 hex digits."""
    return load_template(template).version


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(source)


def render_template(template: str | Path | Template, **values: object) -> str:
    """Fill a template in.

    Raises:
        ConfigError: the template cannot be loaded, or uses a variable that has no value here.
    """
    loaded = load_template(template) if not isinstance(template, Template) else template
    try:
        return _compile(loaded.source).render(values)
    except jinja2.TemplateError as error:
        known = ", ".join(sorted(values))
        raise ConfigError(f"template {loaded.name}: {error.message}. It can use: {known}.") from None


def quote_imitations(text: str, *, template: Template | None = None) -> str:
    """Text of a user or model, with `> ` before each line that imitates what the templates say; all else as it is.

    These are lines that begin with a speaker's label (`User:`, `Chatbot:`, `System:`), with `Critique:`, with the
    closing question or with the sentence that introduces a critique to a reward model; and with the labels and
    sentences of `template`, where it is given.
    """
    # A line break in front, so that the first line is found as the others are.
    return _imitations(template.source if template else "").sub(r"\1> \2", "\n" + text)[1:]


@functools.lru_cache(maxsize=64)
def _imitations(source: str) -> re.Pattern[str]:
    """Matches a line break and the white space before what is imitated."""
    labels = [f"{label}[ \t]*[:：]" for label in (*LABELS.values(), "Critique")]
    sources = (source, load_template("critique").source, _intro("critique_intro").source)
    fixed = [beginning for each in sources for beginning in _fixed_beginnings(each)]
    # Invisible characters before a label hide it from a pattern, but not from a model.
    space = f"(?:[^\\S{BREAKS}]|[\\x00-\\x08\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff])*"
    return re.compile(f"([{BREAKS}])({space})(?={'|'.join([*labels, *dict.fromkeys(fixed)])})")


def _fixed_beginnings(source: str) -> list[str]:
    """How a template's own lines begin, as regular expressions: labels, sentences by six words, short lines whole."""
    found = []
    for line in source.splitlines():
        literal = re.split(r"\{[{%#]", line)[0].strip()
        words = literal.split()
        if literal.endswith(":"):
            found.append(re.escape(literal))
        elif len(words) >= 4:
            found.append("(?i:" + r"\s+".join(re.escape(word) for word in words[:6]) + ")")
        elif re.search(r"\w", literal):
            found.append(f"{re.escape(literal)}[ \t]*(?:$|[{BREAKS}])")
    return found


def render_conversation(messages: tuple[Message, ...], *, template: Template | None = None) -> str:
    r"""The paper's plain form: `User: ...\n\nChatbot: ...\n\nUser: ...` (Appendix A); imitations of it are quoted."""
    turns = ((LABELS[message.role], quote_imitations(message.content, template=template)) for message in messages)
    return "\n\n".join(f"{label}: {content}" for label, content in turns)


def critique_messages(
    prompt: tuple[Message, ...], completion: str, *, template: str | Path | Template = "critique"
) -> tuple[Message, ...]:
    """What the critic is sent: one user message with the conversation and one completion (section 3.1, Appendix A).

    Raises:
        ConfigError: the template cannot be used.
    """
    if not isinstance(template, Template):
        template = load_template(template, needs=("conversation", "response"))
    conversation = render_conversation(prompt, template=template)
    response = quote_imitations(completion, template=template)
    text = render_template(template, conversation=conversation, response=response)
    return (Message("user", text),)


def reward_segments(
    prompt: tuple[Message, ...], completion: str, critique: str, *, critique_first: bool = False
) -> tuple[str, str, str]:
    """The text that a reward model over a base model reads, in three segments (section 3.2, footnote 1).

    Args:
        prompt: the conversation so far.
        completion: the response to be scored.
        critique: the critique of that response; blank for none.
        critique_first: the critique stands between prompt and completion, not behind the completion as in the paper.

    Returns:
        Prompt, completion and critique text; concatenated in their order, they are what is read. The last is empty
        without a critique.
        Lines of any of them that imitate this form are quoted, see `quote_imitations`.
    """
    conversation = render_conversation(prompt)
    completion_text, critique_text = " " + quote_imitations(completion.rstrip()), ""
    if critique.strip():
        # Its first line stands behind the introduction, so it cannot be taken for a line of ours.
        first, *rest = critique.strip().splitlines(keepends=True)
        intro = _intro("critique_intro_before" if critique_first else "critique_intro")
        critique_text = "\n\n" + render_template(intro, critique=first + quote_imitations("".join(rest)))
    if critique_first:
        # The label goes with the completion: what both completions share is the conversation alone.
        return conversation, f"\n\nChatbot:{completion_text}", critique_text
    return f"{conversation}\n\nChatbot:" if conversation else "Chatbot:", completion_text, critique_text


REWARD_CHAT_TEMPLATE = """\
{%- set labels = {'user': 'User', 'assistant': 'Chatbot', 'system': 'System'} -%}
{%- for message in messages -%}
{{- '' if loop.first else '\\n\\n' -}}
{%- if loop.last and message['role'] == 'assistant' -%}
{{- 'Chatbot: ' + message['content'].rstrip() -}}
{%- else -%}
{{- labels[message['role']] + ': ' + message['content'] -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n\\nChatbot:' -}}{%- endif -%}
"""
"""The text of `reward_segments` as a chat template, so that tools which apply one read what was trained on.

A critique is part of the last message but one or of the last, as `with_critique` puts it. Lines that imitate the form
are not quoted: a chat template cannot do that.
"""


def reward_chat_template(cue: str = "") -> str:
    """`REWARD_CHAT_TEMPLATE` with the words at whose end a reward model is asked for the reward, if there are any."""
    return REWARD_CHAT_TEMPLATE + (f"{{{{- {json.dumps(cue)} -}}}}\n" if cue else "")


def with_critique(
    prompt: tuple[Message, ...], completion: str, critique: str, *, critique_first: bool = False
) -> tuple[Message, ...]:
    """A conversation that holds a critique in its messages' texts, for tools that know no critiques.

    It stands behind the completion in the assistant's message; or behind the prompt's last message, for a reward model
    that reads critiques first.
    """
    _, _, text = reward_segments((), completion, critique, critique_first=critique_first)
    if not critique_first:
        return (*prompt, Message("assistant", completion.rstrip() + text))
    *earlier, last = prompt
    return (*earlier, Message(last.role, last.content + text), Message("assistant", completion))


@functools.cache
def _intro(name: str) -> Template:
    return load_template(name, needs=("critique",))
