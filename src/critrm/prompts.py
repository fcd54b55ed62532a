"""Renders the texts that models read, from `templates/*.md` (Appendix A).

Every wording is a file, so that it can be read, replaced and hashed: a template's version is its content hash. What is
put into a template is data: it is never rendered a second time, never escaped, and any character passes through.
"""

import functools
import hashlib
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


def render_conversation(messages: tuple[Message, ...]) -> str:
    r"""The paper's plain form: `User: ...\n\nChatbot: ...\n\nUser: ...` (Appendix A)."""
    return "\n\n".join(f"{LABELS[message.role]}: {message.content}" for message in messages)


def critique_messages(
    prompt: tuple[Message, ...], completion: str, *, template: str | Path | Template = "critique"
) -> tuple[Message, ...]:
    """What the critic is sent: one user message with the conversation and one completion (section 3.1, Appendix A).

    Raises:
        ConfigError: the template cannot be used.
    """
    if not isinstance(template, Template):
        template = load_template(template, needs=("conversation", "response"))
    text = render_template(template, conversation=render_conversation(prompt), response=completion)
    return (Message("user", text),)


def reward_segments(prompt: tuple[Message, ...], completion: str, critique: str) -> tuple[str, str, str]:
    """The text that a reward model over a base model reads, in three segments (section 3.2, footnote 1).

    Args:
        prompt: the conversation so far.
        completion: the response to be scored.
        critique: the critique of that response; blank for none.

    Returns:
        Prompt, completion and critique text; concatenated, they are what is read. The last is empty without a critique.
    """
    conversation = render_conversation(prompt)
    prompt_text = f"{conversation}\n\nChatbot:" if conversation else "Chatbot:"
    critique = critique.strip()
    critique_text = "\n\n" + render_template(_intro(), critique=critique) if critique else ""
    return prompt_text, " " + completion.rstrip(), critique_text


@functools.cache
def _intro() -> Template:
    return load_template("critique_intro", needs=("critique",))
