"""Items computed by several threads come in order, with the cores divided, and nothing is left running."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from critrm.cores import MAX_THREADS, GradientsInOrder, computed, n_side_by_side, sharing_cores


@pytest.fixture(scope="module", autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def left_running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("critrm-core")]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4))
def test_items_come_in_order_whatever_takes_how_long(delays, n):
    def compute(item):
        time.sleep(item[1] / 1000)
        return item[0] * 2

    items = list(enumerate(delays))
    assert list(computed(compute, items, n=n)) == [(item, item[0] * 2) for item in items]
    assert not left_running()


def test_no_more_items_are_drawn_than_are_computed_and_as_many_again():
    drawn = []

    def items():
        for i in range(100):
            drawn.append(i)
            yield i

    for item, _ in computed(lambda item: item, items(), n=3):
        assert len(drawn) <= item + 2 * 3


def test_each_thread_has_its_share_of_cores_and_others_keep_theirs():
    with sharing_cores(2) as pool:
        assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {2}
        assert torch.get_num_threads() == 4
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == 4
    assert torch.get_num_threads() == 4 and not left_running()


def test_a_single_item_has_all_cores():
    found = dict(computed(lambda _: (torch.get_num_threads(), threading.current_thread()), ["one"], n=2))
    assert found == {"one": (4, threading.current_thread())}


def test_what_fails_is_raised_in_its_turn_and_the_rest_is_not_computed():
    seen = []

    def compute(item):
        seen.append(item)
        if item == 2:
            raise RuntimeError("no more memory")
        return item

    found = []
    with pytest.raises(RuntimeError, match="no more memory"):
        for item, _ in computed(compute, range(50), n=2):
            found.append(item)
    assert found == [0, 1] and len(seen) < 10
    assert not left_running()


def test_who_listens_no_longer_ends_it():
    stream = computed(lambda item: item, range(50), n=2)
    assert next(stream) == (0, 0)
    stream.close()
    assert not left_running()


def test_a_cpu_has_few_and_another_device_one():
    assert n_side_by_side(torch.device("cpu")) == MAX_THREADS == 4
    assert n_side_by_side(torch.device("cuda")) == 1


def add_up(parameters, scales, delays, *, fails=(), skips=()):
    """Gradients of passes at once that each have their own scale, and take their own time."""
    order = GradientsInOrder(parameters, len(scales))

    def backward(number):
        with order.turn(number):
            time.sleep(delays[number] / 1000)
            if number in fails:
                raise RuntimeError("no more memory")
            read = [parameter for n, parameter in enumerate(parameters) if (number, n) not in skips]
            (scales[number] * torch.cat([parameter.flatten() for parameter in read]).sum()).backward()

    with order.watching(), sharing_cores(2) as pool:
        return [future.exception() for future in [pool.submit(backward, n) for n in range(len(scales))]]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.integers(0, 3)), min_size=1, max_size=6))
def test_gradients_are_added_in_the_order_of_their_numbers_whatever_takes_how_long(passes):
    scales, delays = zip(*passes, strict=True)
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(4)]
    # The last parameter has no part in the first pass, as an expert that no token is sent to.
    assert add_up(parameters, scales, delays, skips={(0, 3)}) == [None] * len(scales)
    expected = torch.zeros(3)
    for scale in scales:
        expected = expected + scale
    assert all(torch.equal(parameter.grad, expected) for parameter in parameters[:3])


def test_nobody_waits_for_a_pass_that_failed():
    parameters = [torch.nn.Parameter(torch.ones(3))]
    failures = add_up(parameters, [1.0, 2.0, 4.0], [5, 0, 0], fails={0})
    assert [str(failure) for failure in failures] == ["no more memory", "None", "None"]
    assert parameters[0].grad.tolist() == [6.0] * 3
    assert not left_running()


def test_without_passes_at_once_gradients_come_as_ever():
    parameter = torch.nn.Parameter(torch.ones(3))
    with GradientsInOrder([parameter], 1).watching():
        pass
    parameter.sum().backward()
    assert parameter.grad.tolist() == [1.0] * 3
