//! `bpf-bridge upgrade`: an operator has replaced the binary, and wants its programs on the
//! ports that are attached. Nothing that flows stops.

use std::io::{self, Write};

use thiserror::Error;

use crate::datapath::{self, Moved, Report};

/// Why it failed.
#[derive(Debug, Error)]
pub enum UpgradeError {
    /// The datapath refused.
    #[error(transparent)]
    Datapath(#[from] datapath::Error),
    /// What was done could not be told.
    #[error("telling what was done: {0}")]
    Output(#[from] io::Error),
}

/// Upgrades, and tells people on `out` what was done.
///
/// # Errors
///
/// [`UpgradeError`].
pub fn run(out: &mut impl Write) -> Result<(), UpgradeError> {
    let report = datapath::upgrade()?;
    tell(out, &report)?;
    Ok(())
}

fn tell(out: &mut impl Write, report: &Report) -> io::Result<()> {
    if !report.loaded {
        return writeln!(out, "no programs are loaded: there is nothing to upgrade");
    }
    if let Some(carried) = &report.carried {
        let entries = carried.entries;
        match &carried.from {
            Some(from) => writeln!(
                out,
                "carried over from the layout {from}: {entries} entries"
            )?,
            None => writeln!(out, "made anew by the node's limits: {entries} entries")?,
        }
    }
    let mut replaced: Vec<String> = report
        .levels
        .iter()
        .map(|level| format!("`port` for the log level {}", level.name()))
        .collect();
    if report.translators {
        replaced.push("the programs that translate".to_owned());
    }
    if replaced.is_empty() {
        writeln!(out, "the programs are those of this binary")?;
    } else {
        writeln!(out, "replaced: {}", replaced.join(", "))?;
    }
    let Moved {
        ports,
        uplinks,
        foreign,
    } = &report.moved;
    writeln!(
        out,
        "in use on {ports} ports and {uplinks} hooks of uplinks"
    )?;
    for device in foreign {
        writeln!(
            out,
            "left alone: {device}, whose program is not one of ours"
        )?;
    }
    Ok(())
}
