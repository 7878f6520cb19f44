/**
 * One dashboard: ?board=NAME&theme=light|dark draws dashboards/NAME.json with recording.json.
 * The server is told by a request for drawn, or for failed with the reason.
 */
import '@fontsource/inter/400.css';
import '@fontsource/inter/500.css';

import { createTheme, type DataFrame, dateTimeForTimeZone, type GrafanaTheme2, ThemeContext, type TimeRange } from '@grafana/data';
import { GlobalStyles, PanelChrome } from '@grafana/ui';
import { useEffect } from 'react';
import { createRoot } from 'react-dom/client';

import { framesOf, type Panel, type Recording } from './frames';
import { Visualization } from './panels';

const GAP = 8;
const ROW = 30;
const COLUMNS = 24;
const HEAD = 56;

interface Dashboard {
  title: string;
  panels: Panel[];
}

async function read<Content>(path: string): Promise<Content> {
  const answer = await fetch(path);
  if (!answer.ok) {
    throw new Error(`${path}: ${answer.status}`);
  }
  return answer.json();
}

function place({ x, y, w, h }: Panel['gridPos']) {
  const column = (innerWidth - GAP) / COLUMNS;
  return { left: GAP + x * column, top: HEAD + y * (ROW + GAP), width: w * column - GAP, height: h * (ROW + GAP) - GAP };
}

interface BoardProps {
  dashboard: Dashboard;
  frames: DataFrame[][];
  recording: Recording;
  theme: GrafanaTheme2;
}

function Board({ dashboard, frames, recording, theme }: BoardProps) {
  const [from, to] = [recording.begin, recording.end].map((at) => dateTimeForTimeZone('utc', at * 1000)) as [TimeRange['from'], TimeRange['to']];
  const range: TimeRange = { from, to, raw: { from, to } };
  useEffect(() => void fetch('drawn'), []);
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <h1 style={{ ...theme.typography.h3, position: 'absolute', left: 2 * GAP, top: 2 * GAP }}>{dashboard.title}</h1>
      {dashboard.panels.map((panel, index) => {
        const { left, top, width, height } = place(panel.gridPos);
        return (
          <div key={`${left} ${top}`} style={{ position: 'absolute', left, top, width, height }}>
            <PanelChrome title={panel.title} width={width} height={height}>
              {(w, h) => <Visualization panel={panel} frames={frames[index]!} range={range} width={w} height={h} />}
            </PanelChrome>
          </div>
        );
      })}
    </ThemeContext.Provider>
  );
}

addEventListener('error', ({ message }) => void fetch(`failed?${encodeURIComponent(message)}`));
addEventListener('unhandledrejection', ({ reason }) => void fetch(`failed?${encodeURIComponent(reason)}`));

const asked = new URLSearchParams(location.search);
const theme = createTheme({ colors: { mode: asked.get('theme') === 'dark' ? 'dark' : 'light' } });
const [dashboard, recording] = await Promise.all([read<Dashboard>(`dashboards/${asked.get('board')}.json`), read<Recording>('recording.json')]);
const frames = await Promise.all(dashboard.panels.map((panel) => framesOf(panel, recording, theme)));
// Text on canvas is measured and painted once, so the fonts have to be there before.
await Promise.all(['400 12px Inter', '500 14px Inter'].map((font) => document.fonts.load(font)));
createRoot(document.getElementById('page')!).render(<Board {...{ dashboard, frames, recording, theme }} />);
