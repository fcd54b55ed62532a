"""The table of verbs; each verb's code is the `command` function of its stage's module."""

import os
import sys

from cyclopts import App, Parameter

from critrm import __version__
from critrm.errors import CritrmError

VERBS = {
    "preferences": (
        "critrm.preferences:command",
        "Read preference pairs in any of the field's formats and check them.",
    ),
    "critics": ("critrm.critics:command", "The critics known by name: endpoint, price, and whether their key is set."),
    "critique": ("critrm.critique:command", "Stage 1: have a critic write a critique of every completion."),
    "overlap": ("critrm.overlap:command", "Find test prompts that are in the training data."),
    "quality": ("critrm.quality:command", "Check critiques for flaws and leaked grades before training."),
    "augment": ("critrm.augment:command", "Stage 2: join pairs and critiques into one pair set for all arms."),
    "train": ("critrm.train:command", "Stage 3: train a reward model on augmented pairs."),
    "evaluate": ("critrm.evaluate:command", "Stage 4: score a benchmark with a reward model."),
    "judge": ("critrm.judge:command", "Stage 5: have a model rate every completion, without or with a critique."),
    "metacritique": ("critrm.metacritique:command", "Stage 6: precision, recall and F1 of critiques."),
    "attribute": ("critrm.attribute:command", "Which sentences of critiques moved the reward."),
    "rank": ("critrm.rank:command", "Best of n: order the completions of each prompt by a reward model."),
    "doctor": ("critrm.doctor:command", "Check a backbone, its tokenizer and a data set before money is spent."),
    "run": ("critrm.pipeline:command", "Run the stages of a recipe in order, skipping what is finished."),
    "study": ("critrm.study:command", "Stage 7: grids of backbones, critics and sizes; what a critique is worth."),
    "cross": ("critrm.cross:command", "What a finished run's models lose on another critic's critiques."),
    "report": ("critrm.report:command", "Stage 8: a study's tables and figures, and one page with its pairs."),
    "serve": ("critrm.serve:command", "Stage 9: critique and score over HTTP."),
    "push": (
        "critrm.push:command",
        "A model or critiqued pairs for the hub, with a card; nothing leaves without --upload.",
    ),
    "demo": ("critrm.demo:command", "The whole method on the bundled pairs with the embedded model."),
}
MODEL_VERBS = {
    "get": ("critrm.models:command_get", "Put an embedded model's weights into the user's cache."),
    "list": ("critrm.models:command_list", "List the embedded models and whether they are in the cache."),
}
CACHE_VERBS = {
    "info": ("critrm.critique_cache:command_info", "Say what a cache of answered calls holds, by critic."),
    "merge": ("critrm.critique_cache:command_merge", "Take over the answered calls of other caches."),
}
EXTRAS = {
    "accelerate": "train",
    "datasets": "data",
    "datasketch": "eval",
    "fastapi": "serve",
    "gguf": "embedded",
    "huggingface_hub": "train",
    "matplotlib": "report",
    "peft": "train",
    "prometheus_client": "serve",
    "pyarrow": "data",
    "ray": "ray",
    "safetensors": "train",
    "sklearn": "eval",
    "tensorboard": "train",
    "torch": "train",
    "transformers": "train",
    "uvicorn": "serve",
    "vaderSentiment": "eval",
}
"""Optional package -> the extra that installs it."""


def _make_app() -> App:
    app = App(
        name="critrm",
        help="Reward models that read critiques.",
        version=__version__,
        suppress_keyboard_interrupt=False,
        # "nothing" as a default goes without saying
        default_parameter=Parameter(
            show_default=lambda value: None if value in ("", ()) else value, negative_iterable=()
        ),
    )
    models = App(name="models", help="The embedded models, whose weights come from the package index.")
    cache = App(name="cache", help="The store of answered critic calls: what it holds, and merging two of them.")
    for target, verbs in ((app, VERBS), (models, MODEL_VERBS), (cache, CACHE_VERBS)):
        for verb, (function, summary) in verbs.items():
            # By import string: a verb's module, and torch with it, is loaded only when that verb runs.
            target.command(function, name=verb, help=summary)
    app.command(models)
    app.command(cache)
    return app


app = _make_app()


def _fail(message: str, code: int) -> int:
    from rich.console import Console
    from rich.text import Text

    # As `Text`, so that brackets in a user's data are not read as markup; unwrapped, so that paths can be copied.
    Console(stderr=True).print(Text(message, style="red"), soft_wrap=True)
    return code


def _missing_extra(error: BaseException | None) -> str:
    verb = next(iter(sys.argv[1:]), "")
    if not verb.startswith("-") and verb not in (names := (*VERBS, "models", "cache")):
        # Looking for a verb that resembles it, cyclopts imports them all.
        return f"Unknown command {verb!r}. There are: {', '.join(names)}."
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").partition(".")[0]) in EXTRAS:
            return f"This needs the package {package!r}. Install it with: pip install 'critrm[{EXTRAS[package]}]'"
        error = error.__cause__
    return ""


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a defect of critrm, 2 cannot be done as asked, 130 interrupted."""
    try:
        app(sys.argv[1:])
    except CritrmError as error:
        sys.exit(_fail(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(_fail("Interrupted. Run the same command again to go on.", 130))
    except BrokenPipeError:
        # Whoever read our output (`head`, say) has seen enough; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ImportError as error:
        message = _missing_extra(error)
        if not message:
            raise
        sys.exit(_fail(message, 2))
