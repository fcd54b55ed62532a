"""What the tests of live scoring and of the server share."""

from critrm.live_critic import LiveCritic
from critrm.llm import Sampling, ScriptedChat
from critrm.reward_model import Reads, RewardModel
from critrm.types import CritiquedPair, Message, PreferencePair

PROMPT = (Message("user", "What is 2 plus 2?"),)
READS = Reads(critic="scripted", max_length=256, critique_dropout=0.1)


def critique_of(text: str) -> str:
    """What the scripted critic says: something else for each completion."""
    response = text.partition("Chatbot: ")[2].partition("\n\nPlease")[0]
    return f"The response says {response!r}. It is {len(response)} long."


def scripted_critic() -> ScriptedChat:
    return ScriptedChat(lambda request: critique_of(request.messages[0].content))


def make_critic(chat, cache, *, max_tokens=256, **options) -> LiveCritic:
    return LiveCritic(chat, critic="scripted", sampling=Sampling(max_tokens=max_tokens), cache=cache, **options)


def offline(model: RewardModel, completions, critiques, prompt=PROMPT) -> list[float]:
    """As `critrm evaluate` scores."""
    rewards = []
    for i, (text, critique) in enumerate(zip(completions, critiques, strict=True)):
        pair = PreferencePair(id=str(i), prompt=prompt, chosen=text, rejected=text)
        item = CritiquedPair(pair=pair, critic="scripted", chosen_critique=critique, rejected_critique=critique)
        rewards.append(model.score([item])[0].chosen)
    return rewards
