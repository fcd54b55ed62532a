"""The reward functions of RL trainers: what each trainer passes and expects, batching, and failures that raise."""

import asyncio
import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest

from critrm.critique_cache import CritiqueCache
from critrm.errors import ConfigError, CriticError, DataError
from critrm.live import LiveRewardModel
from critrm.live_critic import LiveCritic
from critrm.llm import Reply, Sampling
from critrm.reward_model import Reads, RewardModel
from critrm.rl import open_reward_model, openrlhf_reward, score_rows, trl_reward, verl_batch_reward, verl_reward
from critrm.types import Message
from scripted_server import Answer, completion, serving

CHAT = [{"role": "user", "content": "2 + 2?"}]
PROMPT = (Message("user", "2 + 2?"),)


@pytest.fixture(scope="module")
def model(tiny_model):
    return RewardModel.from_backbone(str(tiny_model), Reads(critic="c", max_length=400, critique_dropout=0.1), seed=3)


def said(request):
    return "It says " + request.messages[0].content.rpartition("Chatbot: ")[2].partition("\n\nPlease")[0] + "."


@pytest.fixture
def make_live(model, scripted_chat, tmp_path):
    """Makes a live reward model whose critic is scripted; `live.critic.chat.calls` are its calls."""
    cache = CritiqueCache(tmp_path / "critiques.sqlite")
    made = []

    def make(answer=said, *, reads=model, **policy):
        critic = LiveCritic(scripted_chat(answer), critic="c", sampling=Sampling(), cache=cache, retries=0)
        made.append(LiveRewardModel(reads, critic=critic, **policy))
        return made[-1]

    yield make
    for live in made:
        live.close()
    cache.close()


def expected(model, completions, prompt=PROMPT):
    critiques = [f"It says {completion}." for completion in completions]
    return pytest.approx(model.score_completions(prompt, completions, critiques=critiques), abs=1e-4)


def fails_for_5(request):
    return (
        Reply(id=request.id, failure="http 400: no") if "Chatbot: 5" in request.messages[0].content else said(request)
    )


def test_rows_with_one_prompt_are_scored_together(make_live, model):
    live = make_live(fails_for_5, on_failure="without")
    other = (Message("user", "3 + 3?"),)
    scores = asyncio.run(score_rows(live, [PROMPT, other, PROMPT, other], ["4", "6", "5", "7"]))
    assert [score.critique for score in scores] == ["", "It says 6.", "", "It says 7."]
    assert [scores[i].reward for i in (1, 3)] == expected(model, ["6", "7"], other)
    assert [scores[i].reward for i in (0, 2)] == pytest.approx(model.score_completions(PROMPT, ["4", "5"]), abs=1e-4)
    assert live.batcher.stats.n_prompts == 2


def test_trl_gets_a_list_of_rewards_from_text_and_from_messages(make_live, model):
    reward, logged = trl_reward(make_live()), {}
    assert inspect.iscoroutinefunction(reward)
    plain = asyncio.run(reward(["2 + 2?"] * 2, ["4", "5"], completion_ids=[[1], [2]], trainer_state=None))
    assert plain == expected(model, ["4", "5"])
    chat = reward(
        [CHAT] * 2,
        [[{"role": "assistant", "content": "4"}], [{"role": "assistant", "content": [{"type": "text", "text": "5"}]}]],
        log_extra=logged.__setitem__,
        log_metric=logged.__setitem__,
    )
    assert asyncio.run(chat) == plain
    assert logged == {"critique": ["It says 4.", "It says 5."], "critrm/without_critique": 0.0}
    turns = [
        {"role": "assistant", "content": "Hm."},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "4"},
    ]
    later = (*PROMPT, Message("assistant", "Hm."), Message("user", "?"))
    assert asyncio.run(reward([CHAT], [turns])) == expected(model, ["4"], later)


def test_a_failed_critic_is_never_a_number(make_live, model):
    with pytest.raises(CriticError, match="http 400"):
        asyncio.run(trl_reward(make_live(fails_for_5))([CHAT] * 2, ["4", "5"]))
    logged = {}
    lenient = trl_reward(make_live(fails_for_5, on_failure="without"))
    rewards = asyncio.run(lenient([CHAT] * 2, ["4", "5"], log_metric=logged.__setitem__))
    assert rewards == pytest.approx(model.score_completions(PROMPT, ["4", "5"]), abs=1e-4)
    assert logged == {"critrm/without_critique": 1.0}


@pytest.mark.parametrize(
    ("prompt", "said", "field"),
    [
        (CHAT, [{"role": "tool", "content": "x"}], "completion"),
        (CHAT, [{"role": "user", "content": "x"}], "completion"),
        (CHAT, [], "completion"),
        ([{"role": "user", "content": [{"type": "image"}]}], "x", "prompt"),
        (3, "x", "prompt"),
        ([{"role": "user", "content": None}], "x", "prompt"),
    ],
)
def test_what_trl_passes_and_nobody_can_read_is_an_error(make_live, prompt, said, field):
    with pytest.raises(DataError, match=f"field '{field}'"):
        asyncio.run(trl_reward(make_live())([prompt], [said]))


def test_verl_calls_once_per_response_and_the_calls_are_batched(make_live, model):
    import numpy as np

    live = make_live()
    live.batcher.wait = 0.5  # the machine may be busy
    compute_score = verl_reward(live)
    assert inspect.iscoroutinefunction(compute_score)

    async def step():
        extra = {"prompt": np.array(CHAT, dtype=object), "index": 3}  # as Parquet files give it
        calls = (
            compute_score(data_source="d", solution_str=text, ground_truth="4", extra_info=extra) for text in ("4", "5")
        )
        return await asyncio.gather(*calls)

    found = asyncio.run(step())
    assert [each["score"] for each in found] == expected(model, ["4", "5"])
    assert [(each["critique"], each["without_critique"]) for each in found] == [
        ("It says 4.", 0.0),
        ("It says 5.", 0.0),
    ]
    assert live.batcher.stats.n_batches == 1
    with pytest.raises(DataError, match=r"extra_info\.prompt.*verl passes no prompt"):
        asyncio.run(compute_score("d", "4", "4", {"index": 3}))


def test_verls_batch_manager_gets_all_scores_at_once(make_live, model):
    compute_score = verl_batch_reward(make_live(), prompt_key="question")
    found = compute_score(
        data_sources=["d"] * 2,
        solution_strs=["4", "5"],
        ground_truths=["4"] * 2,
        extra_infos=[{"question": "2 + 2?"}] * 2,
    )
    assert [each["score"] for each in found] == expected(model, ["4", "5"])
    with pytest.raises(DataError, match="1 extra_infos of 2"):
        compute_score(["d"] * 2, ["4", "5"], ["4"] * 2, [{"question": "q"}])


def test_openrlhf_gets_tensors_from_threads(make_live, model):
    live = make_live()
    reward_func = openrlhf_reward(live)
    # OpenRLHF calls once per response, each in a thread of its own.
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(reward_func, ["2 + 2?" + text], ["2 + 2?"], ["4"]) for text in ("4<|im_end|>", "5</s>\n")]
        found = [call.result() for call in calls]
    assert [each["rewards"].item() for each in found] == expected(model, ["4", "5"])
    assert all(0 < each["scores"].item() < 1 for each in found)
    assert [each["extra_logs"]["without_critique"].item() for each in found] == [0.0, 0.0]
    with pytest.raises(CriticError):
        openrlhf_reward(make_live(fails_for_5))(["2 + 2?51"], ["2 + 2?"], [""])


def test_openrlhf_prompts_with_a_chat_template_come_as_labels(make_live, model):
    rendered = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    live = make_live()
    with pytest.raises(DataError, match="prompt_in_label"):
        openrlhf_reward(live)([rendered + "4"], [rendered], [""])
    found = openrlhf_reward(live, prompt_in_label=True)([rendered + "4<|im_end|>"], [rendered], [CHAT])
    assert found["rewards"].tolist() == expected(model, ["4"])
    # A prompt that is too long loses its beginning in the query.
    cut = openrlhf_reward(live, prompt_in_label=True)([rendered[9:] + "4<|im_end|>"], [rendered], ["2 + 2?"])
    assert cut["rewards"].tolist() == found["rewards"].tolist()
    with pytest.raises(DataError, match="begin with its prompt"):
        openrlhf_reward(live)(["something else"], ["2 + 2?"], [""])


def test_a_run_and_its_critic_are_opened_by_name(model, tmp_path):
    model.save(tmp_path / "run" / "model")
    tries = []

    def answer(body):
        tries.append(body)
        return Answer(status=503, body="{}") if len(tries) == 1 else completion("It says 4.")

    with serving(answer) as server:
        settings = {"model": "m", "base_url": server.url, "key_variable": ""}
        live = open_reward_model(
            tmp_path / "run", critic="c", settings=settings, cache=tmp_path / "cache.sqlite", precision="fp32"
        )
        with live:
            assert asyncio.run(trl_reward(live)([CHAT], ["4"])) == expected(model, ["4"])
    assert len(tries) == 2
    live.critic.cache.close()
    with open_reward_model(tmp_path / "run", precision="fp32") as live:  # it was trained with critique dropout
        assert asyncio.run(trl_reward(live)([CHAT], ["4"])) == pytest.approx(
            model.score_completions(PROMPT, ["4"]), abs=1e-4
        )
    with pytest.raises(ConfigError, match="tempo"):
        open_reward_model(tmp_path / "run", critic="c", settings={"model": "m", "tempo": 1})


@pytest.mark.filterwarnings("ignore")  # TRL's, and those of what it imports
def test_trls_grpo_trainer_takes_steps_with_it(make_live, tiny_model, tmp_path):
    pytest.importorskip("trl", reason="trl is not installed (extra `bench`): nothing to train with")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (extra `data`): TRL needs it")
    from trl import GRPOConfig, GRPOTrainer

    from critrm.models import load_tokenizer

    config = GRPOConfig(
        output_dir=str(tmp_path / "grpo"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        max_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    data = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": f"{n} + {n}?"}]} for n in range(8)])
    live = make_live()
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = policy.lm_head.weight.detach().clone()
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=trl_reward(live),
        args=config,
        train_dataset=data,
        processing_class=load_tokenizer(str(tiny_model)),
    )
    trainer.train()
    steps = [row for row in trainer.state.log_history if "reward" in row]
    assert len(steps) == 2
    assert all(row["critrm/without_critique"] == 0.0 for row in steps)
    assert all(row["reward"] == row["reward"] for row in steps)
    assert live.batcher.stats.n_completions == 8
    assert live.critic.chat.calls
    assert not (policy.lm_head.weight == before).all()
