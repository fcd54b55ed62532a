"""The critics known by name (`critics.yaml`), their settings made complete, and the chat behind them (section 4.2)."""

import difflib
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from critrm.batch_llm import BatchChat
from critrm.budget import Price
from critrm.config import CriticConfig, CritiqueConfig, Section, data_path, read_yaml
from critrm.errors import ConfigError, CriticError
from critrm.llm import KEY_VARIABLE, Chat, OpenAIChat, Sampling
from critrm.prompts import load_template
from critrm.store import refuse_same_folders
from critrm.types import Message

OURS = Path(__file__).with_name("critics.yaml")


class Server(Section):
    """Where critics are: an OpenAI-compatible API, or this process."""

    base_url: str | None = None
    """None is $OPENAI_BASE_URL, else OpenAI."""
    key_variable: str = Field(default="", pattern=r"^([A-Z_][A-Z0-9_]*)?$")
    """The environment variable that holds the API key; empty where none is needed."""
    in_process: bool = False


class NamedCritic(Section):
    """A critic as `critics.yaml` describes it."""

    endpoint: str
    model: str
    context: int | None = Field(default=None, gt=0)
    """Tokens that prompt and critique may have together."""
    parameters: str = ""
    price_in: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """US dollars per million tokens read; unknown, or hosted by yourself, when None."""
    price_out: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    batch_price_share: float | None = Field(default=None, gt=0, le=1)
    """Price of a batch over that of single calls; no Batch API when None."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=256, gt=0)
    licence: str = ""

    @model_validator(mode="after")
    def _both_prices(self) -> "NamedCritic":
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("price_in and price_out go together")
        return self


class Critics(Section):
    """What a critics file holds."""

    endpoints: dict[str, Server] = Field(default_factory=dict)
    critics: dict[str, NamedCritic] = Field(default_factory=dict)


def load_critics(file: str | Path | None = None) -> Critics:
    """The named critics: ours, then the user's own, then those of a file; the later ones override by name.

    Args:
        file: a critics file, as `--critics` names it.

    Raises:
        ConfigError: a file cannot be used; names the file and the key.
    """
    files = [OURS]
    if (own := user_file()).is_file():
        files.append(own)
    if file:
        files.append(data_path(str(file)))
    endpoints: dict[str, Server] = {}
    critics: dict[str, NamedCritic] = {}
    for path in files:
        found = read_yaml(Critics, path, what="critics file")
        endpoints |= found.endpoints
        critics |= found.critics
        for name, critic in found.critics.items():
            if critic.endpoint not in endpoints:
                known = ", ".join(endpoints)
                raise ConfigError(f"{path}: critics.{name}.endpoint: no {critic.endpoint!r}; there are: {known}")
    return Critics(endpoints=endpoints, critics=critics)


def user_file() -> Path:
    """Where a user's own critics are looked for."""
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(folder).expanduser() / "critrm" / "critics.yaml"


def complete_critic(name: str, given: CriticConfig, *, critics: Critics, backbone: str = "") -> CriticConfig:
    """Fill in what a critic's settings leave open: from the named critic, or from the backbone for `self_critique`.

    What is given stays. Another model than the named critic's has no known price, and another base URL is not sent
    the named endpoint's key.

    Args:
        name: the critic's name; one of `critics`, or a free one when `given` says which model.
        given: the settings.
        critics: the named critics.
        backbone: the reward model's backbone.

    Raises:
        ConfigError: no critic has this name, or the settings do not fit together.
    """
    settled = given
    if given.self_critique:
        if not backbone:
            raise ConfigError(f"critic {name}: self_critique needs a backbone")
        served = given.base_url or backbone.startswith(("embedded:", "local:"))
        model = backbone if served else f"local:{backbone}"
        settled = given.model_copy(update={"self_critique": False, "model": model})
    elif name in critics.critics and not given.files:
        settled = _with_defaults(name, given, critics)
    elif not (given.model or given.files):
        close = difflib.get_close_matches(name, critics.critics, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(close)}? " if close else ""
        raise ConfigError(
            f"no critic is called {name!r}. {hint}`critrm critics` lists them; "
            "for another model, say which (--model, or `model:` in a recipe)."
        )
    check_samples(settled.samples, settled.temperature)
    return settled


def complete_critics(stage: CritiqueConfig, *, backbone: str) -> dict[str, CriticConfig]:
    """All critics of a recipe, complete: whatever is wrong with one shows before the first is called.

    Raises:
        ConfigError: a critic is not known, or there is a limit and no price.
    """
    known = load_critics(stage.critics_file)
    refuse_same_folders(stage.arms)
    found = {
        name: complete_critic(name, critic, critics=known, backbone=backbone) for name, critic in stage.critics.items()
    }
    for name, critic in found.items():
        if stage.max_cost is not None and not critic.files and price_of(critic) is None:
            raise no_price(name)
    return found


def _with_defaults(name: str, given: CriticConfig, critics: Critics) -> CriticConfig:
    named = critics.critics[name]
    server = critics.endpoints[named.endpoint]
    own = {field: getattr(given, field) for field in given.model_fields_set if field != "model" or given.model}
    values: dict[str, Any] = named.model_dump(include={"model", "temperature", "top_p", "max_tokens"})
    if server.in_process and not named.model.startswith(("embedded:", "local:")):
        values["model"] = f"local:{named.model}"
    values["key_variable"] = ""
    if given.base_url is None and not given.in_process:
        values |= {"base_url": server.base_url, "key_variable": server.key_variable}
    if given.model in ("", named.model) and named.price_in is not None and named.price_out is not None:
        share = 1.0
        if given.batch:
            if named.batch_price_share is None:
                raise ConfigError(f"critic {name}: no Batch API is known for it; leave out --batch")
            share = named.batch_price_share
        values |= {"price_in": named.price_in * share, "price_out": named.price_out * share}
    return CriticConfig(**(values | own))


def check_samples(samples: int, temperature: float) -> None:
    """Several critiques of one completion have to be drawn.

    Raises:
        ConfigError: they would all be the same.
    """
    if samples > 1 and temperature == 0:
        raise ConfigError(
            f"samples: {samples} critiques per completion at temperature 0 would be {samples} times the same one, "
            "and each would be paid for: set a temperature, such as 0.7"
        )


def price_of(critic: CriticConfig) -> Price | None:
    """A complete critic's price; None when it is unknown. A model in this process costs nothing per token."""
    if critic.price_in is not None and critic.price_out is not None:
        return Price(critic.price_in, critic.price_out)
    return Price(0.0, 0.0) if critic.in_process else None


def no_price(name: str) -> ConfigError:
    """The error of a limit on the cost of a critic whose price is unknown."""
    return ConfigError(
        f"critic {name} has no known price, so a limit cannot be kept: add price_in and price_out in the recipe or a "
        "critics file, or give --price-in and --price-out (US dollars per million tokens; 0 for a model of your own)"
    )


def sampling_of(critic: CriticConfig) -> Sampling:
    """How a critic's replies are drawn."""
    return Sampling(temperature=critic.temperature, top_p=critic.top_p, max_tokens=critic.max_tokens, seed=critic.seed)


def open_chat(critic: CriticConfig, *, batch_state: Path | None = None) -> Chat:
    """The chat behind a complete critic; nothing is sent or loaded yet.

    Args:
        critic: the settings.
        batch_state: the file that notes the batches under way, for `batch`.

    Raises:
        ConfigError: the settings do not fit together.
        CriticError: a key is needed, and the environment holds none.
    """
    if critic.engine == "ray":
        return _ray_chat(critic)
    if critic.in_process:
        if critic.base_url or critic.batch:
            raise ConfigError(f"{critic.model} runs in this process: leave out --base-url and --batch")
        from critrm.local_llm import LocalChat

        return LocalChat(critic.model.removeprefix("local:"))
    variable = critic.key_variable
    if variable and critic.base_url and not os.environ.get(variable):
        raise CriticError(f"no API key for {critic.model}: set {variable}")
    # A named critic that needs no key is sent none; a model that only the user names may need OpenAI's.
    variable = KEY_VARIABLE if variable is None else variable
    if critic.batch:
        if batch_state is None:
            raise ConfigError("batches need a file to note them in")
        url = ",".join(critic.base_url) if isinstance(critic.base_url, tuple) else critic.base_url
        return BatchChat(critic.model, base_url=url, key_variable=variable, state=batch_state)
    return OpenAIChat(
        critic.model,
        base_url=critic.base_url,
        key_variable=variable,
        concurrency=critic.concurrency,
        timeout=critic.timeout,
        requests_per_minute=critic.requests_per_minute,
        tokens_per_minute=critic.tokens_per_minute,
    )


def check_critic(critic: CriticConfig) -> None:
    """Find out what would stop a complete critic, before another critic of the recipe is paid.

    Raises:
        ConfigError: its template or its settings cannot be used.
        CriticError: its key is not set.
    """
    if not critic.files:
        load_template(critic.template, needs=("conversation", "response"))
        open_chat(critic, batch_state=Path("unused"))


def _ray_chat(critic: CriticConfig) -> Chat:
    from critrm.ray_llm import RayChat

    def share(limit: float | None) -> float | None:
        return None if limit is None else limit / critic.workers

    each = critic.model_copy(
        update={
            "engine": "local",
            "requests_per_minute": share(critic.requests_per_minute),
            "tokens_per_minute": share(critic.tokens_per_minute),
        }
    )
    open_chat(each)  # what is wrong with the settings shows here, not on a worker
    return RayChat(
        functools.partial(open_chat, each),
        model=critic.model.removeprefix("local:"),
        n_workers=critic.workers,
        block_size=1024 if critic.in_process else 4 * critic.concurrency,
    )


def token_counter(critic: CriticConfig) -> Callable[[tuple[Message, ...]], int] | None:
    """Counts the tokens of a prompt, for a model in this process whose files are here; None for any other."""
    if not critic.in_process:
        return None
    from critrm import models
    from critrm.encoding import encode_chat

    name = critic.model.removeprefix("local:")
    folder = models.cached_folder(name) if name.startswith(models.PREFIX) else Path(name).expanduser()
    if not folder.is_dir():
        return None
    tokenizer = models.load_tokenizer(name)
    return lambda messages: len(encode_chat(tokenizer, messages))


def command(*, critics: Path | None = None) -> None:
    """List the critics that `--critic` knows by name: where they are, what they cost, whether their key is set.

    Args:
        critics: a file of your own critics; those in ~/.config/critrm/critics.yaml are always listed.
    """
    console = Console()
    console.print(critics_table(load_critics(critics), environment=os.environ, wide=console.width >= 110))
    console.print(f"Your own critics: {user_file()}, or --critics FILE.", soft_wrap=True, markup=False, highlight=False)


def critics_table(critics: Critics, *, environment: Mapping[str, str], wide: bool = True) -> Table:
    """The named critics for the terminal; of a key, only whether it is set.

    Args:
        critics: the critics.
        environment: where the keys are looked for.
        wide: whether a model's name has a column of its own; else it stands below the critic's.
    """
    table = Table(title="Critics", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, caption_justify="left")
    for title in ("critic", *(["model"] if wide else []), "endpoint"):
        table.add_column(title, overflow="fold")
    for title in ("context", "$ in", "$ out"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("key", no_wrap=True)
    unset: dict[str, None] = {}
    for name, critic in critics.critics.items():
        variable = critics.endpoints[critic.endpoint].key_variable
        key = Text("not needed", "dim") if not variable else Text("yes", "green")
        if variable and not environment.get(variable):
            unset[variable] = None
            key = Text("no", "red")
        # As `Text`, so that brackets in a name are not read as markup.
        named = [Text(name), Text(critic.model)] if wide else [Text.assemble(name, "\n", (critic.model, "dim"))]
        context = f"{critic.context:,}" if critic.context else ""
        cells = (critic.endpoint, context, _dollars(critic.price_in), _dollars(critic.price_out))
        table.add_row(*named, *map(Text, cells), key)
    caption = "$: US dollars per million tokens, as of the dates in critics.yaml: check your provider's page."
    table.caption = Text(caption + (f"\nKeys that are not set: {', '.join(unset)}." if unset else ""))
    return table


def _dollars(price: float | None) -> str:
    return "" if price is None else f"{price:g}" if price < 0.1 else f"{price:.2f}"
