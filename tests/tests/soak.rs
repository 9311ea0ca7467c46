//! `cargo xtask soak`, as a developer would run it, but for seconds.

use std::{env, fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

#[test]
fn a_short_soak_finds_no_leak_and_says_what_it_did() -> Result<()> {
    let xtask = env::var_os("BPF_BRIDGE_XTASK")
        .context("BPF_BRIDGE_XTASK does not name the commands; run `cargo xtask test`")?;
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("soak.json");
    let output = Command::new(xtask)
        .args(["soak", "--minutes", "0.1", "--callers", "8", "--output"])
        .arg(&file)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "{}: {text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    for word in ["--seed ", "eBPF programs", "published, from outside"] {
        ensure!(text.contains(word), "no {word:?} in {text}");
    }
    let report: Value = serde_json::from_str(&fs::read_to_string(&file)?)?;
    for what in ["ADD", "DEL", "GC", "killed"] {
        ensure!(
            report["done"][what].as_u64() > Some(0),
            "no {what}: {report}"
        );
    }
    ensure!(report["upgrades"].as_u64() > Some(0), "{report}");
    for (name, talk) in report["talk"].as_object().context("no talk")? {
        ensure!(talk["good"].as_u64() > Some(0), "{name}: {talk}");
    }
    let metrics = report["metrics"].as_array().context("no metrics")?;
    let programs = metrics
        .iter()
        .find(|metric| metric["name"] == "eBPF programs")
        .context("programs are not counted")?;
    let counts = programs["values"].as_array().context("no values")?;
    ensure!(
        counts.len() > 1 && counts[0].as_u64() > Some(5),
        "{programs}"
    );
    ensure!(report["leaks"] == serde_json::json!([]), "{report}");
    Ok(())
}
