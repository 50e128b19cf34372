"""The style sheet of the page."""

from sora_llm.report_page.charts import COLOURS, VIRIDIS

_DARK_COLOURS = ("#7db2ee", "#f2935c", "#7cc988", "#b99ae8", "#dcb13c", "#ea86b4", "#6fcfd8", "#b8a898")
_STOPS = ", ".join(f"rgb{level}" for level in VIRIDIS)


def _series(colours: tuple[str, ...]) -> str:
    return " ".join(f"--s{index}: {colour};" for index, colour in enumerate(colours))


_RULES = "\n".join(f".s{i} {{ --own: var(--s{i}); }}" for i in range(len(COLOURS)))

STYLE = f"""
:root {{
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1c2128; --quiet: #5c6672; --rule: #dfe3e8; --card: #f5f7f9;
  --dense: #e9eff7; --sparsify: #fcf1de; --finetune: #e6f3e7;
  --good: #1a7f37; --bad: #b42318; --bad-card: #fdf0ee; --wait: #8a5a00;
  --hatch: #cfd4da; --hatch-ink: #5c6672;
  {_series(COLOURS)}
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --paper: #14171b; --ink: #e4e7eb; --quiet: #9aa4af; --rule: #31373f; --card: #1d2127;
    --dense: #1d2733; --sparsify: #2e2617; --finetune: #1a2a1d;
    --good: #5fc878; --bad: #ff8a7a; --bad-card: #331b18; --wait: #e2b04a;
    --hatch: #3a4149; --hatch-ink: #a6afb9;
    {_series(_DARK_COLOURS)}
  }}
}}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }}
body {{
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 58rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}}
h1 {{ margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }}
h2 {{ margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--rule); font-size: 1.25rem; }}
h3 {{ margin: 1.5rem 0 .4rem; font-size: 1rem; }}
p {{ margin: .45rem 0; max-width: 46rem; }}
a {{ color: inherit; }}
code {{ font: .88em/1.4 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }}
.quiet, .missing {{ color: var(--quiet); }}
.head {{ display: flex; flex-wrap: wrap; align-items: baseline; gap: .3rem .9rem; }}
.state {{ font-weight: 600; }}
.finished, .passed {{ color: var(--good); }} .failed {{ color: var(--bad); }}
.running, .preempted {{ color: var(--wait); }}
.alarms {{
  margin: 1.2rem 0 0; padding: .7rem 1rem; border-left: 4px solid var(--bad); background: var(--bad-card);
  border-radius: 0 6px 6px 0;
}}
.alarms h2 {{ margin: 0 0 .3rem; padding: 0; border: 0; font-size: 1rem; color: var(--bad); }}
.alarms ul {{ margin: 0; padding-left: 1.1rem; }} .alarms li {{ overflow-wrap: anywhere; }}
.tiles {{
  display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .6rem; margin: 1.3rem 0 0;
}}
.tile {{ padding: .6rem .85rem .7rem; background: var(--card); border-radius: 8px; }}
.tile dt {{ font-size: .8rem; color: var(--quiet); }}
.tile dd {{
  margin: 0; font-size: 1.22rem; line-height: 1.35; font-weight: 600; font-variant-numeric: tabular-nums;
}}
.tile dd + dd {{ font-size: .8rem; font-weight: 400; color: var(--quiet); overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }}
th, td {{ padding: .22rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }}
th {{ font-weight: 600; color: var(--quiet); font-size: .82rem; }}
th:first-child, td:first-child {{ padding-left: 0; }}
td.text, th.text {{ text-align: left; }}
tr.marked td {{ font-weight: 600; }}
.heat-blocks {{ display: flex; flex-wrap: wrap; gap: 0 1.6rem; align-items: flex-start; }}
table.heat {{ border-collapse: separate; border-spacing: 1px; font-size: .78rem; line-height: 1.2; }}
table.heat th {{ padding: .1rem .25rem; border: 0; font-size: .72rem; }}
table.heat thead th {{ text-align: center; vertical-align: bottom; }}
table.heat tbody th {{ text-align: right; padding-right: .45rem; font-weight: 400; }}
table.heat td {{ padding: .12rem .15rem; min-width: 2.6rem; text-align: center; border: 0; border-radius: 2px; }}
table.heat.wide td {{ min-width: 5.6rem; padding: .3rem .2rem; }}
table.heat td.mean {{ color: var(--quiet); min-width: 2.6rem; }}
td.zero, i.zero {{
  color: var(--hatch-ink);
  background: repeating-linear-gradient(135deg, var(--hatch) 0 1.5px, transparent 1.5px 6px);
}}
td.dark {{ color: #fff; }} td.bright {{ color: #000; }}
.scale {{
  display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; align-items: center; font-size: .82rem; color: var(--quiet);
}}
.scale i {{ display: inline-block; width: 1.6rem; height: .8rem; border-radius: 2px; }}
.scale span {{ display: inline-flex; align-items: center; gap: .5rem; }}
.scale i.pruned {{ background: rgb(140, 140, 140); }}
.scale i.colours {{ width: 8rem; background: linear-gradient(90deg, {_STOPS}); }}
svg.chart {{ display: block; width: 100%; min-width: 36rem; height: auto; margin: .2rem 0 .6rem; }}
svg.chart text {{ fill: var(--quiet); font-size: 11.5px; font-variant-numeric: tabular-nums; }}
svg.chart text.phase {{ font-size: 11px; }}
svg.chart text.note {{ fill: var(--ink); }}
svg image {{ image-rendering: pixelated; }}
.grid {{ stroke: var(--rule); stroke-width: 1; }}
.rule {{ stroke: var(--paper); stroke-width: 1.5; }}
.stage {{ stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 2 3; }}
.band.dense {{ fill: var(--dense); }} .band.sparsify {{ fill: var(--sparsify); }}
.band.finetune {{ fill: var(--finetune); }}
.line {{ fill: none; stroke: var(--own); stroke-width: 2; stroke-linejoin: round; }}
.line.thin {{ stroke-width: 1.3; }} .line.faint {{ stroke-width: 1; opacity: .38; }}
.line.dashed {{ stroke-dasharray: 6 4; stroke-width: 1.6; }} .line.linked {{ stroke-width: 1.4; }}
.dot {{ fill: var(--own); }} .ring {{ fill: none; stroke: var(--own); stroke-width: 2.2; }}
.tip {{ fill: transparent; }} .tip:hover {{ fill: var(--ink); fill-opacity: .06; }}
.key {{
  display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; margin: .5rem 0 .2rem; max-width: none; font-size: .85rem;
}}
.key span {{ display: inline-flex; align-items: center; gap: .4rem; }}
.key .sample {{ width: 28px; height: 14px; flex: none; overflow: visible; }}
.swatch {{ width: 1.2rem; height: .8rem; border: 1px solid var(--rule); border-radius: 2px; }}
.swatch.dense {{ background: var(--dense); }} .swatch.sparsify {{ background: var(--sparsify); }}
.swatch.finetune {{ background: var(--finetune); }}
.bars td {{ border: 0; padding-top: .06rem; padding-bottom: .06rem; }}
.bars i {{ display: block; height: .7rem; min-width: 1px; background: var(--s0); border-radius: 2px; }}
.bars td.bar {{ width: 18rem; }}
dl.facts {{
  display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.1rem; font-size: .9rem; margin: .5rem 0;
}}
dl.facts dt {{ color: var(--quiet); }}
dl.facts dd {{ margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }}
blockquote {{
  margin: .3rem 0 .9rem; padding: 0 0 0 .8rem; border-left: 3px solid var(--rule); white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .92rem;
}}
{_RULES}
@media (max-width: 40rem) {{
  body {{ padding: 1.1rem .8rem 3rem; }}
  .tiles {{ grid-template-columns: 1fr 1fr; }}
  .tile dd {{ font-size: 1.02rem; }}
  th, td {{ padding-left: .4rem; padding-right: .4rem; }}
  table.heat td, table.heat.wide td, table.heat td.mean {{ min-width: 2.25rem; }}
  svg.chart {{ min-width: 34rem; }} svg.chart text, svg.chart text.phase {{ font-size: 14px; }}
  svg.chart text.y-name {{ font-size: 12px; }}
}}
@media print {{
  * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  h2, h3, .key {{ break-after: avoid; }} svg.chart, .tile, tr {{ break-inside: avoid; }}
  svg.chart {{ min-width: 0; }} .scroll {{ overflow: visible; }} .tip {{ display: none; }}
}}
"""
