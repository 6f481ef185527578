"""The watermark is the highest revision below which every event's key was attempted since, whatever the order."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from lrm.bookmarks import Watermark
from storage.redis_bookmarks import SavedBookmark


@dataclass
class NaiveModel:
    """Keeps every event and which attempts were made when."""

    events: list[tuple[str, int, bool]] = field(default_factory=list)
    """(key, revision, attempted since)"""
    covered: dict[str, list[int]] = field(default_factory=dict)
    """Key in hand → the indexes of the events that its attempt covers."""

    def saw(self, key: str, revision: int) -> None:
        self.events.append((key, revision, False))

    def begin(self, key: str) -> None:
        self.covered[key] = [i for i, event in enumerate(self.events) if event[0] == key]

    def end(self, key: str, attempted: bool) -> None:
        for i in self.covered.pop(key):
            self.events[i] = (*self.events[i][:2], self.events[i][2] or attempted)

    def forget(self, key: str) -> None:
        self.events = [(k, r, done or k == key) for k, r, done in self.events]

    def at(self, head: int) -> int:
        return min([head, *(revision - 1 for _, revision, done in self.events if not done)])


STEP = st.tuples(
    st.sampled_from(["saw", "begin", "end", "failed", "forget"]), st.sampled_from("abc"), st.integers(0, 2)
)


@settings(deadline=None)
@given(st.lists(STEP, max_size=60))
def test_it_is_what_a_full_record_of_events_and_attempts_says(steps: list[tuple[str, str, int]]) -> None:
    mark, model, head = Watermark[str](), NaiveModel(), 10
    for step, key, more in steps:
        match step:
            case "saw":
                head += more
                mark.saw(key, head)
                model.saw(key, head)
            case "begin" if key not in model.covered:
                mark.begin(key)
                model.begin(key)
            case "end" | "failed" if key in model.covered:
                mark.end(key, step == "end")
                model.end(key, step == "end")
            case "forget" if key not in model.covered:
                mark.forget(key)
                model.forget(key)
        assert mark.at(head) == model.at(head)


def test_what_is_seen_while_a_key_is_in_hand_waits_for_the_next_attempt() -> None:
    mark = Watermark[str]()
    mark.saw("a", 5)
    mark.begin("a")
    mark.saw("a", 8)
    mark.saw("b", 9)
    assert mark.at(9) == 4
    mark.end("a", attempted=True)
    assert mark.at(9) == 7
    mark.begin("a")
    mark.end("a", attempted=False)
    assert mark.at(9) == 7
    mark.forget("a")
    assert mark.at(9) == 8
    mark.clear()
    assert mark.at(9) == 9


def test_a_value_that_is_no_bookmark_is_none() -> None:
    good = SavedBookmark("c", "e", 7, 3, "2026-01-01T00:00:00Z")
    assert SavedBookmark.decode(good.encode()) == good
    for raw in (
        b"",
        b"garbage",
        b"[]",
        b"{}",
        good.encode().replace(b"7", b"-7"),
        good.encode().replace(b"7", b"7.5"),
        good.encode().replace(b"7", b"true"),
        good.encode().replace(b"7", b"90071992547409920"),
        good.encode().replace(b'"e"', b"null"),
    ):
        assert SavedBookmark.decode(raw) is None, raw
