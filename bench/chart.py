"""Draws docs/performance.svg from a result of bench/loader.py.

python bench/chart.py bench/results/FILE docs/performance.svg
"""

import json
import sys
from pathlib import Path

LEFT, BAR, GAP, WIDTH, TOP = 170, 18, 6, 420, 28
COLORS = {"limit": "#9aa0a6", "headrace": "#0b6bcb"}
NAMES = {"limit": "pinned copy (limit)"}


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    result = json.loads(source.read_text())
    points = [point for point in result["points"] if point["name"] == "large"]
    peers = [name for name in result["peers"] if any(name in point for point in points)]
    highest = max(point["limit"]["max"] for point in points)
    y, marks = TOP, []
    for point in points:
        marks.append(f'<text x="8" y="{y + 12}" font-weight="bold">{point["gib"]:g} GiB</text>')
        y += BAR + GAP
        for name in ("limit", "headrace", *peers):
            if not point.get(name):
                continue
            value, y = point[name], y + BAR + GAP
            marks.extend(bar(NAMES.get(name, name), value, WIDTH / highest, y - BAR - GAP))
        y += GAP * 2
    title = "Page cache to GPU memory, GiB/s: median, line from slowest to fastest round"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 70}" height="{y}" '
        'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>'
        f'\n<text x="8" y="16">{title}</text>\n' + "\n".join(marks) + "\n</svg>\n"
    )
    target.write_text(svg)


def bar(name: str, value: dict[str, float], scale: float, y: float) -> list[str]:
    width, low, high = (value[key] * scale for key in ("median", "min", "max"))
    color = COLORS.get(name, COLORS["limit"] if name in NAMES.values() else "#c58b3b")
    middle = y + BAR / 2
    return [
        f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{name}</text>',
        f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{color}"/>',
        f'<path d="M{LEFT + low:.1f} {middle}H{LEFT + high:.1f}" stroke="black"/>',
        f'<text x="{LEFT + max(width, high) + 6:.1f}" y="{y + 13}">{value["median"]:.1f}</text>',
    ]


if __name__ == "__main__":
    main()
