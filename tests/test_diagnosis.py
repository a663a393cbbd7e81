"""Which rank failed first, and why."""

from __future__ import annotations

from typing import Any

import pytest

from dit_ds.diagnosis import Event, first, sentence

LIMITS = {"start": 900.0, "compile": 1800.0, "step": 120.0, "save": 600.0, "sample": 900.0}


def seen(rank: int, number: int = 50, **more: Any) -> dict[str, Any]:
    """What an agent saw of a rank."""
    where = {
        "phase": "step",
        "step": 12,
        "doing": "micro-step 1 of 2",
        "state": "S",
        "quiet": 121.0,
    }
    return {"rank": rank, "number": number, **where, **more}


def ended(rank: int, code: int, tail: str = "", **more: Any) -> Event:
    return Event("ended", f"n{rank}", rank, code, tail=tail, seen=seen(rank, state=""), **more)


def stalled(rank: int, **more: Any) -> Event:
    return Event("stalled", f"n{rank}", rank, seen=seen(rank, **more))


RESET = ended(0, 1, "RuntimeError: [gloo] Connection reset by peer")
LOST = Event("lost", "n2", why="not heard for 121 s")


@pytest.mark.parametrize(
    ("events", "cause"),
    [
        ([RESET, ended(1, -9)], 1),  # the news of the cause came last
        ([RESET, ended(1, 1, "ValueError: x"), ended(2, 1, "Broken pipe")], 1),
        ([ended(2, -15), ended(1, 1, "KeyError: 'a'")], 1),  # others were asked to end
        ([RESET, LOST, ended(1, 1, "ValueError: x")], None),
        ([stalled(0), RESET, ended(1, -11)], 1),
        ([RESET, ended(1, 1, "Socket closed")], 0),
        # Crashes while others' errors end them, and one that is the error.
        ([ended(1, 1, "KeyError: 'a'"), ended(2, -11)], 1),
        ([ended(2, -11), ended(1, 1, "KeyError: 'a'")], 2),
        ([ended(1, 1, "KeyError: 'a'"), ended(2, -9)], 2),
    ],
)
def test_a_cause_goes_before_its_consequences(events: list[Event], cause: int | None) -> None:
    assert first(events, []).rank == cause


def test_who_left_early_is_named_where_the_others_only_missed_it() -> None:
    left = [ended(3, 0)]
    assert first([RESET], [], left).rank == 3
    assert first([RESET, ended(1, 1, "ValueError: x")], [], left).rank == 1
    assert first([RESET, ended(1, -15)], [], left).rank == 0  # asked to end, all of them
    assert first([stalled(0)], [], left).rank == 0


def test_of_ranks_that_hang_the_stopped_or_slowest_is_named() -> None:
    others = [("n0", seen(0)), ("n1", seen(1, number=49)), ("n2", seen(2, state=""))]
    assert first([stalled(0)], others).rank == 1
    assert first([stalled(0)], [*others, ("n3", seen(3, number=60, state="D"))]).host == "n3"
    # One that has ended well is not the one that others wait for.
    assert first([stalled(0)], [("n0", seen(0)), ("n2", seen(2, number=1, state=""))]).rank == 0


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (ended(1, -9, why="the kernel has killed"), "rank 1 on n1 was killed by SIGKILL"),
        (ended(1, -9, why="the kernel has killed"), "; the kernel has killed"),
        (ended(1, 3, "a\nOSError: no\n\n"), "with exit code 3 in phase step at step 12"),
        (ended(1, 3, "a\nOSError: no\n\n"), ": OSError: no"),
        (ended(1, 0), "ended with exit code 0 before the others in phase step at step 12"),
        (LOST, "n2 was lost: not heard for 121 s"),
        (stalled(1), "has not moved for 121 s in phase step at step 12 (micro-step 1 of 2)"),
        (stalled(1), "the limit of this phase is --step-timeout 120"),
        (stalled(1, state="T"), "it is stopped"),
        (stalled(1, state="D"), "it sleeps uninterruptibly"),
        (Event("unable", "n1", why="no disk"), "n1 could not start its ranks: no disk"),
    ],
)
def test_sentences_say_where_what_and_at_which_step(event: Event, told: str) -> None:
    assert told in sentence(event, LIMITS)
