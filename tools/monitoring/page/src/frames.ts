/** Prometheus' answers as Grafana's data frames, with a panel's field settings applied by Grafana. */
import {
  applyFieldOverrides,
  cacheFieldDisplayNames,
  type DataFrame,
  type DataTransformerConfig,
  type Field,
  type FieldConfigPropertyItem,
  FieldConfigOptionsRegistry,
  type FieldConfigSource,
  FieldType,
  type GrafanaTheme2,
  standardTransformers,
  standardTransformersRegistry,
  transformDataFrame,
  type TransformerRegistryItem,
} from '@grafana/data';
import { firstValueFrom } from 'rxjs';

/** One series of an answer: `values` of a range query, `value` of an instant one. */
interface Series {
  metric: Record<string, string>;
  values?: [number, string][];
  value?: [number, string];
}

/** What Prometheus said: seconds since 1970, and the answers by expression. */
export interface Recording {
  begin: number;
  end: number;
  step: number;
  range: Record<string, Series[]>;
  instant: Record<string, Series[]>;
}

interface Target {
  expr: string;
  refId: string;
  instant?: boolean;
  legendFormat?: string;
  format?: string;
}

/** A panel of a dashboard's JSON, as far as it is used here. */
export interface Panel {
  type: string;
  title: string;
  gridPos: { x: number; y: number; w: number; h: number };
  targets: Target[];
  fieldConfig: FieldConfigSource;
  transformations?: DataTransformerConfig[];
  // Of another shape in each type, and not in the library.
  options: any;
}

const STANDARD = ['unit', 'min', 'max', 'decimals', 'displayName', 'noValue', 'color', 'mappings', 'thresholds'];
const CUSTOM = ['drawStyle', 'lineInterpolation', 'lineStyle', 'lineWidth', 'fillOpacity', 'showPoints', 'stacking', 'axisSoftMax', 'hideFrom', 'cellOptions', 'minWidth', 'width'];

/** Grafana's server registers settings and transformations with their editors; this is the rest of them. */
const settings = new FieldConfigOptionsRegistry(() => [...STANDARD.map((id) => setting(id, false)), ...CUSTOM.map((id) => setting(id, true))]);
const { groupingToMatrixTransformer, organizeFieldsTransformer } = standardTransformers;
standardTransformersRegistry.setInit(() =>
  [groupingToMatrixTransformer, organizeFieldsTransformer].map((one) => {
    return { id: one.id, name: one.name, transformation: async () => one } as Partial<TransformerRegistryItem> as TransformerRegistryItem;
  }),
);

function setting(path: string, isCustom: boolean): FieldConfigPropertyItem {
  const shown = { process: (value: unknown) => value, shouldApply: ({ type }: Field) => type !== FieldType.time };
  return { id: isCustom ? `custom.${path}` : path, path, isCustom, name: path, ...shown } as Partial<FieldConfigPropertyItem> as FieldConfigPropertyItem;
}

/** Returns a panel's frames, transformed: one for each series, or one for each target that asks for a table. */
export async function framesOf(panel: Panel, recording: Recording, theme: GrafanaTheme2): Promise<DataFrame[]> {
  const answers = panel.targets.flatMap((target) => {
    const found = (target.instant ? recording.instant : recording.range)[target.expr];
    if (!found) {
      throw new Error(`${panel.title}: the recording has no answer to ${target.expr}`);
    }
    return target.format === 'table' ? tableOf(found, target) : found.map((series) => frameOf(series, target, recording.step));
  });
  const data = await firstValueFrom(transformDataFrame(panel.transformations ?? [], answers));
  const frames = applyFieldOverrides({ data, fieldConfig: panel.fieldConfig, fieldConfigRegistry: settings, replaceVariables: (text) => text, theme, timeZone: 'utc' });
  cacheFieldDisplayNames(frames);
  return frames;
}

/** Returns a sample's number; null, a gap, where Prometheus says NaN or Inf. */
function numberOf([, text]: [number, string]): number | null {
  return Number.isFinite(Number(text)) ? Number(text) : null;
}

function frameOf(series: Series, target: Target, step: number): DataFrame {
  const points = series.values ?? [series.value!];
  const { __name__: name, ...labels } = series.metric;
  const legend = target.legendFormat?.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, label) => series.metric[label] ?? '').trim();
  return {
    refId: target.refId,
    name: legend ?? name,
    length: points.length,
    fields: [
      { name: 'Time', type: FieldType.time, config: { interval: step * 1000 }, values: points.map(([at]) => at * 1000) },
      { name: 'Value', type: FieldType.number, labels, config: { displayNameFromDS: legend ?? name }, values: points.map(numberOf) },
    ],
  };
}

function tableOf(found: Series[], target: Target): DataFrame {
  const labels = [...new Set(found.flatMap(({ metric }) => Object.keys(metric)))];
  const fields: Field[] = labels.map((name) => ({ name, type: FieldType.string, config: {}, values: found.map(({ metric }) => metric[name] ?? '') }));
  const values = found.map(({ value }) => numberOf(value!));
  return { refId: target.refId, length: found.length, fields: [...fields, { name: 'Value', type: FieldType.number, config: {}, values }] };
}
