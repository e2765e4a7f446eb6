"""How the pages look: on a desk, on a phone and on paper, light and dark.

Heat maps have 11 steps: s0 ... s10 are viridis, d0 ... d10 go from blue through grey to orange; who
does not see all colours tells them apart, too. In the light the larger is darker, in the dark it is
brighter: in either the ink of the page is read on small steps, and its paper on large ones.
"""

_SEQUENTIAL = (
    *("#fde725", "#bddf26", "#7ad151", "#44bf70", "#22a884", "#21918c"),
    *("#2a788e", "#355f8d", "#414487", "#482475", "#440154"),
)
_DIVERGING = (
    *("#08519c", "#2171b5", "#3d87c4", "#86b8df", "#c3d9ec", "#e4e4e4"),
    *("#f9d9b5", "#f5b06b", "#cf7212", "#b05a08", "#8c4500"),
)
_DIVERGING_DARK = (
    *("#7cc0ff", "#5aa5ea", "#3f87c9", "#2f6aa0", "#2c4a66", "#33383e"),
    *("#664a2a", "#99622a", "#c97a26", "#ee9838", "#ffbb66"),
)
STEPS = len(_SEQUENTIAL)


def _variables(sequential: tuple[str, ...], diverging: tuple[str, ...]) -> str:
    named = (("s", sequential), ("d", diverging))
    return " ".join(
        f"--{letter}{step}: {colour};"
        for letter, colours in named
        for step, colour in enumerate(colours)
    )


STYLE = (
    f"""
:root {{ color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --faint: #67707b;
  --line: #d5dae0; --bar: #4f7fb8; --bad: #b3261e;
  --c0: #1f6fb4; --c1: #c05a00; --c2: #2e7d32; --c3: #8e3fa8; --c4: #b3261e; --c5: #6b5b00;
  {_variables(_SEQUENTIAL, _DIVERGING)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{
  --ink: #e6e8eb; --paper: #14171a; --faint: #9aa3ad;
  --line: #333a41; --bar: #6f9fd8; --bad: #ff8a80;
  --c0: #6db3f2; --c1: #ffab5e; --c2: #7fce83; --c3: #d59be8; --c4: #ff8a80; --c5: #d9c65c;
  {_variables(_SEQUENTIAL[::-1], _DIVERGING_DARK)} }} }}
"""
    + "\n".join(
        f".{letter}{step} {{ background: var(--{letter}{step}); color: var(--{ink}); }}"
        for letter, large in (("s", range(5, STEPS)), ("d", (0, 1, 2, 8, 9, 10)))
        for step in range(STEPS)
        for ink in ("paper" if step in large else "ink",)
    )
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 96rem; padding: 1.5rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h3, caption { font-size: 1rem; font-weight: 600; text-align: left; margin: 1rem 0 .25rem;
  overflow-wrap: anywhere; }
p, summary { max-width: 60rem; margin: .25rem 0; overflow-wrap: anywhere; }
summary { cursor: pointer; }
a { color: inherit; text-decoration-color: var(--faint); text-underline-offset: 2px; }
.faint, .ticks { color: var(--faint); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.rows { width: 100%; }
.rows th, .rows td { padding: .25rem .55rem .25rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; vertical-align: bottom; }
.rows .text { text-align: left; }
.rows td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 17.5rem; }
.rows td.bar, .rows th.bar { width: 12rem; min-width: 9rem; padding: .25rem 1.2rem .25rem .3rem; }
tr:has(:target) { background: color-mix(in srgb, var(--bar) 22%, transparent); }
:target { scroll-margin-top: 1rem; }
.track { position: relative; height: .8rem; }
.track + .track { margin-top: 2px; }
.limit { position: absolute; top: -3px; bottom: -3px; border-left: 2px solid var(--bad); }
.mark, .wrong { color: var(--bad); }
.over { background: color-mix(in srgb, var(--bad) 9%, transparent); }
.fill { height: 100%; min-width: 2px; background: var(--bar); border-radius: 0 2px 2px 0; }
.fill.before { opacity: .45; }
.infinite { background: repeating-linear-gradient(135deg, var(--bad) 0 4px, transparent 4px 8px); }
.ticks { position: relative; height: 1.3em; font-weight: 400; }
.ticks span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.ticks span:first-child { transform: none; }
.rows .note td { text-align: left; color: var(--faint); white-space: normal;
  overflow-wrap: anywhere; padding-top: 0; }
.rows .note td.wrong { color: var(--bad); }
tr:has(+ .note) td { border-bottom: none; }
details { margin: .25rem 0; }
details[open] > summary { font-weight: 600; }
figure { margin: 0; max-width: 48rem; }
svg { width: 100%; height: auto; }
svg text { fill: var(--faint); font-size: 12px; }
svg .grid { stroke: var(--line); }
svg polyline { fill: none; stroke-width: 2; }
.heat { border-collapse: separate; border-spacing: 1px; font-size: .75rem; line-height: 1; }
.heat td { width: 2rem; min-width: 1.2rem; height: 1.2rem; padding: 0; text-align: center; }
.heat tbody td:empty, .none {
  background: radial-gradient(circle, var(--faint) 1.2px, transparent 1.7px); }
.heat td a { display: block; padding: .2rem 0; min-height: 1.2rem; color: inherit;
  text-decoration: none; }
.heat td a:focus-visible, .heat td a:hover { outline: 2px solid var(--ink); }
.heat tbody th { position: sticky; left: 0; background: var(--paper); text-align: right;
  vertical-align: middle; padding: 0 .4rem 0 0; white-space: nowrap; }
.heat .kind { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left;
  vertical-align: middle; max-height: 15rem; overflow: hidden; padding: .2rem 0; margin: 0 auto;
  line-height: 1.3; white-space: nowrap; text-overflow: ellipsis; }
.heat tfoot .kind { text-align: right; }
.positive, .negative, .unknown { color: var(--ink); font-weight: 700;
  box-shadow: inset 0 0 0 1px var(--faint); }
.positive { background: repeating-linear-gradient(135deg,
  color-mix(in srgb, var(--bad) 35%, transparent) 0 3px, transparent 3px 6px); }
.negative { background: repeating-linear-gradient(45deg,
  color-mix(in srgb, var(--bar) 40%, transparent) 0 3px, transparent 3px 6px); }
.scale { max-width: 30rem; margin: .5rem 0; }
.scale .steps { display: flex; height: .9rem; }
.scale .steps i { flex: 1; }
.scale .ticks { font-size: .8rem; }
.scale .ticks .end { transform: translateX(-100%); }
.sample { display: inline-block; width: 1.6rem; text-align: center; margin-right: .5rem;
  font-size: .75rem; font-style: normal; }
ul.facts { padding-left: 1.2rem; margin: .25rem 0; }
ul.facts li { max-width: 60rem; }
ul.key { list-style: none; padding: 0; margin: .25rem 0; }
ul.key svg { width: 2.5rem; height: .6rem; vertical-align: middle; margin-right: .5rem; }
dl { display: grid; grid-template-columns: minmax(0, max-content) minmax(0, 1fr);
  gap: .1rem 1rem; margin: .25rem 0; }
dt, dd, li { overflow-wrap: anywhere; max-width: 40rem; }
dd { margin: 0; color: var(--faint); }
@media (max-width: 48rem) { /* a phone: a weight is a block, its numbers with their names */
  body { padding: 1rem; }
  .rows thead { display: none; }
  .rows, .rows tbody { display: block; }
  .rows tr { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: .5rem 0;
    border-bottom: 1px solid var(--line); }
  .rows tr:has(+ .note) { border-bottom: none; padding-bottom: 0; }
  .rows .note { padding-top: 0; }
  .rows .note td:first-child { font-weight: 400; }
  .rows td, .rows .note td { display: block; border: none; padding: 0; text-align: left; }
  .rows td:first-child { flex: 0 0 100%; min-width: 0; font-weight: 600; }
  .rows td:empty { display: none; }
  td[data-label]::before { content: attr(data-label) " "; color: var(--faint); }
  .rows td.bar { flex: 0 0 100%; padding: .3rem 0; }
  .heat td { width: 1.6rem; }
  dl { grid-template-columns: minmax(0, 1fr); }
  dd { margin: 0 0 .4rem 1rem; }
  svg text { font-size: 22px; }
}
@media print {
  :root { color-scheme: light; }
  * { print-color-adjust: exact; }
  body { max-width: none; padding: 0; font-size: 11px; }
  tr, figure { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; }
  .heat td { width: auto; min-width: .8rem; }
}
"""
)
