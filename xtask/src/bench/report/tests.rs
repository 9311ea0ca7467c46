//! A small result, and what is made of it.

use roxmltree::Document;
use serde_json::{Value, json};

use super::{Report, headline::Verdict, svg};
use crate::bench::{
    measurement::{Axis, Better, Contender, Cpu, Fact, Measurement},
    run::Found,
};

const ALL: [Contender; 5] = [
    Contender::BpfBridge,
    Contender::Xdp,
    Contender::NoNetfilter,
    Contender::Stock,
    Contender::Floor,
];

/// Values that are so large and differ by a hundredth.
fn about(value: f64) -> Vec<f64> {
    (0..20)
        .map(|turn| value * (1.0 + f64::from(turn % 5) / 500.0))
        .collect()
}

fn values(of: &[(Contender, f64)]) -> Vec<(Contender, Vec<f64>)> {
    of.iter()
        .map(|&(contender, value)| (contender, about(value)))
        .collect()
}

fn call(verb: &str, pods: usize, ours: f64, stock: f64, floor: f64) -> Measurement {
    let values = values(&[
        (Contender::BpfBridge, ours),
        (Contender::Stock, stock),
        (Contender::Floor, floor),
    ]);
    Measurement::new(format!("{verb}, {pods} pods"), "ms", Better::Lower, values)
        .additive()
        .at(&format!("{verb} alone"), Axis::Pods, pods)
}

fn published(ports: usize, ours: f64, stock: f64) -> Measurement {
    let values = values(&[
        (Contender::BpfBridge, ours),
        (Contender::Xdp, ours * 1.1),
        (Contender::Stock, stock),
    ]);
    let name = format!("outside to published port, TCP_CRR, {ports} ports");
    Measurement::new(name, "1000/s", Better::Higher, values).at(
        "outside to published port, TCP_CRR",
        Axis::Ports,
        ports,
    )
}

fn at_a_time(ours: f64, stock: f64) -> Measurement {
    let values = values(&[(Contender::BpfBridge, ours), (Contender::Stock, stock)]);
    Measurement::new("ADDs, 16 at a time", "1/s", Better::Higher, values)
}

fn small() -> Report {
    let mut trips = Measurement::new(
        "pod to pod, TCP_RR, IPv4",
        "µs",
        Better::Lower,
        values(&[
            (Contender::BpfBridge, 5.5),
            (Contender::Stock, 6.6),
            (Contender::Floor, 5.0),
        ]),
    );
    trips.cpu = vec![(
        Contender::BpfBridge,
        Cpu {
            user: 1.0,
            system: 3.0,
            softirq: 1.5,
        },
    )];
    trips.latencies = vec![(
        Contender::BpfBridge,
        vec![(0.5, 5.4), (0.9, 6.0), (1.0, 90.0)],
    )];
    let same = Measurement::new(
        "pod to <pod> & \"back\", UDP_RR, IPv6",
        "µs",
        Better::Lower,
        values(&[(Contender::BpfBridge, 5.0), (Contender::Stock, 5.0)]),
    );
    let out = Measurement::new(
        "pod to outside, TCP_CRR, IPv4",
        "1000/s",
        Better::Higher,
        values(&ALL.map(|contender| (contender, 20.0 + contender as u8 as f64))),
    );
    let found = Found {
        measurements: vec![
            trips,
            same,
            out,
            published(1, 26.0, 20.0),
            published(10_000, 26.0, 5.0),
            call("ADD", 0, 5.0, 15.0, 1.0),
            call("ADD", 1000, 5.0, 45.0, 1.0),
            call("DEL", 0, 5.0, 5.0, 4.0),
            call("DEL", 1000, 5.0, 55.0, 4.0),
            at_a_time(300.0, 25.0),
        ],
        facts: vec![Fact {
            name: "size of <the> binary".to_owned(),
            unit: "MB".to_owned(),
            values: vec![(Contender::BpfBridge, 6.0), (Contender::Stock, 4.5)],
        }],
        notes: vec!["A note <with> & signs.".to_owned()],
    };
    let machine = json!({"cpu": "A <CPU>", "kernel": "6.18", "nft": null, "loadAverageBefore": [0.1, 0.2, 0.3]});
    Report::new(machine, json!({"rounds": 20}), None, found)
}

fn nothing() -> Report {
    Report::new(Value::Null, Value::Null, None, Found::default())
}

#[test]
fn a_result_is_read_as_it_was_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("results/1.json");
    let report = small();
    report.write(&path).unwrap();
    let again = Report::read(&path).unwrap();
    assert_eq!(
        serde_json::to_value(&report).unwrap(),
        serde_json::to_value(&again).unwrap()
    );
    let text = std::fs::read_to_string(&path).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    let first = &value["measurements"][0];
    assert_eq!(first["values"]["bpf-bridge"].as_array().unwrap().len(), 20);
    assert_eq!(first["cpuMicroseconds"]["bpf-bridge"]["softirq"], 1.5);
    assert_eq!(value["measurements"][4]["point"]["at"], 10_000);
}

#[test]
fn a_result_of_another_layout_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("old.json");
    std::fs::write(&path, r#"{"machine": {}, "measurements": []}"#).unwrap();
    let error = format!("{:#}", Report::read(&path).unwrap_err());
    assert!(
        error.contains("old.json") && error.contains("format"),
        "{error}"
    );
}

#[test]
fn the_table_has_all_contenders_and_fits() {
    let table = small().table();
    for word in [
        "POD TO OUTSIDE",
        "bpf-bridge",
        "XDP",
        "netfilter",
        "stock",
        "floor",
        "same",
        "FACTS",
        "6.00",
        "A note <with> & signs.",
    ] {
        assert!(table.contains(word), "{word} is not in\n{table}");
    }
    for line in table.lines() {
        assert!(line.chars().count() <= 120, "too long: {line}");
    }
    // 6.6 / 5.5, and what is 10 % from the floor.
    assert!(table.contains("1.20 (1.20 … 1.20)"), "{table}");
    assert!(table.contains("−9.1 %"), "{table}");
    assert!(table.contains("+4.0 ms"), "{table}");
}

#[test]
fn a_table_that_is_too_wide_tells_less() {
    let mut report = small();
    for measurement in &mut report.found.measurements {
        measurement.name += ", in circumstances that take many words to tell";
    }
    let table = report.table();
    for line in table.lines() {
        assert!(line.chars().count() <= 120, "too long: {line}");
    }
    let values = table.lines().filter(|line| line.contains("26.1"));
    assert_eq!(values.count(), 2, "{table}");
}

#[test]
fn too_few_turns_have_no_interval() {
    let mut report = small();
    for (_, values) in &mut report.found.measurements[0].values {
        values.truncate(3);
    }
    let table = report.table();
    assert!(table.contains("1.20 (of 3)"), "{table}");
}

#[test]
fn the_page_stands_alone() {
    let page = super::html::page(&small());
    let body = &page[page.find("<body>").unwrap()..page.find("</html>").unwrap()];
    let document = Document::parse(body).unwrap();
    let text: String = document
        .descendants()
        .filter_map(|node| node.text())
        .collect();
    for word in [
        "bpf-bridge, XDP",
        "bpf-bridge, no netfilter",
        "stock",
        "floor",
        "same",
        "pod to <pod> & \"back\"",
        "size of <the> binary",
        "A note <with> & signs.",
        "A <CPU>",
        "unknown",
    ] {
        assert!(text.contains(word), "{word} is not in the page");
    }
    let elsewhere = page.replace("http://www.w3.org/2000/svg", "");
    for reference in [
        "http:", "https:", "src=", "href=", "url(", "@import", "<script",
    ] {
        assert!(!elsewhere.contains(reference), "{reference}");
    }
    assert!(page.contains("prefers-color-scheme: dark"));
}

#[test]
fn plots_are_files_of_their_own() {
    let report = small();
    let plots = report.few_plots();
    let names: Vec<_> = plots.iter().map(|plot| plot.name).collect();
    assert_eq!(
        names,
        [
            "packets",
            "calls",
            "floor",
            "calls-floor",
            "pods",
            "ports",
            "latencies",
            "cpu"
        ]
    );
    for plot in plots {
        let file = svg::file(&plot.svg);
        let document =
            Document::parse(&file).unwrap_or_else(|error| panic!("{}: {error}", plot.name));
        let root = document.root_element();
        assert_eq!(root.tag_name().name(), "svg");
        assert_eq!(
            root.tag_name().namespace(),
            Some("http://www.w3.org/2000/svg")
        );
        let style = root
            .children()
            .find(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "style")));
        assert!(style.is_some(), "{} has no style", plot.name);
        let height: f64 = root.attribute("height").unwrap().parse().unwrap();
        for text in document
            .descendants()
            .filter(|node| node.tag_name().name() == "text")
        {
            let x: f64 = text.attribute("x").unwrap().parse().unwrap();
            let y: f64 = text.attribute("y").unwrap().parse().unwrap();
            let within = (0.0..=svg::WIDTH).contains(&x) && (0.0..=height).contains(&y);
            assert!(within, "{}: {:?} at {x}, {y}", plot.name, text.text());
        }
    }
}

#[test]
fn every_contender_has_its_mark() {
    let plots = small().plots();
    let plot = |name: &str| plots.iter().find(|plot| plot.name == name).unwrap();
    let packets = plot("packets").svg.clone().into_string();
    for contender in ["bpf-bridge", "xdp", "no-netfilter"] {
        assert!(
            packets.contains(&format!("class=\"{contender}\"")),
            "{contender}"
        );
    }
    // What is the same is hollow, and said.
    assert!(packets.contains("fill=\"none\"") && packets.contains(">same<"));
    let ports = plot("ports").svg.clone().into_string();
    assert_eq!(ports.matches("<polyline").count(), 3);
}

#[test]
fn five_figures_follow_from_the_rule() {
    let [pod, published, masquerade, calls, worst] = small().headlines();
    let figure =
        |headline: &super::headline::Headline| headline.found.as_ref().unwrap().figure.clone();
    assert!(figure(&pod).starts_with("−9.1 %"), "{}", figure(&pod));
    assert!(
        figure(&published).contains("1.30") && figure(&published).contains("5.20"),
        "{}",
        figure(&published)
    );
    assert!(
        masquerade.line().contains("no netfilter"),
        "{}",
        masquerade.line()
    );
    // (15 + 5) / (5 + 5), and (45 + 55) / (5 + 5).
    assert!(
        figure(&calls).contains("2.00") && figure(&calls).contains("10.0"),
        "{}",
        figure(&calls)
    );
    let detail = &calls.found.as_ref().unwrap().detail;
    assert!(detail.contains("ADDs, 16 at a time: 12.0"), "{detail}");
    // 20 beside 23: the only one that is behind.
    let told = worst.found.unwrap();
    assert_eq!(told.verdict, Verdict::Worse);
    assert!(
        told.detail.starts_with("pod to outside, TCP_CRR"),
        "{}",
        told.detail
    );
    assert!(told.figure.contains("0.87"), "{}", told.figure);
}

#[test]
fn calls_are_grouped_by_their_verb() {
    for (name, split) in [
        ("ADD, 100 pods", ("ADD", "100 pods")),
        ("DELs, 16 at a time", ("DEL", "16 at a time")),
        ("60 ADDs at once", ("ADD", "60 ADDs at once")),
        (
            "pod to pod, UDP, 64 bytes, IPv4",
            ("pod to pod", "UDP, 64 bytes, IPv4"),
        ),
        ("the rest", ("others", "the rest")),
    ] {
        assert_eq!(super::split(name), split);
    }
}

#[test]
fn what_was_not_measured_is_said() {
    let mut report = small();
    let names = ["pod to pod", "ADD,"];
    report
        .found
        .measurements
        .retain(|measurement| names.iter().any(|name| measurement.name.starts_with(name)));
    let [pod, published, masquerade, calls, worst] = report.headlines();
    assert!(pod.found.is_some() && worst.found.is_some());
    for missing in [published, masquerade, calls] {
        assert!(missing.found.is_none());
        assert!(
            missing.line().contains("not measured"),
            "{}",
            missing.line()
        );
    }
    let page = super::html::page(&nothing());
    assert_eq!(page.matches("not measured").count(), 5);
    assert!(!page.contains("<svg"));
    assert!(nothing().table().is_empty());
}

#[test]
fn the_documentation_says_what_is_worse() {
    let directory = tempfile::tempdir().unwrap();
    let readme = directory.path().join("README.md");
    std::fs::write(&readme, "no place").unwrap();
    assert!(small().write_docs(directory.path()).is_err());
    std::fs::write(
        &readme,
        "# Title\n<!-- bench: written by `cargo xtask bench --render FILE --docs` -->\nold\n<!-- end of bench -->\nrest\n",
    )
    .unwrap();
    let stale = directory.path().join("docs/benchmarks/stale.svg");
    std::fs::create_dir_all(stale.parent().unwrap()).unwrap();
    std::fs::write(&stale, "").unwrap();
    let lines = small().write_docs(directory.path()).unwrap();
    assert_eq!(lines.lines().count(), 5);
    let written = std::fs::read_to_string(&readme).unwrap();
    assert!(written.contains(&lines) && written.ends_with("rest\n") && !written.contains("old"));
    let page = std::fs::read_to_string(directory.path().join("docs/benchmarks.md")).unwrap();
    assert!(
        page.contains("- pod to outside, TCP_CRR, IPv4: bpf-bridge is 0.87"),
        "{page}"
    );
    assert!(
        page.contains("- size of &lt;the> binary: 6.00 MB, beside 4.50."),
        "{page}"
    );
    for (at, _) in page.match_indices("](benchmarks/") {
        let file = page[at + 2..].split(')').next().unwrap();
        assert!(directory.path().join("docs").join(file).exists(), "{file}");
    }
    assert!(!stale.exists());
}
