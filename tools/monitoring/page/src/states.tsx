/** A state timeline: @grafana/ui has none, so bars are painted here, on Grafana's axes and in its colors. */
import { type Field, FieldType, formattedValueToString, getFieldDisplayName, type GrafanaTheme2 } from '@grafana/data';
import { AxisPlacement, LegendDisplayMode, ScaleDirection, ScaleOrientation } from '@grafana/schema';
import { UPlotChart, UPlotConfigBuilder, useTheme2, VizLayout, VizLegend } from '@grafana/ui';

import type { PanelProps } from './panels';

interface Span {
  row: number;
  begin: number;
  end: number;
  text: string;
  color: string;
}

/** Returns what is painted: points of one value that follow each other are one bar. */
function spansOf(row: number, times: number[], field: Field, step: number): Span[] {
  const spans: Span[] = [];
  times.forEach((begin, index) => {
    const shown = field.display!(field.values[index]);
    const last = spans.at(-1);
    const text = formattedValueToString(shown);
    if (last && last.text === text && begin - last.end < step) {
      last.end = begin + step;
    } else {
      spans.push({ row, begin, end: begin + step, text, color: shown.color ?? 'gray' });
    }
  });
  return spans;
}

function configOf(names: string[], spans: Span[], from: number, to: number, theme: GrafanaTheme2): UPlotConfigBuilder {
  const builder = new UPlotConfigBuilder('utc');
  builder.addScale({ scaleKey: 'x', isTime: true, orientation: ScaleOrientation.Horizontal, direction: ScaleDirection.Right, range: () => [from, to] });
  builder.addScale({ scaleKey: 'y', orientation: ScaleOrientation.Vertical, direction: ScaleDirection.Down, range: () => [0, names.length] });
  builder.addAxis({ scaleKey: 'x', isTime: true, placement: AxisPlacement.Bottom, timeZone: 'utc', theme });
  builder.addAxis({ scaleKey: 'y', placement: AxisPlacement.Left, splits: names.map((_, row) => row + 0.5), values: names, grid: { show: false }, ticks: { show: false }, theme });
  builder.addSeries({ scaleKey: 'y', theme, pathBuilder: () => null });
  builder.addHook('draw', (plot) => {
    const { ctx } = plot;
    ctx.save();
    ctx.beginPath();
    ctx.rect(plot.bbox.left, plot.bbox.top, plot.bbox.width, plot.bbox.height);
    ctx.clip();
    ctx.font = `${12 * devicePixelRatio}px ${theme.typography.fontFamily}`;
    ctx.textAlign = 'left';
    ctx.textBaseline = 'middle';
    for (const { row, begin, end, text, color } of spans) {
      const [left, right] = [begin, end].map((at) => plot.valToPos(at, 'x', true)) as [number, number];
      const [top, bottom] = [row + 0.05, row + 0.95].map((at) => plot.valToPos(at, 'y', true)) as [number, number];
      ctx.fillStyle = color;
      ctx.globalAlpha = 0.7;
      ctx.fillRect(left, top, right - left, bottom - top);
      ctx.globalAlpha = 1;
      ctx.fillStyle = theme.colors.text.primary;
      if (ctx.measureText(text).width + 8 < right - left) {
        ctx.fillText(text, left + 4, (top + bottom) / 2);
      }
    }
    ctx.restore();
  });
  return builder;
}

export function StateTimeline({ panel, frames, range, width, height }: PanelProps) {
  const theme = useTheme2();
  const [from, to] = [range.from.valueOf(), range.to.valueOf()];
  const rows = frames.map((frame) => ({ frame, times: frame.fields[0]!.values as number[], field: frame.fields.find((field) => field.type === FieldType.number)! }));
  const spans = rows.flatMap(({ frame, times, field }, row) => spansOf(row, times, field, frame.fields[0]!.config.interval!));
  const names = rows.map(({ frame, field }) => getFieldDisplayName(field, frame, frames));
  const items = [...new Map(spans.map(({ text, color }) => [text, { label: text, color, yAxis: 1 }])).values()];
  const { showLegend } = panel.options.legend;
  const legend = showLegend && (
    <VizLayout.Legend placement="bottom">
      <VizLegend items={items} displayMode={LegendDisplayMode.List} placement="bottom" />
    </VizLayout.Legend>
  );
  return (
    <VizLayout width={width} height={height} legend={legend || null}>
      {(w: number, h: number) => <UPlotChart config={configOf(names, spans, from, to, theme)} data={[[from, to], [null, null]]} width={w} height={h} />}
    </VizLayout>
  );
}
