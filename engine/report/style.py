"""The style sheet. Its colours are near those of Okabe and Ito (2008), which the colour-blind can tell apart."""

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2126; --soft: #59636e; --rule: #d8dde3; --panel: #f5f7f9;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b5588f; --c4: #b57d00; --c5: #7a5cc4; --c6: #59636e;
  --c7: #8c4a2f;  --right: #0072b2; --wrong: #d55e00; --hit: #c5ebdc; --miss: #cfe4f4; --false: #fbdcc6; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181c; --ink: #e4e8ec; --soft: #9aa5b1; --rule: #343c45;
  --panel: #1c2228; --c0: #56b4e9; --c1: #f08a4b; --c2: #35c79b; --c3: #e08fbf; --c4: #e6b23c; --c5: #b7a2f2;
  --c6: #9aa5b1; --c7: #cf9a7c;
  --right: #2f86bf; --wrong: #c8652a; --hit: #14523d; --miss: #17466b; --false: #6d3512; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem clamp(.8rem, 3vw, 2rem) 4rem; max-width: 82rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .8rem; padding-top: .6rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .5rem; }
.task { font-size: 1.15rem; margin-top: 2.4rem; }
p { margin: .4rem 0; }
a { color: var(--c0); }
nav a { margin-right: 1rem; white-space: nowrap; }
.note, .unit, .notes, nav { color: var(--soft); font-size: .86rem; }
.notes { padding-left: 1.1rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: 1.4rem 1.6rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: .95rem; }
figcaption .unit { font-weight: 400; margin-left: .3rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
.marker { stroke: var(--soft); stroke-dasharray: 2 3; } .diagonal { stroke: var(--soft); stroke-dasharray: 4 4; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dashed { stroke-dasharray: 5 4; } .faint { stroke-width: 1; opacity: .4; } .bar { stroke-width: 1.3; opacity: .7; }
.dot { opacity: .75; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); } .s3 { stroke: var(--c3); }
.s4 { stroke: var(--c4); } .s5 { stroke: var(--c5); } .s6 { stroke: var(--c6); } .s7 { stroke: var(--c7); }
.f0 { fill: var(--c0); } .f1 { fill: var(--c1); } .f2 { fill: var(--c2); } .f3 { fill: var(--c3); }
.f4 { fill: var(--c4); } .f5 { fill: var(--c5); } .f6 { fill: var(--c6); } .f7 { fill: var(--c7); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .2rem 0 0; font-size: .82rem; color: var(--soft); }
.legend span { display: inline-flex; align-items: center; gap: .35rem; overflow-wrap: anywhere; }
.key { width: 22px; flex: none; }
.legend + .charts { margin-top: 1rem; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
.settings td, .settings th { text-align: left; overflow-wrap: anywhere; font-family: ui-monospace, monospace; }
.settings .differs td { background: var(--panel); }
.matrix td { min-width: 2.7rem; text-align: center; border: 1px solid var(--paper); padding: .4rem; }
td:first-child { min-width: 8rem; max-width: 24rem; overflow-wrap: break-word; }
.matrix th { border: 0; text-align: center; min-width: 3.6rem; max-width: 9rem; overflow-wrap: break-word;
  vertical-align: bottom; } .matrix th[scope=row] { text-align: right; }
.matrix .corner { font-weight: 400; font-size: .78rem; white-space: nowrap; }
.matrix .right { background: color-mix(in srgb, var(--right) var(--share), var(--panel)); }
.matrix .wrong { background: color-mix(in srgb, var(--wrong) var(--share), var(--panel)); }
.matrix a { color: inherit; display: block; } .matrix .deep { color: #fff; }
.cell { display: none; } .cell:target { display: block; }
.numbers { display: flex; flex-wrap: wrap; gap: .5rem 1.8rem; margin: 1rem 0; }
.numbers div { min-width: 5.5rem; } .numbers dt { color: var(--soft); font-size: .82rem; }
.numbers dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.examples { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); }
.images { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); }
article { background: var(--panel); border-radius: 6px; padding: .5rem .8rem; overflow-wrap: anywhere;
  font-size: .92rem; }
article p { white-space: pre-wrap; max-height: 10.5rem; overflow-y: auto; }
article .facts { color: var(--soft); font-size: .8rem; white-space: normal; }
.facts b { color: var(--ink); } .true { color: var(--c0); } .predicted { color: var(--c1); }
img { width: 96px; min-height: 48px; image-rendering: auto; border-radius: 3px; display: block; }
mark { color: inherit; border-radius: 3px; padding: 0 .15em; border-bottom: 2px solid transparent; }
mark small { font-size: .68em; margin-left: .3em; color: var(--soft); }
mark.both { background: var(--hit); border-color: var(--c2); }
mark.true { background: var(--miss); border-color: var(--c0); color: inherit; }
mark.predicted { background: var(--false); border-color: var(--c1); color: inherit; }
.column { color: var(--soft); margin-right: .2rem; }
.column:not(:first-child)::before { content: "\\A"; white-space: pre; }
pre { white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--panel); padding: .6rem .8rem; border-radius: 6px; font-size: .84rem; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 36rem) { th, td { padding: .28rem .4rem; } }
@media print { .cell { display: none; } }
"""
