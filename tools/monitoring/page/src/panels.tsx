/** The panels by type: Grafana's components, given what a panel's JSON says. */
import { type DataFrame, type DisplayValueAlignmentFactors, type FieldDisplay, getDisplayValueAlignmentFactors, getFieldDisplayValues, type TimeRange, VizOrientation } from '@grafana/data';
import { BarGauge, BigValue, TimeSeries, useTheme2, VizRepeater, type VizRepeaterRenderValueProps } from '@grafana/ui';
import { TableNG } from '@grafana/ui/unstable';
import type { ComponentType } from 'react';

import type { Panel } from './frames';
import { StateTimeline } from './states';

export interface PanelProps {
  panel: Panel;
  frames: DataFrame[];
  range: TimeRange;
  width: number;
  height: number;
}

/** A panel without data says so, as in Grafana. */
export function Visualization(props: PanelProps) {
  const Type = TYPES[props.panel.type];
  if (!Type) {
    throw new Error(`${props.panel.title}: panels of type ${props.panel.type} are not drawn here`);
  }
  return props.frames.length ? <Type {...props} /> : <div style={{ display: 'grid', placeItems: 'center', height: '100%' }}>No data</div>;
}

function Lines({ panel, frames, range, width, height }: PanelProps) {
  return <TimeSeries frames={frames} timeRange={range} timeZone="utc" legend={panel.options.legend} width={width} height={height} />;
}

function Rows({ panel, frames, range, width, height }: PanelProps) {
  return <TableNG data={frames[0]!} fieldConfig={panel.fieldConfig} timeRange={range} width={width} height={height} />;
}

function useValues({ panel, frames }: PanelProps): FieldDisplay[] {
  const theme = useTheme2();
  const { fieldConfig, options } = panel;
  return getFieldDisplayValues({ data: frames, fieldConfig, reduceOptions: options.reduceOptions, replaceVariables: (text) => text, theme, timeZone: 'utc' });
}

function Stat(props: PanelProps) {
  const { colorMode, graphMode, justifyMode, textMode } = props.panel.options;
  const [value] = useValues(props);
  return <BigValue value={{ ...value!.display, title: '' }} theme={useTheme2()} width={props.width} height={props.height} {...{ colorMode, graphMode, justifyMode, textMode }} />;
}

function Bars(props: PanelProps) {
  const theme = useTheme2();
  const { displayMode, namePlacement, showUnfilled, valueMode, minVizHeight, maxVizHeight, minVizWidth } = props.panel.options;
  const values = useValues(props);
  const bar = ({ value, ...place }: VizRepeaterRenderValueProps<FieldDisplay, DisplayValueAlignmentFactors>) => (
    <BarGauge
      {...{ ...place, displayMode, namePlacement, showUnfilled, theme }}
      value={value.display}
      field={value.field}
      display={value.view?.getFieldDisplayProcessor(value.colIndex!)}
      valueDisplayMode={valueMode}
    />
  );
  return (
    <VizRepeater
      {...{ minVizHeight, maxVizHeight, minVizWidth }}
      source={props.frames}
      renderCounter={0}
      getValues={() => values}
      getAlignmentFactors={getDisplayValueAlignmentFactors}
      renderValue={bar}
      orientation={VizOrientation.Horizontal}
      width={props.width}
      height={props.height}
    />
  );
}

const TYPES: Record<string, ComponentType<PanelProps>> = { bargauge: Bars, stat: Stat, 'state-timeline': StateTimeline, table: Rows, timeseries: Lines };
