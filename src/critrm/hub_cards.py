"""The cards of what is pushed to the hub: what it is, what was measured, and how it is used."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from critrm import __version__
from critrm.metrics import n_scored
from critrm.prompts import reward_segments, with_critique
from critrm.report_markup import escaped
from critrm.result_tables import arms_markdown, markdown_table
from critrm.results import baseline_notes
from critrm.types import NO_CRITIC, CritiquedPair, EvalResult, Interval, Message

if TYPE_CHECKING:
    from critrm.reward_model import Reads

PAPER = "[Improving Reward Models with Synthetic Critiques](https://arxiv.org/abs/2405.20850)"
MADE_WITH = "Made with critrm"
"""In every card."""
PROMPT = (Message("user", "What is the capital of France?"),)
COMPLETION = "Paris."
CRITIQUE = "Correct and to the point."
CHOSEN_BY = (
    "Strict accuracy: how often the chosen completion has the higher reward; a tie is not right. "
    "[95 % Wilson interval]."
)


def model_card(
    repo: str,
    *,
    licence: str,
    reads: "Reads",
    base_model: str,
    training: Mapping[str, Any],
    critic: Mapping[str, Any],
    results: Mapping[str, EvalResult],
    beside: Mapping[str, Any] | None,
) -> str:
    """A reward model's card.

    Args:
        repo: owner and name on the hub.
        licence: the hub's name of it.
        reads: what the model was trained to read.
        base_model: the backbone's hub id; empty where it has none.
        training: settings by name, as `critrm train` recorded them.
        critic: what is known of the critic: its model, prompt version and sampling.
        results: test set -> result of this very model.
        beside: the results of the whole run, over arms and seeds, where it was one of several.
    """
    from huggingface_hub import EvalResult as HubResult
    from huggingface_hub import ModelCardData

    metrics = [
        HubResult(
            task_type="text-classification",
            task_name="Pairwise preference",
            dataset_type=test,
            dataset_name=result.benchmark if result.benchmark != "Pairs" else test,
            metric_type="accuracy",
            metric_name="strict accuracy",
            metric_value=round(result.overall.accuracy.value, 4),
        )
        for test, result in results.items()
        if result.overall.accuracy
    ]
    facts = ModelCardData(
        license=licence,
        base_model=base_model or None,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["reward-model", "preference", "critrm", *(["critique"] if reads.critic != NO_CRITIC else [])],
        model_name=repo.partition("/")[2],
        eval_results=metrics or None,
    )
    whose = (
        "It reads no critiques."
        if reads.critic == NO_CRITIC
        else f"It reads the response together with a critique of it, written by {_code(reads.critic)}."
    )
    if reads.critic != NO_CRITIC and reads.critique_dropout:
        whose += " It was trained to score responses without a critique, too."
    sections = [
        f"# {escaped(repo.partition('/')[2])}",
        "A reward model: it says how good a response to a prompt is, as one number; only differences between responses "
        f"to the same prompt mean anything. {whose} {MADE_WITH} {__version__} after {PAPER}.",
        "## Results",
        *_results(results),
        *_beside(beside),
        "## What it reads",
        _reading(reads),
        "## How to use it",
        _use(repo, reads),
        "## Training",
        _listed(training),
        *(["## The critic", _listed({"name": reads.critic, **critic})] if reads.critic != NO_CRITIC else []),
        "## What can go wrong",
        _limits(reads),
    ]
    return _card(facts.to_yaml(), sections)


def pairs_card(
    repo: str,
    items: Sequence[CritiquedPair],
    *,
    licence: str,
    split: str,
    critic: Mapping[str, Any],
    beside: Mapping[str, Any] | None,
) -> str:
    """The card of critiqued pairs.

    Args:
        repo: owner and name on the hub.
        items: the pairs, all of one critic.
        licence: the hub's name of it.
        split: the name of their only split.
        critic: what is known of the critic.
        beside: the results of the run that used them.
    """
    from huggingface_hub import DatasetCardData

    n_pairs, critic_name = len(items), items[0].critic
    facts = DatasetCardData(
        license=licence,
        pretty_name=repo.partition("/")[2],
        tags=["preference", "reward-model", "critrm", "trl", *(["critique"] if critic_name != NO_CRITIC else [])],
        size_categories=next(
            label
            for limit, label in ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e99, "n>100K"))
            if n_pairs < limit
        ),
        configs=[{"config_name": "default", "data_files": [{"split": split, "path": f"data/{split}.jsonl"}]}],
    )
    sources = Counter(item.pair.source or "not named" for item in items)
    sections = [
        f"# {escaped(repo.partition('/')[2])}",
        f"{n_pairs} preference pairs"
        + (f" with a critique of each completion, written by {_code(critic_name)}" if critic_name != NO_CRITIC else "")
        + f". {MADE_WITH} {__version__} after {PAPER}.",
        "## Columns",
        "`prompt`, `chosen` and `rejected` are messages (TRL's conversational preference format), `id`, `rating`, "
        "`margin`, `source`, `subset` those of the pairs, empty where they had none. `chosen_critique` and "
        "`rejected_critique` are text, `chosen_score` and `rejected_score` the critic's own scores where it gave some, "
        "`critic` says by whom.",
        "\n".join(markdown_table(["source", "pairs"], [[name, str(n)] for name, n in sources.most_common()])),
        *_beside(beside),
        "## How to use it",
        _use_pairs(repo, split, critic_name),
        *(["## The critic", _listed({"name": critic_name, **critic})] if critic_name != NO_CRITIC else []),
        "## What can go wrong",
        "Critiques are a model's text: they may be wrong, and may repeat what is harmful in a completion. The licence "
        "of the pairs and the terms of the critic's provider both apply.",
    ]
    return _card(facts.to_yaml(), sections)


def _card(metadata: str, sections: Sequence[str]) -> str:
    return f"---\n{metadata.strip()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _code(text: str) -> str:
    """A name of somebody's as inline code, which no character of it can end."""
    return "`" + text.replace("`", "'").replace("\n", " ") + "`"


def _listed(facts: Mapping[str, Any]) -> str:
    lines = [f"- {name.replace('_', ' ')}: {_code(str(value))}" for name, value in facts.items()]
    return "\n".join(lines) if lines else "Not recorded."


def _cell(found: Interval | None) -> str:
    return f"{found.value:.3f} [{found.low:.2f}, {found.high:.2f}]" if found else "-"


def _results(results: Mapping[str, EvalResult]) -> list[str]:
    if not results:
        return ["Not evaluated: nothing is known about how good it is."]
    rows = []
    for test, result in results.items():
        tally = result.overall
        rows.append([test, str(n_scored(tally)), _cell(tally.accuracy), str(tally.n_tie)])
        if len(result.subsets) > 1:
            for subset, each in result.subsets.items():
                rows.append([f"  {subset}", str(n_scored(each)), _cell(each.accuracy), str(each.n_tie)])
    table = "\n".join(markdown_table(["test set", "pairs", "accuracy", "ties"], rows))
    return [table, f"{CHOSEN_BY} These are the numbers of this very model, one seed."]


def _beside(results: Mapping[str, Any] | None) -> list[str]:
    """The whole run's arms, and which of them do not beat a baseline that reads no meaning."""
    if results is None:
        return []
    notes = "\n".join(f"- {escaped(note)}" for note in baseline_notes(results["tests"]))
    title = "### Beside reward models without critiques, and by other critics"
    return [title, arms_markdown(results), *([notes] if notes else [])]


def _reading(reads: "Reads") -> str:
    critique, order = CRITIQUE if reads.critic != NO_CRITIC else "", reads.critique_first
    prompt, completion, critique_text = reward_segments(PROMPT, COMPLETION, critique, critique_first=order)
    text = prompt + (critique_text + completion if order else completion + critique_text)
    where = "behind the prompt in the user's" if order else "part of the assistant's"
    return (
        f"Plain text of up to {reads.max_length} tokens, and no other form:\n\n```text\n{text}\n```\n\n"
        f"The tokenizer's chat template writes this form{f', with the critique {where} message' if critique else ''}. "
        "The reward is read at the last token."
    )


def _use(repo: str, reads: "Reads") -> str:
    reads_critiques = reads.critic != NO_CRITIC
    critique = CRITIQUE if reads_critiques else ""
    read = with_critique(PROMPT, COMPLETION, critique, critique_first=reads.critique_first)
    rows = "\n".join(f'    {{"role": "{message.role}", "content": {message.content!r}}},' for message in read)
    named = f", critic={reads.critic!r}" if reads_critiques else ""
    flag = ' --critic "NAME" --model "MODEL"' if reads_critiques else ""
    beside = (
        " For RewardBench's own script, and for any other that reads pairs, put the critiques into the "
        "messages as above (`critrm.prompts.with_critique` does so)."
        if reads_critiques
        else ""
    )
    beginning = "With critrm, which also has the critiques written by a critic of `critics.yaml`:"
    return f"""{beginning if reads_critiques else "With critrm:"}

```python
from critrm.rl import open_reward_model, trl_reward

reward = trl_reward(open_reward_model("{repo}"{named}))  # reward_funcs of TRL's GRPOTrainer
```

```bash
critrm serve "{repo}"{flag}   # over HTTP, for OpenRLHF, verl and others
```

With transformers alone:

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForSequenceClassification.from_pretrained("{repo}")
messages = [
{rows}
]
text = tokenizer.apply_chat_template(messages, tokenize=False)
with torch.no_grad():
    print(model(**tokenizer(text, return_tensors="pt")).logits.item())
```

As with any classifier of one label: `vllm serve "{repo}" --runner pooling`, `rewardbench --model "{repo}"`.{beside}"""


def _use_pairs(repo: str, split: str, critic: str) -> str:
    lines = f"""```python
from datasets import load_dataset

pairs = load_dataset("{repo}", split="{split}")
```"""
    if critic == NO_CRITIC:
        return lines
    return (
        lines + "\n\nTo train a reward model that reads the critiques, with critrm: download the file, then\n\n"
        f"```bash\ncritrm augment data/{split}.jsonl --critiques data/{split}.jsonl --out arms\n"
        f"critrm train arms/CRITIC.jsonl --backbone BACKBONE --out runs/mine\n```\n\n"
        "With any other trainer: `critrm.prompts.with_critique(prompt, completion, critique)` is the conversation to "
        "train on."
    )


def _limits(reads: "Reads") -> str:
    lines = ["- It prefers what its training pairs prefer, their mistakes included, and can be gamed by a policy."]
    if reads.critic != NO_CRITIC:
        lines += [
            f"- With critiques by anybody but {_code(reads.critic)} its accuracy is not that of the tables "
            "(section 4.2 of the paper).",
            "- A critique is text that it believes: who can write into the critique can move the reward.",
        ]
        if not reads.critique_dropout:
            lines.append("- Without a critique its rewards mean nothing: it was not trained for that.")
    return "\n".join(lines)
