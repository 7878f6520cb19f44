"""The bars of the cold start, and the engine's log lines they are drawn from."""

from hypothesis import given
from hypothesis import strategies as st

from demo.coldstart import attached_lines
from demo.timeline import Span, gantt


def test_bars_share_one_scale():
    text = gantt([Span("load", 10, 15, "5 MiB"), Span("engine", 15, 20)], width=10)
    assert text.splitlines() == [
        "        0 s 10.0 s",
        "load   |█████     |   5.0 s  5 MiB",
        "engine |     █████|   5.0 s",
    ]


def test_instant_is_one_column_and_stays_inside():
    line = gantt([Span("all", 0, 10), Span("instant", 10, 10)], width=10).splitlines()[-1]
    assert line == "instant |         █|   0.0 s"


def test_clocks_with_a_resolution_of_a_second_do_not_make_time_negative():
    assert Span("scheduled", 10.9, 10.0).seconds == 0.0


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 1e5)), min_size=1, max_size=8))
def test_every_bar_fits(times):
    spans = [Span(f"s{n}", begin, begin + length) for n, (begin, length) in enumerate(times)]
    for line in gantt(spans, width=30).splitlines()[1:]:
        bar = line.split("|")[1]
        assert len(bar) == 30
        assert bar.strip()
        assert not bar.strip().strip("█")


def test_attached_lines_of_timestamped_log():
    log = (
        "2026-01-02T03:04:05.5Z (Worker_TP1 pid=7) INFO headrace: attached "
        "rank=1 tensors=9 bytes=1024 seconds=0.025\n"
        "2026-01-02T03:04:06Z INFO something else\n"
    )
    ((when, rank, size, seconds),) = attached_lines(log)
    assert (round(when % 60, 1), rank, size, seconds) == (5.5, 1, 1024, 0.025)
