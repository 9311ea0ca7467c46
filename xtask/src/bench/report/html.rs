//! The page: one file that needs no other.

use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde_json::Value;

use super::{Report, headline::Verdict, svg, table::FULL, words};

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1f2328; --dim: #59636e; --paper: #ffffff;
  --box: #f4f6f8; --line: #d9dee3; --better: #00664a; --worse: #b03a00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --dim: #9aa4af; --paper: #15191e; --box: #1e242b; --line: #2f363e;
    --better: #2fcf9f; --worse: #f08a3c; }
}
body { margin: 0 auto; padding: 1rem 1.5rem 4rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, 'DejaVu Sans', sans-serif; }
h1 { font-size: 1.6rem; margin: 1rem 0 0; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p.about, .detail, caption { color: var(--dim); }
ul.headlines { list-style: none; margin: 1.5rem 0; padding: .25rem 1.25rem; background: var(--box);
  border: 1px solid var(--line); border-radius: 8px; }
ul.headlines li { padding: .75rem 0; border-top: 1px solid var(--line); }
ul.headlines li:first-child { border-top: 0; }
.figure { font-weight: 600; font-size: 1.05rem; }
.better .figure { color: var(--better); } .worse .figure { color: var(--worse); }
.detail { font-size: .9rem; }
svg.plot { max-width: 100%; height: auto; display: block; margin: .5rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 12rem; }
table.said td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
";

/// How it is measured, for those who were not there.
pub(super) const METHOD: [&str; 6] = [
    "Each contender has a node of its own, in network and mount namespaces, whose network does \
     the same work: two families, a gateway, masquerade, published ports.",
    "Contenders take turns, and each goes first as often as the others; both ends of all \
     traffic are pinned to one CPU; what comes first warms up and does not count.",
    "A value is the median of all turns, with the quartiles. A comparison is made turn by turn \
     (what disturbs the machine disturbs both) and told as the median of these ratios, with the \
     interval in which it lies with 95 % confidence (by the sign test, so no distribution is \
     assumed).",
    "\"same\": 1 (or no difference) lies within that interval, so the difference is smaller than \
     the noise. \"(of 3)\": so few turns have no interval of that confidence.",
    "\"Times better\" is above 1 where bpf-bridge is better, whether the unit is one of time or of \
     speed.",
    "The floor is one raw veth pair between the namespaces for packets, and the bare netlink \
     requests for calls.",
];

/// The whole page.
pub(super) fn page(report: &Report) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "bpf-bridge: benchmark" }
                style { (PreEscaped(STYLE)) (PreEscaped(svg::STYLE)) }
            }
            body {
                h1 { "bpf-bridge beside " (report.beside()) }
                p class="about" { (report.about()) }
                (headlines(report))
                @for plot in report.plots() {
                    h2 { (plot.title) }
                    div class="wide" { (plot.svg) }
                }
                h2 { "All figures" }
                (tables(report))
                h2 { "Method" }
                ul {
                    @for line in METHOD { li { (line) } }
                    @for note in &report.found.notes { li { (note) } }
                }
                h2 { "Machine and versions" }
                (said(&report.machine))
                h2 { "Settings" }
                (said(&report.settings))
            }
        }
    };
    page.into_string()
}

fn headlines(report: &Report) -> Markup {
    html! {
        ul class="headlines" {
            @for headline in report.headlines() {
                @match &headline.found {
                    Some(told) => li class=(class(told.verdict)) {
                        div { (headline.title) }
                        div class="figure" { (told.figure) }
                        div class="detail" { (told.detail) }
                    },
                    None => li { div { (headline.title) } div class="detail" { "not measured in this run" } },
                }
            }
        }
    }
}

fn class(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Better => "better",
        Verdict::Same => "same",
        Verdict::Worse => "worse",
    }
}

fn tables(report: &Report) -> Markup {
    let contenders = report.fact_contenders();
    html! {
        @for group in report.groups() {
            @let columns = group.columns();
            h3 { (group.name) }
            div class="wide" {
                table {
                    thead { tr { th {} @for column in &columns { th { (column.title(report)) } } } }
                    tbody {
                        @for (what, measurement) in &group.rows {
                            tr { td { (what) } @for column in &columns { td { (column.cell(measurement, FULL)) } } }
                        }
                    }
                }
            }
        }
        @if !contenders.is_empty() {
            h3 { "Facts" }
            div class="wide" {
                table {
                    thead { tr { th {} th { "unit" } @for contender in &contenders { th { (report.name(*contender)) } } } }
                    tbody {
                        @for fact in &report.found.facts {
                            tr { td { (fact.name) } td { (fact.unit) }
                                @for contender in &contenders { td { (words::fact(fact, *contender)) } } }
                        }
                    }
                }
            }
        }
    }
}

/// What an object says, key by key.
fn said(value: &Value) -> Markup {
    html! {
        table class="said" {
            tbody {
                @for (key, value) in value.as_object().into_iter().flatten() {
                    tr { td { (key) } td { (plain(value)) } }
                }
            }
        }
    }
}

/// A value as people write it.
pub(super) fn plain(value: &Value) -> String {
    match value {
        Value::Null => "unknown".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(values) if values.iter().all(|value| !value.is_array()) => {
            values.iter().map(plain).collect::<Vec<_>>().join(", ")
        }
        Value::Object(values) => {
            let told = values
                .iter()
                .map(|(key, value)| format!("{key}: {}", plain(value)));
            told.collect::<Vec<_>>().join("; ")
        }
        other => other.to_string(),
    }
}
