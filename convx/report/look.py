"""The style sheet of the front page: light and dark, wide and narrow, printed. Colour never carries meaning
alone."""

STYLE = """
:root{color-scheme:light dark;--ink:#1b1b1a;--paper:#fff;--line:#c8c8c4;--soft:#575753;--back:#f4f4f1;
--good:#00694a;--bad:#a8211a;--news:#00579b;--warn:#8f5600}
@media(prefers-color-scheme:dark){:root{--ink:#e9e9e4;--paper:#161615;--line:#4a4a46;--soft:#b4b4ad;
--back:#232321;
--good:#4cc79c;--bad:#ff8a80;--news:#7cb9f2;--warn:#e0a24a}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1120px;padding:1.5rem;color:var(--ink);
background:var(--paper);
overflow-wrap:break-word}
h1{margin:0 0 .2rem;font-size:1.75rem;line-height:1.2}
h2{margin:2.4rem 0 .6rem;font-size:1.3rem;border-bottom:1px solid var(--line)}
p{margin:.5rem 0}.soft,caption,figcaption,summary small{color:var(--soft)}
.warn{border-left:4px solid var(--warn);padding:.4rem .8rem;background:var(--back)}
.answer{font-size:1.08rem}
.counts{display:flex;flex-wrap:wrap;gap:.45rem;padding:0;margin:.6rem 0;list-style:none}
.verdict{font-weight:600;white-space:nowrap;border:1.5px solid var(--line);border-radius:.4rem;
padding:.02rem .45rem}
.good{border-color:var(--good);color:var(--good)}.bad{border-color:var(--bad);color:var(--bad);
border-style:dashed}
.news{border-color:var(--news);color:var(--news);border-style:double;border-width:3px}
.wide{overflow-x:auto}.wide:focus-visible{outline:2px solid var(--news)}
table{border-collapse:collapse;font-size:.9rem;width:100%}
caption{text-align:left;padding:.2rem 0 .5rem;font-size:.88rem}
th,td{text-align:left;padding:.4rem .55rem;border-bottom:1px solid var(--line);vertical-align:top}
thead th{background:var(--back);font-size:.85rem}tbody th{font-weight:normal}
td.n{font-variant-numeric:tabular-nums}.side td.n{white-space:nowrap;text-align:right}
.side th.n{text-align:right;min-width:5.2rem}
.side tbody th{white-space:nowrap}.side code{overflow-wrap:normal}
.claims{table-layout:fixed}.claims thead th:nth-child(1){width:34%}.claims thead th:nth-child(2){width:10%}
.claims thead th:nth-child(3){width:15%}.claims thead th:nth-child(4){width:17%}
.claims small{color:var(--soft);display:block;overflow-wrap:anywhere}.claims .verdict{white-space:normal;
display:inline-block}
td.why{color:var(--soft);font-size:.86rem}
figure{margin:1.4rem 0}figure img{display:block;max-width:min(100%,54rem);height:auto;background:#fff}
details{margin:.5rem 0}summary{cursor:pointer;padding:.25rem 0}
code{font-size:.92em;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.35rem .8rem;font-size:.92rem}dd{margin:0}
footer{margin-top:3rem;color:var(--soft);font-size:.86rem}
@media(max-width:46rem){body{padding:1rem}
.claims thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.claims,.claims caption,.claims tbody,.claims tr,.claims th,.claims td{display:block;width:auto}
.claims tr{border:1px solid var(--line);border-radius:.4rem;margin:.7rem 0;padding:.2rem .3rem}
.claims th,.claims td{border:0;padding:.22rem .4rem}
.claims td::before{content:attr(data-label) ": ";color:var(--soft);font-size:.86rem}
dl{grid-template-columns:1fr}dd{margin:0 0 .4rem}}
@media print{body{max-width:none}}
"""
