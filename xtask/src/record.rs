//! `cargo xtask record`: how many instructions the verifier looks at.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    kernel::{self, Machine},
    process::{run, workspace},
    test,
};

/// Programs and their counts, by kernel: what the tests compare with.
type Record = BTreeMap<String, BTreeMap<String, u32>>;

/// Tells the test that it is to write down what it finds, and where.
const VARIABLE: &str = "BPF_BRIDGE_RECORD";
/// The test.
const TEST: [&str; 2] = [
    "datapath::tests::programs::the_verifier_looks_at_no_more_than_was_recorded",
    "--exact",
];
/// The record, and what the test writes on a virtual machine.
const FILE: &str = "verified.json";

/// Counts on this machine's kernel and on those of the virtual machines, and writes the
/// record. What it has of other kernels stays.
pub(crate) fn run_all() -> Result<()> {
    let path = workspace().join("ebpf").join(FILE);
    let mut record = if path.exists() {
        read(&path)?
    } else {
        Record::new()
    };
    let tests = test::unit_tests()?;
    let directory = tempfile::tempdir().context("making a directory")?;
    let own = directory.path().join(FILE);
    run(Command::new(&tests).args(TEST).env(VARIABLE, &own))?;
    record.extend(read(&own)?);
    for version in kernel::ALL {
        let mut machine = kernel::machine(version)?;
        machine.set(VARIABLE, Path::new(Machine::SHARE).join(FILE).as_os_str());
        machine.run(&tests, TEST);
        let share = machine.boot()?;
        record.extend(read(&share.path().join(FILE))?);
    }
    let text = serde_json::to_string_pretty(&record).context("writing the record")? + "\n";
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}

fn read(path: &Path) -> Result<Record> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("reading {}", path.display()))
}
