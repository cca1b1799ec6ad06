"""How the page looks, on paper-white and in the dark."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: light-dark(#fcfcfb, #16181b); --ink: light-dark(#22252a, #dfe2e6); --soft: light-dark(#646b75, #98a0ab);
  --line: light-dark(#e2e4e8, #30343a); --card: light-dark(#f3f4f6, #1f2226); --accent: light-dark(#1f5fa8, #7db4f0);
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); }
body { font: 16px/1.6 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
p, pre { max-width: 46rem; } p { margin: .8rem 0; } a { color: var(--accent); }
h1 { font-size: 2.1rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 .6rem; }
h2 { font-size: 1.45rem; letter-spacing: -.01em; margin: 3.5rem 0 .6rem; padding-top: 1rem; }
h2 { border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
.lead { font-size: 1.2rem; line-height: 1.5; margin: 0 0 1rem; } .lead, .note, .pm, .none { color: var(--soft); }
.note { font-size: .9rem; } .pm { font-size: .85em; }
.question { border-left: 3px solid var(--accent); padding-left: 1rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; font-size: .9rem; margin: 1.2rem 0; }
nav a { text-decoration: none; } nav a:hover { text-decoration: underline; }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; margin: 2rem 0; }
.numbers div { background: var(--card); border-radius: .6rem; padding: .9rem 1.1rem; }
.numbers b { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.numbers span { font-size: .85rem; color: var(--soft); }
.table { overflow-x: auto; margin: .6rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .9rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); border-bottom: 1.5px solid var(--soft); }
.words { text-align: left; }
th:first-child, td:first-child { padding-left: 0; position: sticky; left: 0; background: var(--paper); }
tbody tr:hover td { background: var(--card); } .none { font-size: .85em; font-style: italic; }
.album { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 2rem; }
.album { margin: 1.2rem 0; }
figure { margin: 0; } figure svg { width: 100%; height: auto; overflow: visible; }
figcaption { font-size: .87rem; color: var(--soft); max-width: 46rem; margin-top: .4rem; }
details { border-top: 1px solid var(--line); padding: .7rem 0; }
summary { cursor: pointer; font-weight: 600; } summary:hover { color: var(--accent); }
pre { background: var(--card); border-radius: .5rem; padding: .8rem 1rem; overflow-x: auto; font-size: .8rem; }
pre { max-width: none; line-height: 1.5; }
code { font-size: .9em; }
@media (max-width: 40rem) { main { padding-top: 1.5rem; } h1 { font-size: 1.6rem; } }
@media print { main { max-width: none; } details > .album { break-inside: avoid; } nav { display: none; } }
"""
