"""The pictures of the dashboards: every panel is drawn, with and without data."""

import xml.etree.ElementTree as ET

import pytest

from dashboards.boards import BOARDS
from monitoring import draw
from monitoring.__main__ import expand

SVG = "{http://www.w3.org/2000/svg}"
RESULT = [
    {"metric": {"pod": "p", "phase": "load"}, "values": [[10, "1"], [20, "0"], [30, "NaN"]]},
    {"metric": {"pod": "q"}, "values": [[10, "NaN"]]},
]


def test_series_are_named_and_what_is_no_number_is_left_out():
    found = draw.series(RESULT, "{{pod}} {{phase}} {{absent}}")
    assert found == [("p load", [(10.0, 1.0), (20.0, 0.0)])]


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
@pytest.mark.parametrize("result", [[], RESULT], ids=["empty", "data"])
def test_every_panel_is_drawn(board, result):
    found = draw.series(result, "{{pod}}")
    answers = {panel.title: found for panel in board.panels}
    picture = ET.fromstring(draw.board(board, answers, "a note & more"))
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert {panel.title for panel in board.panels} <= set(texts)
    assert texts.count("no data") == (0 if result else len(board.panels))


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_no_variable_of_grafana_is_left_in_a_query(board):
    for panel in board.panels:
        for query in panel.queries:
            assert "$" not in expand(query)
