//! `bpf-bridge upgrade`: the programs of this binary in place of those that another one has
//! loaded, for the same maps.
//!
//! Programs of several builds may be in use side by side, as long as the layout is the same:
//! so it does not matter when a hook gets its new program, nor when this is killed. What is
//! pinned changes first; from then on new ports get the new programs. Whoever looks at an old
//! port then ([`Datapath::is_own_program`](super::Datapath::is_own_program)) knows its program
//! by the maps that it uses.

use std::mem;

use super::{
    Error, LogLevel,
    carry::{self, Carried},
    hooks::{self, Moved},
    nat::Translators,
    object::Switch,
    pins::{self, Root},
};
use crate::lock::Mode;

/// What an upgrade has done.
#[derive(Debug, Default)]
pub struct Report {
    /// An older layout was carried over.
    pub carried: Option<Carried>,
    /// Programs are loaded at all.
    pub loaded: bool,
    /// The programs for these log levels were replaced.
    pub levels: Vec<LogLevel>,
    /// Those that translate were.
    pub translators: bool,
    /// What has the new programs.
    pub moved: Moved,
}

/// Takes the programs of this binary into use wherever others are.
///
/// # Errors
///
/// The kernel refuses them, a pin is not one of ours, or the maps are of a newer layout.
pub fn upgrade() -> Result<Report, Error> {
    pins::require_bpffs()?;
    let mut report = Report {
        carried: carry::settle()?,
        ..Report::default()
    };
    let _alone = pins::lock(Mode::Exclusive)?;
    let own = Root::own();
    if !own.is_loaded() {
        return Ok(report);
    }
    report.loaded = true;
    if let Some(Carried {
        whole: true, moved, ..
    }) = &mut report.carried
    {
        // With the programs of this binary.
        report.moved = mem::take(moved);
        return Ok(report);
    }
    if report.carried.is_none() && carry::has_other_limits(&own)? {
        report.carried = carry::from(&own.put_aside()?)?;
        if let Some(Carried { moved, .. }) = &mut report.carried {
            report.moved = mem::take(moved);
        }
        return Ok(report);
    }
    // All are verified before any is used.
    let mut switches = Vec::new();
    for level in own.levels() {
        let mut switch = Switch::load(level)?;
        if !switch.is_pinned()? {
            switches.push((level, switch));
        }
    }
    let mut translators = Translators::load_as_in(&own, None)?;
    if let Some(loaded) = &mut translators
        && loaded.is_pinned()?
    {
        translators = None;
    }
    for (level, switch) in switches {
        switch.install()?;
        report.levels.push(level);
    }
    if let Some(translators) = translators {
        translators.install(None)?;
        report.translators = true;
    }
    report.moved = hooks::hand_over_all(None)?;
    Ok(report)
}
