import asyncio

import pytest

from critrm.batching import Candidates
from critrm.errors import DataError, ModelError
from critrm.microbatch import MicroBatcher
from live_parts import PROMPT


def test_one_bad_request_of_a_batch_fails_alone():
    class Picky:
        def score_candidates(self, candidates, *, max_tokens_per_step):
            for each in list(candidates):
                if "bad" in each.completions:
                    raise DataError("bad")
                yield [[1.0]]

    batcher = MicroBatcher(Picky(), wait=0.2)

    async def several():
        calls = [batcher.score(Candidates(prompt=PROMPT, completions=(text,))) for text in ("a", "bad", "c")]
        return await asyncio.gather(*calls, return_exceptions=True)

    first, bad, last = asyncio.run(several())
    assert first == last == [[1.0]]
    assert isinstance(bad, DataError)
    assert batcher.stats.n_batches == 1
    batcher.close()
    with pytest.raises(ModelError, match="shut down"):
        asyncio.run(several_closed(batcher))


async def several_closed(batcher):
    await batcher.score(Candidates(prompt=PROMPT, completions=("a",)))
